"""`verify`: is an archive sound?"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from dm_generations.archive import Archive, verify
from dm_generations.cli._text import counted, printable
from dm_generations.cli._types import at_least_one
from dm_generations.cli.model_options import (
    add_dalle_pytorch_options,
    dalle_pytorch_overrides,
    prepare_device,
)
from dm_generations.errors import UserError
from dm_generations.generate.sweep import DEFAULT_BATCH_SIZE
from dm_generations.resources import shipped

HELP = "check an archive for damage"
DESCRIPTION = """\
Check an archive: SQLite's own integrity, ids that point nowhere, types and ranges of all values, lengths of
token vectors, codes beyond the codebook, MD5. Prints a line for each problem with the row's id; the exit
status is 1 when there is one. Nothing is changed.

With --regenerate the rows are drawn again by their model and compared; with --replay their codes are fed to it, and
each must be the one that the row's noise chooses, or miss by no more than --margin (in units of logits over
temperature), so that rows made on other hardware, where numbers are rounded differently, can be checked too.
"""
EPILOG = """\
example:
  python -m dm_generations verify --db archive/emoji.db
  python -m dm_generations verify --db archive/emoji.db --replay --sample 64
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--db", metavar="FILE", help="archive (default: the emoji archive that ships)")
    parser.add_argument("--json", action="store_true", help="print each problem as one line of JSON")
    group = parser.add_argument_group("does the model give the rows again?")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--regenerate", action="store_true", help="draw rows again and compare their codes")
    which.add_argument("--replay", action="store_true", help="check that each stored code is the one that wins")
    group.add_argument("--sample", type=at_least_one, metavar="N", help="N rows, evenly spread (default: all)")
    group.add_argument("--margin", type=float, default=0.01, help="by how much a code may miss (default: 0.01)")
    group.add_argument("--model", metavar="PATH", help="the model that drew them (default: the one that ships)")
    group.add_argument("--tokenizer", metavar="PATH", type=Path, help="its tokenizer, if not beside it")
    add_dalle_pytorch_options(group.add_argument)
    group.add_argument(
        "--batch-size",
        type=at_least_one,
        default=DEFAULT_BATCH_SIZE,
        metavar="N",
        help=f"as they were drawn with (default: {DEFAULT_BATCH_SIZE})",
    )
    group.add_argument("--cpu-only", action="store_true", help="leave accelerators alone")


def run(args: argparse.Namespace) -> int:
    problem_count = 0
    with Archive.open(args.db or shipped("archive/emoji.db")) as archive:
        for problem in verify(archive):
            problem_count += 1
            if args.json:
                print(json.dumps(dataclasses.asdict(problem)))
            else:
                print(printable(str(problem), 1000))
        if not args.json:
            verdict = (
                counted(problem_count, "problem")
                if problem_count
                else f"sound, {counted(archive.count(), 'picture')} checked"
            )
            print(f"{printable(str(archive.path), 1000)}: {verdict}")
        if args.regenerate or args.replay:
            problem_count += _draw_again(archive, args)
    return 1 if problem_count else 0


def _draw_again(archive: Archive, args: argparse.Namespace) -> int:
    """How many rows the model does not give again; a line for each."""
    from dm_generations.progress import Progress

    if not args.margin >= 0:
        raise UserError(f"--margin must be 0 or more, not {args.margin}")
    prepare_device(args.cpu_only)
    from dm_generations.generate.again import differences, ids_of_model
    from dm_generations.models.loading import load_generator

    generator = load_generator(args.model, args.tokenizer, dalle_pytorch_overrides(args))
    ids, other_count = ids_of_model(archive, generator, args.sample)
    if other_count:
        rows = counted(other_count, "row")
        print(f"{rows} not checked: drawn by another model or with other noise than its own", file=sys.stderr)
    if not ids:
        raise UserError(
            f"{archive.path} holds no row that {generator.name!r} drew with this program's own noise; give the model "
            "with --model, and flags about it that it was drawn with"
        )
    row_count, found_count = sum(map(len, ids.values())), 0
    margin = None if args.regenerate else args.margin
    with Progress(row_count) as progress:
        for dtype, ids_of_dtype in ids.items():
            for count, found in differences(archive, generator, ids_of_dtype, args.batch_size, margin, dtype):
                found_count += len(found)
                for difference in found:
                    print(json.dumps(dataclasses.asdict(difference)) if args.json else difference)
                progress.advance(count)
    if not args.json:
        what = "drawn again" if args.regenerate else "replayed"
        verdict = counted(found_count, "difference") if found_count else "all as stored"
        print(f"{counted(row_count, 'picture')} {what}: {verdict}")
    return found_count
