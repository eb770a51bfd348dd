"""`score`: CLIP scores for the pictures of an archive."""

import argparse
import sys
from pathlib import Path

from dm_generations.archive import Archive
from dm_generations.cli._text import counted
from dm_generations.cli.model_options import STOPPED, add_model_options, prepare_device

HELP = "fill in missing CLIP scores"
DESCRIPTION = """\
Score the pictures of an archive against their prompts with CLIP: those without a score, and with --all those that
another CLIP scored. Each is scored as the codec that made it shows it. Stopped, the same command goes on.
"""
EPILOG = """\
example:
  python -m dm_generations score --db rockets.db --all --clip openai-clip-vit-base-patch32
"""
_BAD_ROWS_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--db", metavar="FILE", type=Path, required=True, help="archive to score; it is changed")
    add("--all", action="store_true", help="score also what another CLIP scored")
    add_model_options(parser, generates=False)


def run(args: argparse.Namespace) -> int:
    try:
        return _score(args)
    except KeyboardInterrupt:
        print("stopped; the scores so far are in the archive", file=sys.stderr)
        return STOPPED


def _score(args: argparse.Namespace) -> int:
    with Archive.open(args.db, "w") as archive:
        prepare_device(args.cpu_only)
        from dm_generations.generate.scores import score_archive
        from dm_generations.models.loading import load_checkpoint
        from dm_generations.pipelines.model_records import known_model, model_info
        from dm_generations.progress import Progress

        codec, clip = load_checkpoint(args.codec, "codec"), load_checkpoint(args.clip, "clip")
        total = archive.count_to_score(args.all, known_model(archive, model_info(clip)))
        if not total:
            print(f"every picture in {args.db} has its scores{' by this CLIP' if args.all else ''}; nothing to do")
            return 0
        with Progress(total) as progress:
            report = score_archive(archive, codec, clip, args.batch_size, args.all, progress.advance)
    return _tell(report, args, codec.name)


def _tell(report, args: argparse.Namespace, codec_name: str) -> int:
    """Print what was done; 1 if something was left undone."""
    print(f"{counted(report.scored_count, 'picture')} scored in {args.db}")
    for line in report.bad_rows[:_BAD_ROWS_SHOWN]:
        print(f"error: {line}", file=sys.stderr)
    if hidden := len(report.bad_rows[_BAD_ROWS_SHOWN:]):
        print(f"error: {counted(hidden, 'more picture')} not scored; `verify` lists them", file=sys.stderr)
    for name, count in report.count_by_other_codec.items():
        print(
            f"error: {count:,} not scored: made with codec {name!r:.100}, not {codec_name!r:.100}; "
            "run this again with its folder as --codec",
            file=sys.stderr,
        )
    return 1 if report.bad_rows or report.count_by_other_codec else 0
