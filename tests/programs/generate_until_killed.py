"""Run `generate` and kill this process within a transaction: generate_until_killed.py COUNT ARGUMENTS...

It dies in the first transaction that brings the archive above COUNT images.
"""

import os
import signal
import sys

from dm_generations.archive import Archive
from dm_generations.cli import main

add_images = Archive.add_images


def add_images_or_die(archive, images, *rest):
    added = add_images(archive, images, *rest)
    if archive.count() > int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return added


if __name__ == "__main__":
    Archive.add_images = add_images_or_die
    sys.exit(main(["generate", *sys.argv[2:]]))
