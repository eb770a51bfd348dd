"""`demo`: from a prompt to the page of its images in one go."""

import argparse
from pathlib import Path

from dm_generations.cli.common import Progress, at_least_one, counted, file_path, prepare_device, print_line
from dm_generations.cli.view import add_no_open, open_page, write_page
from dm_generations.pipelines.sweep import DEFAULT_SEED, Sweep

HELP = "generate, score and show images of a prompt in one go"
DESCRIPTION = """\
Generate images with the small model that ships, score them, store them in an archive, decode them, and open the page
with the best first. It draws emoji: `info` lists prompts that it knows.
"""
EPILOG = """\
example:
  python -m dm_generations demo "a cute avocado"
"""
_COUNT = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="what to generate")
    add("--n", type=at_least_one, default=_COUNT, metavar="N", help=f"images of each prompt (default: {_COUNT})")
    add("--seed", type=int, default=DEFAULT_SEED, help=f"another gives other images (default: {DEFAULT_SEED})")
    add(
        "--db",
        type=file_path,
        default=Path("demo.db"),
        metavar="FILE",
        help="archive to add them to; its images are decoded into the folder of its name (default: demo.db)",
    )
    add_no_open(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    sweep = Sweep(args.prompts, count=args.n, seed=args.seed)
    prepare_device(cpu_only=False)
    from dm_generations.pipelines.generate import GenerateOptions, generate

    print_line(f"1. Generate and score {counted(args.n * len(sweep.prompts), 'image')} in {args.db}")
    with Progress() as on_progress:
        report = generate(sweep, GenerateOptions(db=args.db), on_progress)
    what = f"{report.added_count:,} added, {report.distinct_count:,} different" if report.added_count else "all there"
    print_line(f"   {what}")
    print_line("2. Decode the archive into files")
    page, status = write_page(args.db)
    print_line("3. Open the page")
    open_page(page, args)
    return status
