"""Rows as a table for people, as CSV, or as JSON."""

import csv
import json
import sys
from collections.abc import Sequence
from typing import Any, Final

from dm_generations.cli.common import MAX_LINE, printable

FORMATS: Final = ("table", "csv", "json")
MAX_CELL: Final = 40  # characters of a text in a table


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]], style: str) -> None:
    """Print rows on stdout.

    Args:
        columns: Names of the values.
        rows: Values: texts, numbers, or None.
        style: One of FORMATS. `table` rounds numbers and shortens texts.
    """
    if style == "json":
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2))
    elif style == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        clean = _shown if sys.stdout.isatty() else list
        writer.writerows(map(clean, rows))
    else:
        cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        is_text = [any(isinstance(row[place], str) for row in rows) for place in range(len(columns))]
        for line in cells:
            padded = zip(line, widths, is_text, strict=True)
            print("  ".join(cell.ljust(width) if left else cell.rjust(width) for cell, width, left in padded).rstrip())


def _shown(row: Sequence[Any]) -> list[Any]:
    """Return values for a terminal, in which a text could be a command."""
    return [printable(value, MAX_LINE) if isinstance(value, str) else value for value in row]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else printable(str(value), MAX_CELL)
