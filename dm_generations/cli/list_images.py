"""`list`: the images of an archive as rows."""

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from dm_generations.archive import Archive
from dm_generations.archive.listing import LIST_COLUMNS, list_rows
from dm_generations.cli.common import (
    MAX_LINE,
    add_archive,
    add_selection_options,
    archive_path,
    at_least_one,
    print_line,
    selection_from,
)
from dm_generations.errors import printable

HELP = "list the images of an archive as rows"
DESCRIPTION = """\
List images, a row each: a table for people, or CSV or JSON lines for programs. Rows come prompt by prompt and
setting by setting, the best first, and are printed as they are read.
"""
EPILOG = """\
example:
  python -m dm_generations list mine.db --where cond_scale=3.. --n-best 4
  python -m dm_generations list archive/emoji.db --format csv --limit 100
"""
# Of the table, which is to fit on a screen: column, width, and whether it is aligned to the right.
_TABLE = (
    ("id", 8, True),
    ("prompt", 32, False),
    ("sc_prompt", 12, False),
    ("top_k", 6, True),
    ("top_p", 6, True),
    ("temperature", 11, True),
    ("cond_scale", 10, True),
    ("key", 21, False),
    ("score", 6, True),
    ("model", 24, False),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_archive(parser, "archive to list")
    parser.add_argument(
        "--format",
        choices=["table", "csv", "jsonl"],
        default="table",
        help="jsonl is a line of JSON for each image; it and csv have all columns (default: table)",
    )
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="at most N rows (default: all)")
    add_selection_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    selection = selection_from(args)
    with Archive.open(archive_path(args)) as archive:
        rows = list_rows(archive, selection, args.limit)
        if args.format == "csv":
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(LIST_COLUMNS)
            clean = _shown if sys.stdout.isatty() else _plain
            writer.writerows([clean(value) for value in row] for row in rows)
        elif args.format == "jsonl":
            for line in _json_lines(rows):
                print(line)
        else:
            for line in _table_lines(rows):
                print_line(line)
    return 0


def _json_lines(rows: Iterable[tuple[Any, ...]]) -> Iterator[str]:
    for row in rows:
        yield json.dumps({name: _plain(value) for name, value in zip(LIST_COLUMNS, row, strict=True)})


def _plain(value: Any) -> Any:
    """Return a value for a program; a damaged archive can hold bytes anywhere, and JSON has no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.hex() if isinstance(value, bytes) else value


def _shown(value: Any) -> Any:
    """Return a value for a terminal, in which a text could be a command."""
    return printable(value, MAX_LINE) if isinstance(value, str) else _plain(value)


def _table_lines(rows: Iterable[tuple[Any, ...]]) -> Iterator[str]:
    yield _table_line(name for name, _, _ in _TABLE)
    for row in rows:
        values = dict(zip(LIST_COLUMNS, row, strict=True))
        score = values["clip_score_input"]
        values["score"] = f"{score:.2f}" if isinstance(score, float) else score
        values["key"] = f"{values['key0']}:{values['key1']}"
        yield _table_line(values[name] for name, _, _ in _TABLE)


def _table_line(values: Iterable[Any]) -> str:
    cells = []
    for (_, width, is_right), value in zip(_TABLE, values, strict=True):
        text = "" if value is None else printable(str(value), width)
        cells.append(text.rjust(width) if is_right else text.ljust(width))
    return "  ".join(cells).rstrip()
