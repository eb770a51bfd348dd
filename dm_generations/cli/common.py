"""What several commands share: types and options of flags, the device, progress, and values as text for a terminal."""

import argparse
import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from dm_generations.archive import DTYPES
from dm_generations.pipelines.sweep import DEFAULT_BATCH_SIZE

MAX_TEXT = 100  # characters of a prompt


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
            type=Path,
            help="tokenizer of the prompts, a file or folder, if it is not in the model's folder",
        )
        add_dalle_pytorch_options(add)
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


def add_dalle_pytorch_options(add: Callable[..., argparse.Action]) -> None:
    """Add options for what a `dalle.pt` lacks or has wrong; `add` is the method of a parser or a group."""
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


def dalle_pytorch_overrides(args: argparse.Namespace) -> dict[str, str | bool]:
    """Return those of these options that are set, as entries of the model's config."""
    overrides: dict[str, str | bool] = {} if args.conv_like is None else {"conv_like": args.conv_like}
    if args.cond_scale_of is not None:
        overrides["guides_first_code_alone"] = args.cond_scale_of == "first"
    return overrides


def prepare_device(cpu_only: bool) -> None:
    """Configure JAX, before its first use."""
    # JAX takes most of a GPU's memory at its first use unless told otherwise; others may be using that GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if cpu_only:
        import jax

        jax.config.update("jax_platforms", "cpu")


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[int, int], None]]:
    """Show progress on stderr.

    Yields:
        A callback for (done, total) images; the bar appears at its first call.
    """
    from dm_generations.progress import Progress

    with contextlib.ExitStack() as stack:
        bar: Progress | None = None
        previous = 0

        def on_progress(done: int, total: int) -> None:
            nonlocal bar, previous
            if bar is None and total:
                bar = stack.enter_context(Progress(total))
            if bar is not None and done > previous:
                bar.advance(done - previous)
                previous = done

        yield on_progress


def print_warning(line: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {line}", file=sys.stderr)


def printable(text: str, limit: int = MAX_TEXT) -> str:
    """Escape and shorten untrusted text for a terminal.

    Args:
        text: Any text, also with control characters.
        limit: Characters at most.
    """
    escaped = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text[: limit + 1]
    )
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


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
