"""What commands share that compute: options of models and batches, and the device."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from dm_generations.archive import DTYPES
from dm_generations.cli._types import at_least_one
from dm_generations.generate import sweep as sweeps

STOPPED = 130  # the exit status of a program that Ctrl-C ended


def add_model_options(parser: argparse.ArgumentParser, generates: bool) -> None:
    """Options about models, batches and the device: of `generate`, and without `generates` of `score`."""
    group = parser.add_argument_group(
        "models", "a folder, a file or a name on the Hugging Face hub, owner/name@revision; by default what ships"
    )
    add = group.add_argument
    if generates:
        add("--model", metavar="PATH", help="text model that draws the codes")
        add(
            "--tokenizer",
            metavar="PATH",
            type=Path,
            help="file or folder that makes ids of prompts, if not beside the model",
        )
        add_dalle_pytorch_options(add)
    codec_default = " (default: the one that lies with the model, else the one that ships)" if generates else ""
    add("--codec", metavar="PATH", help=f"codec that turns codes into pixels{codec_default}")
    add("--clip", metavar="PATH", help="CLIP that scores the pictures")
    if generates:
        add("--no-score", action="store_true", help="leave the scores out; `score` adds them later")
    add(
        "--batch-size",
        type=at_least_one,
        default=sweeps.DEFAULT_BATCH_SIZE,
        metavar="N",
        help=f"pictures at a time; halved where memory does not hold them (default: {sweeps.DEFAULT_BATCH_SIZE})",
    )
    if generates:
        add(
            "--dtype",
            choices=DTYPES,
            default="float32",
            help="of activations and caches; rows remember it, and are not drawn again in another (default: float32)",
        )
    add("--cpu-only", action="store_true", help="leave accelerators alone")


def add_dalle_pytorch_options(add: Callable[..., argparse.Action]) -> None:
    """What a `dalle.pt` does not tell of itself, or tells wrongly; `add`: of a parser or a group."""
    add(
        "--conv-like",
        choices=["causal", "centred"],
        help="of a dalle.pt, the window of its convolutional attention: above and left of a code, as since March "
        "2022, or around it (default: what the file tells)",
    )
    add(
        "--cond-scale-of",
        choices=["all", "first"],
        help="of a dalle.pt, which codes a condition scale guides: all, or the first alone, the rest being drawn "
        "without the prompt, as DALLE-pytorch's own program does by mistake (default: all)",
    )


def dalle_pytorch_overrides(args: argparse.Namespace) -> dict[str, str | bool]:
    """Of these options, those that are given, as entries of the model's config."""
    overrides = {} if args.conv_like is None else {"conv_like": args.conv_like}
    if args.cond_scale_of is not None:
        overrides["guides_first_code_alone"] = args.cond_scale_of == "first"
    return overrides


def prepare_device(cpu_only: bool) -> None:
    """Settings of JAX, before its first use."""
    # JAX takes most of a GPU's memory at its first use unless told otherwise; others may be using that GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if cpu_only:
        import jax

        jax.config.update("jax_platforms", "cpu")
