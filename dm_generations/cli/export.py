"""`export`: the images of an archive for other tools."""

import argparse
import logging

from dm_generations.archive import Archive
from dm_generations.cli.common import (
    Progress,
    add_archive,
    add_selection_options,
    archive_path,
    at_least_one,
    counted,
    file_path,
    prepare_device,
    print_line,
    selection_from,
)
from dm_generations.pipelines.sweep import DEFAULT_BATCH_SIZE

_logger = logging.getLogger(__name__)

HELP = "write the images of an archive for other tools"
DESCRIPTION = """\
Write images as what evaluators of FID take: one array of all, (n, H, W, 3) uint8, named arr_0 in a .npz file. It is
written as it is decoded, so memory holds one batch, and appears when it is whole.
"""
EPILOG = """\
example:
  python -m dm_generations export archive/emoji.db --fid emoji.npz --where cond_scale=3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add = parser.add_argument
    add_archive(parser, "archive to export")
    add(
        "--fid", metavar="FILE", type=file_path, required=True, help=".npz file to write; one that is there is replaced"
    )
    add("--codec", metavar="PATH", help="codec that the images were made with (default: the embedded one)")
    add(
        "--batch-size",
        type=at_least_one,
        default=DEFAULT_BATCH_SIZE,
        metavar="N",
        help=f"images decoded at a time (default: {DEFAULT_BATCH_SIZE})",
    )
    add("--cpu-only", action="store_true", help="do not use accelerators")
    add_selection_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    selection = selection_from(args)
    with Archive.open(archive_path(args)) as archive, Progress() as on_progress:
        prepare_device(args.cpu_only)
        from dm_generations.export.fid import write_fid

        count, warnings = write_fid(archive, args.fid, selection, args.codec, args.batch_size, on_progress)
    for warning in warnings:
        _logger.warning(warning)
    print_line(f"{counted(count, 'image')} written to {args.fid}")
    return 0
