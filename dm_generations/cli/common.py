"""What several commands share: types and options of flags, the device, progress, and values as text for a terminal."""

import argparse
import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from dm_generations.archive import DTYPES, Selection
from dm_generations.archive.selection import WHERE_NAMES, parse_where
from dm_generations.errors import UserError
from dm_generations.errors import printable as printable
from dm_generations.paths import shipped
from dm_generations.pipelines.sweep import DEFAULT_BATCH_SIZE

if TYPE_CHECKING:
    from tqdm import tqdm

    from dm_generations.runtime.ray_pool import RayPool

MAX_LINE = 10_000  # characters of what is printed at once
PROGRESS_LINE_S = 10.0
WATCH_S = 1.0
DECODE_SCRIPT = "dm_generations_decode.py"  # of 2022, at the root of a checkout


def at_least_one(text: str) -> int:
    """Convert a flag's value.

    Raises:
        ArgumentTypeError: The number is below 1.
        ValueError: It is not a whole number.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


at_least_one.__name__ = "whole number"  # as argparse names it when int() fails


def add_archive(parser: argparse.ArgumentParser, what: str, has_default: bool = True, is_changed: bool = False) -> None:
    """Add the archive of a command, which `archive_path` returns: an argument, or the flag --db.

    Args:
        parser: Of the command.
        what: Explains it.
        has_default: Whether the emoji archive that ships stands for one that is left out.
        is_changed: Whether the command writes to it; then it has to be a file.
    """
    default = " (default: the emoji archive that ships)" if has_default else ""
    what += "" if is_changed else ", a file or an https:// or hf:// address, which is downloaded once"
    read = file_path if is_changed else _file_or_address
    group = parser.add_mutually_exclusive_group(required=not has_default)
    group.add_argument(
        "archive",
        nargs="?",
        metavar="ARCHIVE",
        type=read,
        help=f"{what}{default}; it stands before lists of values",
    )
    group.add_argument("--db", metavar="FILE", type=read, help="the same as ARCHIVE")


def add_archives(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the archives of a command, which `archive_paths` returns: arguments, or the flag --db, once for each."""
    parser.add_argument(
        "archive",
        nargs="*",
        metavar="ARCHIVE",
        type=_file_or_address,
        help=f"{what}, a file or an https:// or hf:// address, or several side by side (default: the emoji archive"
        " that ships); they stand before lists of values",
    )
    parser.add_argument(
        "--db",
        metavar="FILE",
        type=_file_or_address,
        action="append",
        default=[],
        help="the same as ARCHIVE; can be repeated",
    )


def archive_paths(args: argparse.Namespace) -> list[Path]:
    """Return the archives of a command; those with an address are downloaded.

    Raises:
        UserError: One is named twice.
    """
    paths = [_local_path(given) for given in given_archives(args)]
    for path in paths:
        if [other.absolute() for other in paths].count(path.absolute()) > 1:
            raise UserError(f"{path} is named twice; name each archive once")
    return paths


def given_archives(args: argparse.Namespace) -> list[Path | str]:
    """Return the archives that were named, paths or addresses, or the one that ships."""
    return [*args.archive, *args.db] or [shipped("archive/emoji.db")]


def archive_path(args: argparse.Namespace) -> Path:
    """Return the archive of a command, which is downloaded if an address was given."""
    return _local_path(given_archive(args) or shipped("archive/emoji.db"))


def given_archive(args: argparse.Namespace) -> Path | str | None:
    """Return the archive that was named, a path or an address; None for the one that ships."""
    return args.archive if args.db is None else args.db


def _local_path(given: Path | str) -> Path:
    if isinstance(given, Path):
        return given
    from dm_generations.api.download import find_archive

    return find_archive(given)


def _file_or_address(text: str) -> Path | str:
    return text if "://" in text else file_path(text)


def is_decode_script() -> bool:
    """Whether this program was started as the script of 2022."""
    return os.path.basename(sys.argv[0]) == DECODE_SCRIPT


def command_words(command: str) -> list[str]:
    """Return the words that start a command, as this program itself was started."""
    if is_decode_script() and command == "decode":
        return ["python", sys.argv[0]]
    if Path(sys.argv[0]).stem == "dm-generations":
        return ["dm-generations", command]
    return ["python", "-m", "dm_generations", command]


def add_selection_options(parser: argparse.ArgumentParser, best_of: str = "prompt and setting") -> None:
    """Add options that select images, which `selection_from` reads. Every command that selects has the same ones.

    Args:
        parser: Of the command.
        best_of: Whose images `--n-best` counts.
    """
    group = parser.add_argument_group(
        "which images", "all that is listed in one flag or name adds up, and all flags and names have to match"
    )
    add = group.add_argument
    add("--prompt-ids", type=int, nargs="+", default=[], metavar="ID", help="these prompts, by id")
    add("--prompt-texts", nargs="+", default=[], metavar="TEXT", help="these prompts, by their whole text")
    add(
        "--sc-prompt-ids",
        type=int,
        nargs="+",
        default=[],
        metavar="ID",
        help="these unconditional prompts (super conditioning), by id; 1 is the empty one",
    )
    add(
        "--sc-prompt-texts",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="these unconditional prompts, by their whole text",
    )
    add(
        "--where",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUES",
        help="a value, several as top_k=50,256, or a range as score=20.. or cond_scale=1..3; names are "
        f"{', '.join(WHERE_NAMES)}. time is a day as 2026-01-31 or a time (UTC), model and codec are a name or the "
        "first digits of a SHA-256, key is KEY0:KEY1, rating is the mean of people's",
    )
    add("--distinct", action="store_true", help="of images with equal tokens only the one with the highest score")
    add(
        "--n-best",
        type=at_least_one,
        metavar="N",
        help=f"only the N best of each {best_of}, by score",
    )
    add(
        "--rank-by",
        metavar="SCORER",
        help="order the images of each prompt and setting by the scores of another judge: its name, its id or the "
        "first digits of its hash (default: clip_score_input)",
    )


def selection_from(args: argparse.Namespace) -> Selection:
    """Return what the options of `add_selection_options` select."""
    filters = parse_where(args.where)
    filters.update(
        prompt=[*args.prompt_ids, *args.prompt_texts],
        sc_prompt=[*args.sc_prompt_ids, *args.sc_prompt_texts],
        distinct=args.distinct,
    )
    if args.n_best is not None:
        filters["best"] = args.n_best
    if args.rank_by is not None:
        filters["rank_by"] = args.rank_by
    return Selection.of(**filters)


def file_name(text: str) -> str:
    """Check a flag's value, such as that of an unset variable of a shell.

    Raises:
        ArgumentTypeError: It is empty, which would mean this folder, or nothing.
    """
    if not text:
        raise argparse.ArgumentTypeError("the name of the file is empty")
    return text


def file_path(text: str) -> Path:
    """Convert a flag's value. Raises ArgumentTypeError if it is empty."""
    return Path(file_name(text))


def add_model_options(parser: argparse.ArgumentParser, generates: bool) -> None:
    """Add options about models, batches and the device: of `generate`, or without `generates` of `score`."""
    group = parser.add_argument_group(
        "models", "a folder, a file or a name on the Hugging Face hub, owner/name@revision; by default the embedded one"
    )
    add = group.add_argument
    if generates:
        add("--model", metavar="PATH", help="text model that samples the tokens")
        add(
            "--tokenizer",
            metavar="PATH",
            type=file_path,
            help="tokenizer of the prompts, a file or folder, if it is not in the model's folder",
        )
        add_checkpoint_options(add)
    codec_default = " (default: the model's own if it has one, else the embedded one)" if generates else ""
    add("--codec", metavar="PATH", help=f"codec that decodes tokens to pixels{codec_default}")
    add("--clip", metavar="PATH", help="CLIP that scores the images")
    if generates:
        add("--no-score", action="store_true", help="do not score; `score` can do so later")
    add(
        "--batch-size",
        type=at_least_one,
        default=DEFAULT_BATCH_SIZE,
        metavar="N",
        help=f"images at a time; halved if memory does not hold them (default: {DEFAULT_BATCH_SIZE})",
    )
    if generates:
        add(
            "--dtype",
            choices=DTYPES,
            default="float32",
            help="of activations and caches; stored with each row; images of another dtype are not generated again "
            "(default: float32)",
        )
    add("--cpu-only", action="store_true", help="do not use accelerators")


def add_checkpoint_options(add: Callable[..., argparse.Action]) -> None:
    """Add options for what the file of a model lacks or has wrong; `add` is the method of a parser or a group."""
    add(
        "--conv-like",
        choices=["causal", "centred"],
        help="of a dalle.pt, the window of its convolutional attention: above and left of a token, as since March "
        "2022, or around it (default: as in the file)",
    )
    add(
        "--cond-scale-of",
        choices=["all", "first"],
        help="of a dalle.pt, which tokens --cond-scale guides: all, or only the first, and the rest are sampled "
        "without the prompt, as DALLE-pytorch's own program does by mistake (default: all)",
    )
    add(
        "--heads",
        type=at_least_one,
        metavar="N",
        help="of a LlamaGen model, its attention heads (default: 64 channels each, or what its size is known to have)",
    )
    add(
        "--grid",
        type=at_least_one,
        metavar="N",
        help="of a LlamaGen model, tokens a side (default: by the pixels in the name of its file, 16 a token, else 16)",
    )


def config_overrides(args: argparse.Namespace) -> dict[str, str | bool | int]:
    """Return those of these options that are set, as entries of the model's config."""
    overrides: dict[str, str | bool | int] = {} if args.conv_like is None else {"conv_like": args.conv_like}
    if args.cond_scale_of is not None:
        overrides["guides_first_code_alone"] = args.cond_scale_of == "first"
    if args.heads is not None:
        overrides["n_head"] = args.heads
    if args.grid is not None:
        overrides["block_size"] = args.grid**2
    return overrides


def add_ray_options(parser: argparse.ArgumentParser) -> None:
    """Add options for work on a Ray cluster, which `ray_pool` reads."""
    add = parser.add_argument_group("cluster", "this process reads and writes, others hold the models").add_argument
    add(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="use the Ray cluster at HOST:PORT, or auto for the one that runs on this machine; without ADDRESS use the "
        "one that RAY_ADDRESS names, else this machine alone",
    )
    add(
        "--ray-workers",
        type=at_least_one,
        metavar="N",
        help="processes that share a GPU or, on a node without GPUs, its CPUs (default: 1)",
    )


def ray_pool(args: argparse.Namespace) -> "AbstractContextManager[RayPool | None]":
    """Return the processes of `--ray`, to be entered; None without it. Raises UserError: ray is not installed."""
    if args.ray is None:
        if args.ray_workers is not None:
            raise UserError("--ray-workers has no effect without --ray")
        return contextlib.nullcontext()
    # Without reports to its makers, and without what it prints itself: errors come as exceptions, too.
    for name, value in (("USAGE_STATS_ENABLED", "0"), ("SCHEDULER_EVENTS", "0"), ("DEDUP_LOGS_SKIP_REGEX", ".")):
        os.environ.setdefault(f"RAY_{name}", value)
    try:
        from dm_generations.runtime.ray_pool import RayPool
    except ImportError as error:
        raise UserError("--ray needs the packages ray and pyarrow: pip install 'dm-generations[ray]'") from error
    address = args.ray if args.ray != "local" else os.environ.get("RAY_ADDRESS") or "local"
    return RayPool(address, args.ray_workers or 1, args.cpu_only)


def prepare_device(cpu_only: bool) -> None:
    """Configure JAX, before its first use."""
    # JAX takes most of a GPU's memory at its first use unless told otherwise; others may be using that GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if cpu_only:
        import jax

        jax.config.update("jax_platforms", "cpu")


class Progress:
    """Shows progress on stderr: a bar on a terminal, otherwise a line at least every 10 seconds. A context manager.

    Until the first images are done it says what takes the time: loading, and after the first call compiling.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._done, self._total = 0, 0
        self._stage = "loading"
        self._first: tuple[float, int] | None = None  # when the first images were done, and how many
        self._started = self._last_line = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` images are done."""
        with self._lock:
            if total and self._stage == "loading":
                self._stage, self._total = "compiling", total
                self._show_bar(total)
            if done <= self._done:
                return
            now = time.monotonic()
            if self._bar is not None:
                self._bar.set_description_str("", refresh=False)
                self._bar.update(done - self._done)
            if self._first is None:  # most of the time so far was loading and compiling
                self._first, self._last_line = (now, done), now
            self._done, self._stage = done, ""
            if done < total:
                self._print_due_line(now)

    def on_step(self, done: int, total: int) -> None:
        """Show that `done` of `total` steps of a batch are taken."""
        with self._lock:
            self._stage = f"step {done:,} of {total:,}"
            if self._bar is not None:
                self._bar.set_description_str(self._stage)

    def _show_bar(self, total: int | None) -> None:
        """Show a bar on a terminal; without a total only what is done at the moment."""
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm

        if self._bar is not None:
            self._bar.leave = False
            self._bar.close()
        rest = "" if total is None else "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
        rest += "[{elapsed}]" if total is None else "[{elapsed}<{remaining}, {rate_noinv_fmt}]"
        self._bar = tqdm(
            total=total,
            desc=self._stage,
            unit=" images",
            smoothing=0.05,
            bar_format="{desc} " + rest,
            leave=bool(total),
        )

    def _print_due_line(self, now: float) -> None:
        if self._bar is not None or now - self._last_line < PROGRESS_LINE_S:
            return
        self._last_line = now
        if self._first is None:
            print_line(f"{self._stage}: {now - self._started:,.0f} s so far", to_stderr=True)
            return
        since, count = self._first
        line = f"{self._done:,} of {self._total:,} images" + (f", {self._stage}" if self._stage else "")
        if self._done > count and now > since:
            speed = (self._done - count) / (now - since)
            line += f", {rate(speed)}, {(self._total - self._done) / speed:,.0f} s left"
        print_line(line, to_stderr=True)

    def _watch(self) -> None:
        """Show every second, until this ends, how long something takes."""
        while not self._ended.wait(WATCH_S):
            with self._lock:
                self._print_due_line(time.monotonic())
                if self._bar is not None:
                    self._bar.refresh()

    def __enter__(self) -> "Progress":
        self._started = self._last_line = time.monotonic()
        self._show_bar(None)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        with self._lock:
            if self._bar is not None:
                self._bar.leave = self._bar.leave and self._done > 0
                self._bar.close()
                self._bar = None


def rate(images_per_second: float) -> str:
    """Return a speed as text, "12.3 images/s" or "0.031 images/s"."""
    return f"{images_per_second:,.1f} images/s" if images_per_second >= 1 else f"{images_per_second:.2g} images/s"


def print_line(text: object, to_stderr: bool = False) -> None:
    """Print text, which may be of others, as one line. All that a command prints goes through here, or is JSON.

    Args:
        text: See `printable`.
        to_stderr: Print above a bar of progress, and go on where that is impossible: on a full disk, for instance.

    Raises:
        OSError: Stdout cannot be written.
    """
    line = printable(str(text), MAX_LINE)
    if not to_stderr:
        print(line)
        return
    with contextlib.suppress(OSError):
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def file_size(byte_count: int) -> str:
    """Return a size as text: 12,345,678 as "12.3 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if byte_count >= size:
            return f"{byte_count / size:.1f} {unit}"
    return f"{byte_count} bytes"


def utc_time(seconds: float) -> str:
    """Return UTC Unix seconds as "2022-07-12 10:06:41 UTC", or as the number where that is not a date."""
    try:
        return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, OSError, ValueError):
        return str(seconds)


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 image", "2,000 images"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or noun + 's'}"
