"""Run `merge` and kill this process after COUNT rows of a source: merge_until_killed.py COUNT ARGUMENTS..."""

import os
import signal
import sys

from dm_generations.archive import Archive
from dm_generations.cli import main

scan = Archive.scan


def scan_or_die(archive, *arguments, **options):
    for count, row in enumerate(scan(archive, *arguments, **options)):
        if count == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield row


if __name__ == "__main__":
    Archive.scan = scan_or_die
    sys.exit(main(["merge", *sys.argv[2:]]))
