"""Time and memory of a decode without the network: of a first run, and of a second one that finds all files there.

    python benchmarks/resume.py                          # 1,024 and 71,680 images: a minute and a half on 2 cores
    python benchmarks/resume.py --codec FOLDER --cpu-only --images 1024 8192

Each line is one whole process, from start to end. The codec is a tiny one for images of 8x8 pixels, which take almost
no time, unless --codec names another. Memory is the peak of the process on the host.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from decode_kit import random_tokens, write_archive_2022
from tiny import tiny_vqgan

from dm_generations.models.loading import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
IMAGES_OF_A_PROMPT = 128


def timed_decode(what: str, image_count: int, command: list[str]) -> None:
    """Run `command`, which must succeed, and print what it took."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    wall = time.perf_counter() - started
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    cpu = usage.ru_utime + usage.ru_stime
    rate = image_count / wall
    times = f"{wall:8.1f} s ({cpu:6.1f} s of CPU time), {rate:9,.0f} images a second"
    print(f"{what:<35}{times}, peak memory {peak:5.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, nargs="+", default=[1024, 71_680], help="sizes of archives (default: 1024 71680)")
    add("--codec", metavar="PATH", help="as in `decode` (default: a tiny one, made here)")
    add("--cpu-only", action="store_true", help="leave accelerators alone")
    args = parser.parse_args()
    flags = ["--cpu-only"] if args.cpu_only else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codec = args.codec or str(tiny_vqgan(folder / "codec"))
        config = load_checkpoint(codec, "codec").config
        tokens = random_tokens(IMAGES_OF_A_PROMPT, config.grid**2, config.codebook_size)
        for image_count in args.images:
            prompts = tuple(f"boat number {number}" for number in range(-(-image_count // IMAGES_OF_A_PROMPT)))
            db = write_archive_2022(folder / f"{image_count}.db", tokens, prompts)
            decode = [sys.executable, "-m", "dm_generations", "decode", "--db", str(db), "--codec", codec, *flags]
            for run in ("first", "second"):
                out = folder / f"{image_count} images"
                timed_decode(f"{image_count:,} images, {run} run", image_count, [*decode, "--out-dir", str(out)])


if __name__ == "__main__":
    main()
