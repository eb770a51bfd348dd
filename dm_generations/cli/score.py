"""`score`: CLIP scores for the images of an archive."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dm_generations.archive import Archive
from dm_generations.cli.common import Progress, add_model_options, counted, prepare_device, print_line

if TYPE_CHECKING:
    from dm_generations.pipelines.rescore import ScoreReport

HELP = "fill in missing CLIP scores"
DESCRIPTION = """\
Score the images of an archive against their prompts with CLIP: those without a score, and with --all also those that
another CLIP scored. Each image is decoded by its own codec. After a stop, the same command scores the rest.
"""
EPILOG = """\
example:
  python -m dm_generations score --db rockets.db --all --clip openai-clip-vit-base-patch32
"""
_MAX_BAD_ROWS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("--db", metavar="FILE", type=Path, required=True, help="archive to score; it is changed")
    add("--all", action="store_true", help="also score images that another CLIP scored")
    add_model_options(parser, generates=False)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    with Archive.open(args.db, "w") as archive:
        prepare_device(args.cpu_only)
        from dm_generations.models.loading import load_checkpoint
        from dm_generations.pipelines.rescore import score_archive

        codec, clip = load_checkpoint(args.codec, "codec"), load_checkpoint(args.clip, "clip")
        with Progress() as on_progress:
            report = score_archive(archive, codec, clip, args.batch_size, args.all, on_progress)
    return _print_report(report, args, codec.name)


def _print_report(report: "ScoreReport", args: argparse.Namespace, codec_name: str) -> int:
    """Print what was done; 1 if something was left undone."""
    if not report.due_count:
        print_line(f"All images in {args.db} have scores{' of this CLIP' if args.all else ''}; nothing to do")
        return 0
    print_line(f"Scored {counted(report.scored_count, 'image')} in {args.db}")
    for line in report.bad_rows[:_MAX_BAD_ROWS]:
        print_line(f"error: {line}", to_stderr=True)
    if hidden := len(report.bad_rows[_MAX_BAD_ROWS:]):
        print_line(f"error: {counted(hidden, 'more image')} not scored; `verify` lists them", to_stderr=True)
    for name, count in report.count_by_other_codec.items():
        print_line(
            f"error: {counted(count, 'image')} not scored: made with codec {name!r:.100}, not {codec_name!r:.100}; "
            "repeat this with its folder as --codec",
            to_stderr=True,
        )
    return 1 if report.bad_rows or report.count_by_other_codec else 0
