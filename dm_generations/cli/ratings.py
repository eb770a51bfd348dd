"""`ratings`: what people said of the images of an archive."""

import argparse
import csv
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from dm_generations.archive import Archive
from dm_generations.archive.ratings import add_ratings
from dm_generations.cli.common import add_archive, archive_path, counted, file_path, print_line, printable

if TYPE_CHECKING:
    from dm_generations.pipelines.rank import Strength

HELP = "import, export and rank what people said of images"
DESCRIPTION = """\
Add ratings to an archive (pairs, scores, favourites and tags, as the page exports them), write them to a file, or rank
what was judged in pairs by Bradley-Terry strengths with 95% intervals.
"""
EPILOG = """\
example:
  python -m dm_generations ratings --db mine.db --import ratings.json
  python -m dm_generations ratings --db mine.db --rank
"""
_SHOWN_PROMPT = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add = parser.add_argument
    add_archive(parser, "archive", has_default=False, is_changed=True)
    actions = parser.add_mutually_exclusive_group(required=True)
    actions.add_argument(
        "--import",
        dest="import_file",
        metavar="FILE",
        type=file_path,
        help="add the ratings of a JSON file that the page exported, or of a CSV file as --export writes it",
    )
    actions.add_argument(
        "--export",
        metavar="FILE",
        type=file_path,
        help="write pairs in the columns of Pick-a-Pic (.csv, or with pyarrow .parquet), or all ratings (.json)",
    )
    actions.add_argument("--rank", action="store_true", help="print strengths, from pairs; a tie is half a win")
    add(
        "--by",
        choices=["settings", "prompt", "model", "image"],
        default="settings",
        help="what to rank (default: settings)",
    )
    add("--format", choices=["table", "csv", "json"], default="table", help="of the ranking (default: table)")


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    if args.rank:
        from dm_generations.pipelines.rank import rank_ratings

        with Archive.open(archive_path(args)) as archive:
            _print_ranking(rank_ratings(archive, args.by), args.format)
        return 0
    from dm_generations.export.ratings_file import read_ratings_file, write_ratings_file

    if args.export:
        with Archive.open(archive_path(args)) as archive:
            count = write_ratings_file(archive, args.export)
        print_line(f"Wrote {counted(count, 'rating')} to {args.export}")
        return 0
    ratings = read_ratings_file(args.import_file)
    with Archive.open(archive_path(args), "w") as archive:
        changed_count = add_ratings(archive, ratings)
    skipped = len(ratings) - changed_count
    note = f" ({skipped:,} skipped, already present)" if skipped > 0 else ""
    print_line(f"Added {counted(changed_count, 'rating')} to {archive_path(args)}{note}")
    return 0


def _print_ranking(ranking: "list[Strength]", output: str) -> None:
    rows = [dataclasses.asdict(one) for one in ranking]
    if output == "json":
        print(json.dumps(rows, indent=2))
        return
    columns = ["strength", "low", "high", "pair_count"]
    if output == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow([*columns, *(ranking[0].item if ranking else ())])
        writer.writerows([*(row[name] for name in columns), *row["item"].values()] for row in rows)
        return
    if not rows:
        print_line("No pairs were judged that can be ranked")
        return
    print_line("strength   95% interval      pairs")
    for one in ranking:
        texts = (f"{name} {printable(str(value), _SHOWN_PROMPT)}" for name, value in one.item.items() if value != "")
        interval = f"{one.low:+.2f} to {one.high:+.2f}"
        print_line(f"{one.strength:+8.2f}   {interval:<16}{one.pair_count:>7,}   {', '.join(texts)}")
