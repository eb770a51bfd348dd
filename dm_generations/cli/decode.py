"""`decode`: the pictures of an archive as files."""

import argparse
from pathlib import Path

from dm_generations.archive import DTYPES, Archive
from dm_generations.cli.common import Progress, at_least_one, counted, prepare_device
from dm_generations.errors import UserError
from dm_generations.paths import shipped

HELP = "turn an archive into picture files"
DESCRIPTION = "Decode the pictures of an archive into files, with a page to look at them."
EPILOG = """\
Pictures that are on disk already are left as they are, so a run that was stopped goes on when it is repeated.

example:
  python -m dm_generations decode --prompt-ids 1 2 --n-best 4 --out-dir pictures
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add = parser.add_argument
    add("--db", metavar="FILE", help="archive to decode (default: the emoji archive that ships)")
    add(
        "--codec",
        metavar="PATH",
        help="codec that the pictures were made with: a folder, a file or a name on the Hugging Face hub "
        "(default: the embedded one)",
    )
    add(
        "--mode",
        choices=["images", "gallery", "npy", "tar", "zip"],
        default="images",
        help="a file for each picture, one for all of a prompt and setting, a file of tokens for each picture, "
        "WebDataset shards with the rows as JSON, or one zip with what images would write (default: images)",
    )
    add(
        "--output",
        choices=["pictures", "npy"],
        default="pictures",
        help="npy is the same as --mode npy (default: pictures)",
    )
    add("--out-dir", metavar="FOLDER", help="folder to write into (default: the name of the mode)")
    add("--overwrite", action="store_true", help="decode again what is on disk already")
    add(
        "--batch-size",
        type=_batch_size,
        default=32,
        metavar="N",
        help="pictures decoded at a time, or auto for what the device has memory for (default: 32)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="numbers that the decoder computes with; the 16-bit ones are faster on most accelerators, and change "
        "pixels a little (default: float32)",
    )
    add(
        "--num-workers",
        type=at_least_one,
        metavar="N",
        help="threads that encode files (default: one for each core)",
    )
    add("--cpu-only", action="store_true", help="leave accelerators alone")
    _add_files(parser.add_argument_group("files"))
    _add_gallery(
        parser.add_argument_group("gallery", "a group with more pictures goes on to files with page=2, page=3, ...")
    )
    _add_selection(
        parser.add_argument_group(
            "which pictures", "ids and texts add up; prompts and sc prompts both have to match (default: all)"
        )
    )


def _add_files(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--format", choices=["png", "webp", "jpeg"], help="of the pictures (default: png)")
    add(
        "--quality",
        type=_quality,
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
        help="pictures carry their row: prompt, settings, key, scores and models, as text (default: off)",
    )
    add("--shard-size", type=at_least_one, metavar="N", help="pictures in a shard of --mode tar (default: 1000)")


def _add_gallery(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--gallery-cols", type=at_least_one, default=8, metavar="N", help="pictures in a row (default: 8)")
    add("--gallery-rows", type=at_least_one, default=4, metavar="N", help="rows of pictures (default: 4)")
    add(
        "--seamless",
        action="store_true",
        help="the pictures of a file are decoded as one, and run into each other without seams (default: off)",
    )
    add("--captions", action="store_true", help="a strip above the pictures with prompt and settings (default: off)")
    add("--score-labels", action="store_true", help="CLIP scores below the pictures (default: off)")
    add(
        "--caption-font",
        metavar="FILE",
        help="font for this text, for other scripts and for accents, which the default leaves out (default: Pillow's)",
    )


def _add_selection(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prompt-ids", type=int, nargs="+", default=[], metavar="ID", help="these prompts, by id")
    add("--prompt-texts", nargs="+", default=[], metavar="TEXT", help="these prompts, by their whole text")
    add(
        "--sc-prompt-ids",
        type=int,
        nargs="+",
        default=[],
        metavar="ID",
        help="these unconditional prompts (super conditioning), by id; 1 is the empty one",
    )
    add(
        "--sc-prompt-texts",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="these unconditional prompts, by their whole text",
    )
    add(
        "--n-best",
        type=at_least_one,
        metavar="N",
        help="only the N best of each prompt and setting, by CLIP score",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    _check_flags(args)
    with Archive.open(shipped("archive/emoji.db") if args.db is None else args.db) as archive:
        return _decode(archive, args)


def _decode(archive: Archive, args: argparse.Namespace) -> int:
    prepare_device(args.cpu_only)
    from dm_generations.export.captions import Strips
    from dm_generations.export.encoders import Encoding
    from dm_generations.export.exporter import ExportOptions, export_archive
    from dm_generations.export.plan import Layout, Selection

    mode = _mode(args)
    options = ExportOptions(
        out_dir=Path(args.out_dir or mode),
        layout=Layout(
            mode,
            args.gallery_cols,
            args.gallery_rows,
            shard_size=args.shard_size or 1000,
            is_seamless=args.seamless,
        ),
        selection=Selection(args.prompt_ids, args.prompt_texts, args.sc_prompt_ids, args.sc_prompt_texts, args.n_best),
        codec=args.codec,
        dtype=args.dtype,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        overwrite=args.overwrite,
        encoding=Encoding(args.format or "png", args.quality, args.png or "default"),
        has_metadata=args.metadata,
        strips=Strips(args.captions, args.score_labels, args.caption_font),
    )
    with Progress() as on_progress:
        report = export_archive(archive, options, on_progress)
    summary = f"{counted(report.written, 'file')} written to {options.out_dir}"
    if report.already_there:
        summary += f", {report.already_there:,} there already"
    if report.problems:
        summary += f", {counted(len(report.problems), 'problem')}"
    print(f"{summary}. Open {report.page} in a browser." if report.page else f"{summary}.")
    return 1 if report.problems else 0


def _mode(args: argparse.Namespace) -> str:
    return "npy" if args.output == "npy" else args.mode


def _check_flags(args: argparse.Namespace) -> None:
    """UserError for a flag that would have no effect beside the others."""
    mode, picture_format = _mode(args), args.format or "png"
    without_effect = [
        ("--format", args.format and mode == "npy", "files of tokens have no picture format"),
        ("--metadata", args.metadata and mode == "npy", "files of tokens carry nothing else"),
        ("--quality", args.quality and picture_format == "png", "png is lossless; choose --format webp or jpeg"),
        (
            "--png",
            args.png and (picture_format != "png" or mode == "npy"),
            f"no png is written with --format {picture_format}",
        ),
        ("--shard-size", args.shard_size and mode != "tar", "it is for --mode tar"),
        ("--seamless", args.seamless and mode != "gallery", "it is for --mode gallery"),
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
        raise UserError(f"use just one of --seamless and {text}: one picture has no room for text between its parts")


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else at_least_one(text)


def _quality(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{number} is not between 1 and 100")
    return number


_quality.__name__ = "whole number"  # argparse names the type when int() fails
_batch_size.__name__ = "whole number or auto"
