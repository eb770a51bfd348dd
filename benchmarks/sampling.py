"""Time the sampling of one token for each row of a batch: each filter, the noise, and sorting for comparison.

    python benchmarks/sampling.py                              # a minute on 2 cores
    python benchmarks/sampling.py --rows 512 --columns 16416

This happens once for each token of an image, after one step of the network.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dm_generations.sampling import logits as sampling

SHAPES = ((64, 1024), (64, 16416))
SETTINGS = {  # top_k, top_p, temperature
    "sample, greedy": (0, 1.0, 0.0),
    "sample, no filter": (0, 1.0, 1.0),
    "sample, top_k 256": (256, 1.0, 1.0),
    "sample, top_p 0.9": (0, 0.9, 1.0),
    "sample, top_k 256 and top_p 0.9": (256, 0.9, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, metavar="N", help="(default: 64)")
    parser.add_argument("--columns", type=int, metavar="N", help="of the logits (default: 1,024, then 16,416)")
    args = parser.parse_args()
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, load {os.getloadavg()[0]:.1f}", flush=True)
    shapes = [shape for shape in SHAPES if args.columns in (None, shape[1])] or [(64, args.columns)]
    for row_count, columns in shapes:
        time_shape(args.rows or row_count, columns)


def time_shape(row_count: int, columns: int) -> None:
    print(f"{row_count} rows of {columns} columns")
    for what, wall, cpu in timings(row_count, columns):
        print(f"    {what:32}{1e3 * wall:9.2f} ms ({1e3 * cpu:.2f} ms of CPU time)", flush=True)


def timings(row_count: int, columns: int) -> Iterator[tuple[str, float, float]]:
    """Return what is done, and its wall and CPU seconds."""
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(row_count, columns)) * 2, jnp.float32)
    keys = jnp.asarray(random.integers(0, 2**32, (row_count, 2), dtype=np.uint32))
    tokens, step = jnp.zeros(row_count, jnp.int32), jnp.int32(7)

    def timed(what: str, function: Callable, *arguments) -> tuple[str, float, float]:
        compiled = jax.jit(function)
        return what, *seconds_of(lambda: compiled(*arguments))

    yield timed("noise", lambda keys: sampling.gumbel(keys, step, columns), keys)
    yield timed("log_prob", lambda logits: sampling.log_prob(logits, tokens, columns), logits)
    for name, settings in SETTINGS.items():
        arrays = [jnp.full(row_count, value) for value in settings]
        yield timed(
            name, lambda *arguments: sampling.sample(arguments[0], step, *arguments[1:], columns), logits, keys, *arrays
        )
    count = min(256, columns)
    yield timed("top_k 256 alone, by bisection", sampling.keep_top_k, logits, jnp.full(row_count, count))
    yield timed("lax.top_k 256, for comparison", lambda logits: jax.lax.top_k(logits, count), logits)
    yield timed("a sort, for comparison", lambda logits: jnp.sort(logits, axis=1), logits)


def seconds_of(function: Callable, repeats: int = 10) -> tuple[float, float]:
    """Return wall and CPU seconds, each the best of some calls, without the first one, which compiles.

    The two differ by the cores that took part, and where other programs use them too.
    """
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        jax.block_until_ready(function())
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    wall, cpu = zip(*times, strict=True)
    return min(wall), min(cpu)


if __name__ == "__main__":
    main()
