"""Run the command line and interrupt it while it imports a module: interrupt_import.py MODULE ARGUMENTS..."""

import signal
import sys


class Interrupter:
    """Raises SIGINT when a module is looked for; finds none itself."""

    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    sys.meta_path.insert(0, Interrupter())
    from dm_generations.__main__ import start

    start(sys.argv[2:])
