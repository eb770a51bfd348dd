"""Run `info` on an archive, with a query that never ends in place of the first: query_for_ever.py ARCHIVE."""

import math
import sys

from dm_generations.archive import Archive, connection
from dm_generations.cli import program

connection.MAX_STEPS = math.inf


def count_for_ever(archive, *arguments):
    print("begun", flush=True)
    numbers = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
    return archive.connection.value(f"{numbers} SELECT count(i) FROM n")


if __name__ == "__main__":
    Archive.count_groups = count_for_ever
    program(["info", "--db", sys.argv[1]])
