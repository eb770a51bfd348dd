"""Compare the time to read a batch from an archive with that of a training step of the embedded model.

    python benchmarks/training_data.py                   # needs '.[train]'; a minute on 2 cores

Rows are read by SQLite one batch at a time, in random order, while the devices compute the step before. As long as a
batch takes less than a step, the devices do not wait.
"""

import argparse
import sys
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dm_generations.archive.selection import ALL
from dm_generations.models.loading import load_checkpoint
from dm_generations.training.data import Examples
from dm_generations.training.finetune import Trainer
from dm_generations.training.options import TrainOptions


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--db", type=Path, default=Path("archive/emoji.db"), help="archive of the embedded codec")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a batch (default: 64)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each measurement (default: 20)")
    args = parser.parse_args()
    base, codec = load_checkpoint(None, "generator"), load_checkpoint(None, "codec")
    options = TrainOptions(archives=(args.db,), run=Path("unused"), batch_size=args.batch_size)
    with Examples(options.archives, ALL, codec, base.config.image_length) as examples:
        trainer = Trainer(base, examples, options)
        state, _ = trainer.step(trainer.put(trainer.init()), 0)
        jax.block_until_ready(state)
        start = time.perf_counter()
        for step in range(args.steps):
            trainer.make_batch(step)
        batch_s = (time.perf_counter() - start) / args.steps
        start = time.perf_counter()
        for step in range(args.steps):
            state, _ = trainer.step(state, step)
        jax.block_until_ready(state)
        step_s = (time.perf_counter() - start) / args.steps
    print(f"a batch of {args.batch_size} from {args.db}: {batch_s * 1e3:.1f} ms")
    print(f"a step, the batch included: {step_s * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
