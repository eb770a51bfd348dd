"""Options that `generate` and `score` share: models, batches and the device."""

import argparse
import os

from dm_generations.errors import UserError
from dm_generations.generate import sweep as sweeps

STOPPED = 130  # the exit status of a program that Ctrl-C ended


def add_model_options(parser: argparse.ArgumentParser, generates: bool) -> None:
    """Options about models and the device, which `score` shares."""
    group = parser.add_argument_group("models", "folders; by default the small models that ship")
    add = group.add_argument
    if generates:
        add("--model", metavar="FOLDER", help="DalleBart that draws the codes")
    add("--codec", metavar="FOLDER", help="VQGAN that turns codes into pixels")
    add("--clip", metavar="FOLDER", help="CLIP that scores the pictures")
    if generates:
        add("--no-score", action="store_true", help="leave the scores out; `score` adds them later")
    add(
        "--batch-size",
        type=int,
        default=sweeps.DEFAULT_BATCH_SIZE,
        metavar="N",
        help=f"pictures at a time; use fewer if memory runs out (default: {sweeps.DEFAULT_BATCH_SIZE})",
    )
    add("--cpu-only", action="store_true", help="leave accelerators alone")


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch-size must be at least 1, not {batch_size}")


def prepare_device(cpu_only: bool) -> None:
    """Settings of JAX, before its first use."""
    # JAX takes most of a GPU's memory at its first use unless told otherwise; others may be using that GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if cpu_only:
        import jax

        jax.config.update("jax_platforms", "cpu")
