"""`compare`: settings of an archive by scores, diversity and distance to other images."""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dm_generations.archive import Archive, ArchiveError
from dm_generations.archive.records import PARAM_COLUMNS
from dm_generations.archive.scores import find_scorer
from dm_generations.archive.vectors import find_vector_model
from dm_generations.cli.common import add_archive, archive_path, file_path, prepare_device
from dm_generations.cli.table import FORMATS, print_rows

if TYPE_CHECKING:
    import numpy as np

    from dm_generations.pipelines.compare import Comparison, Estimate

HELP = "compare settings by scores, diversity and distance to other images"
DESCRIPTION = """\
Compare the settings of an archive over all prompts: the mean score; the Vendi score, which says how many different
images those of a prompt are worth; and with --with the CMMD to other images, which is smaller the more alike they are.
The last two read CLIP vectors, which `score --vectors` has stored; only those of a folder are computed. Of more than
30,000 images on a side so many count for the CMMD. The last row is all settings together. low and high are 95%
bootstrap intervals.
"""
EPILOG = """\
examples:
  python -m dm_generations compare --db sweep.db
  python -m dm_generations compare --db sweep.db --with photos --format csv
  python -m dm_generations compare --db sweep.db --with other.db --rank-by aesthetic
"""
_COLUMNS = (
    *("sc_prompt", *PARAM_COLUMNS, "extra_settings", "images", "scored", "mean_score", "score_low", "score_high"),
    *("vectors", "vendi", "vendi_low", "vendi_high"),
)
_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add_archive(parser, "archive to compare", has_default=False)
    add(
        "--with",
        dest="other",
        metavar="FILE|FOLDER",
        type=file_path,
        help="another archive, a folder of images, or a .npy file of vectors (n, P) of the same CLIP",
    )
    add(
        "--rank-by",
        metavar="SCORER",
        help="whose scores: a judge's name, its id or the first digits of its hash (default: clip_score_input)",
    )
    add("--clip", metavar="PATH", help="CLIP that made the vectors (default: the embedded one, for a folder)")
    add("--format", choices=FORMATS, default="table", help="of the result (default: table)")
    add("--cpu-only", action="store_true", help="do not use accelerators")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from dm_generations.pipelines.compare import Vectors, compare

    with Archive.open(archive_path(args)) as archive:
        scorer = None if args.rank_by is None else find_scorer(archive, args.rank_by)
        clip = None
        if args.clip is not None or (args.other is not None and args.other.is_dir()):
            prepare_device(args.cpu_only)
            from dm_generations.models.loading import load_checkpoint

            clip = load_checkpoint(args.clip, "clip")
        vectors = others = None
        try:
            model_id = find_vector_model(archive, None if clip is None else clip.model_info())
        except ArchiveError as error:
            if args.other is not None or args.clip is not None:
                raise
            _logger.warning("%s", error)
        else:
            vectors = Vectors.read(archive, model_id)
            if args.other is not None:
                others = _read_others(args.other, archive, model_id, clip, vectors.rows.shape[1])
        found = compare(archive, scorer, vectors, others)
        sc_prompts = archive.sc_prompts()
    columns = _COLUMNS if others is None else (*_COLUMNS, "cmmd")
    rows = [row if others is not None else row[:-1] for row in _rows(found, sc_prompts)]
    print_rows(columns, rows, args.format)
    return 0


def _read_others(path: Path, archive: Archive, model_id: int, clip: Any, width: int) -> "np.ndarray":
    """Return vectors (m, P) of the images in a folder, of another archive by the same CLIP, or of a file."""
    from dm_generations.pipelines.compare import Vectors, read_vector_file

    if path.is_dir():
        from dm_generations.pipelines.embed import embed_images, list_images

        return embed_images(list_images(path), clip)
    if path.suffix == ".npy":
        return read_vector_file(path, width)
    with Archive.open(path) as other:
        return Vectors.read(other, find_vector_model(other, archive.models()[model_id])).rows


def _rows(found: "list[Comparison]", sc_prompts: dict[int, str | None]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of _COLUMNS, and the CMMD."""
    for one in found:
        if one.setting is None:
            setting: tuple[Any, ...] = (None,) * (len(PARAM_COLUMNS) + 2)
        else:
            sc_prompt = sc_prompts.get(one.setting.sc_prompt_id) or ""
            setting = (sc_prompt, *one.setting.params.values(), one.setting.extra_settings)
        yield (
            *setting,
            *(one.image_count, one.score_count, *_values(one.mean_score)),
            *(one.vector_count, *_values(one.vendi), one.cmmd),
        )


def _values(estimate: "Estimate | None") -> tuple[float | None, ...]:
    return (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
