"""Square the numbers below COUNT on the Ray cluster at ADDRESS; print the squares as they come.

Each call leaves a file in FOLDER. The first call for a number in --killed, or with --always every one, ends its worker,
as the system does when memory runs out.
"""

import argparse
import functools
import logging
from pathlib import Path

from ray_kit import make_square

from dm_generations.errors import UserError
from dm_generations.runtime.ray_pool import RayPool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--killed", type=int, nargs="*", default=[])
    parser.add_argument("--always", action="store_true")
    parser.add_argument("--refused", type=int, nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=0.0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    make = functools.partial(make_square, args)
    try:
        with RayPool(args.address) as pool:
            for result in pool.map(make, range(args.count)):
                print(result, flush=True)
    except UserError as error:
        print(f"error: {error}", flush=True)


if __name__ == "__main__":
    main()
