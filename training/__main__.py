"""The whole recipe, from nothing to build/models; run it again to resume.

    python -m training

Needs `pip install -e '.[training]'` and npm, which fetches the emoji. README.md beside this file says how long each
part takes and what comes out.
"""

import os
import subprocess
import sys
import time

# A step takes and gives back hundreds of MB, which glibc gets from the kernel anew each time, 4 KB by 4 KB: a tenth
# to a fifth of the step. So it is told to keep them, in huge pages and in one heap. Other C libraries ignore this.
MALLOC = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("hugetlb=1", "mmap_max=0", "arena_max=1", "top_pad=2147483648", "trim_threshold=4294967296")
)
STEPS = (
    ("training.data", "--size", "64", "--out", "build/emoji-64.npz"),
    ("training.captions", "--data", "build/emoji-64.npz", "--out", "build/tokenizer"),
    ("training.vqgan", "--run", "build/vqgan", "--out", "build/models/vqgan"),
    ("training.clip", "--run", "build/clip", "--out", "build/models/clip"),
    ("training.dalle_bart", "--run", "build/dalle_bart", "--out", "build/models/dalle_bart"),
    ("training.evaluate", "--models", "build/models", "--out", "build/evaluation"),
)


def main() -> None:
    environment = {"GLIBC_TUNABLES": MALLOC} | os.environ
    for module, *arguments in STEPS:
        print(f"== {module}", flush=True)
        start = time.monotonic()
        if subprocess.run([sys.executable, "-m", module, *arguments], env=environment).returncode:
            raise SystemExit(f"{module} failed; run the same command again to resume")
        print(f"== {module}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
