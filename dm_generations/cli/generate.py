"""`generate`: pictures from text, into an archive."""

import argparse
import contextlib
import dataclasses
import os.path
import shlex
import sys
import time
from pathlib import Path

from dm_generations.archive import Archive
from dm_generations.cli._text import counted, file_size
from dm_generations.cli._types import at_least_one
from dm_generations.cli.model_options import (
    STOPPED,
    add_model_options,
    dalle_pytorch_overrides,
    prepare_device,
)
from dm_generations.errors import UserError
from dm_generations.generate import sweep as sweeps
from dm_generations.generate.sweep_file import KEYS, read_sweep

HELP = "draw pictures from text into an archive"
DESCRIPTION = """\
Draw pictures from text and keep them, as tokens with their settings, keys and scores, in an archive.

Options that take several values are combined: every prompt with every setting, --n pictures of each. Picture
i has the same noise in every combination. What the archive holds already is not drawn again, so a run that
was stopped, or that got one more value, draws exactly what is missing.
"""
EPILOG = """\
examples:
  python -m dm_generations generate --db rockets.db --prompts "a rocket" --n 16
  python -m dm_generations generate --db sweep.db --prompts "a castle" "a cat" --top-k 50 0 --cond-scale 1 3
  python -m dm_generations generate --db sweep.db --sweep castles.toml --dry-run
"""
ROW_BYTES = 235  # of the archive for a picture besides its codes, indexes included: measured on archive/emoji.db


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--db", metavar="FILE", type=Path, required=True, help="archive to fill; made if there is none")
    add("--prompts", nargs="+", metavar="TEXT", help="what to draw")
    add("--prompts-file", metavar="FILE", type=Path, help="more prompts: UTF-8 text, one a line")
    add(
        "--sweep",
        metavar="FILE",
        type=Path,
        help="TOML file with prompts, settings, n and seed, named as the flags with _ for -; a flag goes before it",
    )
    add(
        "--n",
        type=int,
        metavar="N",
        help=f"pictures of each combination (default: {sweeps.DEFAULT_COUNT})",
    )
    add(
        "--seed",
        type=int,
        help=f"whole number from 0 to 2^64 - 1; another one draws others (default: {sweeps.DEFAULT_SEED})",
    )
    add(
        "--rng",
        choices=["rows", "dalle-mini"],
        default="rows",
        help="rows: this program's own noise; dalle-mini: the noise of dalle-mini's generate, called for one prompt "
        "with the row's key, for DALL-E mini's kind of model alone (default: rows)",
    )
    add("--output", choices=["db", "npy"], default="db", help="npy: also write a file of tokens for each picture")
    add("--out-dir", metavar="FOLDER", type=Path, default=Path("npy"), help="where --output npy writes (default: npy)")
    add(
        "--keys",
        nargs="+",
        metavar="KEY0:KEY1",
        help="draw the pictures of these keys, as archive and page show them, in place of --n and --seed",
    )
    add(
        "--same-seeds",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="picture i has the same key under all settings, so that they are compared on equal noise; without, each "
        "combination has keys of its own (default: the same)",
    )
    add(
        "--progressive",
        type=at_least_one,
        metavar="N",
        help="write a picture of the codes so far after every N of them, the rest filled with the first one",
    )
    add(
        "--progressive-dir",
        metavar="FOLDER",
        type=Path,
        default=Path("progressive"),
        help="where --progressive writes (default: progressive)",
    )
    add("--dry-run", action="store_true", help="only say what would be drawn: pictures, bytes, memory and time")
    _add_settings(parser.add_argument_group("settings", "each takes one or more values"))
    _add_given(parser.add_argument_group("given codes", "pictures that go on from the first codes of another one"))
    add_model_options(parser, generates=True)


def _add_settings(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--top-k",
        type=int,
        nargs="+",
        metavar="K",
        help=f"draw among the K best codes; 0 is no limit (default: {sweeps.DEFAULT_TOP_K}; with --rng dalle-mini this "
        "and the next two are what the model's config.json says, else 50, 1 and 1)",
    )
    add(
        "--top-p",
        type=float,
        nargs="+",
        metavar="P",
        help="draw among the best codes that hold P of the probability; 1 is no limit "
        f"(default: {sweeps.DEFAULT_TOP_P:g})",
    )
    add(
        "--temperature",
        type=float,
        nargs="+",
        metavar="T",
        help=f"above 1 bolder, below 1 tamer, 0 the best code (default: {sweeps.DEFAULT_TEMPERATURE:g})",
    )
    add(
        "--cond-scale",
        type=float,
        nargs="+",
        metavar="C",
        help="super conditioning: how strongly the prompt is weighed against the unconditional one; 1 is off "
        f"(default: {sweeps.DEFAULT_COND_SCALE:g})",
    )
    add(
        "--sc-prompts",
        nargs="+",
        metavar="TEXT",
        help='unconditional prompts, for what not to draw; "" is the model\'s own empty one (default: "")',
    )


def _add_given(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--init-image", metavar="FILE", type=Path, help="a picture, cropped to a square, through the codec's encoder")
    add("--init-tokens", metavar="FILE", type=Path, help="a .npy file of codes, as --output npy writes them")
    add("--init-count", metavar="N", type=int, help="codes that are kept, row by row from the top (default: 7 of 16)")


def run(args: argparse.Namespace) -> int:
    try:
        return _generate(args)
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, the same command draws the rest", file=sys.stderr)
        return STOPPED


def _generate(args: argparse.Namespace) -> int:
    if args.no_score and args.clip:
        raise UserError("use just one of --clip and --no-score")
    if args.keys and (args.n is not None or args.seed is not None):
        raise UserError("use just one of --keys and of --n with --seed")
    described = {} if args.sweep is None else read_sweep(args.sweep)
    described |= {name: value for name in KEYS if (value := getattr(args, name)) is not None}
    sweep = sweeps.Sweep(
        prompts=[*described.get("prompts", []), *_prompts_of(args.prompts_file)],
        sc_prompts=described.get("sc_prompts", [None]),
        top_k=described.get("top_k", [sweeps.DEFAULT_TOP_K]),
        top_p=described.get("top_p", [sweeps.DEFAULT_TOP_P]),
        temperature=described.get("temperature", [sweeps.DEFAULT_TEMPERATURE]),
        cond_scale=described.get("cond_scale", [sweeps.DEFAULT_COND_SCALE]),
        count=described.get("n", sweeps.DEFAULT_COUNT),
        seed=described.get("seed", sweeps.DEFAULT_SEED),
        same_seeds=described.get("same_seeds", True),
        row_keys=[parse_key(text) for text in described["keys"]] if "keys" in described else None,
    )
    prepare_device(args.cpu_only)
    from dm_generations.generate.given import load_given
    from dm_generations.generate.models import load_models
    from dm_generations.generate.run import Pipeline, Progressive, open_archive

    exists = os.path.exists(args.db)  # unlike Path.exists, False for a name that cannot be
    if exists:  # found out before the models are loaded, which takes a moment
        with Archive.open(args.db, "r" if args.dry_run else "w") as archive:
            if archive.is_2022:
                raise UserError(f"{args.db}: the 2022 layout is only read; `merge` it into a new archive to add to it")
    overrides = dalle_pytorch_overrides(args)
    models = load_models(args.model, args.codec, args.clip, not args.no_score, args.tokenizer, overrides)
    config, codes = models.generator.config, models.codec.config.codebook_size
    if codes > config.codebook_size:
        print(
            f"warning: codec {models.codec.name!r} has {codes:,} codes, model {models.generator.name!r} draws "
            f"{config.codebook_size:,}: pictures are right only if it is the codec that the model was trained with",
            file=sys.stderr,
        )
    given = load_given(
        args.init_image, args.init_tokens, args.init_count, models.codec, config.image_length, config.codebook_size
    )
    progress = None if args.progressive is None else Progressive(args.progressive, args.progressive_dir)
    pipeline = Pipeline(models, args.batch_size, args.rng, args.dtype, given, progress)
    pipeline.check(sweep)
    if pipeline.generator.batch_size < args.batch_size:
        print(f"memory holds batches of {pipeline.generator.batch_size}, not of {args.batch_size}", file=sys.stderr)
    if args.rng == "dalle-mini":  # whose `generate` takes what it is not given from config.json
        unset = [name for name in ("top_k", "top_p", "temperature") if name not in described]
        sweep = dataclasses.replace(sweep, **{name: [getattr(config, name)] for name in unset})
    if args.dry_run:
        with Archive.open(args.db) if exists else contextlib.nullcontext() as archive:
            _estimate(pipeline, pipeline.plan(sweep, archive))
        return 0
    with open_archive(args.db) as archive:
        return _fill(archive, pipeline.plan(sweep, archive), pipeline, args)


def _estimate(pipeline, work: sweeps.Plan) -> None:
    """Say what a run would draw, and what that takes."""
    from tqdm import tqdm

    generator = pipeline.generator
    print(f"{_describe(work.sweep)}; {work.existing_count:,} there already, {work.missing_count:,} to draw")
    code_bytes = work.missing_count * generator.token_count * 2
    total = file_size(code_bytes + work.missing_count * ROW_BYTES)
    print(f"they take about {total} in the archive, of which {code_bytes:,} bytes are codes")
    size, at_once = generator.batch_size, generator.at_once
    megabytes = at_once * generator.batch_bytes(size) / 1e6
    batches = f"a batch of {size} takes" if at_once == 1 else f"{at_once} batches of {size} beside each other take"
    print(f"{batches} {megabytes:,.0f} MB of memory besides the weights", flush=True)
    if work.missing:
        about = tqdm.format_interval(pipeline.seconds(work))
        what = "drawing" if pipeline.models.clip is None else "drawing and scoring"
        print(f"{what} takes about {about}, by the speed of a few steps; nothing was drawn")


def _fill(archive: Archive, work: sweeps.Plan, pipeline, args: argparse.Namespace) -> int:
    from dm_generations.progress import Progress

    print(f"{_describe(work.sweep)}, {work.missing_count:,} of them to draw", file=sys.stderr)
    started = time.monotonic()
    added_count = elsewhere_count = 0
    if work.missing:
        with Progress(work.missing_count) as progress:
            filled = pipeline.fill(archive, work, progress.advance)
            added_count, elsewhere_count = filled.added, filled.elsewhere
    seconds = time.monotonic() - started
    summary = f"{counted(added_count, 'picture')} added to {args.db}, {work.existing_count:,} there already"
    if elsewhere_count:
        summary += f", {elsewhere_count:,} added by other processes"
    if added_count:
        summary += f"; {added_count / seconds:.1f} pictures a second"
    print(f"{summary}. To look at them:\n  {_decode_command(args.db, pipeline.models.codec_from)}")
    has_failed = args.output == "npy" and not _write_npy(archive, work.sweep, args.out_dir)
    # Only dalle-mini's noise leaves pictures out.
    if args.rng == "dalle-mini" and (left_out := work.missing_count - added_count - elsewhere_count):
        what = f"{counted(left_out, 'picture')} left out, with an id that is no code"
        print(f"error: {what}: dalle-mini draws its end token too", file=sys.stderr)
        return 1
    return 1 if has_failed else 0


def _write_npy(archive: Archive, sweep: sweeps.Sweep, out_dir: Path) -> bool:
    """Write the tokens of the sweep's prompts; whether all are written."""
    from dm_generations.export.exporter import ExportOptions, export_archive
    from dm_generations.export.plan import Layout, Selection

    options = ExportOptions(out_dir, Layout("npy", 1, 1), Selection(prompt_texts=sweep.prompts))
    report = export_archive(archive, options, lambda line: print(f"warning: {line}", file=sys.stderr))
    print(f"{counted(report.written, 'file')} of tokens written to {out_dir}, {report.already_there:,} there already")
    return not report.problems


def _describe(sweep: sweeps.Sweep) -> str:
    combinations = counted(sweep.combination_count, "combination")
    return f"{combinations} x {sweep.count:,} = {counted(sweep.picture_count, 'picture')}"


def _decode_command(db: Path, codec: str | None) -> str:
    words = ["python", "-m", "dm_generations", "decode", "--db", str(db)]
    return shlex.join(words + ([] if codec is None else ["--codec", codec]))


def parse_key(text: str) -> tuple[int, int]:
    """(key0, key1) of "key0:key1". Raises UserError for anything else."""
    try:
        key0, key1 = map(int, text.split(":"))
    except ValueError:
        raise UserError(f"--keys {text!r:.60} is not two whole numbers with a colon between, as 12345:67890") from None
    return key0, key1


def _prompts_of(path: Path | None) -> list[str]:
    """The lines of a file that are not blank."""
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--prompts-file {str(path)!r}: {reason}") from error
    prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file {path}: there is no prompt in it")
    return prompts
