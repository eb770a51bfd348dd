"""Time a training step of the recipe's DalleBart, with dense layers in bfloat16 and in float32, in turns.

    python benchmarks/training_step.py                   # needs '.[recipes]'; two minutes on 2 cores

Captions and tokens are random, which does not change the time of a step. The floor is the time of the products of dense
layers, forward and backward, at the rate of a large float32 product; Muon's products are not counted.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from timing import matrix_peak, seconds_of

from dm_generations.models.dalle_mini.network import DalleBart
from recipes.emoji import dalle_bart
from recipes.emoji.backgrounds import Tokens
from recipes.emoji.common import replicate

BATCH, TEXT, CODES, VOCAB, TEXT_VOCAB = 64, 16, 64, 4096, 2048


def make_step(settings: argparse.Namespace) -> tuple[Callable[[], jax.Array], dict]:
    """Make a function that takes the next step.

    Returns:
        The function, which returns the loss, and the parameters at the start.
    """
    config = dalle_bart.make_config(VOCAB, CODES, TEXT_VOCAB)
    side = round(CODES**0.5)
    no_emoji = Tokens(np.zeros((0, side, side), np.int32), np.zeros((0, side, side), bool), np.zeros(0, int), None)
    trainer = dalle_bart.Trainer(DalleBart(config), no_emoji, [], None, settings)
    state = replicate(trainer.init(None))
    rng = np.random.default_rng(0)
    ids = rng.integers(TEXT_VOCAB, size=(BATCH, TEXT), dtype=np.int32)
    inputs, targets = rng.integers(VOCAB, size=(2, BATCH, CODES), dtype=np.int32)
    first = np.full((BATCH, VOCAB + 1), 1 / (VOCAB + 1), np.float32)
    smoothing = np.full(BATCH, dalle_bart.LABEL_SMOOTHING, np.float32)

    def step() -> jax.Array:
        nonlocal state
        state, metrics = trainer.update(state, ids, np.ones_like(ids), inputs, targets, first, smoothing)
        return metrics["loss"]

    return step, state["params"]


def count_multiplications(params: dict) -> int:
    """Count the multiplications of all kernels, by whether the kernel reads text tokens or tokens."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "kernel" in name:
            reads_text = "encoder" in name or ("FlaxBartAttention_1" in name and ("k_proj" in name or "v_proj" in name))
            total += leaf.size * BATCH * (TEXT if reads_text else CODES)
    return total


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10, help="steps of each kind in each of two rounds")
    args = parser.parse_args()
    steps = {}
    for name in ("bfloat16", "float32"):
        settings = argparse.Namespace(seed=0, steps=1000, learning_rate=1e-3, bfloat16=name == "bfloat16")
        steps[name], params = make_step(settings)
    floor = 6 * count_multiplications(params) / matrix_peak("float32", 2048)
    for _ in range(2):
        for name, step in steps.items():
            print(f"{name}: {seconds_of(step, args.repeats):.2f} s a step", flush=True)
    print(f"floor of the products in float32: {floor:.2f} s")


if __name__ == "__main__":
    main()
