"""Write a temporary file in FOLDER, say so, and give it its name when a line is read."""

import sys
from pathlib import Path

from dm_generations.atomic_io import replacing

if __name__ == "__main__":
    with replacing(Path(sys.argv[1]) / "whole") as file:
        file.write(b"whole")
        print("open", flush=True)
        sys.stdin.readline()
