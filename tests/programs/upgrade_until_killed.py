"""Updates an archive of version 1 and is killed before it commits."""

import os
import signal
import sys
from pathlib import Path

from dm_generations.archive import schema
from dm_generations.archive.connection import connect

connection = connect(Path(sys.argv[1]), "w", timeout=10)
connection.execute("PRAGMA cache_size = 10")  # pages, so that half of the step reaches the file
with connection.transaction():
    schema.upgrade(connection)
    os.kill(os.getpid(), signal.SIGKILL)
