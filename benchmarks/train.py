"""Time a step of `train` on the shipped model and archive, and measure the memory of low-rank training.

    python benchmarks/train.py step      # a minute on 2 cores
    python benchmarks/train.py memory    # `--lora-rank 8 --dtype bfloat16` on DALL-E mini's shape; 5 GB, two minutes

The floor of a step is the time of the products with its kernels, forward and backward, at the rate of a large product;
beside it is the time of the same products alone. Attention, norms and the optimizer are not counted. Memory is
what the compiled step needs, and the most that the whole process had, the program included.
"""

import argparse
import dataclasses
import math
import resource
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from timing import matrix_peak, seconds_of

from dm_generations.archive.selection import ALL
from dm_generations.models.dalle_mini.config import DalleBartConfig
from dm_generations.models.loading import load_checkpoint, load_generator
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
    """Print what low-rank training needs on DALL-E mini's shape, with the shipped tokenizer and codec."""
    config = DalleBartConfig.from_dict({"image_vocab_size": 4096, "image_length": 64})
    shapes = parameter_shapes("dalle_bart", config)
    params = native.unflatten({path: np.zeros(shape, ml_dtypes.bfloat16) for path, shape in shapes.items()})
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    model = dataclasses.replace(load_generator(None, None), config=config, params=params)
    options = TrainOptions(
        archives=(ARCHIVE,),
        run=Path(),
        batch_size=args.batch_size,
        dtype="bfloat16",
        lora_rank=8,
        recompute=args.recompute,
    )
    with Examples(options.archives, ALL, load_checkpoint(None, "codec"), config.image_length) as examples:
        trainer = Trainer(model, examples, options)
        state = trainer.put(trainer.init())
        compiled = trainer._step.lower(state, trainer._frozen, trainer.make_batch(0)).compile().memory_analysis()
        for number in range(2):
            state, metrics = trainer.step(state, number)
        jax.block_until_ready(metrics)
    print(f"weights in bfloat16: {weights / 1e9:.2f} GB; in multiples of them:")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for what, size in (
        ("what a step is given", compiled.argument_size_in_bytes),
        ("what it needs besides", compiled.temp_size_in_bytes),
        ("the most that the process had", used),
    ):
        print(f"{what}: {size / weights:.2f}")


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
