"""`train`: a model that learns from the images of archives."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dm_generations.cli.common import (
    add_selection_options,
    at_least_one,
    command_words,
    file_path,
    prepare_device,
    print_line,
    selection_from,
)
from dm_generations.errors import UserError

if TYPE_CHECKING:
    from dm_generations.training.options import TrainOptions

HELP = "train a model on the images of archives"
DESCRIPTION = """\
Train a text-to-image model on the tokens that archives hold: no image is decoded. Take the best images by score, those
that people rated, or your own, which `encode` puts into an archive. A run is a folder; the same command goes on where a
stopped one ended, to the same weights. Its subfolder `model` is for --model of the other commands. With --decoder it
trains a diffusion decoder of a codec's tokens, on images as `encode` takes them; then `model` is for --decoder. With
--train-codec it fine-tunes the codec, a VQGAN, on such images; then `model` is for --codec.
"""
EPILOG = """\
examples:
  python -m dm_generations train mine.db --run better --n-best 4 --steps 500
  python -m dm_generations train mine.db --run liked --objective dpo --prefer pairs --lora-rank 16
  python -m dm_generations train photos/ --decoder --run sharp --steps 20000
  python -m dm_generations train photos/ --train-codec --run mine --perceptual vgg16.pth vgg.pth
  python -m dm_generations generate --model better/model --db better.db --prompts-file better/held_out.txt
"""
_AUTO: Final = "auto"
_EXTRAS = {"optax": "train", "tensorboardX": "tensorboard"}  # of pyproject.toml, by the module that is missing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("archives", nargs="*", metavar="ARCHIVE", type=file_path, help="archives, or images for a decoder or codec")
    add("--db", nargs="+", default=[], metavar="FILE", type=file_path, help="the same as ARCHIVE")
    add("--run", dest="folder", required=True, metavar="FOLDER", type=file_path, help="folder of the run; resumes")
    add_selection_options(parser, "prompt, of all its settings and archives")
    _add_model(parser.add_argument_group("model").add_argument)
    _add_objective(parser.add_argument_group("what is learnt").add_argument)
    _add_hosts(parser.add_argument_group("several hosts, each with this command and its own number").add_argument)
    _add_optimizer(parser.add_argument_group("optimiser").add_argument)
    _add_run(parser.add_argument_group("checkpoints, log and samples").add_argument)


def _add_model(add: Callable[..., argparse.Action]) -> None:
    add("--decoder", action="store_true", help="train a diffusion decoder of the codec's tokens")
    add("--train-codec", action="store_true", help="fine-tune the codec itself, a VQGAN")
    add("--model", metavar="PATH", help="model to start from (default: the embedded one; a decoder: random weights)")
    add("--config", metavar="FILE", type=file_path, help="config.json of a model to train from random weights instead")
    add("--tokenizer", metavar="PATH", type=file_path, help="tokenizer, if it is not in the model's folder")
    add("--codec", metavar="PATH", help="codec of the tokens, or to train (default: the model's, else the embedded)")
    add("--lora-rank", type=int, default=0, metavar="R", help="train low-rank changes of dense layers; 0 trains all")
    add("--lora-alpha", type=float, default=16.0, metavar="A", help="they are multiplied with A / R (default: 16)")
    add(
        "--lora-layers",
        nargs="+",
        metavar="REGEX",
        help="which dense layers, by regular expressions of their paths (default: those of attention)",
    )
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of activations, and with --lora-rank of the weights that stay as they are (default: float32)",
    )
    add("--recompute", action="store_true", help="compute activations twice, to keep less in memory")
    add("--shard-params", action="store_true", help="divide the weights among the devices (FSDP), not only the batch")
    add("--cpu-only", action="store_true", help="do not use accelerators")


def _add_hosts(add: Callable[..., argparse.Action]) -> None:
    add("--coordinator", metavar="HOST:PORT", help="of process 0, or auto where Slurm or a TPU pod tells all three")
    add("--processes", type=at_least_one, metavar="N", help="how many processes train together")
    add("--process", type=int, metavar="I", help="number of this one, 0 to N - 1")


def _check_hosts(args: argparse.Namespace) -> None:
    """Check the flags of several processes that train together."""
    numbers, coordinator = (args.processes, args.process), args.coordinator
    if coordinator is None or coordinator == _AUTO:
        if numbers != (None, None):
            raise UserError("--processes and --process need --coordinator HOST:PORT, that of process 0")
    elif None in numbers:
        raise UserError("--coordinator needs --processes and --process, or is auto")
    elif not 0 <= args.process < args.processes:
        raise UserError(f"--process must be from 0 to {args.processes - 1}, not {args.process}")
    elif not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise UserError(f"--coordinator {coordinator!r:.100} is not HOST:PORT")


def _train(options: "TrainOptions", args: argparse.Namespace) -> Path | None:
    """Train, together with other processes or alone; returns the model's folder, of which one process tells."""
    from dm_generations.training import hosts
    from dm_generations.training.train import train

    if options.tensorboard:
        import tensorboardX  # noqa: F401
    if args.coordinator is None:
        return train(options)
    with hosts.join(None if args.coordinator == _AUTO else args.coordinator, args.processes, args.process):
        model = train(options)
        return model if hosts.is_first() else None


def _add_objective(add: Callable[..., argparse.Action]) -> None:
    add(
        "--objective",
        choices=["next-token", "dpo"],
        default="next-token",
        help="imitate the images, or prefer the better of two of a prompt (default: next-token)",
    )
    add(
        "--prefer",
        choices=["score", "rating", "pairs"],
        default="score",
        help="what tells dpo which is better: scores, ratings, or pairs that people judged (default: score)",
    )
    add(
        "--perceptual",
        nargs="+",
        default=[],
        metavar="FILE",
        type=file_path,
        help="of a codec: weights of LPIPS for the perceptual loss, torchvision's vgg16 and lpips' vgg.pth, or both in "
        "one file (default: no such loss)",
    )
    add(
        "--adversarial-from",
        type=int,
        metavar="STEP",
        help="of a codec: when a discriminator begins to count in the loss (default: never)",
    )
    add("--min-gap", type=float, default=0.0, metavar="X", help="smallest gap of a pair's scores (default: 0)")
    add("--beta", type=float, default=0.1, metavar="B", help="of dpo: how much leaving the first model costs")
    add("--weight-by", choices=["score", "rating"], help="images above their prompt's mean count more")
    add("--held-out", type=float, default=0.05, metavar="SHARE", help="prompts that are not learnt (default: 0.05)")
    add("--caption-dropout", type=float, default=0.1, metavar="SHARE", help="rows without a caption (default: 0.1)")
    add("--label-smoothing", type=float, default=0.0, metavar="SHARE", help="share of all other tokens (default: 0)")
    add(
        "--unconditional-smoothing",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="the same of rows without a caption; 1 suits the embedded model, which was trained so (default: 0)",
    )
    add(
        "--text-weight",
        type=float,
        default=1 / 8,
        metavar="SHARE",
        help="of the text in the loss of minDALL-E and DALLE-pytorch (default: 0.125)",
    )


def _add_optimizer(add: Callable[..., argparse.Action]) -> None:
    add("--steps", type=at_least_one, default=1000, metavar="N", help="updates of the weights (default: 1000)")
    add("--batch-size", type=at_least_one, default=32, metavar="N", help="images of a batch (default: 32)")
    add("--accumulate", type=at_least_one, default=1, metavar="N", help="batches of an update (default: 1)")
    add(
        "--optimizer",
        choices=["adafactor", "adamw", "lamb", "lion", "muon", "sgd"],
        default="adamw",
        help="of optax (default: adamw)",
    )
    add("--learning-rate", type=float, default=1e-4, metavar="X", help="its peak (default: 0.0001)")
    add(
        "--schedule",
        choices=["constant", "cosine", "linear"],
        default="cosine",
        help="after the warm-up (default: cosine)",
    )
    add("--warmup", type=int, default=None, metavar="N", help="steps (default: 50, or a tenth of the steps)")
    add("--weight-decay", type=float, default=0.01, metavar="X", help="of matrices (default: 0.01)")
    add("--clip-norm", type=float, default=1.0, metavar="X", help="largest norm of gradients; 0 for none (default: 1)")
    add(
        "--ema",
        type=float,
        default=0.9999,
        metavar="SHARE",
        help="of a decoder: share of the average of its weights that a step keeps; early steps keep less "
        "(default: 0.9999)",
    )
    add("--seed", type=int, default=0, help="of all that is random (default: 0)")


def _add_run(add: Callable[..., argparse.Action]) -> None:
    add("--save-every", type=at_least_one, default=200, metavar="N", help="steps between checkpoints (default: 200)")
    add("--keep", type=at_least_one, default=2, metavar="K", help="checkpoints that are kept (default: 2)")
    add(
        "--log-every", type=at_least_one, default=10, metavar="N", help="steps between lines of log.jsonl (default: 10)"
    )
    add("--tensorboard", action="store_true", help="write the log for TensorBoard too, into the run's folder")
    add("--evaluate-every", type=int, default=100, metavar="N", help="steps between evaluations (default: 100)")
    add("--sample-every", type=int, default=0, metavar="N", help="draw into samples.db, with the same keys each time")
    add("--sample-prompts", nargs="+", default=[], metavar="TEXT", help="what to draw (default: some held-out prompts)")
    add("--sample-count", type=at_least_one, default=4, metavar="N", help="images of each (default: 4)")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    archives = (*args.archives, *args.db)
    if not archives:
        raise UserError("train needs an archive, or images with --decoder or --train-codec; name one or more")
    from dm_generations.training.options import TrainOptions

    given = {field: value for field, value in vars(args).items() if field in TrainOptions.__annotations__}
    given |= {
        "archives": archives,
        "run": args.folder,
        "selection": selection_from(args),
        "perceptual": tuple(args.perceptual),
        "lora_layers": tuple(args.lora_layers or ()),
        "sample_prompts": tuple(args.sample_prompts),
        "warmup": min(50, args.steps // 10) if args.warmup is None else args.warmup,
    }
    options = TrainOptions(**given)
    _check_hosts(args)
    prepare_device(args.cpu_only)
    try:
        model = _train(options, args)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        raise UserError(f"this needs {error.name}: pip install 'dm-generations[{_EXTRAS[error.name]}]'") from error
    if model is None:
        return 0
    print_line(f"Wrote {model}")
    if args.decoder:
        codec = f" --codec {args.codec}" if args.codec else ""
        print_line("To decode with it:")
        print_line(f"  {' '.join(command_words('decode'))} FILE.db{codec} --decoder {model} --out-dir images")
        return 0
    if args.train_codec:
        print_line("To encode images with it:")
        print_line(f"  {' '.join(command_words('encode'))} FOLDER --codec {model} --db new.db")
        return 0
    print_line("To draw with it:")
    print_line(f'  {" ".join(command_words("generate"))} --model {model} --db new.db --prompts "a rocket"')
    return 0
