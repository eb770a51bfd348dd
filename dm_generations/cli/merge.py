"""`merge`: add archives to one."""

import argparse
import json

from dm_generations.archive import merge
from dm_generations.cli.common import add_selection_options, counted, file_path, print_line, selection_from

HELP = "join archives"
DESCRIPTION = """\
Add the images of archives to another, which is made if it does not exist. Prompts and models get new ids.
An image that is already there is not added twice, but gets the source's CLIP scores if it has none. Sources
can have older formats and the 2022 layout; the archive that they are added to gets the newest format. If
something is wrong with a source, nothing is added.

With a selection only those images of the sources are added, with their prompts and models.
"""
EPILOG = """\
example:
  python -m dm_generations merge --into all.db archive/emoji.db mine.db
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add = parser.add_argument
    add("sources", nargs="+", metavar="FILE", type=file_path, help="archives to take images from; they are not changed")
    add("--into", required=True, metavar="FILE", type=file_path, help="archive to add them to")
    add("--json", action="store_true", help="print what was done as JSON, for programs")
    add_selection_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    reports = merge(args.sources, args.into, selection_from(args))
    if args.json:
        print(json.dumps([vars(report) for report in reports]))
        return 0
    for report in reports:
        skipped_count = report.image_count - report.added_count
        line = f"Added {counted(report.added_count, 'image')} from {report.path}"
        line += f" ({skipped_count:,} skipped, already present)"
        if report.scored_count:
            line += f"; {report.scored_count:,} of those now have its scores"
        if report.judgement_count:
            line += f"; {report.judgement_count:,} of its scores of other judges, vectors and ratings added"
        print_line(line)
    return 0
