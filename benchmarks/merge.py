"""Time merging many archives into one, a command for each, with one that is killed; and what is read of the whole.

    python benchmarks/merge.py --parts 20 --rows 100000

Writes temporary archives of random data (about 5 GB for 20 archives of 100,000 rows of 256 tokens) and removes them.
The lines are those of the table on the page on performance. CPU time tells what a quiet core would take.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from archive import new_images
from dm_generations.archive import Archive, ModelInfo, Selection
from dm_generations.archive.listing import list_rows

ROOT = Path(__file__).resolve().parent.parent


def print_row(what: str, wall: float, cpu: float, more: str = "") -> None:
    print(f"| {what} | {wall:.1f} s | {cpu:.1f} s | {more} |", flush=True)


def run(*words: object) -> tuple[float, float, int]:
    """Run a command; return its seconds, its seconds of CPU time, and the largest memory of any so far in MB."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "dm_generations", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, cpu, after.ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def write_parts(folder: Path, parts: int, rows: int, token_count: int) -> list[Path]:
    """Write archives that differ in their prompts."""
    side = int(token_count**0.5)
    shapes = {"token_shape": (side, side), "image_shape": (8 * side, 8 * side)}
    codec = ModelInfo("codec", "random", "1" * 64, {}, codebook_size=65536, **shapes)
    generator = ModelInfo("generator", "random", "0" * 64, {})
    images = new_images(parts * rows, token_count)
    paths = [folder / f"part-{number}.db" for number in range(parts)]
    for path in paths:
        with Archive.create(path) as target, target.transaction():
            ids = map(target.model_id, (generator, codec))
            target.add_images(itertools.islice(images, rows), *ids, None, sampler_version=1)
    return paths


def kill_while_it_merges(part: Path, whole: Path) -> bool:
    """Start a command and kill it in its transaction; returns whether it was in one."""
    journal = whole.with_name(f"{whole.name}-journal")
    words = [sys.executable, "-m", "dm_generations", "merge", "--into", whole, part]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=ROOT) as process:
        while process.poll() is None and not journal.exists():
            time.sleep(0.01)
        time.sleep(1)
        process.kill()
    return journal.exists()


@contextlib.contextmanager
def read_part(path: Path, what: str) -> Iterator[None]:
    """Print the time of a block, and how much of a file it read."""
    before, started, cpu = read_bytes(), time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    read = read_bytes() - before
    print_row(what, wall, cpu, f"{read / 1e6:,.1f} MB read, {read / path.stat().st_size:.2%} of the file")


def read_bytes() -> int:
    """Return how many bytes this process has read, from the system's cache too."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
    return 0


def time_verify(parts: list[Path]) -> None:
    """Check each archive, several at a time."""
    processes = os.cpu_count() or 1
    started, before = time.perf_counter(), os.times()
    with concurrent.futures.ThreadPoolExecutor(processes) as threads:
        list(threads.map(lambda part: run("verify", part), parts))
    wall, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    print_row(f"`verify` of each, {processes} at a time", wall, cpu)


def time_merges(parts: list[Path], whole: Path) -> None:
    """Merge one archive after the other, the last one once more after a command that was killed."""
    found = [run("merge", "--into", whole, part) for part in parts[:-1]]
    for number in (0, len(found) - 1):
        wall, cpu, memory = found[number]
        print_row(f"`merge` archive {number + 1} of {len(parts)}", wall, cpu, f"{memory} MB of memory at most")
    was_killed = kill_while_it_merges(parts[-1], whole)
    wall, cpu, memory = run("merge", "--into", whole, parts[-1])
    what = "after the same command was killed in it" if was_killed else "once more"
    print_row(f"`merge` archive {len(parts)}, {what}", wall, cpu, f"{memory} MB of memory at most")
    found.append((wall, cpu, memory))
    print_row(
        f"`merge` all {len(parts)}, a command each", sum(each[0] for each in found), sum(each[1] for each in found)
    )
    wall, cpu, memory = run("merge", "--into", whole, parts[0])
    print_row("`merge` archive 1 once more", wall, cpu, "all of its images are there")


def time_whole(whole: Path, row_count: int) -> None:
    """Check the whole, and read parts of it."""
    wall, cpu, _ = run("verify", whole)
    print_row("`verify` of the whole", wall, cpu, f"{whole.stat().st_size / 1e6:,.0f} MB")
    with read_part(whole, "open it, list 20 images"), Archive.open(whole) as archive:
        count = len(list(list_rows(archive, Selection(), 20)))
    with read_part(whole, "open it, read the images of a prompt"), Archive.open(whole) as archive:
        groups = archive.groups(prompt="prompt number 1")
        count += sum(1 for group in groups for _ in archive.rows(group.key))
    with Archive.open(whole) as archive:
        assert count > 20
        assert archive.count() == row_count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=20, help="archives to merge (default: 20)")
    parser.add_argument("--rows", type=int, default=100_000, help="images of each (default: 100,000)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an image, a square (default: 256)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, whole = Path(name), Path(name) / "whole.db"
        parts = write_parts(folder, args.parts, args.rows, args.tokens)
        print("| what | time | CPU time | |\n|---|---|---|---|", flush=True)
        time_verify(parts)
        time_merges(parts, whole)
        time_whole(whole, args.parts * args.rows)


if __name__ == "__main__":
    main()
