"""`contact-sheet`: a labelled grid of images as PNG or WebP."""

import argparse
import os
from pathlib import Path

from dm_generations.archive.grid import AXES, CELLS
from dm_generations.atomic_io import write_atomic
from dm_generations.cli.common import (
    add_archive,
    add_selection_options,
    archive_path,
    counted,
    file_name,
    file_path,
    prepare_device,
    print_line,
    selection_from,
)
from dm_generations.errors import UserError

HELP = "make a labelled grid of images, for a paper or a post"
DESCRIPTION = """\
Make a grid of images with labels: one axis as rows, another one as columns, and if wanted a third one as pages. The
axes are prompt, sc_prompt, the settings, model and seed (the noise). Those that are not shown must have one value,
which stands above the grid; choose it with the flags that select images.
"""
EPILOG = """\
A grid that is larger than 8,192 pixels a side is split: sheet.png becomes sheet-1.png, sheet-2.png and so on.

example:
  python -m dm_generations contact-sheet --rows prompt --cols cond_scale --where top_k=256 top_p=1 temperature=1
  python -m dm_generations contact-sheet mine.db --rows temperature --cols cond_scale --pages prompt --cell best4
"""
_FORMATS = {".png": "png", ".webp": "webp"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add_archive(parser, "archive with the images")
    add("--rows", choices=AXES, required=True, metavar="AXIS", help=f"axis of the rows: {', '.join(AXES)}")
    add("--cols", choices=AXES, required=True, metavar="AXIS", help="axis of the columns, another one of these")
    add("--pages", choices=AXES, metavar="AXIS", help="a page for each value of a third axis (default: none)")
    add(
        "--cell",
        choices=CELLS,
        default="best1",
        help="what a cell shows: the best 1, 4 or 9 images by CLIP score, or the same seed in every cell, which "
        "is the one that most cells have (default: best1)",
    )
    add(
        "--out",
        metavar="FILE",
        type=file_path,
        default=Path("contact-sheet.png"),
        help="file to write, .png or .webp (lossless) (default: contact-sheet.png)",
    )
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--scores", action="store_true", help="CLIP scores below the images (default: off)")
    add("--theme", choices=["light", "dark"], default="light", help="colours (default: light)")
    add(
        "--font",
        metavar="FILE",
        type=file_name,
        help="font of the labels, for other scripts and for accents, which the default leaves out (default: Pillow's)",
    )
    add(
        "--codec",
        metavar="PATH",
        help="codec that the images were made with: a folder, a file or a name on the Hugging Face hub "
        "(default: the embedded one)",
    )
    add("--cpu-only", action="store_true", help="do not use accelerators")
    add_selection_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    selection, out = selection_from(args), args.out
    if out.suffix.lower() not in _FORMATS:
        raise UserError(f"--out {str(out)!r:.200} is neither .png nor .webp")
    if not out.parent.is_dir():
        raise UserError(f"--out {str(out)!r:.200}: there is no folder {str(out.parent)!r:.200}; make it first")
    prepare_device(args.cpu_only)
    import numpy as np

    from dm_generations.api.archive import Archive
    from dm_generations.export.output_file import Encoding
    from dm_generations.inference.decoder import Decoder

    encoding = Encoding(_FORMATS[out.suffix.lower()])
    with Archive.open(archive_path(args)) as archive:
        sheet = archive.contact_sheet(
            *(args.rows, args.cols, args.pages, args.cell),
            scores=args.scores,
            theme=args.theme,
            font=args.font,
            decoder=None if args.codec is None else Decoder.load(args.codec),
            selection=selection,
        )
        files = _files(out, len(sheet), args.overwrite)
        for number, file in enumerate(files):
            write_atomic(file, encoding.encode(np.asarray(sheet[number])))
    what = str(files[0]) if len(files) == 1 else f"{files[0]} to {files[-1].name}"
    print_line(f"{counted(len(files), 'page')} written: {what}")
    return 0


def _files(out: Path, page_count: int, overwrite: bool) -> list[Path]:
    """Return the file of each page."""
    width = len(str(page_count))
    numbers = [f"-{number:0{width}}" for number in range(1, page_count + 1)] if page_count > 1 else [""]
    files = [out.with_name(f"{out.stem}{number}{out.suffix}") for number in numbers]
    for file in files:
        if os.path.lexists(file) and not overwrite:
            raise UserError(f"{str(file)!r:.200} exists already; choose another --out, or add --overwrite")
    return files
