"""`convert`: write a model of any format as a folder of this program's own format."""

import argparse

from dm_generations.archive import DTYPES
from dm_generations.cli.common import add_checkpoint_options, config_overrides, file_path, print_line

HELP = "write a public checkpoint in this program's own format"
DESCRIPTION = """\
Write a model of any format that this program reads as a folder of its own format: config.json, model.safetensors and
the tokenizer's files. It loads faster than PyTorch's and Flax's files. A generator's own codec goes to its subfolder
codec.
"""
EPILOG = """\
examples:
  python -m dm_generations convert dalle-mini/dalle-mega --out mega --dtype float16
  python -m dm_generations convert vqgan_gumbel_f8 --out gumbel
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("model", metavar="PATH", help="a folder, a file or a name on the Hugging Face hub, owner/name@revision")
    add("--out", metavar="FOLDER", type=file_path, required=True, help="folder to write; it must not exist yet")
    add(
        "--tokenizer",
        metavar="PATH",
        type=file_path,
        help="the generator's tokenizer, if it is not in the model's folder",
    )
    add_checkpoint_options(add)
    add("--dtype", choices=["as-is", *DTYPES], default="as-is", help="how weights are stored (default: as they are)")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from dm_generations.pipelines.convert import convert

    dtype = None if args.dtype == "as-is" else args.dtype
    for line in convert(args.model, args.out, args.tokenizer, dtype, config_overrides(args)):
        print_line(line)
    return 0
