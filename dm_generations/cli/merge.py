"""`merge`: several archives into one."""

import argparse

from dm_generations.archive import merge
from dm_generations.cli.common import counted, printable

HELP = "join archives"
DESCRIPTION = """\
Add the pictures of archives to another, which is made if it does not exist. Prompts and models get ids anew;
a picture that is there already is not added again, but gives its CLIP scores if those are missing. Archives
of older formats and of the 2022 layout are taken too; the one that they are added to gets the newest format.
Everything is merged or, when something is wrong with a source, nothing.
"""
EPILOG = """\
example:
  python -m dm_generations merge --into all.db archive/emoji.db mine.db
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="FILE", help="archives to take pictures from; only read")
    parser.add_argument("--into", required=True, metavar="FILE", help="archive to add them to")


def run(args: argparse.Namespace) -> int:
    for report in merge(args.sources, args.into):
        there = report.image_count - report.added_count
        line = f"{printable(report.path, 1000)}: {counted(report.added_count, 'picture')} added"
        if there:
            line += f", {there:,} there already"
        if report.scored_count:
            line += f", {report.scored_count:,} of them scored now"
        print(line)
    return 0
