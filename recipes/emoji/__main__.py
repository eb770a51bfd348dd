"""Run the whole recipe, from nothing to build/models; run it again to resume.

    python -m recipes.emoji

Needs `pip install -e '.[recipes]'` and npm, which fetches the emoji. README.md in this folder says how long each part
takes and what it makes.
"""

import os
import subprocess
import sys
import time

# glibc would return the hundreds of MB of each step to the kernel and ask for them again, which takes a tenth to a
# fifth of a step. These settings keep them, in huge pages and in one heap. Other C libraries ignore them.
MALLOC = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("hugetlb=1", "mmap_max=0", "arena_max=1", "top_pad=2147483648", "trim_threshold=4294967296")
)
STEPS = (
    ("recipes.emoji.data", "--size", "64", "--out", "build/emoji-64.npz"),
    ("recipes.emoji.captions", "--data", "build/emoji-64.npz", "--out", "build/tokenizer"),
    ("recipes.emoji.vqgan", "--run", "build/vqgan", "--out", "build/vqgan-alone"),
    ("recipes.emoji.background_decoder", "--init", "build/vqgan-alone", "--out", "build/models/vqgan"),
    ("recipes.emoji.clip", "--run", "build/clip", "--out", "build/models/clip"),
    ("recipes.emoji.dalle_bart", "--run", "build/dalle_bart", "--out", "build/models/dalle_bart"),
    ("recipes.emoji.evaluate", "--models", "build/models", "--out", "build/evaluation"),
)


def main() -> None:
    """Run each part in a process of its own and print how long it took.

    Raises:
        SystemExit: A part failed.
    """
    environment = {"GLIBC_TUNABLES": MALLOC} | os.environ
    for module, *arguments in STEPS:
        print(f"== {module}", flush=True)
        start = time.monotonic()
        if subprocess.run([sys.executable, "-m", module, *arguments], env=environment).returncode:
            raise SystemExit(f"{module} failed; run the same command again to resume")
        print(f"== {module}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
