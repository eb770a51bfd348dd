"""Run one command of the package, and print as JSON the package's files in which a function ran on the way.

Not counted: what runs while a module is imported, and the parsing of flags.
"""

import argparse
import inspect
import json
import sys
import threading
from pathlib import Path
from types import FrameType

import dm_generations
from dm_generations.cli import build_parser

PACKAGE = Path(dm_generations.__file__).parent
_seen: set[str] = set()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            return True
        frame = frame.f_back
    return False


def _record(frame: FrameType, event: str, _: object) -> None:
    code = frame.f_code
    is_function = code.co_flags & inspect.CO_OPTIMIZED
    is_new = code.co_filename.startswith(str(PACKAGE)) and code.co_filename not in _seen
    if event == "call" and is_function and is_new and not _is_importing(frame):
        _seen.add(code.co_filename)


def _run(args: argparse.Namespace) -> int:
    threading.setprofile(_record)
    sys.setprofile(_record)
    try:
        return args.run(args)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


if __name__ == "__main__":
    status = _run(build_parser().parse_args(sys.argv[1:]))
    print(json.dumps(sorted(Path(name).relative_to(PACKAGE).as_posix() for name in _seen)))
    sys.exit(status)
