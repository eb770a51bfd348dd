"""Time what a new user waits for: decoding the archive that ships, generating 16 images; first and later starts.

    python benchmarks/start.py      # a minute on 2 cores

Each line is one whole process, from start to end. The compilation cache is empty at first.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def timed(what: str, environment: dict[str, str], *arguments: str) -> None:
    started = time.perf_counter()
    command = [sys.executable, "-m", "dm_generations", *arguments]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    print(f"{what:45} {time.perf_counter() - started:7.2f} s", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"XDG_CACHE_HOME": f"{folder}/cache"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        timed("--help", environment, "--help")
        for start in ("first", "second"):
            draw = ("generate", "--db", f"{folder}/{start}.db", "--prompts", f"a {start} dragon", "--n", "16")
            timed(f"generate and score 16 images, {start} start", environment, *draw)
        for run in ("first", "second"):
            timed(f"decode the shipped archive, {run} run", environment, "decode", "--out-dir", f"{folder}/images")


if __name__ == "__main__":
    main()
