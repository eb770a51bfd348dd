"""Time the decode of an archive by Ray on this machine against the plain command, both after their start.

    python benchmarks/ray_decode.py                      # the best images of the archive that ships: a minute
    python benchmarks/ray_decode.py --n-best 8           # all 6,048
    python benchmarks/ray_decode.py --ray-workers 1 2

Each line is one command that writes PNG files. The start ends when the first images are written: loading, compiling
and, for Ray, starting its processes. CPU time is that of all its processes after the start; where other programs keep
the cores busy, it says more than the time. The driver's share of it bounds what one driver can do.
"""

import argparse
import json
import os
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
    plain = (0.0, 0.0)
    for workers in [0, *args.ray_workers] * args.repeats:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *sys.argv, "--workers", str(workers), "--out-dir", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        start, seconds, cpu, driver, count = json.loads(done.stdout.splitlines()[-1])
        plain = plain if workers else (seconds, cpu)
        what = f"Ray, {workers} a node or GPU" if workers else "the plain command"
        rate = f"{count:,} images in {seconds:6.1f} s ({seconds / plain[0]:.2f} times plain)"
        times = f"CPU {cpu:6.1f} s ({cpu / plain[1]:.2f} times), driver {1e3 * driver / count:.2f} ms an image"
        print(f"{what:24} start {start:5.1f} s, then {rate}, {times}", flush=True)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that descend from it. Linux."""
    parents, times = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(name)], times[int(name)] = int(fields[1]), (int(fields[11]) + int(fields[12]))
    found = [os.getpid()]
    for parent in found:
        found += [pid for pid, its_parent in parents.items() if its_parent == parent]
    return sum(times[pid] for pid in found) / os.sysconf("SC_CLK_TCK")


def decode(args: argparse.Namespace) -> tuple[float, float, float, float, int]:
    """Return seconds until the first images were written, then seconds, CPU seconds of all and of this, and images."""
    if args.workers:
        from dm_generations.runtime.ray_pool import RayPool

        pool = RayPool(args.ray, args.workers)
    else:
        pool = nullcontext()
    seen: list[tuple[float, float, float, int]] = []

    def note(done: int, total: int) -> None:
        if done == total or (done and not seen):
            seen.append((time.perf_counter(), cpu_seconds(), time.process_time(), done))

    started = time.perf_counter()
    options = ExportOptions(args.out_dir, selection=Selection.of(best=args.n_best), codec=args.codec)
    with Archive.open(args.db) as archive, pool as entered:
        export_archive(archive, options, note, pool=entered)
    first, last = seen[0], seen[-1]
    return first[0] - started, *(after - before for before, after in zip(first, last, strict=True))


if __name__ == "__main__":
    main()
