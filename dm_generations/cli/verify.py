"""`verify`: is an archive sound?"""

import argparse
import dataclasses
import json

DESCRIPTION = """\
Check an archive: SQLite's own integrity, ids that point nowhere, types and ranges of all values, lengths of
token vectors, codes beyond the codebook, MD5. Prints a line for each problem with the row's id; the exit
status is 1 when there is one. Nothing is changed.
"""
EPILOG = """\
example:
  python -m dm_generations verify --db archive/emoji.db
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="check an archive for damage",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--db", metavar="FILE", help="archive (default: the emoji archive that ships)")
    parser.add_argument("--json", action="store_true", help="print each problem as one line of JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dm_generations.archive import Archive, verify
    from dm_generations.cli._text import counted, printable
    from dm_generations.resources import shipped

    problem_count = 0
    with Archive.open(args.db or shipped("archive/emoji.db")) as archive:
        for problem in verify(archive):
            problem_count += 1
            if args.json:
                print(json.dumps(dataclasses.asdict(problem)))
            else:
                print(printable(str(problem), 1000))
        if not args.json:
            verdict = (
                counted(problem_count, "problem")
                if problem_count
                else f"sound, {counted(archive.count(), 'picture')} checked"
            )
            print(f"{printable(str(archive.path), 1000)}: {verdict}")
    return 1 if problem_count else 0
