"""`view`: the page of a decoded folder in the browser."""

import argparse
import webbrowser
from pathlib import Path

from dm_generations.archive import Archive
from dm_generations.cli.common import file_path, prepare_device, print_line
from dm_generations.cli.decode import find_out_dir, write_files
from dm_generations.errors import UserError
from dm_generations.paths import PAGE, shipped

HELP = "open the page of an archive or a folder in the browser"
DESCRIPTION = """\
Open the page of a decoded folder in the browser. An archive is decoded first, as `decode` does it: into the folder with
its name, and only what is missing there.
"""
EPILOG = """\
example:
  python -m dm_generations view mine.db
  python -m dm_generations view images --no-open
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add = parser.add_argument
    add(
        "path",
        nargs="?",
        metavar="ARCHIVE|FOLDER",
        type=file_path,
        help="an archive, or a folder that was decoded into (default: the emoji archive that ships)",
    )
    add("--codec", metavar="PATH", help="codec of the archive's images, as for decode (default: the embedded one)")
    add_no_open(parser)


def add_no_open(parser: argparse.ArgumentParser) -> None:
    """Add the flag that `open_page` reads."""
    parser.add_argument("--no-open", action="store_true", help="only print where the page is")


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    if args.path is not None and args.path.is_dir():
        page, status = args.path / PAGE, 0
        if not page.is_file():
            raise UserError(f"{args.path} has no {PAGE}; give a folder that was decoded into, or an archive")
    else:
        page, status = write_page(args.path, args.codec)
    open_page(page, args)
    return status


def write_page(archive_path: Path | None, codec: str | None = None) -> tuple[Path, int]:
    """Decode an archive into its folder.

    Args:
        archive_path: None is the archive that ships.
        codec: As for decode.

    Returns:
        The page, and 1 if an image could not be written.

    Raises:
        UserError: The archive cannot be read or decoded.
    """
    prepare_device(cpu_only=False)
    with Archive.open(archive_path or shipped("archive/emoji.db")) as archive:
        from dm_generations.export.exporter import ExportOptions

        report = write_files(archive, ExportOptions(find_out_dir(archive_path), codec=codec))
    if report.page is None:
        raise UserError(f"{archive_path}: none of the images could be decoded")
    return report.page, 1 if report.problems else 0


def open_page(page: Path, args: argparse.Namespace) -> None:
    """Open a page in the browser unless --no-open says otherwise, and print where it is."""
    print_line(page)
    if not args.no_open and not webbrowser.open(page.resolve().as_uri()):
        print_line("no browser was found; open this file in one", to_stderr=True)
