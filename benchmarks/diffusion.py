"""Time the UNet of a diffusion decoder at its real shape with random weights, and compare its samplers.

    python benchmarks/diffusion.py network               # a step of one image, and of torch if it is installed
    python benchmarks/diffusion.py network --dtype bfloat16 --batch-size 16 --steps 25      # images a second on a GPU
    python benchmarks/diffusion.py guidance              # a step with CLIP guidance beside one without
    python benchmarks/diffusion.py samplers --decoder FILE --images FOLDER      # of a trained decoder

`network` and `guidance` take --size 256, 128 or 64, the preset: 256 needs 8 GB of memory and some minutes on 2 cores.
`samplers` encodes images, PNG with captions in .txt beside them, and decodes their tokens by each sampler from the same
noise, and by the codec's own decoder. --sheet draws the originals, below them the codec's images, then the default's.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from timing import matrix_peak, seconds_of

from dm_generations.archive import DTYPES
from dm_generations.inference.decoder import Decoder, RowKey
from dm_generations.inference.diffusion import Diffusion, DiffusionDecoder, Guidance
from dm_generations.inference.encoder import Encoder
from dm_generations.inference.scorer import Scorer
from dm_generations.models.diffusion_decoder.checkpoint import preset_config
from dm_generations.models.diffusion_decoder.network import DiffusionDecoderConfig, PreparedUNet, UNet
from dm_generations.models.diffusion_decoder.samplers import Steps
from dm_generations.models.loading import Checkpoint, load_checkpoint
from dm_generations.models.registry import parameter_shapes
from dm_generations.models.vqgan.network import VQGANConfig
from dm_generations.sampling.params import DECODER_STEPS
from dm_generations.weights.native import unflatten

GRID = 16  # tokens a side
RUNS = ("dpm10", "dpm15", "dpm25", "dpm50", "ddim25", "ddim50")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["network", "guidance", "samplers"])
    parser.add_argument("--size", type=int, choices=[256, 128, 64], default=256, help="the preset (default: 256)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="of images a second (default: 25)")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="of which the best counts (default: 2)")
    parser.add_argument("--decoder", metavar="FILE", help="of `samplers`")
    parser.add_argument("--codec", metavar="PATH", help="of `samplers` (default: the embedded one)")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="of `samplers`")
    parser.add_argument("--count", type=int, default=50, metavar="N", help="of images at most (default: 50)")
    parser.add_argument("--reference", default="250", metavar="STEPS", help="to compare with (default: 250, DDPM's)")
    parser.add_argument("--clip-denoised", action="store_true", help="of `samplers`: as the flag of decode")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="of `samplers`: a PNG to write")
    args = parser.parse_args()
    if args.what == "samplers" and None in (args.decoder, args.images):
        parser.error("samplers needs --decoder and --images")
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, load {os.getloadavg()[0]:.1f}", flush=True)
    {"network": network, "guidance": guidance, "samplers": samplers}[args.what](args)


def network(args: argparse.Namespace) -> None:
    """Print the seconds of a step, its share of the rate of a matrix product, and images a second."""
    config = preset_config(args.size)
    params = random_params(config)
    unet = PreparedUNet(config, np.dtype(args.dtype), jax.devices()[0].platform)
    inputs = random_inputs(config, args.batch_size)
    written = jax.jit(lambda params, *inputs: UNet(config).apply({"params": params}, *inputs))
    gflop = written.lower(jax.eval_shape(lambda: params), *inputs).cost_analysis()["flops"] / args.batch_size / 1e9
    peak = matrix_peak(args.dtype) / 1e9
    print(f"{gflop:,.0f} GFLOP a step of an image", flush=True)

    def line(what: str, seconds: float) -> None:
        share = args.batch_size * gflop / seconds / peak
        images = args.batch_size / seconds / args.steps
        print(
            f"{what:28} {seconds:8.2f} s a step, {share:4.0%} of the {peak:,.0f} GFLOP/s of a matrix product, "
            f"{images:.3g} images/s in {args.steps} steps",
            flush=True,
        )

    placed, step = unet.prepare_params(params), jax.jit(unet)
    line(f"ours, {args.dtype}", seconds_of(functools.partial(step, placed, *inputs), args.repeats))
    del placed
    time_torch(config, params, inputs, args, line)


def guidance(args: argparse.Namespace) -> None:
    """Print the seconds of a step with and without guidance by the embedded CLIP."""
    config = preset_config(args.size)
    checkpoint = Checkpoint("diffusion_decoder", config, random_params(config), "random", "0" * 64, Path())
    clip, codec = load_checkpoint(None, "clip"), random_codec(config)
    steps = Steps.parse("dpm2", None, config.diffusion_steps)
    tokens, key = np.zeros((1, GRID**2), np.uint16), [RowKey(prompt="a rocket")]
    for what, by in (("without", None), ("with", Guidance(clip))):
        decoder = DiffusionDecoder(codec, Diffusion(checkpoint, steps, guidance=by), 1, args.dtype, GRID)
        seconds = seconds_of(functools.partial(decoder.decode, tokens, key), args.repeats) / 2
        print(f"a step {what} guidance: {seconds:.2f} s", flush=True)
        del decoder


def samplers(args: argparse.Namespace) -> None:
    """Print how good the images of each sampler are, beside those of the codec's own decoder."""
    codec = load_checkpoint(args.codec, "codec")
    pixels, captions = read_images(args.images, codec.config.image_size, args.count)
    tokens = Encoder(codec).encode(pixels)
    keys = [RowKey(7, number) for number in range(len(tokens))]
    scorer = Scorer.load()
    scores, sheet = {}, [pixels]

    def line(what: str, images: np.ndarray, seconds: float) -> None:
        noise = np.maximum(((images.astype(float) - pixels) ** 2).mean((1, 2, 3)), 1e-6)
        scores[what] = scorer(images, captions)
        difference = scores[what] - scores[args.reference]
        interval = 1.96 * difference.std(ddof=1) / len(images) ** 0.5
        print(
            f"{what:10} {10 * np.log10(255**2 / noise).mean():8.2f} dB {scores[what].mean():8.2f} CLIP "
            f"{difference.mean():+8.2f} +- {interval:.2f} {np.abs(images - exact).mean():8.2f} {seconds:8.1f} s",
            flush=True,
        )

    def decode(steps: str | None) -> tuple[np.ndarray, float]:
        diffusion = None if steps is None else Diffusion.load(args.decoder, steps, clip_denoised=args.clip_denoised)
        grid = round(tokens.shape[1] ** 0.5)
        decoder = Decoder.from_checkpoint(codec, args.batch_size, args.dtype, grid, diffusion)
        decoder.compile()
        started = time.perf_counter()
        return decoder(tokens, keys).astype(np.uint8), time.perf_counter() - started

    print(f"{len(pixels)} images: PSNR, CLIP score and its difference from {args.reference}, distance from it in 1/255")
    reference, seconds = decode(args.reference)
    exact = reference.astype(float)
    line(args.reference, reference, seconds)
    line("originals", pixels, 0)
    own, seconds = decode(None)
    line("codec", own, seconds)
    for steps in RUNS:
        images, seconds = decode(steps)
        line(steps, images, seconds)
        if steps == DECODER_STEPS:
            sheet += [own, images]
    if args.sheet is not None:
        Image.fromarray(np.concatenate([np.concatenate([*images], 1) for images in sheet])).save(args.sheet)


def read_images(folder: Path, side: int, count: int) -> tuple[np.ndarray, list[str]]:
    """Return (n, side, side, 3) uint8 of a folder's images, spread over it, and the captions beside them."""
    files = [path for path in sorted(folder.glob("*.png")) if path.with_suffix(".txt").exists()]
    files = [files[len(files) * number // count] for number in range(count)] if len(files) > count else files
    images = [Image.open(path).convert("RGB").resize((side, side), Image.Resampling.LANCZOS) for path in files]
    return np.stack(images), [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in files]


def random_params(config: DiffusionDecoderConfig) -> dict:
    """Return weights that keep activations near 1."""
    random, flat = np.random.default_rng(0), {}
    for path, shape in parameter_shapes("diffusion_decoder", config).items():
        scale = np.prod(shape[:-1]) ** -0.5 if path.endswith("kernel") else 0.1
        flat[path] = random.standard_normal(shape, np.float32) * np.float32(scale) + np.float32(path.endswith("scale"))
    return unflatten(flat)


def random_codec(config: DiffusionDecoderConfig) -> Checkpoint:
    """Return a codec that is a codebook."""
    width = config.emb_input_dims
    codec = VQGANConfig(n_embed=64, embed_dim=width, resolution=GRID * 16)
    rows = np.random.default_rng(1).standard_normal((64, width), np.float32)
    return Checkpoint("vqgan", codec, {"quantize": {"embedding": {"embedding": rows}}}, "random", "0" * 64, Path())


def random_inputs(config: DiffusionDecoderConfig, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return noisy images, times and vectors of tokens."""
    random, side = np.random.default_rng(2), config.image_side(GRID)
    x = random.standard_normal((count, side, side, 3), np.float32)
    vectors = random.standard_normal((count, GRID, GRID, config.emb_input_dims), np.float32)
    return x, np.full(count, 500, np.float32), vectors


def time_torch(
    config: DiffusionDecoderConfig,
    params: dict,
    inputs: tuple[np.ndarray, ...],
    args: argparse.Namespace,
    line: Callable[[str, float], None],
) -> None:
    """Time the same network in PyTorch, channels last, and print how far its result is from ours in float32."""
    try:
        import torch
    except ImportError:
        print("torch is not installed")
        return
    from torch_unet import TorchUNet

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = True
    unet = TorchUNet(config, params, "cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode(), torch.autocast(unet.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        line(f"torch {torch.__version__}, {args.dtype}", seconds_of(lambda: unet(*inputs), args.repeats))
        found = unet(*inputs).cpu().float().numpy()
    if args.dtype == "float32":
        ours = PreparedUNet(config, np.dtype("float32"), jax.devices()[0].platform)
        expected = jax.jit(ours)(ours.prepare_params(params), *inputs)
        print(f"largest difference {np.abs(found.transpose(0, 2, 3, 1) - expected).max():.1e}")


if __name__ == "__main__":
    main()
