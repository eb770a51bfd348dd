"""Time the reader of training: rows a second from SQLite, rows a second that steps take, and how often a step waits.

    python benchmarks/training_reader.py                 # needs '.[train]'; two minutes on 2 cores

The shipped model learns from the shipped archive in batches of 32, shuffled. A step waits if the device has ended the
one before when the batch is ready. With grain installed (`pip install grain`), it reads the same rows by the same
function: row by row, as its DataLoader does, and a batch at a time.
"""

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dm_generations.archive.selection import ALL
from dm_generations.models.loading import load_checkpoint, load_generator
from dm_generations.training.data import Examples, choose_rows
from dm_generations.training.finetune import Trainer
from dm_generations.training.options import TrainOptions

ARCHIVE = Path(__file__).resolve().parent.parent / "archive" / "emoji.db"
BATCH = 32


def open_examples() -> Examples:
    codec = load_checkpoint(None, "codec")
    return Examples([ARCHIVE], ALL, codec, codec.config.grid**2)


class Source:
    """Rows for grain, which reads on threads and in processes: each has a connection of its own."""

    def __init__(self, count: int):
        self._count, self._local = count, threading.local()

    def __reduce__(self) -> Any:
        return Source, (self._count,)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.read(np.array([index]))[0]

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Read the tokens of a batch by one query."""
        if not hasattr(self._local, "examples"):
            self._local.examples = open_examples()
        return self._local.examples.read(indices)[1]


def read_rate(batches: Iterator[Any], count: int) -> float:
    """Return the rows a second of `count` batches, after one that opens what is needed."""
    next(batches)
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    return BATCH * count / (time.perf_counter() - started)


def grain_loaders(total: int) -> dict[str, Callable[[], Iterator[Any]]]:
    import absl.flags
    import grain

    absl.flags.FLAGS.mark_as_parsed()  # which grain reads

    def loader(processes: int) -> Iterator[Any]:
        sampler = grain.samplers.IndexSampler(total, grain.sharding.NoSharding(), shuffle=True, seed=0)
        return iter(
            grain.DataLoader(
                data_source=Source(total),
                sampler=sampler,
                operations=[grain.transforms.Batch(BATCH)],
                worker_count=processes,
                read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=BATCH),
            )
        )

    return {
        "grain, row by row": lambda: loader(0),
        "grain, row by row, 2 processes": lambda: loader(2),
        "grain, a batch at a time": lambda: iter(
            grain.MapDataset.range(total).shuffle(seed=0).batch(BATCH).map(Source(total).read)
        ),
    }


class WatchedTrainer(Trainer):
    """Counts batches that were ready only after the step before had ended, and the seconds of making them."""

    last, waits, seconds = None, 0, 0.0

    def make_batch(self, step: int) -> dict[str, jax.Array]:
        started = time.perf_counter()
        batch = super().make_batch(step)
        self.seconds += time.perf_counter() - started
        self.waits += self.last is not None and self.last.is_ready()
        return batch


def measure_steps(trainer: WatchedTrainer, count: int) -> None:
    """Print the rows a second of training, the time that batches take, and how often a step waited for one."""
    state, metrics = trainer.step(trainer.put(trainer.init()), 0)
    jax.block_until_ready(metrics)  # compiled
    trainer.seconds = 0.0
    started = time.perf_counter()
    for step in range(1, count + 1):
        before = metrics
        state, metrics = trainer.step(state, step)
        trainer.last = metrics["loss"]
        jax.device_get(before)  # as `Run.train` does
    jax.block_until_ready(metrics)
    seconds = time.perf_counter() - started
    print(f"training: {BATCH * count / seconds:,.0f} rows/s, {1000 * seconds / count:.0f} ms a step")
    print(f"a batch is made in {1000 * trainer.seconds / count:.1f} ms, while the device computes the step before")
    print(f"steps that waited for their batch: {trainer.waits} of {count}")


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="steps of training that are timed (default: 40)")
    parser.add_argument("--batches", type=int, default=300, help="batches that are read (default: 300)")
    args = parser.parse_args()
    with open_examples() as examples:
        total = len(examples.rows)
        ours = (examples.read(choose_rows(0, step, BATCH, total)) for step in range(args.batches + 1))
        print(f"this reader: {read_rate(ours, args.batches):,.0f} rows/s")
        try:
            loaders = grain_loaders(total)
        except ImportError:
            loaders = {}
        for name, make in loaders.items():
            print(f"{name}: {read_rate(make(), min(args.batches, total // BATCH - 1)):,.0f} rows/s", flush=True)
        options = TrainOptions(archives=(ARCHIVE,), run=Path("unused"), steps=1000, batch_size=BATCH)
        measure_steps(WatchedTrainer(load_generator(None, None), examples, options), args.steps)


if __name__ == "__main__":
    main()
