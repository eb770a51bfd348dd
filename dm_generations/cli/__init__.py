"""The command line: `python -m dm_generations COMMAND`. Importing it imports neither JAX nor NumPy."""

import argparse
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from dm_generations import __version__
from dm_generations.cli import browse, convert, decode, generate, info, merge, ratings, score, verify
from dm_generations.errors import (
    EXIT_CALLBACKS,
    INTERRUPTED,
    INTERRUPTED_LINE,
    UserError,
    exit_interrupted,
    handle_sigint,
)

# Each has HELP, DESCRIPTION and EPILOG, `add_arguments(parser)`, and `run(args)`, which gives the exit status.
COMMANDS = {
    "generate": generate,
    "score": score,
    "decode": decode,
    "browse": browse,
    "info": info,
    "verify": verify,
    "merge": merge,
    "ratings": ratings,
    "convert": convert,
}
CLOSED_OUTPUT = 128 + 13  # exit status of a program whose reader has gone; Windows has no signal.SIGPIPE
DESCRIPTION = """\
An archive of text-to-image generations, and the pipeline around it: prompts become tokens in one SQLite file,
and the images are decoded from it.
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


class _LogHandler(logging.Handler):
    """Prints messages on stderr, above a bar of progress; warnings and errors with their level in front."""

    def emit(self, record: logging.LogRecord) -> None:
        message = self.format(record)
        if record.levelno > logging.INFO:
            message = f"{record.levelname.lower()}: {message}"
        with contextlib.suppress(OSError):  # a full disk, for instance, does not stop the work
            if "tqdm" in sys.modules:
                sys.modules["tqdm"].tqdm.write(message, file=sys.stderr)
            else:
                print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Print the package's log messages on stderr."""
    logger = logging.getLogger("dm_generations")
    handler = _LogHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `args.run(args)` runs the one that was parsed."""
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
    """Run a command as this process, which ends with its exit status."""
    gc.set_threshold(50_000, 20, 20)  # JAX makes many objects at the start, little of it garbage: a tenth of its time
    handle_sigint()
    try:
        status = main(argv)
    except KeyboardInterrupt:  # before or after the command itself
        exit_interrupted()
    if status in (INTERRUPTED, CLOSED_OUTPUT):
        # Other threads may still compute, and Python's own end could crash them; and closed output cannot be flushed.
        EXIT_CALLBACKS.close()
        os._exit(status)
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, exit_interrupted)
    sys.exit(status)


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 all done, 1 an error that a line on stderr explains, 130 interrupted, 141 output closed.

    Raises:
        SystemExit: A flag is wrong, with exit status 2 and a line on stderr; or the flag was --help or --version.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    elif hasattr(sys.stdout, "reconfigure"):
        # A prompt holds any character, and a name any byte, whatever the terminal or file can: as stderr does it.
        sys.stdout.reconfigure(errors="backslashreplace")
    is_debugging = False
    try:
        try:
            args = build_parser().parse_args(argv)
        finally:
            sys.stdout.flush()  # the text of --help
        is_debugging = args.debug
        with _log_to_stderr():
            status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        return CLOSED_OUTPUT
    except (UserError, OSError) as error:  # OSError: of our output, say, to a disk that is full
        if is_debugging:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except MemoryError:
        if is_debugging:
            raise
        print(
            "error: not enough memory on this machine; use a smaller --batch-size or end other programs",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(INTERRUPTED_LINE, file=sys.stderr)
        return INTERRUPTED
