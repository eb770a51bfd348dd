"""Open the journal of FOLDER, say so, and keep it open."""

import sys
import time
from pathlib import Path

from dm_generations.export.journal import Journal

if __name__ == "__main__":
    journal = Journal(Path(sys.argv[1]))
    journal.open(create=True)
    print("open", flush=True)
    time.sleep(100)
