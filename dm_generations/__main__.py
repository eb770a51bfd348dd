"""`python -m dm_generations`."""

import sys

from dm_generations.cli import main

if __name__ == "__main__":
    sys.exit(main())
