"""Load models by name, each argument `role=name`, and print the kind of each."""

import sys

from dm_generations.models.loading import load_checkpoint

for argument in sys.argv[1:]:
    role, name = argument.split("=")
    print(load_checkpoint(name, role).kind)
