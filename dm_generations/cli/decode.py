"""`decode`: the images of an archive as files."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dm_generations.archive import DTYPES, Archive
from dm_generations.cli.common import (
    Progress,
    add_archive,
    add_ray_options,
    add_selection_options,
    archive_path,
    at_least_one,
    counted,
    file_name,
    file_path,
    given_archive,
    is_decode_script,
    prepare_device,
    print_line,
    ray_pool,
    selection_from,
)
from dm_generations.cli.decoder_options import add_decoder_options, load_diffusion
from dm_generations.errors import UserError
from dm_generations.paths import sanitize_name

if TYPE_CHECKING:
    from dm_generations.export.exporter import ExportOptions, ExportReport
    from dm_generations.runtime.ray_pool import RayPool

HELP = "decode the images of an archive into files"
DESCRIPTION = "Decode the images of an archive into files, with a page to look at them."
EPILOG = """\
Images that are on disk already are skipped, so a run that was stopped continues when it is repeated. File names count
the ranks of the images that are selected, so use another --out-dir for another selection.

example:
  python -m dm_generations decode --prompt-ids 1 2 --n-best 4 --out-dir images
  python -m dm_generations decode mine.db --where cond_scale=3.. score=20.. --distinct --out-dir best
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add = parser.add_argument
    add_archive(parser, "archive to decode")
    add(
        "--codec",
        metavar="PATH",
        help="of the images: a folder, a file or a name on the Hugging Face hub (default: the embedded one)",
    )
    add(
        "--mode",
        choices=["images", "gallery", "npy", "tar", "zip"],
        default="images",
        help="a file for each image, one for all of a prompt and setting, a file of tokens for each image, "
        "WebDataset shards with the rows as JSON, or one zip with what images would write (default: images)",
    )
    add(
        "--output",
        choices=["images", "npy", "pictures"],  # "pictures": the name of "images" in version 0.1
        default="images",
        metavar="{images,npy}",
        help="npy is the same as --mode npy (default: images)",
    )
    add(
        "--out-dir",
        metavar="FOLDER",
        type=file_path,
        help="folder to write into (default: the name of the archive, with -gallery and so on for other modes than "
        "images; for the archive that ships, and for dm_generations_decode.py, the name of the mode)",
    )
    add("--overwrite", action="store_true", help="decode images that are on disk already, too")
    add(
        "--batch-size",
        type=_batch_size,
        metavar="N",
        help="images decoded at a time, or auto for as many as the device has memory for (default: 32; with --decoder "
        "auto)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the decoder's activations; the 16-bit ones are faster on most accelerators, and change pixels "
        "a little (default: float32)",
    )
    add(
        "--num-workers",
        type=at_least_one,
        metavar="N",
        help="threads that encode files (default: one for each core)",
    )
    add("--cpu-only", action="store_true", help="do not use accelerators")
    _add_files(parser.add_argument_group("files"))
    _add_gallery(
        parser.add_argument_group("gallery", "a group with more images continues in files with page=2, page=3, ...")
    )
    number_help = "decode each image N times, from other noise each time (default: 1)"
    add_decoder_options(parser).add_argument("--decoder-n", type=at_least_one, metavar="N", help=number_help)
    add_ray_options(parser)
    add_selection_options(parser)


def _add_files(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--format", choices=["png", "webp", "jpeg"], help="of the images (default: png)")
    add(
        "--quality",
        type=quality,
        metavar="N",
        help="1 to 100, of jpeg (default: 90) and webp (default: lossless, of about the size of a png)",
    )
    add(
        "--png",
        choices=["default", "small"],
        help="effort for png: small takes some 20 times as long for 2%% less; --format webp is faster and lossless too "
        "(default: default)",
    )
    add(
        "--metadata",
        action="store_true",
        help="store the row in each image: prompt, settings, key, scores and models, as text (default: off)",
    )
    add("--shard-size", type=at_least_one, metavar="N", help="images in a shard of --mode tar (default: 1000)")


def _add_gallery(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--gallery-cols", type=at_least_one, default=8, metavar="N", help="images in a row (default: 8)")
    add("--gallery-rows", type=at_least_one, default=4, metavar="N", help="rows of images (default: 4)")
    add(
        "--seamless",
        action="store_true",
        help="decode the images of a file as one, so that there are no seams between them (default: off)",
    )
    add("--captions", action="store_true", help="a strip above the images with prompt and settings (default: off)")
    add("--score-labels", action="store_true", help="CLIP scores below the images (default: off)")
    add(
        "--caption-font",
        metavar="FILE",
        type=file_name,
        help="font for this text, for other scripts and for accents, which the default leaves out (default: Pillow's)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    _check_flags(args)
    with Archive.open(archive_path(args)) as archive, ray_pool(args) as pool:
        return _decode(archive, args, pool)


def _decode(archive: Archive, args: argparse.Namespace, pool: "RayPool | None") -> int:
    prepare_device(args.cpu_only or pool is not None)
    from dm_generations.export.captions import Strips
    from dm_generations.export.exporter import ExportOptions
    from dm_generations.export.output_file import Encoding
    from dm_generations.export.plan import Layout

    mode, batch_size = _mode(args), args.batch_size or (None if args.decoder else 32)
    options = ExportOptions(
        out_dir=args.out_dir or find_out_dir(given_archive(args), mode),
        layout=Layout(
            mode,
            args.gallery_cols,
            args.gallery_rows,
            shard_size=args.shard_size or 1000,
            is_seamless=args.seamless,
            decodings=args.decoder_n or 1,
        ),
        selection=selection_from(args),
        codec=args.codec,
        diffusion=load_diffusion(args),
        dtype=args.dtype,
        batch_size=None if batch_size == "auto" else batch_size,
        num_workers=args.num_workers,
        overwrite=args.overwrite,
        encoding=Encoding(args.format or "png", args.quality, args.png or "default"),
        has_metadata=args.metadata,
        strips=Strips(args.captions, args.score_labels, args.caption_font),
    )
    return 1 if write_files(archive, options, pool).problems else 0


def find_out_dir(archive: Path | str | None, mode: str = "images") -> Path:
    """Return the folder that an archive is decoded into by default.

    Args:
        archive: A path or an address. None is the one that ships, whose folder has the mode's name, as all had for
            the script of 2022.
        mode: Of decode.
    """
    if archive is None or is_decode_script():
        return Path(mode)
    if isinstance(archive, str):
        from dm_generations.api.download import archive_name

        archive = Path(archive_name(archive))
    name = archive.stem if mode == "images" and archive.suffix else f"{archive.stem}-{mode}"
    return Path(sanitize_name(name) or mode)


def write_files(archive: Archive, options: "ExportOptions", pool: "RayPool | None" = None) -> "ExportReport":
    """Write the files of an archive with a bar of progress, and print what was done."""
    from dm_generations.export.exporter import export_archive

    with Progress() as on_progress:
        report = export_archive(archive, options, on_progress, on_progress.on_step, pool)
    notes = [f"{report.already_there:,} skipped, already present"] if report.already_there else []
    notes += [counted(len(report.problems), "problem")] if report.problems else []
    summary = f"{counted(report.written, 'file')} written to {options.out_dir}"
    summary += f" ({'; '.join(notes)})" if notes else ""
    summary += "" if report.written or report.problems else "; nothing to do"
    print_line(f"{summary}. Open {report.page} in a browser." if report.page else f"{summary}.")
    if report.left_out_count:
        other = counted(report.left_out_count, "other file")
        print_line(
            f"warning: {other} in {options.out_dir}, of another archive or selection, not on its page; choose another "
            "--out-dir to have a page of each",
            to_stderr=True,
        )
    return report


def _mode(args: argparse.Namespace) -> str:
    return "npy" if args.output == "npy" else args.mode


def _check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for a flag that would have no effect together with the others."""
    mode, image_format = _mode(args), args.format or "png"
    without_effect = [
        ("--format", args.format and mode == "npy", "files of tokens have no image format"),
        ("--metadata", args.metadata and mode == "npy", "files of tokens have no place for it"),
        ("--quality", args.quality and image_format == "png", "png is lossless; choose --format webp or jpeg"),
        (
            "--png",
            args.png and (image_format != "png" or mode == "npy"),
            f"no png is written with --format {image_format}",
        ),
        ("--ray", args.ray and mode == "npy", "files of tokens need no codec"),
        ("--shard-size", args.shard_size and mode != "tar", "it is for --mode tar"),
        ("--seamless", args.seamless and mode != "gallery", "it is for --mode gallery"),
        ("--seamless", args.seamless and args.decoder, "a diffusion decoder decodes each image by itself"),
        ("--decoder", args.decoder and mode == "npy", "tokens are written as they are"),
        ("--captions", args.captions and mode != "gallery", "it is for --mode gallery"),
        ("--score-labels", args.score_labels and mode != "gallery", "it is for --mode gallery"),
        (
            "--caption-font",
            args.caption_font and not (args.captions or args.score_labels),
            "it is for --captions and --score-labels",
        ),
    ]
    for flag, is_wrong, reason in without_effect:
        if is_wrong:
            raise UserError(f"{flag} has no effect here: {reason}")
    if args.seamless and (args.captions or args.score_labels):
        text = "--captions" if args.captions else "--score-labels"
        raise UserError(
            f"use just one of --seamless and {text}: there is no space for text between images that are decoded as one"
        )


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else at_least_one(text)


def quality(text: str) -> int:
    """Convert the flag --quality. Raises ArgumentTypeError or ValueError."""
    number = int(text)
    if not 1 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{number} is not between 1 and 100")
    return number


quality.__name__ = "whole number"  # argparse names the type when int() fails
_batch_size.__name__ = "whole number or auto"
