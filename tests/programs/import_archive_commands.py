"""Imports the commands that need only the standard library; prints which large packages that imported."""

import sys

import dm_generations.archive
import dm_generations.cli.info
import dm_generations.cli.merge
import dm_generations.cli.verify  # noqa: F401

print(sorted({name.split(".")[0] for name in sys.modules} & {"numpy", "jax", "flax", "PIL"}))
