"""Options about a diffusion decoder, of all commands that decode."""

import argparse
from typing import TYPE_CHECKING

from dm_generations.errors import UserError
from dm_generations.sampling.params import DECODER_STEPS

if TYPE_CHECKING:
    from dm_generations.inference.diffusion import Diffusion

_DECODER_OPTIONS = (
    *("decoder_steps", "eta", "clip_denoised", "decoder_seed", "decoder_n", "decoding"),
    *("clip_guidance_scale", "guidance_clip"),
)


def add_decoder_options(parser: argparse.ArgumentParser, guides: bool = True) -> argparse._ArgumentGroup:
    """Add a group of options about a diffusion decoder, which `load_diffusion` reads, and return it.

    Args:
        parser: Of the command.
        guides: Whether a CLIP can guide it.
    """
    group = parser.add_argument_group(
        "diffusion decoder", "takes the place of the codec's own decoder, and begins with noise from each image's key"
    )
    add = group.add_argument
    add(
        "--decoder",
        metavar="PATH",
        help="a model-latest.pt or ema_*.pt of DALL-3's decoder, or a folder that convert made of one; --codec is the "
        "codec that made the tokens",
    )
    add(
        "--decoder-steps",
        metavar="N",
        help="steps and their sampler: 250 is DDPM, ddim50 is DDIM and dpm25 is DPM-Solver++; more take longer "
        f"(default: {DECODER_STEPS})",
    )
    add("--eta", type=_eta, metavar="X", help="noise of the steps of ddimN, 0 to 1 (default: 0)")
    add("--clip-denoised", action="store_true", help="clip what is predicted at each step to the range of pixels")
    add(
        "--decoder-seed",
        type=_decoder_seed,
        metavar="N",
        help="of the noise; another one gives other details (default: 0)",
    )
    if guides:
        add(
            "--clip-guidance-scale",
            type=_scale,
            metavar="X",
            help="let a CLIP draw each image towards its prompt, 1000 for instance; takes several times as long "
            "(default: off)",
        )
        add("--guidance-clip", metavar="PATH", help="the CLIP that does so (default: the embedded one)")
    return group


def load_diffusion(args: argparse.Namespace) -> "Diffusion | None":
    """Load the decoder that the options of `add_decoder_options` ask for, after `prepare_device`; None for none.

    Raises:
        UserError: It is missing or broken, or an option has no effect.
    """
    if args.decoder is None:
        for name in _DECODER_OPTIONS:
            if getattr(args, name, None):
                raise UserError(f"--{name.replace('_', '-')} has no effect here: it is for --decoder")
        return None
    from dm_generations.inference.diffusion import Diffusion, Guidance
    from dm_generations.models.loading import load_checkpoint

    guidance = None
    if scale := getattr(args, "clip_guidance_scale", None):
        guidance = Guidance(load_checkpoint(args.guidance_clip, "clip"), scale)
    elif getattr(args, "guidance_clip", None):
        raise UserError("--guidance-clip has no effect here: it is for --clip-guidance-scale")
    steps = args.decoder_steps or DECODER_STEPS
    return Diffusion.load(args.decoder, steps, args.eta, args.clip_denoised, args.decoder_seed or 0, guidance)


def _scale(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1e9:
        raise argparse.ArgumentTypeError(f"{number} is not above 0 and at most 1e9")
    return number


def _eta(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 1")
    return number


def _decoder_seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 1 << 32:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 4,294,967,295")
    return number


_eta.__name__ = _scale.__name__ = "number"
_decoder_seed.__name__ = "whole number"
