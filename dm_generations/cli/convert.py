"""`convert`: any model that loads, as our own folder."""

import argparse
from pathlib import Path

from dm_generations.archive import DTYPES

HELP = "write a public checkpoint as our own folder"
DESCRIPTION = """\
Write a model of any format that loads as a folder of our own: config.json, model.safetensors and the tokenizer's
files. Its weights are mapped from the disk, and it needs neither PyTorch's nor Flax's formats.
A generator's own codec goes to the folder codec within.
"""
EPILOG = """\
examples:
  python -m dm_generations convert dalle-mini/dalle-mega --out mega --dtype float16
  python -m dm_generations convert vqgan_gumbel_f8 --out gumbel
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="PATH", help="a folder, a file or a name on the Hugging Face hub, owner/name@revision")
    add("--out", metavar="FOLDER", type=Path, required=True, help="folder to write; it must not exist yet")
    add("--tokenizer", metavar="PATH", type=Path, help="the generator's tokenizer, if it does not lie with it")
    add("--dtype", choices=["as-is", *DTYPES], default="as-is", help="how weights are stored (default: as they are)")


def run(args: argparse.Namespace) -> int:
    from dm_generations.pipelines.convert import convert

    for line in convert(args.model, args.out, args.tokenizer, None if args.dtype == "as-is" else args.dtype):
        print(line)
    return 0
