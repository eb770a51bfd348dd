"""`export-site`: an archive as a folder for any static web host."""

import argparse

from dm_generations.archive import Archive
from dm_generations.cli.common import (
    add_archives,
    add_selection_options,
    archive_paths,
    counted,
    file_path,
    prepare_device,
    print_line,
    selection_from,
)
from dm_generations.cli.decode import quality, write_files
from dm_generations.errors import UserError
from dm_generations.paths import label_paths, sanitize_name

HELP = "make a web site of an archive"
DESCRIPTION = """\
Write a folder for any static web host: the page as index.html, the list of images, the images as WebP files and
thumbnails. Several archives are shown side by side. Images that are there already are skipped, so a run that was
stopped continues when it is repeated.

With --live the folder has the archives in place of images, and the page decodes them in the visitor's browser, on its
GPU if it has one. Such a page has to be served; it does not open from disk.
"""
EPILOG = """\
example:
  python -m dm_generations export-site mine.db --out-dir site
  python -m dm_generations export-site --db mine.db --out-dir site --n-best 4 --quality 90
  python -m dm_generations export-site before.db after.db --out-dir site --live
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add = parser.add_argument
    add_archives(parser, "archive to show")
    add("--out-dir", metavar="FOLDER", type=file_path, required=True, help="folder to write into")
    add(
        "--codec",
        metavar="PATH",
        help="codec that the images were made with: a folder, a file or a name on the Hugging Face hub "
        "(default: the embedded one)",
    )
    add("--quality", type=quality, metavar="N", help="1 to 100, of the images (default: lossless)")
    add("--overwrite", action="store_true", help="write images that are there already, too, as after another --quality")
    add("--live", action="store_true", help="the archives in place of images, decoded in the browser (default: off)")
    add(
        "--packages",
        metavar="FOLDER",
        type=file_path,
        help="with --live, folder with the npm packages of its scripts (default: downloaded by npm, once)",
    )
    add("--cpu-only", action="store_true", help="do not use accelerators")
    add_selection_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    paths, selection = archive_paths(args), selection_from(args)
    _check_flags(args)
    for path in paths:
        Archive.open(path).close()  # before anything is written
    prepare_device(args.cpu_only)
    from dm_generations.export.site import site_options, write_joint_page

    if args.live:
        from dm_generations.export.live_site import export_live_site

        page, image_count = export_live_site(paths, args.out_dir, selection, args.codec, args.packages)
        print_line(
            f"{counted(image_count, 'image')} as tokens in {args.out_dir}. Serve this folder, and open {page.name}."
        )
        return 0
    if len(paths) == 1:
        with Archive.open(paths[0]) as archive:
            options = site_options(args.out_dir, selection, args.codec, args.quality, args.overwrite)
            return 1 if write_files(archive, options).problems else 0
    has_problems, manifests = False, {}
    for number, path in enumerate(paths, 1):
        folder = sanitize_name(f"{number}_{path.stem}")
        with Archive.open(path) as archive:
            report = write_files(
                archive, site_options(args.out_dir / folder, selection, args.codec, args.quality, args.overwrite)
            )
        has_problems |= bool(report.problems)
        if report.manifest is not None:
            manifests[folder] = report.manifest
    if len(manifests) < len(paths):
        raise UserError("none of the images of an archive could be decoded, so there is no page of all")
    page = write_joint_page(args.out_dir, manifests, label_paths(paths))
    print_line(f"Open {page} in a browser to see all archives side by side.")
    return 1 if has_problems else 0


def _check_flags(args: argparse.Namespace) -> None:
    if args.live and args.quality is not None:
        raise UserError("--quality has no effect here: with --live the browser decodes, without loss")
    if args.packages is not None and not args.live:
        raise UserError("--packages has no effect here: it is for --live")
