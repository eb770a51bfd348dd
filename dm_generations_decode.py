"""Decode an archive into picture files, from a checkout: `python dm_generations_decode.py --help`.

The same as `python -m dm_generations decode`.
"""

import sys

from dm_generations.cli import program

if __name__ == "__main__":
    program(["decode", *sys.argv[1:]])
