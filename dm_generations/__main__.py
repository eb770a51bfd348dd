"""`python -m dm_generations`."""

import signal
import sys

from dm_generations.cli import main

if __name__ == "__main__":
    status = main()
    # A batch may still be computing, which the end waits for. A second Ctrl-C ends that at once, and quietly.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)
