"""Opens an archive for writing after a line on stdin; prints its version."""

import sys

from dm_generations.archive import Archive

sys.stdin.readline()
with Archive.open(sys.argv[1], "w") as archive:
    print(archive.version)
