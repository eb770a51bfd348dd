"""`import`: data sets into an archive."""

import argparse

from dm_generations.cli.common import (
    Progress,
    add_selection_options,
    counted,
    file_path,
    prepare_device,
    print_line,
    selection_from,
)

HELP = "add the images of data sets to an archive"
DESCRIPTION = """\
Add images of files to an archive, which is made if it does not exist. Parquet of `export` has all that an archive has,
except vectors and ratings. Files of others hold tokens, and what else is known of the images: JSON lines, WebDataset
shards (.tar with the tokens in .json), NumPy arrays (.npy, or a folder of them) and safetensors. Their tokens are
checked against the codec. If something is wrong with a file, nothing is added.
"""
EPILOG = """\
example:
  python -m dm_generations import mine-parquet --into mine.db
  python -m dm_generations import tokens.npy --labels prompts.csv --into mine.db --codec vqgan_imagenet_f16_16384
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add = parser.add_argument
    add("sources", nargs="+", metavar="PATH", type=file_path, help="files or folders of files")
    add("--into", required=True, metavar="FILE", type=file_path, help="archive to add the images to")
    add(
        "--codec",
        metavar="PATH",
        help="codec whose tokens files of others hold: a folder, a file or a name on the Hugging Face hub "
        "(default: the embedded one)",
    )
    add(
        "--labels",
        metavar="FILE",
        type=file_path,
        help="CSV file with the prompts of arrays: a line of names with prompt, and file_name for a folder of .npy; "
        "then a line for each image",
    )
    add_selection_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    selection = selection_from(args)
    prepare_device(cpu_only=False)
    from dm_generations.pipelines.import_files import ImportOptions, import_files

    with Progress() as on_progress:
        options = ImportOptions(args.codec, args.labels, selection)
        report = import_files(args.sources, args.into, options, on_progress)
    skipped_count = report.image_count - report.added_count
    print_line(
        f"Added {counted(report.added_count, 'image')} to {args.into} ({skipped_count:,} skipped, already present)"
    )
    return 0
