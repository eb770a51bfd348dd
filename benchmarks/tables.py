"""Time exports and imports of an archive; their size and the memory they take.

    python benchmarks/tables.py --rows 1000000

Writes temporary archives of random data (about 3 GB for 1,000,000 rows of 256 tokens) and removes them. CPU time tells
what a quiet core would take.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from archive import Timer, timed_write
from dm_generations.archive import Archive
from dm_generations.archive.selection import ALL
from dm_generations.export.parquet import ParquetOptions, write_parquet
from dm_generations.export.table_files import FORMS, write_table
from dm_generations.pipelines.import_files import ImportOptions, import_files


def timed_tables(path: Path, folder: Path, rows: int) -> None:
    """Time Parquet both ways, and the other forms."""
    with Archive.open(path) as archive:
        with (timer := Timer()):
            write_parquet(archive, ParquetOptions(folder / "set"))
        timer.report("export to Parquet without images", rows)
        size = sum(file.stat().st_size for file in (folder / "set" / "data").iterdir())
        print(f"size: archive {path.stat().st_size / rows:.0f} bytes a row, Parquet {size / rows:.0f}")
        with (timer := Timer()):
            import_files([folder / "set"], folder / "again.db", ImportOptions())
        timer.report("import it into a new archive", rows)
        with (timer := Timer()):
            import_files([folder / "set"], folder / "again.db", ImportOptions())
        timer.report("import it where all images are there", rows)
        (folder / "again.db").unlink()
        for form in FORMS:
            with (timer := Timer()):
                write_table(archive, folder / "out", form, ALL)
            timer.report(f"export to {form}", rows)
            (folder / "out").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="images (default: 100,000)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an image, a square (default: 256)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name), Path(name) / "big.db"
        timed_write(path, args.rows, args.tokens, 10_000)
        timed_tables(path, folder, args.rows)


if __name__ == "__main__":
    main()
