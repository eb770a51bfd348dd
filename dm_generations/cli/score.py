"""`score`: scores for the images of an archive, and vectors."""

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
    add_ray_options,
    add_selection_options,
    archive_path,
    at_least_one,
    counted,
    file_name,
    prepare_device,
    print_line,
    ray_pool,
    selection_from,
)
from dm_generations.cli.decoder_options import add_decoder_options, load_diffusion
from dm_generations.errors import UserError

if TYPE_CHECKING:
    from dm_generations.pipelines.rescore import ScoreReport

HELP = "fill in missing CLIP scores, or add scores of other judges and vectors"
DESCRIPTION = """\
Score the images of an archive against their prompts with CLIP. Without --clip those without a score get one. With
--clip all images get the scores of that CLIP: those of another one stay, and the new ones are added, for --rank-by of
decode; --all replaces them. Each image is decoded by its own codec. After a stop, the same command scores the rest.
"""
EPILOG = """\
examples:
  python -m dm_generations score --db rockets.db --clip openai-clip-vit-large-patch14 --vectors
  python -m dm_generations score --db rockets.db --clip openai-clip-vit-large-patch14 \
      --aesthetic sa_0_4_vit_l_14_linear.pth
"""
_MAX_BAD_ROWS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add_archive(parser, "archive to score; it is changed", has_default=False, is_changed=True)
    add("--all", action="store_true", help="also score images that another CLIP scored, and replace its scores")
    add(
        "--aesthetic",
        metavar="FILE",
        type=file_name,
        help="also add scores of an aesthetic head, layers on the CLIP's image vectors: a .pth or .safetensors file",
    )
    add("--vectors", action="store_true", help="also store the CLIP's image vectors, for find and compare")
    add("--json", action="store_true", help="print what was done as JSON, for programs")
    add_model_options(parser, generates=False)
    add_decoder_options(parser).add_argument(
        "--decoding",
        type=at_least_one,
        metavar="N",
        help="score the Nth decoding of each image, as decode --decoder-n numbers them; each has scores of its own "
        "(default: 1)",
    )
    add_ray_options(parser)
    add_selection_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    selection, path = selection_from(args), archive_path(args)
    if args.vectors and args.decoder:
        raise UserError("--vectors are of a codec's own images, which find and compare show: leave out --decoder")
    with Archive.open(path, "w") as archive:
        where = compile_nonempty(archive, selection)
        asks_for_more = args.all or args.clip or args.aesthetic or args.vectors or args.decoder
        if not asks_for_more and not archive.count_to_score(where=where):  # known at once, without the models
            _print_nothing(args, path)
            return 0
        prepare_device(args.cpu_only or args.ray is not None)
        from dm_generations.models.loading import load_checkpoint
        from dm_generations.pipelines.rescore import Judges, score_archive

        with ray_pool(args) as pool, Progress() as on_progress:
            codec, clip = load_checkpoint(args.codec, "codec"), load_checkpoint(args.clip, "clip")
            head = None if args.aesthetic is None else load_checkpoint(args.aesthetic, "scorer")
            diffusion, decoding = load_diffusion(args), (args.decoding or 1) - 1
            adds = bool(args.clip or diffusion) and not args.all
            judges = Judges(clip, args.all, adds, head, args.vectors, diffusion, decoding)
            on_step = on_progress.on_step
            report = score_archive(archive, codec, judges, args.batch_size, on_progress, where, on_step, pool)
    return _print_report(report, args, path, codec.name)


def _print_nothing(args: argparse.Namespace, path: Path) -> None:
    if args.json:
        print(json.dumps({"due_count": 0, "scored_count": 0, "bad_rows": [], "count_by_other_codec": {}}))
        return
    what = "all that is asked for" if args.aesthetic or args.vectors else "scores"
    print_line(f"All images in {path} have {what}{' of this CLIP' if args.clip else ''}; nothing to do")


def _print_report(report: "ScoreReport", args: argparse.Namespace, path: Path, codec_name: str) -> int:
    """Print what was done; 1 if something was left undone."""
    if not report.due_count:
        _print_nothing(args, path)
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
