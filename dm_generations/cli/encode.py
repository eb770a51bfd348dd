"""`encode`: images with captions into an archive, as tokens."""

import argparse

from dm_generations.cli.common import (
    add_ray_options,
    at_least_one,
    counted,
    file_path,
    prepare_device,
    print_line,
    ray_pool,
)
from dm_generations.pipelines.sweep import DEFAULT_BATCH_SIZE

HELP = "put your own images with captions into an archive, as tokens"
DESCRIPTION = """\
Encode images by a codec and store their tokens with their captions, for `train`, `score`, `find` and all else that
reads archives. SOURCE is a folder of images with a .txt of the same name beside each, a .jsonl or .csv of paths and
captions, a WebDataset's .tar, or a .parquet of the Hugging Face hub. Images are cropped to their middle square. The
same command goes on where a stopped one was.
"""
EPILOG = """\
examples:
  python -m dm_generations encode photos/ --db photos.db
  python -m dm_generations encode list.csv --columns file caption --db photos.db --codec vqgan_imagenet_f16_16384
"""
_MAX_PRINTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("source", metavar="SOURCE", type=file_path, help="folder, .jsonl, .csv, .tar or .parquet")
    add("--db", metavar="FILE", type=file_path, required=True, help="archive to fill; made if there is none")
    add(
        "--columns",
        nargs=2,
        metavar=("IMAGE", "CAPTION"),
        help="names in a .jsonl, .csv or .parquet (default: path, file_name, file or image; caption, text or prompt)",
    )
    add("--codec", metavar="PATH", help="codec that makes the tokens: the model's own (default: the embedded one)")
    add(
        "--batch-size",
        type=at_least_one,
        default=DEFAULT_BATCH_SIZE,
        metavar="N",
        help=f"images at a time (default: {DEFAULT_BATCH_SIZE})",
    )
    add("--cpu-only", action="store_true", help="do not use accelerators")
    add_ray_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    prepare_device(args.cpu_only or args.ray is not None)
    from dm_generations.models.loading import load_checkpoint
    from dm_generations.pipelines.encode import Columns, encode_images, open_source

    columns = Columns(*(args.columns or ()))
    open_source(args.source, columns)  # before the codec is loaded, which takes a moment
    codec = load_checkpoint(args.codec, "codec")
    with ray_pool(args) as pool:
        report = encode_images(args.source, args.db, codec, args.batch_size, columns, pool)
    existing = f"{report.existing_count:,} skipped, already present"
    print_line(f"Added {counted(report.added_count, 'image')} to {args.db} ({existing})")
    for problem in report.problems[:_MAX_PRINTED]:
        print_line(f"error: {problem}", to_stderr=True)
    if len(report.problems) > _MAX_PRINTED:
        print_line(f"error: and {len(report.problems) - _MAX_PRINTED:,} more images", to_stderr=True)
    return 1 if report.problems else 0
