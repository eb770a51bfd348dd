"""`score`: CLIP scores for the images of an archive."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from dm_generations.archive import Archive
from dm_generations.archive.selection import compile_nonempty
from dm_generations.cli.common import (
    Progress,
    add_archive,
    add_model_options,
    add_selection_options,
    archive_path,
    counted,
    prepare_device,
    print_line,
    selection_from,
)

if TYPE_CHECKING:
    from dm_generations.pipelines.rescore import ScoreReport

HELP = "fill in missing CLIP scores"
DESCRIPTION = """\
Score the images of an archive against their prompts with CLIP: those without a score, and with --all also those that
another CLIP scored. Each image is decoded by its own codec. After a stop, the same command scores the rest.
"""
EPILOG = """\
example:
  python -m dm_generations score rockets.db --all --clip openai-clip-vit-base-patch32
"""
_MAX_BAD_ROWS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add_archive(parser, "archive to score; it is changed", has_default=False)
    add("--all", action="store_true", help="also score images that another CLIP scored")
    add("--json", action="store_true", help="print what was done as JSON, for programs")
    add_model_options(parser, generates=False)
    add_selection_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    selection, path = selection_from(args), archive_path(args)
    with Archive.open(path, "w") as archive:
        where = compile_nonempty(archive, selection)
        if not args.all and not archive.count_to_score(where=where):  # known at once, without the models
            _print_nothing(path, args)
            return 0
        prepare_device(args.cpu_only)
        from dm_generations.models.loading import load_checkpoint
        from dm_generations.pipelines.rescore import score_archive

        with Progress() as on_progress:
            codec, clip = load_checkpoint(args.codec, "codec"), load_checkpoint(args.clip, "clip")
            report = score_archive(archive, codec, clip, args.batch_size, args.all, on_progress, where)
    return _print_report(report, path, args, codec.name)


def _print_nothing(path: Path, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps({"due_count": 0, "scored_count": 0, "bad_rows": [], "count_by_other_codec": {}}))
    else:
        print_line(f"All images in {path} have scores{' of this CLIP' if args.all else ''}; nothing to do")


def _print_report(report: "ScoreReport", path: Path, args: argparse.Namespace, codec_name: str) -> int:
    """Print what was done; 1 if something was left undone."""
    if not report.due_count:
        _print_nothing(path, args)
        return 0
    if args.json:
        print(json.dumps(vars(report)))
    else:
        print_line(f"Scored {counted(report.scored_count, 'image')} in {path}")
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
