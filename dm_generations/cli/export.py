"""`export`: the images of an archive as a data set, for other tools."""

import argparse
import logging
import shlex
import sys

from dm_generations.archive import Archive
from dm_generations.cli.common import (
    Progress,
    add_archive,
    add_selection_options,
    archive_path,
    command_words,
    counted,
    file_path,
    prepare_device,
    print_line,
    selection_from,
)
from dm_generations.errors import UserError

_logger = logging.getLogger(__name__)

HELP = "write the images of an archive as a data set for other tools"
DESCRIPTION = """\
Write images with their prompts, settings, keys, scores, models and tokens as a data set. Parquet is a folder that the
Hugging Face hub takes as it is, and `import` makes the same archive of it. Nothing is left of a set that is stopped.
"""
EPILOG = """\
example:
  python -m dm_generations export mine.db --to parquet --out mine-parquet --license cc0-1.0
  python -m dm_generations export archive/emoji.db --to parquet --no-images --out tokens --where score=20..
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add = parser.add_argument
    add_archive(parser, "archive to export")
    add("--to", required=True, choices=["parquet"], help="form of the data set")
    add("--out", required=True, metavar="PATH", type=file_path, help="new folder or file to write")
    add("--no-images", action="store_true", help="of parquet, leave out the column of decoded images")
    add("--codec", metavar="PATH", help="codec that the images were made with (default: the embedded one)")
    add("--license", default="unknown", metavar="NAME", help="of the set, for its card, as cc0-1.0 (default: unknown)")
    add("--cpu-only", action="store_true", help="do not use accelerators")
    add_selection_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    selection = selection_from(args)
    with Archive.open(archive_path(args)) as archive:
        from dm_generations.export.parquet import ParquetOptions, write_parquet

        command = shlex.join([*command_words("export")[:-1], *sys.argv[1:]])
        options = ParquetOptions(args.out, selection, args.license, command)
        with Progress() as on_progress:
            maker = None
            if not args.no_images:
                prepare_device(args.cpu_only)
                from dm_generations.export.output_file import Encoding
                from dm_generations.export.table_images import ImageMaker

                maker = ImageMaker(archive, selection, args.codec, Encoding())
                for warning in maker.warnings:
                    _logger.warning(warning)
            elif args.codec:
                raise UserError("--codec has no effect with --no-images")
            count = write_parquet(archive, options, maker, on_progress)
    print_line(f"{counted(count, 'file')} of data and a card written to {args.out}")
    return 0
