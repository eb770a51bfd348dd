"""`export`: the images of an archive as a data set, for other tools."""

import argparse
import logging
import shlex
import sys

from dm_generations.archive import Archive, Selection
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
from dm_generations.pipelines.sweep import DEFAULT_BATCH_SIZE

_logger = logging.getLogger(__name__)

HELP = "write the images of an archive as a data set for other tools"
DESCRIPTION = """\
Write images with their prompts, settings, keys, scores, models and tokens as a data set. Parquet is a folder that the
Hugging Face hub takes as it is, and `import` makes the same archive of it. The others are one file: JSON lines and CSV
have the same columns, npz has the numbers, prompts and tokens, and npy the tokens alone. --fid writes what evaluators
of FID take: the images as one array arr_0, (n, H, W, 3) uint8, in a .npz file. Nothing is left of what is stopped.
"""
EPILOG = """\
example:
  python -m dm_generations export mine.db --to parquet --out mine-parquet --license cc0-1.0
  python -m dm_generations export archive/emoji.db --to npz --out good.npz --where score=20..
  python -m dm_generations export archive/emoji.db --fid emoji.npz --where cond_scale=3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add = parser.add_argument
    add_archive(parser, "archive to export")
    forms = parser.add_mutually_exclusive_group(required=True)
    forms.add_argument("--to", choices=["parquet", "npz", "npy", "jsonl", "csv"], help="form of the data set")
    forms.add_argument(
        "--fid", metavar="FILE", type=file_path, help=".npz file of images alone; one that is there is replaced"
    )
    add("--out", metavar="PATH", type=file_path, help="with --to: new folder (of parquet) or file to write")
    add("--codec", metavar="PATH", help="codec that the images were made with (default: the embedded one)")
    group = parser.add_argument_group("parquet")
    add = group.add_argument
    add("--no-images", action="store_true", help="leave out the column of decoded images (default: off)")
    add("--format", choices=["png", "webp", "jpeg"], help="of the images (default: png)")
    add("--license", metavar="NAME", help="of the set, for its card, as cc0-1.0 (default: unknown)")
    add("--cpu-only", action="store_true", help="do not use accelerators")
    add_selection_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    _check_flags(args)
    selection = selection_from(args)
    with Archive.open(archive_path(args)) as archive, Progress() as on_progress:
        if args.fid is not None:
            line = counted(_write_fid(archive, selection, args, on_progress), "image")
        elif args.to == "parquet":
            line = f"{counted(_write_parquet(archive, selection, args, on_progress), 'file')} of data and a card"
        else:
            from dm_generations.export.table_files import write_table

            line = counted(write_table(archive, args.out, args.to, selection, on_progress), "image")
    print_line(f"{line} written to {args.fid or args.out}")
    return 0


def _write_fid(archive: Archive, selection: Selection, args: argparse.Namespace, on_progress: Progress) -> int:
    prepare_device(args.cpu_only)
    from dm_generations.export.fid import write_fid

    count, warnings = write_fid(archive, args.fid, selection, args.codec, DEFAULT_BATCH_SIZE, on_progress)
    for warning in warnings:
        _logger.warning(warning)
    return count


def _write_parquet(archive: Archive, selection: Selection, args: argparse.Namespace, on_progress: Progress) -> int:
    from dm_generations.export.parquet import ParquetOptions, check_folder, write_parquet

    command = shlex.join([*command_words("export")[:-1], *sys.argv[1:]])
    options = ParquetOptions(args.out, selection, args.license or "unknown", command)
    maker = None
    if not args.no_images:
        check_folder(options)  # before anything takes time
        prepare_device(args.cpu_only)
        from dm_generations.export.output_file import Encoding
        from dm_generations.export.table_images import ImageMaker

        maker = ImageMaker(archive, selection, args.codec, Encoding(args.format or "png"))
        for warning in maker.warnings:
            _logger.warning(warning)
    return write_parquet(archive, options, maker, on_progress)


def _check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for a flag that would have no effect together with the others."""
    if (args.to is None) != (args.out is None):
        raise UserError("--to and --out go together: give both, or --fid FILE alone")
    if args.to != "parquet":
        names = (
            ["no_images", "format", "license"] if args.fid is not None else ["no_images", "codec", "format", "license"]
        )
        for flag in names:
            if getattr(args, flag):
                raise UserError(f"--{flag.replace('_', '-')} has no effect here: it is for --to parquet")
    elif args.no_images and (args.codec or args.format):
        raise UserError(f"--{'codec' if args.codec else 'format'} has no effect with --no-images")
