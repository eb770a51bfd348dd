"""Time the archive: rows, groups, scores, vectors, an update from version 2; its size on disk and the memory it takes.

    python benchmarks/archive.py --rows 1000000

Writes temporary archives of random data (about 1 GB for 1,000,000 rows of 64 tokens) and removes them. Three minutes on
2 cores.
"""

import argparse
import contextlib
import itertools
import random
import resource
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from dm_generations.archive import Archive, ModelInfo, NewImage, merge, verify
from dm_generations.archive.records import INSERT_COLUMNS
from dm_generations.archive.schema import ADDED_COLUMNS
from dm_generations.archive.scores import add_scores, scorer_id
from dm_generations.archive.selection import Selection, compile_selection
from dm_generations.archive.vectors import add_vectors, read_vectors
from dm_generations.paths import shipped
from dm_generations.pipelines.compare import Cmmd
from dm_generations.pipelines.find import find_duplicates, find_similar
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
            shapes = {"token_shape": (side, side), "image_shape": (8 * side, 8 * side)}
            codec = ModelInfo("codec", "random", "1" * 64, {}, codebook_size=65536, **shapes)
            codec_id = archive.model_id(codec)
        for batch in batches(new_images(rows, token_count), batch_size):
            with timer, archive.transaction():
                archive.add_images(batch, generator_id, codec_id, None, sampler_version=1)
    timer.report(f"write {rows:,} rows, {batch_size:,} a batch", rows)


def write_version_2(path: Path, source: Path) -> None:
    """Copy the rows of an archive into a file of version 2."""
    columns = [name for name in INSERT_COLUMNS if name not in ADDED_COLUMNS[3]]
    listed = ", ".join(("id", *columns))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for version in (1, 2):
            connection.executescript(shipped(f"schema/{version:04d}.sql").read_text(encoding="utf-8"))
        connection.execute("ATTACH ? AS source", (str(source),))
        with connection:
            connection.execute("INSERT INTO prompts SELECT id, desc FROM source.prompts")
            connection.execute(
                "INSERT INTO models (id, kind, name, sha256, config, grid, codebook_size, image_size)"
                " SELECT id, kind, name, sha256, config, json_extract(token_shape, '$[0]'), codebook_size,"
                " json_extract(image_shape, '$[0]') FROM source.models"
            )
            connection.execute(f"INSERT INTO images ({listed}) SELECT {listed} FROM source.images")


def timed_judgements(path: Path, rows: int, vector_count: int, width: int) -> None:
    """Time scores and vectors: adding them, ranking and searching by them."""
    random.seed(1)
    with Archive.open(path, "w") as archive:
        with archive.transaction():
            judge_id = archive.model_id(ModelInfo("scorer", "judge", "2" * 64, {}))
            clip_id = archive.model_id(ModelInfo("clip", "random", "3" * 64, {}))
            scorer = scorer_id(archive, judge_id, "image")
        values = [(row_id, random.random()) for row_id in range(1, rows + 1)]
        random.shuffle(values)
        with (timer := Timer()), archive.transaction():
            add_scores(archive, scorer, values, 1.7e9)
        timer.report("add a score to each row", rows)
        groups = archive.groups()
        with (timer := Timer()):
            where = compile_selection(archive, Selection(rank_by="judge"))
            ranked = sum(len(archive.image_ids(group.key, where=where)) for group in groups)
        timer.report("rank every group by it", ranked)
        generator = np.random.default_rng(0)
        vectors = generator.normal(size=(vector_count, width)).astype(np.float16)
        vectors[1::100] = vectors[::100]  # duplicates
        with (timer := Timer()), archive.transaction():
            add_vectors(archive, clip_id, ((place + 1, row.tobytes()) for place, row in enumerate(vectors)))
        timer.report(f"add vectors of {width} numbers", vector_count)
    with (timer := Timer()), Archive.open(path) as archive:
        found = find_similar(*read_vectors(archive, clip_id), vectors[0], 20)
    timer.report(f"find the {len(found)} most similar of {vector_count:,}")
    with (timer := Timer()), Archive.open(path) as archive:
        sets = find_duplicates(*read_vectors(archive, clip_id), 0.98)
    timer.report(f"find {len(sets):,} sets of near-duplicates")
    few = vectors[:10_000]
    with (timer := Timer()):
        Cmmd(vectors[-len(few) :]).of(few)
    timer.report(f"CMMD of 2 x {len(few):,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="images to write (default: 1,000,000)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an image, a square (default: 64)")
    parser.add_argument("--batch-size", type=int, default=10_000, help="rows of a transaction (default: 10,000)")
    parser.add_argument("--vectors", type=int, default=100_000, help="vectors to search (default: 100,000)")
    parser.add_argument("--width", type=int, default=512, help="numbers of a vector (default: 512)")
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
        (Path(folder) / "merged.db").unlink()

        old = Path(folder) / "old.db"
        write_version_2(old, path)
        size = old.stat().st_size
        with (timer := Timer()):
            Archive.open(old, "w").close()
        timer.report("update from version 2", args.rows)
        print(f"size: {size / 1e6:,.1f} MB before, {old.stat().st_size / 1e6:,.1f} MB after")
        old.unlink()

        timed_judgements(path, args.rows, min(args.vectors, args.rows), args.width)


if __name__ == "__main__":
    main()
