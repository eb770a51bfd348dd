"""Time the decoder of a full-size VQGAN (f16, 16,384 tokens, random weights): the network, and the whole pipeline.

    python benchmarks/decode.py network                  # images a second of each dtype, and of torch if installed
    python benchmarks/decode.py errors                   # each dtype against float64
    python benchmarks/decode.py pipeline --count 64      # an archive to PNG files, each stage of it, and the simple
                                                         # structure: read, decode, wait, encode in turn
    python benchmarks/decode.py memory                   # of 1,000 and 71,680 images, with a tiny codec
    python benchmarks/decode.py memory --modes images gallery npy tar zip

Some minutes each on 2 cores. --codec PATH takes the weights of another codec; "embedded" is the one that ships.
"""

import argparse
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import decode_stages
import jax
import numpy as np
from timing import matrix_peak, seconds_of

from dm_generations.archive import DTYPES
from dm_generations.inference.decoder import Decoder
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.registry import parameter_shapes
from dm_generations.models.vqgan.fast_decoder import VQGANDecoder
from dm_generations.models.vqgan.network import VQGAN, VQGANConfig
from dm_generations.weights.native import unflatten


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["network", "errors", "pipeline", "memory"])
    parser.add_argument("--codec", metavar="PATH", help="(default: random weights of full size)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="(default: 4)")
    parser.add_argument("--count", type=int, default=32, metavar="N", help="images of `pipeline` (default: 32)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of `pipeline` (default: float32)")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 71_680], metavar="N", help="of `memory`")
    modes = decode_stages.MODES
    parser.add_argument("--modes", choices=modes, nargs="+", default=["images", "zip"], help="of `memory`")
    parser.add_argument("--structure", help=argparse.SUPPRESS)  # what a process of its own runs, and where
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.structure:
        {"pipeline": decode_stages.pipeline_process, "memory": decode_stages.memory_process}[args.what](args)
        return
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, load {os.getloadavg()[0]:.1f}", flush=True)
    {"network": network, "errors": errors, "pipeline": pipeline, "memory": decode_stages.memory}[args.what](args)


def network(args: argparse.Namespace) -> None:
    """Print images a second on the device, without the pipeline. GFLOP are those of the plain network."""
    config, params = codec_of(args.codec)
    tokens = random_tokens(config, args.batch_size)
    peak = {dtype: matrix_peak(dtype) / 1e9 for dtype in DTYPES}  # GFLOP/s
    model = VQGAN(config)
    decoder_params = {name: part for name, part in params.items() if name not in VQGAN.ENCODER_PARTS}
    written = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens, method="decode_code"))
    gflop = written.lower(decoder_params, tokens).cost_analysis()["flops"] / args.batch_size / 1e9
    print(f"{gflop:.0f} GFLOP an image")

    def line(what: str, dtype: str, seconds: float) -> None:
        rate = args.batch_size / seconds
        share = f"{rate * gflop / peak[dtype]:4.0%} of the {peak[dtype]:,.0f} GFLOP/s of a matrix product"
        print(f"{what:34} {rate:9.2f} images/s {1e3 / rate:9.1f} ms {share}", flush=True)

    placed = jax.device_put(decoder_params)
    line("the plain network", "float32", seconds_of(functools.partial(written, placed, tokens)))
    del placed
    two = np.concatenate([tokens, tokens])  # batches, which the decoder has under way together
    for dtype in DTYPES:
        codec = Decoder("vqgan", config, params, args.batch_size, dtype)
        line(f"ours, {dtype}", dtype, seconds_of(lambda codec=codec: codec.decode(two)) / 2)
    time_torch(config, params, tokens, line)


def errors(args: argparse.Namespace) -> None:
    """Print the errors against float64, in units of 1/255, before truncation, and how many pixels differ after it."""
    config, params = codec_of(args.codec)
    print("dtype        mean      largest   bytes that differ")
    for dtype, mean, largest, differing in decoding_errors(config, params, random_tokens(config, args.batch_size)):
        print(f"{dtype:10} {mean:9.6f} {largest:9.5f} {differing:9.3%}", flush=True)


def decoding_errors(config: VQGANConfig, params: dict, tokens: np.ndarray) -> Iterator[tuple[str, float, float, float]]:
    """Return each dtype with its mean and largest error, and the share of bytes that differ."""
    platform = jax.devices()[0].platform

    def decoded(dtype: str) -> np.ndarray:
        decoder = VQGANDecoder(config, np.dtype(dtype), platform)
        pixels = jax.jit(decoder.decode)(decoder.prepare_params(params), tokens)
        return np.clip(np.asarray(pixels, np.float64), 0, 1) * 255

    with jax.enable_x64(True):
        exact = decoded("float64")
    for dtype in DTYPES:
        found = decoded(dtype)
        error = np.abs(found - exact)
        yield dtype, error.mean(), error.max(), np.mean(np.floor(found) != np.floor(exact))


def pipeline(args: argparse.Namespace) -> None:
    """Run decode_stages.py."""
    config, params = codec_of(args.codec)
    decode_stages.pipeline(args, config, params, random_tokens(config, args.count))


def codec_of(path: str | None) -> tuple[VQGANConfig, dict]:
    """Return config and parameters, NumPy float32."""
    if path is not None:
        checkpoint = load_checkpoint(None if path == "embedded" else path, "codec")
        return checkpoint.config, jax.tree.map(lambda leaf: np.array(leaf, np.float32), checkpoint.params)
    return VQGANConfig(), random_params("vqgan", VQGANConfig())


def random_params(kind: str, config: Any) -> dict:
    """Return float32 weights that keep activations near 1."""
    rng, flat = np.random.default_rng(0), {}
    for name, shape in parameter_shapes(kind, config).items():
        values = rng.standard_normal(shape, np.float32)
        if name.endswith("kernel"):  # activations stay near 1
            values *= np.prod(shape[:-1]) ** -0.5
        elif not name.endswith("embedding"):  # biases near 0, scales near 1
            values = values * 0.1 + name.endswith("scale")
        flat[name] = values.astype(np.float32)
    return unflatten(flat)


def random_tokens(config: VQGANConfig, count: int) -> np.ndarray:
    """Return random tokens (count, L) int32."""
    return np.random.default_rng(1).integers(config.codebook_size, size=(count, config.grid**2), dtype=np.int32)


def time_torch(config: VQGANConfig, params: dict, tokens: np.ndarray, line: Callable[[str, str, float], None]) -> None:
    """Time the same network in PyTorch, channels last, in float32 and under autocast to bfloat16."""
    try:
        import torch
    except ImportError:
        print("torch is not installed")
        return
    from torch.nn import functional

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("highest")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def put_params(tree):
        if isinstance(tree, dict):
            return {name: put_params(part) for name, part in tree.items()}
        array = torch.from_numpy(np.ascontiguousarray(tree.transpose(3, 2, 0, 1) if tree.ndim == 4 else tree))
        return array.to(device, memory_format=torch.channels_last if tree.ndim == 4 else torch.contiguous_format)

    def conv(weights, x):
        return functional.conv2d(x, weights["kernel"], weights["bias"], padding=weights["kernel"].shape[-1] // 2)

    def norm(weights, x):
        return functional.group_norm(x, config.num_groups, weights["scale"], weights["bias"], config.group_norm_eps)

    def res_block(weights, x):
        h = conv(weights["conv1"], functional.silu(norm(weights["norm1"], x)))
        h = conv(weights["conv2"], functional.silu(norm(weights["norm2"], h)))
        return h + (conv(weights["nin_shortcut"], x) if "nin_shortcut" in weights else x)

    def attention(weights, x):
        normed = norm(weights["norm"], x)
        q, k, v = (conv(weights[name], normed).flatten(2).transpose(1, 2)[:, None] for name in ("q", "k", "v"))
        mixed = functional.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + conv(weights["proj_out"], mixed.transpose(1, 2).reshape(x.shape))

    def decode(tokens):
        side = config.grid
        x = functional.embedding(tokens, codebook).reshape(-1, side, side, codebook.shape[1]).permute(0, 3, 1, 2)
        weights = decoder
        x = conv(weights["conv_in"], conv(after, x))
        x = res_block(weights["mid"]["block_1"], x)
        x = res_block(weights["mid"]["block_2"], attention(weights["mid"]["attn_1"], x))
        for i in reversed(range(len(config.ch_mult))):
            level = weights[f"up_{i}"]
            for j in range(config.num_res_blocks + 1):
                x = res_block(level[f"block_{j}"], x)
                if f"attn_{j}" in level:
                    x = attention(level[f"attn_{j}"], x)
            if i:
                x = conv(level["upsample"]["conv"], functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return conv(weights["conv_out"], functional.silu(norm(weights["norm_out"], x)))

    codebook = put_params(params["quantize"]["embedding"]["embedding"])
    after, decoder = put_params(params["post_quant_conv"]), put_params(params["decoder"])
    tokens = torch.from_numpy(tokens).to(device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for dtype in ("float32", "bfloat16"):
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            line(f"torch {torch.__version__}, {dtype}", dtype, seconds_of(lambda: (decode(tokens), wait())[1]))


if __name__ == "__main__":
    main()
