"""The command line: `python -m dm_generations COMMAND`. Importing it imports neither JAX nor NumPy."""

import argparse
import contextlib
import gc
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from dm_generations import __version__
from dm_generations.cli import (
    browse,
    compare,
    completion,
    contact_sheet,
    convert,
    decode,
    demo,
    encode,
    export,
    export_site,
    find,
    generate,
    import_files,
    info,
    list_images,
    merge,
    plot,
    ratings,
    score,
    train,
    verify,
    view,
)
from dm_generations.cli.common import command_words, is_decode_script, print_line
from dm_generations.errors import (
    EXIT_CALLBACKS,
    INTERRUPTED,
    INTERRUPTED_LINE,
    UserError,
    did_you_mean,
    exit_interrupted,
    handle_sigint,
    was_interrupted,
)

# Each has HELP, DESCRIPTION and EPILOG, `add_arguments(parser)`, and `run(args)`, which gives the exit status.
COMMANDS = {
    "demo": demo,
    "generate": generate,
    "score": score,
    "decode": decode,
    "export": export,
    "import": import_files,
    "view": view,
    "browse": browse,
    "export-site": export_site,
    "contact-sheet": contact_sheet,
    "find": find,
    "compare": compare,
    "ratings": ratings,
    "plot": plot,
    "info": info,
    "list": list_images,
    "verify": verify,
    "merge": merge,
    "encode": encode,
    "train": train,
    "convert": convert,
    "completion": completion,
}
CLOSED_OUTPUT = 128 + 13  # exit status of a program whose reader has gone; Windows has no signal.SIGPIPE
DESCRIPTION = """\
An archive of text-to-image generations, and the pipeline around it: prompts become tokens in one SQLite file,
and the images are decoded from it.
"""
EPILOG = """\
example:
  python -m dm_generations demo "a cute avocado"
  python -m dm_generations generate --db my.db --prompts "a rocket" "a cute avocado"
  python -m dm_generations view my.db
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line. The usage, which argparse puts first, is two dozen lines of flags here."""

    commands: Mapping[str, "_Parser"] = {}

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; an unknown flag is an error that names what is like it."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = self.commands[found.command]._option_string_actions
            flag = next((word for word in unknown if word.startswith("-")), "")
            listed = " ".join(unknown)
            self.error(f"unrecognized arguments: {listed}{did_you_mean(flag.partition('=')[0], known)}")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices or ()))
            raise

    def error(self, message: str) -> NoReturn:
        print_line(f"error: {message}; see --help", to_stderr=True)
        self.exit(2)


class _LogHandler(logging.Handler):
    """Prints messages on stderr; warnings and errors with their level in front."""

    def emit(self, record: logging.LogRecord) -> None:
        message = self.format(record)
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        print_line(level + message, to_stderr=True)


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Print the package's log messages, and warnings of libraries, on stderr."""
    handler = _LogHandler()
    logging.getLogger().addHandler(handler)
    logging.getLogger("dm_generations").setLevel(logging.INFO)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `args.run(args)` runs the one that was parsed."""
    # No abbreviations: a later flag could change what they mean.
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    words = command_words("")[:-1]
    parser = _Parser(prog=" ".join(words), description=DESCRIPTION, epilog=_as_started(EPILOG), **style)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        texts: dict[str, Any] = {"help": command.HELP, "description": command.DESCRIPTION}
        prog = " ".join(command_words(name))
        subparser = subparsers.add_parser(name, epilog=_as_started(command.EPILOG), prog=prog, **texts, **style)
        command.add_arguments(subparser)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        subparser.set_defaults(run=command.run)
    parser.commands = subparsers.choices
    return parser


def _as_started(text: str) -> str:
    """Return examples with the name that this program was started by."""
    if is_decode_script():
        text = text.replace("python -m dm_generations decode", " ".join(command_words("decode")))
    return text.replace("python -m dm_generations", " ".join(command_words("")[:-1]))


def program(argv: list[str] | None = None) -> NoReturn:
    """Run a command as this process, which ends with its exit status."""
    gc.set_threshold(50_000, 20, 20)  # JAX makes many objects at the start, little of it garbage: a tenth of its time
    _open_closed_streams()
    handle_sigint()
    logging.captureWarnings(True)
    try:
        try:
            status = main(argv)
        except SystemExit as stop:  # from the parser
            status = int(stop.code or 0)
        except Exception:  # for --debug, or a mistake in this program
            if was_interrupted():  # the error is what a library made of it
                exit_interrupted()
            for line in traceback.format_exc().splitlines():
                print_line(line, to_stderr=True)
            status = 1
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        EXIT_CALLBACKS.close()
        # At once: other threads may still compute, and a signal at Python's own end, or that end itself, crash them.
        os._exit(status)
    except KeyboardInterrupt:  # before or after the command itself
        exit_interrupted()


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 all done, 1 an error that a line on stderr explains, 130 interrupted, 141 output closed.

    Raises:
        SystemExit: A flag is wrong, with exit status 2 and a line on stderr; or the flag was --help or --version.
    """
    if hasattr(sys.stdout, "reconfigure"):
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
        if is_debugging or was_interrupted():
            raise
        print_line(f"error: {error}", to_stderr=True)
        return 1
    except MemoryError:
        if is_debugging:
            raise
        print_line(
            "error: not enough memory on this machine; use a smaller --batch-size or end other programs",
            to_stderr=True,
        )
        return 1
    except KeyboardInterrupt:
        print_line(INTERRUPTED_LINE, to_stderr=True)
        return INTERRUPTED


def _open_closed_streams() -> None:
    """Open the null device for standard streams that are closed, and so the numbers that other files would get."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
