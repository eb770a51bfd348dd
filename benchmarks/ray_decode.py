"""Time the decode of an archive by Ray on this machine against the plain command, both after their start.

    python benchmarks/ray_decode.py                      # 8,960 images of the archive that ships: a minute on 2 cores
    python benchmarks/ray_decode.py --n-best 8           # all 71,680
    python benchmarks/ray_decode.py --ray-workers 1 2

Each line is one process that writes PNG files. The start ends when the first images are written: loading, compiling
and, for Ray, starting its processes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dm_generations.archive import Archive, Selection
from dm_generations.export.exporter import ExportOptions, export_archive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--db", default="archive/emoji.db", metavar="FILE", help="(default: the archive that ships)")
    add("--codec", metavar="PATH", help="(default: the one that ships)")
    add("--n-best", type=int, default=1, metavar="N", help="of each prompt and setting (default: 1)")
    add("--ray-workers", type=int, nargs="+", default=[1], metavar="N", help="(default: 1)")
    add("--repeats", type=int, default=1, metavar="N", help="of each, in turn (default: 1)")
    add("--ray", metavar="ADDRESS", default="local", help="(default: a cluster of this machine, started for each run)")
    add("--workers", type=int, help=argparse.SUPPRESS)  # what a process of its own runs: 0 is the plain command
    add("--out-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.workers is not None:
        print(json.dumps(decode(args)))
        return
    plain = 0.0
    for workers in [0, *args.ray_workers] * args.repeats:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *sys.argv, "--workers", str(workers), "--out-dir", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        start, seconds, count = json.loads(done.stdout.splitlines()[-1])
        plain = plain if workers else seconds
        what = f"Ray, {workers} a node or GPU" if workers else "the plain command"
        rate = f"{count:,} images in {seconds:6.1f} s, {count / seconds:7,.0f} a second"
        print(f"{what:24} start {start:5.1f} s, then {rate}, {seconds / plain:.2f} times plain", flush=True)


def decode(args: argparse.Namespace) -> tuple[float, float, int]:
    """Return seconds until the first images were written, those from then on, and the images of these."""
    if args.workers:
        from dm_generations.runtime.ray_pool import RayPool

        pool = RayPool(args.ray, args.workers)
    else:
        pool = nullcontext()
    seen: list[tuple[float, int]] = []

    def note(done: int, total: int) -> None:
        if done:
            seen.append((time.perf_counter(), done))

    started = time.perf_counter()
    options = ExportOptions(args.out_dir, selection=Selection.of(best=args.n_best), codec=args.codec)
    with Archive.open(args.db) as archive, pool as entered:
        export_archive(archive, options, note, entered)
    (first, first_count), (last, last_count) = seen[0], seen[-1]
    return first - started, last - first, last_count - first_count


if __name__ == "__main__":
    main()
