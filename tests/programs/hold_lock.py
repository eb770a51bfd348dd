"""Lock the database FILE with a transaction of KIND, say so, and hold it until standard input ends."""

import sqlite3
import sys

if __name__ == "__main__":
    path, kind = sys.argv[1:]
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"BEGIN {kind}")
    print("locked", flush=True)
    sys.stdin.read()
