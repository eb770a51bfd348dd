"""Extract an archive, print the folder, and wait to be killed."""

import sys
import time
from pathlib import Path

from dm_generations.weights.tar import extract

print(extract(Path(sys.argv[1]), {"config.yaml": "config.yaml"}), flush=True)
time.sleep(60)
