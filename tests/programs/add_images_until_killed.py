"""Adds batches of images to an archive, prints the count after each, and is killed in the middle of the fourth one."""

import os
import signal
import sys

from archive_kit import new_image

from dm_generations.archive import Archive

archive = Archive.open(sys.argv[1], "w")
archive.connection.execute("PRAGMA cache_size = 10")  # pages, so that half a batch reaches the file
for key in range(1000, 100_000, 5000):
    with archive.transaction():
        archive.add_images((new_image(key + i) for i in range(5000)), None, None, None, 1)
        if key > 12_000:
            os.kill(os.getpid(), signal.SIGKILL)
    print(archive.count(), flush=True)
