"""`generate`: images from text, into an archive."""

import argparse
import json
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dm_generations.archive import Archive, Selection
from dm_generations.cli.common import (
    Progress,
    add_model_options,
    add_ray_options,
    at_least_one,
    command_words,
    config_overrides,
    counted,
    file_path,
    file_size,
    prepare_device,
    print_line,
    rate,
    ray_pool,
)
from dm_generations.errors import UserError
from dm_generations.pipelines.sweep import (
    DEFAULT_COUNT,
    DEFAULT_PARAMS,
    DEFAULT_SEED,
    SWEEP_KEYS,
    WHOLE_SWEEP,
    Shard,
    load_sweep,
)

if TYPE_CHECKING:
    from dm_generations.pipelines.estimate import Estimate
    from dm_generations.pipelines.generate import GenerateReport

_logger = logging.getLogger(__name__)

HELP = "generate images from text into an archive"
DESCRIPTION = """\
Generate images from text and store them in an archive, as tokens with their settings, keys and scores.

Options that take several values are combined: every prompt with every setting, --n images of each. Image i has
the same noise in every combination. Images that the archive has already are skipped, so a run that was stopped,
or that got one more value, generates exactly what is missing.

Several processes can fill one archive. Give each its own --shard, as an array job does:
--shard 1/4 to --shard 4/4. To replace a process that was killed, repeat its command.
"""
EPILOG = """\
examples:
  python -m dm_generations generate --db rockets.db --prompts "a rocket" --n 16
  python -m dm_generations generate --db sweep.db --prompts "a castle" "a cat" --top-k 50 0 --cond-scale 1 3
  python -m dm_generations generate --db sweep.db --sweep castles.toml --dry-run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("--db", metavar="FILE", type=file_path, required=True, help="archive to fill; created if there is none")
    add("--prompts", nargs="+", metavar="TEXT", help="what to generate")
    add(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="of a model that draws classes: numbers and ranges, as 207 0-999, in place of prompts",
    )
    add("--prompts-file", metavar="FILE", type=file_path, help="more prompts: UTF-8 text, one a line")
    add(
        "--sweep",
        metavar="FILE",
        type=file_path,
        help="TOML file with prompts, settings, n and seed, named as the flags with _ for -; flags take precedence",
    )
    add("--n", type=int, metavar="N", help=f"images of each combination (default: {DEFAULT_COUNT})")
    add("--seed", type=int, help=f"0 to 2^64 - 1; another seed gives other images (default: {DEFAULT_SEED})")
    add(
        "--shard",
        metavar="I/N",
        help="generate only the images of process I of N: those whose position in the sweep is I - 1 modulo N "
        "(default: all)",
    )
    add(
        "--rng",
        choices=["rows", "dalle-mini"],
        default="rows",
        help="rows: this program's own noise; dalle-mini: the noise of dalle-mini's generate, called for one prompt "
        "with the row's key, for DALL-E mini's kind of model only (default: rows)",
    )
    add("--output", choices=["db", "npy"], default="db", help="npy: also write a file of tokens for each image")
    out_dir = Path("npy")
    add("--out-dir", metavar="FOLDER", type=file_path, default=out_dir, help="for --output npy (default: npy)")
    add(
        "--keys",
        nargs="+",
        metavar="KEY0:KEY1",
        help="generate the images of these keys, as archive and page show them, in place of --n and --seed",
    )
    add(
        "--same-seeds",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="image i has the same key under all settings, so that they are compared on equal noise; otherwise each "
        "combination has its own keys (default: the same)",
    )
    _add_progressive(add)
    add("--json", action="store_true", help="print what was done as JSON, for programs")
    add("--dry-run", action="store_true", help="only say what would be generated: images, bytes, memory and time")
    _add_settings(parser.add_argument_group("settings", "each takes one or more values"))
    _add_init_tokens(parser.add_argument_group("initial tokens", "images that continue the first tokens of another"))
    add_model_options(parser, generates=True)
    add_ray_options(parser)


def _add_progressive(add: Callable[..., argparse.Action]) -> None:
    add(
        "--progressive",
        type=at_least_one,
        metavar="N",
        help="write each unfinished image after every N tokens, the rest filled with the first token; or after every N "
        "steps of a model that samples all tokens in each",
    )
    add(
        "--progressive-dir",
        metavar="FOLDER",
        type=file_path,
        help="where --progressive writes (default: progressive)",
    )


def _add_settings(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--top-k",
        type=int,
        nargs="+",
        metavar="K",
        help=f"sample among the K most likely tokens; 0 is no limit (default: {DEFAULT_PARAMS.top_k}, or "
        "the model's own, as of the next three; with --rng dalle-mini this and the next two are what the model's "
        "config.json says, else 50, 1 and 1)",
    )
    add(
        "--top-p",
        type=float,
        nargs="+",
        metavar="P",
        help="sample among the most likely tokens that together have probability P; 1 is no limit "
        f"(default: {DEFAULT_PARAMS.top_p:g})",
    )
    add(
        "--temperature",
        type=float,
        nargs="+",
        metavar="T",
        help="above 1 more varied, below 1 less, 0 always takes the most likely token "
        f"(default: {DEFAULT_PARAMS.temperature:g})",
    )
    add(
        "--cond-scale",
        type=float,
        nargs="+",
        metavar="C",
        help="super conditioning (classifier-free guidance): weight of the prompt against the unconditional one; 1 is "
        f"off (default: {DEFAULT_PARAMS.cond_scale:g})",
    )
    add(
        "--cfg-interval",
        type=int,
        nargs="+",
        metavar="K",
        help="of LlamaGen, guide the first K + 2 tokens alone, as its option of this name; -1 guides all (default: -1)",
    )
    add("--steps", type=int, nargs="+", metavar="N", help="of aMUSEd, in how many steps (default: 12)")
    numbers: dict[str, Any] = {"type": float, "nargs": "+", "metavar": "X"}
    add(
        "--mask-temperature",
        **numbers,
        help="of aMUSEd, how much chance decides at the first step which tokens stay (default: 2)",
    )
    add("--mask-temperature-end", **numbers, help="of aMUSEd, the same at the last step (default: 0)")
    add("--aesthetic-score", **numbers, help="of aMUSEd, a score that the image should have (default: 6)")
    for side in ("top", "left"):
        add(f"--crop-{side}", **numbers, help=f"of aMUSEd, pixels cut off at the {side} (default: 0)")
    add(
        "--sc-prompts",
        nargs="+",
        metavar="TEXT",
        help='unconditional prompts, for what to avoid; "" is the model\'s own empty one (default: "")',
    )


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for flags that exclude each other."""
    if args.no_score and args.clip:
        raise UserError("use just one of --clip and --no-score")
    if args.keys and (args.n is not None or args.seed is not None):
        raise UserError("use just one of --keys and of --n with --seed")
    if args.classes and args.output == "npy":
        raise UserError("--output npy takes no --classes: write tokens with decode --mode npy")
    if args.ray and (args.progressive or args.dry_run):
        raise UserError(f"use just one of --ray and {'--dry-run' if args.dry_run else '--progressive'}")
    if args.progressive_dir is not None and args.progressive is None:
        _logger.warning("--progressive-dir has no effect without --progressive")


def _add_init_tokens(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--init-image",
        metavar="FILE",
        type=file_path,
        help="an image, cropped to a square, through the codec's encoder",
    )
    add("--init-tokens", metavar="FILE", type=file_path, help="a .npy file of tokens, as --output npy writes them")
    add("--init-count", metavar="N", type=int, help="how many of them, row by row from the top (default: 7 of 16)")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    _check(args)
    flags = {name: value for name in SWEEP_KEYS if (value := getattr(args, name)) is not None}
    sweep = load_sweep(flags, args.sweep, args.prompts_file)
    shard = WHOLE_SWEEP if args.shard is None else Shard.parse(args.shard)
    prepare_device(args.cpu_only or args.ray is not None)
    from dm_generations.pipelines.generate import GenerateOptions, generate

    options = GenerateOptions(
        db=args.db,
        model=args.model,
        tokenizer=args.tokenizer,
        config_overrides=config_overrides(args),
        codec=args.codec,
        clip=args.clip,
        is_scored=not args.no_score,
        batch_size=args.batch_size,
        dtype=args.dtype,
        rng=args.rng,
        shard=shard,
        init_image=args.init_image,
        init_tokens=args.init_tokens,
        init_count=args.init_count,
        progressive_every=args.progressive,
        progressive_dir=args.progressive_dir or Path("progressive"),
    )
    if args.dry_run:
        from dm_generations.pipelines.estimate import estimate

        _print_estimate(estimate(sweep, options))
        return 0
    with ray_pool(args) as pool, Progress() as on_progress:
        report = generate(sweep, options, on_progress, pool)
    if args.json:
        print(json.dumps(vars(report), default=str))
    else:
        _print_report(report, args.db)
    status = 0
    if report.invalid_count:
        what = f"{counted(report.invalid_count, 'image')} left out, with a token outside the codebook"
        print_line(f"error: {what}: dalle-mini's noise also samples the start token", to_stderr=True)
        status = 1
    if args.output == "npy":
        status |= _write_token_files(args.db, list(map(str, sweep.prompts)), args.out_dir, args.json)
    return status


def _write_token_files(db: Path, prompts: Sequence[str], out_dir: Path, is_silent: bool) -> int:
    """Write the tokens of these prompts' images as `.npy` files; 1 if something could not be written."""
    from dm_generations.export.exporter import ExportOptions, export_archive
    from dm_generations.export.plan import Layout

    options = ExportOptions(out_dir, Layout("npy", 1, 1), Selection(prompt_texts=prompts))
    with Archive.open(db) as archive:
        report = export_archive(archive, options)
    if not is_silent:
        files = counted(report.written, "token file")
        print_line(f"Wrote {files} to {out_dir} ({report.already_there:,} skipped, already present)")
    return 1 if report.problems else 0


def _print_estimate(found: "Estimate") -> None:
    from tqdm import tqdm

    plan = found.plan
    combinations = counted(plan.sweep.combination_count, "combination")
    images = counted(plan.sweep.image_count, "image")
    print_line(
        f"{combinations} x {plan.sweep.count:,} = {images}: {plan.missing_count:,} to generate "
        f"({plan.existing_count:,} already present)"
    )
    print_line(
        f"archive size: about {file_size(found.archive_bytes)} more, of which {found.token_bytes:,} bytes are tokens"
    )
    batches = f"{found.batch_count} concurrent batches" if found.batch_count > 1 else "a batch"
    memory = f"{found.memory_bytes / 1e6:,.0f} MB"
    print_line(f"peak memory of {batches} of {found.batch_size}: {memory}, besides the weights")
    if plan.missing:
        what = "generating and scoring" if found.is_scored else "generating"
        print_line(
            f"{what}: about {tqdm.format_interval(found.seconds)}, from the speed of a few steps; nothing was written"
        )


def _print_report(report: "GenerateReport", db: Path) -> None:
    skipped = f"{report.existing_count:,} skipped, already present"
    if report.others_count:
        skipped += f"; {report.others_count:,} added by other processes"
    if report.added_count:
        summary = f"Added {counted(report.added_count, 'image')} to {db} ({skipped}), "
        summary += f"{report.distinct_count:,} different, {rate(report.added_count / report.seconds)}"
    else:
        summary = f"Added 0 images to {db} ({skipped})"
        summary += "" if report.others_count or report.invalid_count else "; nothing to do"
    print_line(summary)
    if report.progressive_dir is not None:
        print_line(f"Unfinished images are in {report.progressive_dir}")
    words = [*command_words("decode"), "--db", str(db), *([] if report.codec is None else ["--codec", report.codec])]
    print_line("To view them:")
    print_line(f"  {shlex.join(words)}")
