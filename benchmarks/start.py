"""Time what a new user waits for: decoding the archive that ships, generating 16 images; first and later starts.

    python benchmarks/start.py      # a minute on 2 cores

Each line is one whole process, from start to end. The compilation cache is empty at first.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def timed(environment: dict[str, str], *arguments: str) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-m", "dm_generations", *arguments]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def starts() -> Iterator[tuple[str, float]]:
    """Return what is done and its seconds, one after the other; `--help` first."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"XDG_CACHE_HOME": f"{folder}/cache"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        yield "--help", timed(environment, "--help")
        for start in ("first", "second"):
            generate = ("generate", "--db", f"{folder}/{start}.db", "--prompts", f"a {start} dragon", "--n", "16")
            yield f"generate and score 16 images, {start} start", timed(environment, *generate)
        for run in ("first", "second"):
            decode = ("decode", "--out-dir", f"{folder}/images")
            yield f"decode the shipped archive, {run} run", timed(environment, *decode)


def main() -> None:
    for what, seconds in starts():
        print(f"{what:45} {seconds:7.2f} s", flush=True)


if __name__ == "__main__":
    main()
