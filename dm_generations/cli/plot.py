"""`plot`: scores, token usage and times of an archive as a picture."""

import argparse
from pathlib import Path

from dm_generations.archive import Archive
from dm_generations.cli.common import (
    add_archive,
    add_selection_options,
    archive_path,
    file_path,
    print_line,
    selection_from,
)

HELP = "plot scores, token usage or times of an archive"
DESCRIPTION = """\
Plot the images of an archive as PNG or SVG. It needs matplotlib: pip install 'dm-generations[plot]'.

  score   mean CLIP score by setting, with 95% intervals (1.96 standard errors)
  tokens  how often each token of the codebook is used, and how many are
  time    seconds per image by the number of images that were sampled together
"""
EPILOG = """\
example:
  python -m dm_generations plot archive/emoji.db --out scores.svg
  python -m dm_generations plot mine.db --kind tokens --where cond_scale=3 --out tokens.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_archive(parser, "archive to plot")
    add = parser.add_argument
    add("--kind", choices=["score", "tokens", "time"], default="score", help="see above (default: score)")
    add("--out", type=file_path, metavar="FILE", help="a .png or .svg file (default: KIND.png)")
    add_selection_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    path = args.out or Path(f"{args.kind}.png")
    selection = selection_from(args)
    with Archive.open(archive_path(args)) as archive:
        from dm_generations.export.plots import write_plot

        write_plot(archive, args.kind, selection, path)
    print_line(f"Wrote {path}")
    return 0
