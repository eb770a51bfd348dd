"""The command line: `python -m dm_generations COMMAND`. Importing it imports neither JAX nor NumPy."""

import argparse
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from dm_generations import __version__
from dm_generations.cli import convert, decode, generate, info, merge, score, verify
from dm_generations.errors import UserError

# Each has HELP, DESCRIPTION and EPILOG, `add_arguments(parser)`, and `run(args)`, which gives the exit status.
COMMANDS = {
    "generate": generate,
    "score": score,
    "decode": decode,
    "info": info,
    "verify": verify,
    "merge": merge,
    "convert": convert,
}
SIGPIPE = 13  # which the module signal lacks on Windows
DESCRIPTION = """\
An archive of text-to-image generations, and the pipeline around it: prompts become code vectors in one SQLite file,
and the pictures are rebuilt from it.
"""
EPILOG = """\
example:
  python -m dm_generations generate --db my.db --prompts "a rocket" "a cute avocado"
  python -m dm_generations decode --db my.db
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line. The usage, which argparse puts first, is two dozen lines of flags here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


class _LogFormatter(logging.Formatter):
    """Messages as they are, warnings and errors with their level in front."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {message}"


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Print the package's log messages on stderr."""
    logger = logging.getLogger("dm_generations")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LogFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def build_parser() -> argparse.ArgumentParser:
    # No abbreviations: a later flag could change what they mean.
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser(prog="dm_generations", description=DESCRIPTION, epilog=EPILOG, **style)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        texts: dict[str, Any] = {"help": command.HELP, "description": command.DESCRIPTION, "epilog": command.EPILOG}
        subparser = subparsers.add_parser(name, **texts, **style)
        command.add_arguments(subparser)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        subparser.set_defaults(run=command.run)
    return parser


def program(argv: list[str] | None = None) -> NoReturn:
    """`main`, whose status ends this process."""
    gc.set_threshold(50_000, 20, 20)  # JAX makes many objects at the start, little of it garbage: a tenth of its time
    status = main(argv)
    # A batch may still be computing, which the end waits for. A second Ctrl-C ends that at once, and quietly.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit status: 0 all done, 1 an error that a line on stderr explains, 130 interrupted.

    A flag that is wrong in itself ends the program, with a line too and exit status 2.
    """
    if hasattr(sys.stdout, "reconfigure"):
        # A prompt holds any character, and a name any byte, whatever the terminal or file can: as stderr does it.
        sys.stdout.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        with _log_to_stderr():
            status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        return 128 + SIGPIPE
    except (UserError, OSError) as error:  # OSError: of our output, say, to a disk that is full
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; repeat the command to go on", file=sys.stderr)
        return 128 + signal.SIGINT
