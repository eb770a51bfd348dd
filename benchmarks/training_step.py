"""A step of DalleBart's training as the recipe has it, dense layers in bfloat16 and in float32, in turns.

    python benchmarks/training_step.py                   # needs '.[training]'; two minutes on 2 cores

Random captions and codes: the time of a step does not depend on them. The floor is that of the products of dense
layers alone, forward and backward, at the rate of a large float32 product; Muon's are not counted.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from timing import matrix_peak, seconds_of

from dm_generations.models.dalle_mini.network import DalleBart
from training import dalle_bart
from training.common import on_every_device

BATCH, TEXT, CODES, VOCAB, TEXT_VOCAB = 64, 16, 64, 4096, 2048


def stepper(settings: argparse.Namespace):
    """A function that takes a step from where the last call ended."""
    config = dalle_bart.config_for(VOCAB, CODES, TEXT_VOCAB)
    trainer = dalle_bart.Trainer(DalleBart(config), np.zeros((0, CODES)), [], None, settings)
    state = on_every_device(trainer.init(None))
    rng = np.random.default_rng(0)
    ids = rng.integers(TEXT_VOCAB, size=(BATCH, TEXT), dtype=np.int32)
    inputs, targets = rng.integers(VOCAB, size=(2, BATCH, CODES), dtype=np.int32)
    smoothing = np.full(BATCH, dalle_bart.LABEL_SMOOTHING, np.float32)

    def step():
        nonlocal state
        state, metrics = trainer._step(state, ids, np.ones_like(ids), inputs, targets, smoothing)
        return metrics["loss"]

    return step, state["params"]


def multiplications(params: dict) -> int:
    """Of a row of each kernel with its input, by how many rows it has: codes, or words of the text."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "kernel" in name:
            of_text = "encoder" in name or ("FlaxBartAttention_1" in name and ("k_proj" in name or "v_proj" in name))
            total += leaf.size * BATCH * (TEXT if of_text else CODES)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10, help="steps of each kind in each of two rounds")
    args = parser.parse_args()
    steps = {}
    for name in ("bfloat16", "float32"):
        settings = argparse.Namespace(seed=0, steps=1000, learning_rate=1e-3, bfloat16=name == "bfloat16")
        steps[name], params = stepper(settings)
    floor = 6 * multiplications(params) / matrix_peak("float32", 2048)
    for _ in range(2):
        for name, step in steps.items():
            print(f"{name}: {seconds_of(step, args.repeats):.2f} s a step", flush=True)
    print(f"floor of the products in float32: {floor:.2f} s")


if __name__ == "__main__":
    main()
