"""Changes all scores of a database in one transaction, without the package, and is killed before it commits."""

import os
import signal
import sqlite3
import sys

connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 2")  # pages, so that half of the changes reach the file
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE images SET clip_score_input = 0")
os.kill(os.getpid(), signal.SIGKILL)
