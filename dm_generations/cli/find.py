"""`find`: images that are like a text or an image, and images that are nearly the same."""

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dm_generations.archive import Archive
from dm_generations.archive.records import PARAM_COLUMNS
from dm_generations.archive.vectors import find_vector_model, read_vectors
from dm_generations.cli.common import add_archive, archive_path, at_least_one, prepare_device
from dm_generations.cli.table import FORMATS, print_rows
from dm_generations.errors import UserError

HELP = "find images by a text or an image, or near-duplicates"
DESCRIPTION = """\
Find images by their CLIP vectors, which `score --vectors` has stored; no image is decoded. --like finds those that are
most like a text or an image file. --duplicates finds sets of images that are nearly the same: the first image of each
set, and those whose similarity to it is at least --threshold.
"""
EPILOG = """\
examples:
  python -m dm_generations find --db mine.db --like "a rocket in the snow"
  python -m dm_generations find --db mine.db --like sketch.png --limit 5 --format csv
  python -m dm_generations find --db mine.db --duplicates --threshold 0.99
"""
_ROW_COLUMNS = ("id", "similarity", "prompt", *PARAM_COLUMNS, "clip_score_input")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add_archive(parser, "archive to search", has_default=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--like", metavar="FILE|TEXT", help="what to look for: an image file if there is one, else a text"
    )
    what.add_argument("--duplicates", action="store_true", help="list sets of near-duplicates")
    add(
        "--threshold",
        type=_cosine,
        default=0.98,
        metavar="X",
        help="similarity (cosine, up to 1) from which on images are near-duplicates (default: 0.98)",
    )
    add("--limit", type=at_least_one, default=20, metavar="N", help="images that --like lists (default: 20)")
    add("--clip", metavar="PATH", help="CLIP that made the vectors (default: the embedded one)")
    add("--format", choices=FORMATS, default="table", help="of the list (default: table)")
    add("--cpu-only", action="store_true", help="do not use accelerators")


def _cosine(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and up to 1")
    return value


_cosine.__name__ = "number"  # as argparse names it when float() fails


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    with Archive.open(archive_path(args)) as archive:
        if args.duplicates:
            columns, rows = ("set", *_ROW_COLUMNS), list(_duplicates(archive, args))
        else:
            columns, rows = _ROW_COLUMNS, list(_similar(archive, args))
    print_rows(columns, rows, args.format)
    return 0


def _similar(archive: Archive, args: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    clip = _load_clip(args)
    model_id = find_vector_model(archive, clip.model_info())
    from dm_generations.pipelines.embed import embed_images, embed_text
    from dm_generations.pipelines.find import find_similar

    is_file = os.path.exists(args.like)
    query = embed_images([Path(args.like)], clip)[0] if is_file else embed_text(args.like, clip)
    matches = find_similar(*read_vectors(archive, model_id), query, args.limit)
    yield from _describe(archive, [(match.image_id, match.similarity) for match in matches])


def _load_clip(args: argparse.Namespace) -> Any:
    prepare_device(args.cpu_only)
    from dm_generations.models.loading import load_checkpoint

    return load_checkpoint(args.clip, "clip")


def _duplicates(archive: Archive, args: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    model_id = find_vector_model(archive, None if args.clip is None else _load_clip(args).model_info())
    from dm_generations.pipelines.find import find_duplicates

    sets = find_duplicates(*read_vectors(archive, model_id), args.threshold)
    numbers = [number for number, matches in enumerate(sets, 1) for _ in matches]
    found = [(match.image_id, match.similarity) for matches in sets for match in matches]
    for number, row in zip(numbers, _describe(archive, found), strict=True):
        yield number, *row


def _describe(archive: Archive, found: list[tuple[int, float]]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of _ROW_COLUMNS of images."""
    prompts = archive.prompts()
    rows = {row.id: row for row in archive.read_rows([image_id for image_id, _ in found])}
    for image_id, similarity in found:
        if (row := rows.get(image_id)) is None:
            raise UserError(f"{archive.path}: a vector is of image {image_id}, which is missing; run `verify`")
        score = row.clip_score_input
        score = score if isinstance(score, float) and math.isfinite(score) else None
        yield image_id, similarity, prompts.get(row.prompt_id), *row.params.values(), score
