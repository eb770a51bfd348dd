"""Updates an archive of an older version, and is killed before its COMMIT, or before a statement with this number."""

import os
import signal
import sys
from pathlib import Path

from dm_generations.archive import schema
from dm_generations.archive.connection import connect

connection = connect(Path(sys.argv[1]), "w", timeout=10)
connection.execute("PRAGMA cache_size = 10")  # pages, so that half of the step reaches the file
execute, limit, count = connection.execute, int(sys.argv[2]) if len(sys.argv) > 2 else None, 0


def execute_until_killed(sql, parameters=()):
    """Run a statement, or end."""
    global count
    count += 1
    if count == limit or sql == "COMMIT":
        os.kill(os.getpid(), signal.SIGKILL)
    return execute(sql, parameters)


connection.execute = execute_until_killed
schema.upgrade(connection)
