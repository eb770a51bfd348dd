"""Time the archive: writing rows, listing groups, reading a group; its size on disk and the memory it takes.

    python benchmarks/archive.py --rows 1000000

Writes a temporary archive (about 0.3 GB for 1,000,000 rows of 64 tokens) and removes it. A minute on 2 cores.
"""

import argparse
import itertools
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dm_generations.archive import Archive, ModelInfo, NewImage, merge, verify
from dm_generations.sampling.params import SamplingParams

SEEDS_PER_GROUP = 32
AXES = ((50, 256, 0), (0.9, 1.0), (0.7, 1.0, 3.0), (1.0, 3.0, 10.0))  # top_k, top_p, temperature, cond_scale


def new_images(count: int, token_count: int) -> Iterator[NewImage]:
    """Yield images in the order in which `generate` makes them, with unsorted scores and keys."""
    random.seed(0)
    settings = itertools.cycle(itertools.product(*AXES))
    prompt_numbers = itertools.count()
    made = 0
    while True:
        prompt = f"prompt number {next(prompt_numbers)}"
        for _ in range(len(list(itertools.product(*AXES)))):
            params = SamplingParams(*next(settings))
            for _ in range(SEEDS_PER_GROUP):
                if made == count:
                    return
                made += 1
                quantvec = random.randbytes(2 * token_count)
                yield NewImage(
                    prompt, None, params,
                    random.getrandbits(32), random.getrandbits(32), quantvec, 1.7e9, 1.7e9 + 1,
                    random.random() * 30, random.random() * 30, 1.7e9 + 2,
                )  # fmt: skip


def peak_memory() -> int:
    """Return the peak resident memory of this process in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


def batches(images: Iterator[NewImage], size: int) -> Iterator[list[NewImage]]:
    while batch := list(itertools.islice(images, size)):
        yield batch


class Timer:
    """Sums wall and CPU seconds of `with` blocks; the two differ if other programs use the cores."""

    def __init__(self):
        self.wall = self.cpu = 0.0

    def __enter__(self) -> "Timer":
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall += time.perf_counter() - self._start[0]
        self.cpu += time.process_time() - self._start[1]

    def report(self, what: str, count: int | None = None) -> None:
        rate = f", {count / self.wall:>9,.0f} a second" if count else ""
        cpu = f"{self.cpu:.3f} s of CPU time" + (f", {count / self.cpu:>9,.0f} a second" if count else "")
        print(f"{what:<42}{self.wall:8.3f} s{rate} ({cpu}), peak memory {peak_memory()} MB", flush=True)


def timed_write(path: Path, rows: int, token_count: int, batch_size: int) -> None:
    """Time only the archive, not the making of random images."""
    timer = Timer()
    with Archive.create(path) as archive:
        with archive.transaction():
            generator_id = archive.model_id(ModelInfo("generator", "random", "0" * 64, {}))
            side = int(token_count**0.5)
            codec = ModelInfo("codec", "random", "1" * 64, {}, grid=side, codebook_size=65536, image_size=8 * side)
            codec_id = archive.model_id(codec)
        for batch in batches(new_images(rows, token_count), batch_size):
            with timer, archive.transaction():
                archive.add_images(batch, generator_id, codec_id, None, sampler_version=1)
    timer.report(f"write {rows:,} rows, {batch_size:,} a batch", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="images to write (default: 1,000,000)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a image, a square (default: 64)")
    parser.add_argument("--batch-size", type=int, default=10_000, help="rows of a transaction (default: 10,000)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "big.db"
        timed_write(path, args.rows, args.tokens, args.batch_size)
        print(f"size: {path.stat().st_size / 1e6:,.1f} MB, {path.stat().st_size / args.rows:.0f} bytes a row")

        with (timer := Timer()), Archive.open(path) as archive:
            groups = archive.groups()
        timer.report(f"open and list {len(groups):,} groups")

        with Archive.open(path) as archive:
            with (timer := Timer()):
                read = sum(len(row.quantvec) > 0 for group in groups for row in archive.rows(group.key))
            timer.report("read every group, best first", read)
            with (timer := Timer()):
                problem_count = sum(1 for _ in verify(archive))
            timer.report(f"verify ({problem_count} problems)", args.rows)

        with (timer := Timer()):
            merge([path], Path(folder) / "merged.db")
        timer.report("merge into a new archive", args.rows)


if __name__ == "__main__":
    main()
