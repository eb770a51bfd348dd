"""Decode an archive into image files, from a checkout: `python dm_generations_decode.py --help`.

The same as `python -m dm_generations decode`.
"""

import sys

from dm_generations.__main__ import start

if __name__ == "__main__":
    start(["decode", *sys.argv[1:]])
