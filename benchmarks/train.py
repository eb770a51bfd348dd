"""Time a step of `train` on the shipped model and archive, and measure the memory of low-rank training.

    python benchmarks/train.py step      # a minute on 2 cores
    python benchmarks/train.py memory    # `train --lora-rank 8` on DALL-E mini's shape; 5 GB of memory, 1 GB of disk

The floor of a step is the time of the products with its kernels, forward and backward, at the rate of a large product;
beside it is the time of the same products alone. Attention, norms and the optimizer are not counted. Memory is
the most that the whole process has, the program included, beside the weights in bfloat16.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from timing import matrix_peak, seconds_of

from dm_generations.archive.selection import ALL
from dm_generations.models.dalle_mini.config import DalleBartConfig
from dm_generations.models.loading import EMBEDDED, load_checkpoint, load_generator
from dm_generations.models.registry import parameter_shapes
from dm_generations.training.data import Examples
from dm_generations.training.finetune import Trainer
from dm_generations.training.options import TrainOptions
from dm_generations.weights import native

ARCHIVE = Path(__file__).resolve().parent.parent / "archive" / "emoji.db"


def find_products(params: dict, text_rows: int, token_rows: int) -> list[tuple[int, int, int]]:
    """Return rows, inputs and outputs of each kernel, by whether it reads text tokens or tokens."""
    found = []
    for path, leaf in native.flatten(params).items():
        if path.endswith("kernel"):
            is_cross = "FlaxBartAttention_1" in path and path.split("/")[-2] in ("k_proj", "v_proj")
            found.append((text_rows if "/encoder/" in path or is_cross else token_rows, *leaf.shape))
    return found


def time_products(shapes: list[tuple[int, int, int]]) -> float:
    """Return the seconds of the three products of each kernel: forward, and of both gradients."""
    arrays = [
        (np.ones(one[:2], np.float32), np.ones(one[1:], np.float32), np.ones(one[::2], np.float32)) for one in shapes
    ]
    placed = jax.device_put(arrays)
    products = jax.jit(lambda arrays: [(x @ w, x.T @ g, g @ w.T) for x, w, g in arrays])
    return seconds_of(lambda: products(placed), 10)


def step(args: argparse.Namespace) -> None:
    """Print the seconds of a step and of its products."""
    model, codec = load_generator(None, None), load_checkpoint(None, "codec")
    size = args.batch_size
    options = TrainOptions(archives=(ARCHIVE,), run=Path(), batch_size=size, dtype=args.dtype)
    with Examples(options.archives, ALL, codec, model.config.image_length) as examples:
        trainer = Trainer(model, examples, options)
        state, number = trainer.put(trainer.init()), 0

        def take() -> jax.Array:
            nonlocal state, number
            state, metrics = trainer.step(state, number)
            number += 1
            return metrics["loss"]

        seconds = seconds_of(take, 10)
    config = trainer.checkpoint.config
    shapes = find_products(trainer.checkpoint.params, size * config.max_text_length, size * config.image_length)
    floor = 6 * sum(map(math.prod, shapes)) / matrix_peak("float32", 2048)
    own = time_products(shapes)
    print(f"a step of {size} images, {args.dtype}: {seconds:.3f} s, {size / seconds:,.0f} images/s")
    for what, other in (("at the rate of a large product", floor), ("of their own sizes, alone", own)):
        print(f"its products in float32, {what}: {other:.3f} s; the step takes {seconds / other:.2f} times as long")


def memory(args: argparse.Namespace) -> None:
    """Print the most memory of low-rank training on DALL-E mini's shape with the shipped tokenizer and codec."""
    config = DalleBartConfig.from_dict({"image_vocab_size": 4096, "image_length": 64})
    shapes = parameter_shapes("dalle_bart", config)
    rng = np.random.default_rng(0)
    flat = {
        path: (0.02 * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)
        for path, shape in shapes.items()
    }
    weights = sum(array.nbytes for array in flat.values())
    values = {"image_vocab_size": 4096, "image_length": 64}
    with tempfile.TemporaryDirectory() as folder:
        native.save(Path(folder, "mini"), "dalle_bart", values, native.unflatten(flat))
        del flat
        command = [sys.executable, "-m", "dm_generations", "train", str(ARCHIVE), "--model", f"{folder}/mini"]
        command += ["--tokenizer", str(EMBEDDED / "dalle_bart" / "tokenizer.json"), "--lora-rank", "8"]
        command += ["--dtype", "bfloat16", "--batch-size", str(args.batch_size), "--steps", "2", "--warmup", "0"]
        command += ["--run", f"{folder}/run", "--held-out", "0", *(["--recompute"] if args.recompute else [])]
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"train stopped with {os.waitstatus_to_exitcode(status)}")
    print(
        f"weights {weights / 1e9:.2f} GB; at most {usage.ru_maxrss * 1024 / 1e9:.2f} GB in use, "
        f"{usage.ru_maxrss * 1024 / weights:.2f} times as much"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "memory"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of `step`")
    parser.add_argument("--batch-size", type=int, metavar="N", help="(default: 32, of `memory` 1)")
    parser.add_argument("--recompute", action="store_true", help="of `memory`: compute activations again")
    args = parser.parse_args()
    if args.batch_size is None:
        args.batch_size = 32 if args.what == "step" else 1
    {"step": step, "memory": memory}[args.what](args)


if __name__ == "__main__":
    main()
