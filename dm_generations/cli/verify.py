"""`verify`: check an archive for damage, and whether its model reproduces the rows."""

import argparse
import dataclasses
import json
import logging

from dm_generations.archive import Archive, verify
from dm_generations.archive.selection import Where, compile_nonempty
from dm_generations.cli.common import (
    Progress,
    add_archive,
    add_checkpoint_options,
    add_selection_options,
    archive_path,
    at_least_one,
    config_overrides,
    counted,
    file_path,
    prepare_device,
    print_line,
    selection_from,
)
from dm_generations.errors import UserError
from dm_generations.pipelines.sweep import DEFAULT_BATCH_SIZE

_logger = logging.getLogger(__name__)

HELP = "check an archive for damage"
DESCRIPTION = """\
Check an archive: SQLite's own integrity, ids without a row, types and ranges of all values, lengths of token
vectors, tokens outside the codebook, MD5. Prints a line with the row's id for each problem; the exit status is
1 if there is one. Nothing is changed.

With --regenerate the model samples the rows again, and their tokens are compared. With --replay the model reads the
stored tokens, and each must be the one that the row's noise selects, or miss it by at most --margin (in units of
logits over temperature); this also checks rows from other hardware, which rounds differently.
"""
EPILOG = """\
example:
  python -m dm_generations verify archive/emoji.db
  python -m dm_generations verify archive/emoji.db --replay --sample 64
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_archive(parser, "archive to check")
    parser.add_argument("--json", action="store_true", help="print each problem as one line of JSON")
    add_selection_options(parser)
    group = parser.add_argument_group("does the model reproduce the rows?")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--regenerate", action="store_true", help="sample rows again and compare their tokens")
    which.add_argument("--replay", action="store_true", help="check each stored token against the model")
    group.add_argument("--sample", type=at_least_one, metavar="N", help="N rows, evenly spread (default: all)")
    group.add_argument("--margin", type=float, default=0.01, help="by how much a token may miss (default: 0.01)")
    group.add_argument("--model", metavar="PATH", help="the model that sampled them (default: the one that ships)")
    group.add_argument(
        "--tokenizer", metavar="PATH", type=file_path, help="its tokenizer, if it is not in the model's folder"
    )
    add_checkpoint_options(group.add_argument)
    group.add_argument(
        "--batch-size",
        type=at_least_one,
        default=DEFAULT_BATCH_SIZE,
        metavar="N",
        help=f"as they were sampled with (default: {DEFAULT_BATCH_SIZE})",
    )
    group.add_argument("--cpu-only", action="store_true", help="do not use accelerators")


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    problem_count = 0
    if not (args.regenerate or args.replay):
        for flag in ("sample", "model", "tokenizer"):
            if getattr(args, flag) is not None:
                _logger.warning("--%s has no effect without --regenerate or --replay", flag)
    selection = selection_from(args)
    with Archive.open(archive_path(args)) as archive:
        where = compile_nonempty(archive, selection)
        for problem in verify(archive, where):
            problem_count += problem.count
            if args.json:
                print(json.dumps(dataclasses.asdict(problem)))
            else:
                print_line(problem)
        if not args.json:
            verdict = (
                counted(problem_count, "problem")
                if problem_count
                else f"sound, {counted(archive.count(where), 'image')} checked"
            )
            print_line(f"{archive.path}: {verdict}")
        if args.regenerate or args.replay:
            problem_count += _reproduce(archive, where, args)
    return 1 if problem_count else 0


def _reproduce(archive: Archive, where: Where, args: argparse.Namespace) -> int:
    """Print the rows that the model does not reproduce; return how many there are."""
    if not args.margin >= 0:
        raise UserError(f"--margin must be 0 or more, not {args.margin}")
    prepare_device(args.cpu_only)
    from dm_generations.models.loading import load_generator
    from dm_generations.pipelines.reproduce import Mismatch, reproduce_archive

    def print_mismatch(mismatch: Mismatch) -> None:
        if args.json:
            print(json.dumps(dataclasses.asdict(mismatch)))
        else:
            print_line(mismatch)

    max_margin = None if args.regenerate else args.margin
    with Progress() as on_progress:
        checkpoint = load_generator(args.model, args.tokenizer, config_overrides(args))
        report = reproduce_archive(
            archive, checkpoint, args.batch_size, max_margin, args.sample, print_mismatch, on_progress, where
        )
    if not args.json:
        what = "Regenerated" if args.regenerate else "Replayed"
        verdict = counted(len(report.mismatches), "mismatch", "mismatches") if report.mismatches else "all as stored"
        print_line(f"{what} {counted(report.checked_count, 'image')}: {verdict}")
    return len(report.mismatches)
