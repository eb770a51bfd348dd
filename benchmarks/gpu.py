"""Measure a GPU in one command: whether it computes the right thing, then how fast, with torch beside it if installed.

    python benchmarks/gpu.py                          # at most 8 minutes; README.md says what it needs
    python benchmarks/gpu.py --parts mini mega        # only these
    python benchmarks/gpu.py --tiny --out /tmp/tiny   # all of it with small models, on a CPU too, in about a minute

Each part runs in a process of its own. When it ends, its figures go into results.json, and the table of all parts into
results.md. Parts that are there are skipped, so the same command goes on where an earlier one was stopped.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(ROOT), str(ROOT / "tests")]

# Imports of JAX are in the parts: the process that starts them must not take the GPU's memory.
import numpy as np  # noqa: E402

from dm_generations.archive import Archive  # noqa: E402
from dm_generations.atomic_io import write_atomic  # noqa: E402

GOLDEN_ERROR = 1e-4  # of float32 against the original programs, as in tests/models
BFLOAT16_ERROR = 0.25  # of the logits' standard deviation, as there
DECODER_ERRORS = {"float32": 0.05, "float16": 4.0, "bfloat16": 24.0}  # in 1/255, twice what a CPU shows and more
REPLAY_MARGIN = 0.01  # the default of `verify --replay`
# What is tried beside the defaults: the whole loop as one CUDA graph, with nothing for the host to start.
FLAGS = {"graphs": "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"}
FILES = {"png": ("images", "png"), "webp": ("images", "webp"), "tar": ("tar", "png")}  # mode and format


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    shapes: dict[str, str]  # part -> shape of the model that it samples with
    batches: tuple[int, ...]
    steps: int  # timed, of each batch
    whole: int  # the largest batch that is also sampled from beginning to end
    invariant: tuple[int, ...]  # batch sizes
    dtypes: tuple[str, ...]  # in which a row must not depend on its batch
    decoder_batches: tuple[int, ...]
    files: dict[str, int]  # images of each kind
    matrix: int  # of the peak's product
    memory: int  # bytes of the array that bandwidth is measured with
    scored: int  # images of a batch


FULL = Sizes(
    shapes={"mini": "mini", "mega": "mega"},
    batches=(1, 16, 256, 1024),
    steps=16,
    whole=256,
    invariant=(8, 64, 256),
    dtypes=("float32", "bfloat16"),
    decoder_batches=(32, 128),
    files={"png": 71_680, "webp": 8_960, "tar": 8_960},
    matrix=8192,
    memory=1 << 32,
    scored=256,
)
TINY = Sizes(
    shapes={"mini": "tiny", "mega": "tiny"},
    batches=(1,),
    steps=2,
    whole=1,
    invariant=(2,),
    dtypes=("float32",),
    decoder_batches=(2,),
    files={"png": 80, "webp": 40, "tar": 40},
    matrix=256,
    memory=1 << 22,
    scored=2,
)


class Figures(list):
    """The rows of a part's table, printed as they come."""

    def add(self, what: str, value: float, unit: str, torch: float | None = None, note: str = "") -> None:
        """Add a measurement; `torch` is the same of PyTorch."""
        self._append({"what": what, "value": value, "unit": unit, "torch": torch, "note": note})

    def check(self, what: str, found: float, limit: float, unit: str = "") -> None:
        """Add a number that must not be above a limit."""
        found, limit = float(found), float(limit)
        note = f"at most {limit:.3g}" + ("" if found <= limit else ": WRONG")
        self._append({"what": what, "value": found, "unit": unit, "torch": None, "note": note, "ok": found <= limit})

    def _append(self, figure: dict[str, Any]) -> None:
        figure["value"] = float(figure["value"])
        self.append(figure)
        print("    " + " | ".join(cells(figure)), flush=True)


def cells(figure: dict[str, Any]) -> list[str]:
    """Return what a row of the table shows."""
    numbers = (figure["value"], figure["torch"])
    ours, theirs = ("" if number is None else f"{number:,.4g} {figure['unit']}".strip() for number in numbers)
    return [figure["what"], ours, theirs, figure["note"]]


# The parts.


def correctness(sizes: Sizes, figures: Figures) -> None:
    """Compare with the original programs, between batch sizes, and with rows that a CPU sampled."""
    golden_errors(figures)
    invariance(sizes, figures)
    from decode import codec_of, decoding_errors, random_tokens

    from dm_generations.models.loading import load_checkpoint
    from dm_generations.pipelines.reproduce import reproduce_archive

    with Archive.open(ROOT / "archive" / "emoji.db") as archive:
        checkpoint = load_checkpoint(None, "generator")
        count = min(256, 32 * max(sizes.invariant))
        report = reproduce_archive(archive, checkpoint, max(sizes.invariant), REPLAY_MARGIN, count)
        what = f"of {report.checked_count} rows that a CPU sampled, those off by more than {REPLAY_MARGIN:g}"
        figures.check(what, len(report.mismatches), 0)
    config, params = codec_of(None if sizes is FULL else "embedded")
    for dtype, _, largest, _ in decoding_errors(config, params, random_tokens(config, 2)):
        figures.check(f"decoded in {dtype}, largest error against float64", largest, DECODER_ERRORS[dtype], "/255")


def golden_errors(figures: Figures) -> None:
    """Compare networks with what the original programs gave."""
    import jax
    from helpers import golden_dirs

    from dm_generations.models.clip.network import CLIP
    from dm_generations.models.dalle_mini.config import DalleBartConfig, config_for_params
    from dm_generations.models.dalle_mini.network import DalleBart
    from dm_generations.models.loading import load_checkpoint
    from dm_generations.models.vqgan.network import VQGAN
    from dm_generations.runtime.device import matmul_precision
    from dm_generations.weights.flax_msgpack import read_flax_msgpack

    def first(name: str, array: str) -> tuple[Path, dict[str, np.ndarray]]:
        files = (file for folder in golden_dirs(name)[::-1] for file in sorted(folder.rglob("*.npz")))
        file = next(file for file in files if array in np.load(file).files)
        return file.parent, dict(np.load(file))

    def run(model: Any, params: dict, *inputs: np.ndarray, method: Any = None) -> np.ndarray:
        with matmul_precision(model.dtype), jax.numpy_dtype_promotion("standard"):
            apply = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs, method=method))
            params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
            return np.asarray(apply(params, *inputs), np.float32)

    folder, arrays = first("dalle_bart", "logits")
    params = read_flax_msgpack(folder / "flax_model.msgpack")
    config = config_for_params(DalleBartConfig.from_dict(json.loads((folder / "config.json").read_text())), params)
    inputs = [arrays[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")]
    for dtype, limit in (("float32", GOLDEN_ERROR), ("bfloat16", BFLOAT16_ERROR * arrays["logits"].std())):
        logits = run(DalleBart(config, dtype), params, *inputs)
        figures.check(
            f"logits of DALL-E mini in {dtype}, largest error", np.abs(logits - arrays["logits"]).max(), limit
        )
    folder, arrays = first("vqgan_jax", "decoded")
    codec, expected = load_checkpoint(folder, "codec"), arrays["decoded"]
    tokens = arrays["tokens"].astype(np.int32).reshape(len(expected), -1)
    pixels = run(VQGAN(codec.config), codec.params, tokens, method="decode_code")
    error = np.abs(pixels - expected).max() / np.abs(expected).max()
    figures.check("pixels of VQGAN in float32, largest relative error", error, GOLDEN_ERROR)
    folder, arrays = first("clip", "logits_per_image")
    clip = load_checkpoint(folder / "model", "clip")
    inputs = [arrays["pixel_values"].transpose(0, 2, 3, 1), arrays["input_ids"], arrays["attention_mask"]]
    logits = run(CLIP(clip.config), clip.params, *inputs, method="logits_per_image")
    error = np.abs(logits - arrays["logits_per_image"]).max()
    figures.check("scores of CLIP in float32, largest error", error, GOLDEN_ERROR)


def invariance(sizes: Sizes, figures: Figures) -> None:
    """Sample a row alone and among others, in batches of several sizes."""
    from dm_generations.inference.generator import Generator
    from dm_generations.models.loading import load_checkpoint
    from dm_generations.sampling.params import SamplingParams
    from dm_generations.sampling.prng import row_key

    checkpoint = load_checkpoint(None, "generator")
    settings = (SamplingParams(256, cond_scale=3.0), SamplingParams(0, 0.9, 0.7), SamplingParams(cond_scale=10.0))
    for dtype in sizes.dtypes:
        alone: dict[int, np.ndarray] = {}
        for size in sizes.invariant:
            generator = Generator(checkpoint, checkpoint.load_tokenizer(), size, dtype)
            keys = np.array([row_key(0, index) for index in range(size)], np.uint32)
            params = [settings[index % len(settings)] for index in range(size)]
            prompts = ["a rocket" if index % 2 else "a 3d strawberry" for index in range(size)]
            together = generator.generate(prompts, params, keys)
            alone[size] = generator.generate(prompts[:1], params[:1], keys[:1])[0]
            last = generator.generate(prompts[-1:], params[-1:], keys[-1:])[0]
            found = (alone[size] != together[0]).sum() + (last != together[-1]).sum()
            figures.check(f"tokens of a row that differ alone and in a batch of {size}, {dtype}", found, 0)
        differing = sum(int((tokens != alone[sizes.invariant[0]]).sum()) for tokens in alone.values())
        note = "may be above 0: sums are rounded in another order"
        what = f"tokens that differ between batches of {', '.join(map(str, sizes.invariant))}, {dtype}"
        figures.add(what, differing, "", note=note)


def limits(sizes: Sizes, figures: Figures) -> None:
    """Measure the device's memory and arithmetic, and the parts of a step that choose a token."""
    import jax
    from generate import Machine
    from sampling import timings
    from timing import matrix_peak, seconds_of

    for dtype in ("float32", "bfloat16"):
        figures.add(f"matrix products, {dtype}, all bits", matrix_peak(dtype, sizes.matrix) / 1e12, "TFLOP/s")
    figures.add("memory", Machine.measured("bfloat16", sizes.memory).bandwidth / 1e9, "GB/s")
    on_host = np.ones(min(sizes.memory, 1 << 28), np.uint8)
    on_device = jax.device_put(on_host)
    figures.add("host to device", len(on_host) / seconds_of(lambda: jax.device_put(on_host)) / 1e9, "GB/s")
    seconds = min(timed(lambda: np.asarray(on_device + np.uint8(1))) for _ in range(3))
    figures.add("device to host", len(on_host) / seconds / 1e9, "GB/s")
    rows, columns = (512, 16_384) if sizes is FULL else (4, 64)
    for what, wall, _ in itertools.islice(timings(rows, columns), None if sizes is FULL else 1):
        figures.add(f"{what}; {rows} rows of {columns:,}", 1e3 * wall, "ms")


def decoding(sizes: Sizes, figures: Figures) -> None:
    """Time the decoder on the device alone."""
    from decode import random_tokens, time_torch
    from timing import seconds_of

    from dm_generations.inference.decoder import Decoder

    config, params = codec(sizes)
    for batch_size in sizes.decoder_batches:
        tokens = random_tokens(config, batch_size)
        rates: dict[str, float] = {}  # of torch, by dtype
        time_torch(config, params, tokens, functools.partial(keep_rate, rates, batch_size))
        for dtype in ("float32", "bfloat16"):
            decoder = Decoder("vqgan", config, params, batch_size, dtype)
            note = f"compiled in {timed(decoder.compile):.1f} s"
            decode = functools.partial(decoder.decode_batch, tokens.astype(np.uint16))
            what = f"images a second in batches of {batch_size}, {dtype}"
            figures.add(what, batch_size / seconds_of(decode), "", rates.get(dtype), note)
    add_peak(figures, "all of it, torch beside it")


def keep_rate(rates: dict[str, float], batch_size: int, what: str, dtype: str, seconds: float) -> None:
    """Store images a second, as a callback of `time_torch`."""
    rates[dtype] = batch_size / seconds


def files(sizes: Sizes, figures: Figures) -> None:
    """Decode an archive to files, and time each stage and the encoders."""
    from decode import random_tokens
    from decode_kit import write_archive_2022
    from decode_stages import IMAGES_OF_A_PROMPT, STAGES, in_turn, our_stages
    from encode import core_time, rate

    from dm_generations.export.exporter import ExportOptions, export_archive
    from dm_generations.export.output_file import Encoding
    from dm_generations.export.plan import Layout
    from dm_generations.inference.decoder import Decoder
    from dm_generations.models.loading import load_checkpoint
    from dm_generations.runtime.device import core_count
    from dm_generations.weights import native

    config, params = codec(sizes)
    tokens, cores = random_tokens(config, IMAGES_OF_A_PROMPT).astype(np.uint16), core_count()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        native.save(folder / "codec", "vqgan", dataclasses.asdict(config), params)
        checkpoint = load_checkpoint(folder / "codec", "codec")
        images = list(Decoder.from_checkpoint(checkpoint, 8, "bfloat16").decode(tokens[:8]))
        for kind in ("png", "webp"):
            encode = Encoding(kind).encode
            seconds = core_time(encode, images, 2)
            note = f"{rate(encode, images, cores, 1.0):,.0f} on {cores} threads"
            figures.add(f"{kind} files a second of one core", 1 / seconds, "", note=note)
        for kind, (mode, file_format) in FILES.items():
            count = sizes.files[kind]
            prompts = tuple(f"boat number {number}" for number in range(count // len(tokens)))
            archive_file = write_archive_2022(folder / f"{kind}.db", tokens, prompts)
            encoding = Encoding(file_format)
            layout = Layout(mode, 8, 4, encoding.extension)
            options = ExportOptions(
                folder / kind, layout, codec=str(folder / "codec"), dtype="bfloat16", batch_size=None, encoding=encoding
            )
            with Archive.open(archive_file) as archive:
                started = time.perf_counter()
                report = export_archive(archive, options)
                seconds = time.perf_counter() - started
            assert not report.problems, report.problems[:3]
            note = f"{count:,} images in {seconds:.0f} s, compilation included"
            figures.add(f"images a second on disk, {mode} of {file_format}", count / seconds, "", note=note)
            subprocess.run(["rm", "-rf", str(folder / kind)], check=True)
        write_archive_2022(folder / "archive.db", tokens, ("a boat", "a cat"))
        stages = our_stages(checkpoint, len(tokens), "bfloat16", folder)
        in_turn(stages, len(tokens))
        seconds_of_stage = in_turn(stages, len(tokens))
        for stage in STAGES:
            figures.add(f"images a second of stage {stage!r} alone", 2 * len(tokens) / seconds_of_stage[stage], "")


def graphs(sizes: Sizes, figures: Figures) -> None:
    """Time small batches with other flags of XLA, see FLAGS."""
    few = dataclasses.replace(sizes, batches=sizes.batches[:2])
    sampling(few, figures, "mini")


def sampling(sizes: Sizes, figures: Figures, part: str) -> None:
    """Time steps and whole images of one shape of model in bfloat16, with and without super conditioning."""
    import jax
    from generate import Machine, cost_of_step, model_of, seconds_of_step

    from dm_generations.inference.generator import Generator
    from dm_generations.runtime.device import is_out_of_memory

    checkpoint, tokenizer = model_of(sizes.shapes[part])
    theirs = torch_steps(checkpoint, sizes)  # before JAX takes memory that it does not give back
    machine = Machine.measured("bfloat16", sizes.memory, sizes.matrix)
    length, heads = checkpoint.config.image_length, checkpoint.config.decoder_attention_heads
    started = time.perf_counter()
    generator = Generator(checkpoint, tokenizer, 1, "bfloat16")
    figures.add("weights to the device", time.perf_counter() - started, "s")
    for batch_size in sizes.batches:
        generator.set_batch_size(batch_size)
        if generator.batch_size < batch_size:
            figures.add(f"batch {batch_size} is left out, memory holds", generator.batch_size, "images")
            continue
        try:
            compiling = timed(functools.partial(generator.measure_steps, 1))
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            figures.add(f"batch {batch_size} is left out, memory holds fewer than", batch_size, "images")
            continue
        begin, step = seconds_of_step(generator, sizes.steps)
        read, operations = cost_of_step(checkpoint.config, 2 * batch_size, 2)
        floor = max(read / machine.bandwidth, operations / machine.flops)
        note = f"{floor / step:.0%} of the roofline ({1e3 * floor:.3g} ms); compiled in {compiling:.1f} s"
        figures.add(f"batch {batch_size}, guided: a step", 1e3 * step, "ms", theirs.get(batch_size), note)
        figures.add(f"batch {batch_size}, guided: images a second", batch_size / (begin + length * step), "")
        begin, step = seconds_of_step(generator, sizes.steps, cond_scale=1.0)
        rate = 2 * batch_size / (begin + length * step)
        figures.add(f"batch {batch_size}, two rows of scale 1 in place of one: images a second", rate, "")
        if batch_size <= sizes.whole:
            whole_images(sizes, figures, generator, batch_size)
        add_peak(figures, f"batch {batch_size}")
        time_attention(figures, 2 * batch_size, heads, length, checkpoint.config.d_model // heads)


def torch_steps(checkpoint: Any, sizes: Sizes) -> dict[int, float]:
    """Return the milliseconds of torch's step by batch size, of those that memory holds; nothing without torch."""
    from generate import TorchDecoder

    decoder = TorchDecoder.of(checkpoint, "bfloat16")
    if decoder is None:
        return {}
    found = {}
    for batch_size in sizes.batches:
        try:
            found[batch_size] = 1e3 * decoder.seconds_of_step(batch_size, sizes.steps)
        except RuntimeError as error:  # torch's own, out of memory
            print(f"    torch, batch {batch_size}: {type(error).__name__}")
        decoder.torch.cuda.empty_cache()
    del decoder.layers, decoder.tokens, decoder.head
    decoder.torch.cuda.empty_cache()
    return found


def whole_images(sizes: Sizes, figures: Figures, generator: Any, batch_size: int) -> None:
    """Time sampling and decoding images from beginning to end, on a warm program."""
    from dm_generations.inference.decoder import Decoder
    from dm_generations.sampling.params import SamplingParams
    from dm_generations.sampling.prng import row_key

    config, params = codec(sizes)
    decoder = Decoder("vqgan", config, params, min(batch_size, 64), "bfloat16")
    keys = np.array([row_key(0, index) for index in range(batch_size)], np.uint32)
    prompts = ["a rocket"] * batch_size

    def run() -> None:
        tokens = generator.generate(prompts, SamplingParams(256, cond_scale=3.0), keys)
        decoder.decode(np.resize(tokens, (batch_size, decoder.token_count)).astype(np.uint16) % decoder.codebook_size)

    run()
    seconds = min(timed(run) for _ in range(2))
    grid = " (a 4x4 grid)" if batch_size == 16 else ""
    figures.add(
        f"{batch_size} images{grid}, prompts to pixels", seconds, "s", note=f"{batch_size / seconds:.3g} a second"
    )


def time_attention(figures: Figures, sequences: int, heads: int, length: int, width: int) -> None:
    """Time the attention of one step in one layer as the models compute it, and as JAX's own function does."""
    import jax
    import jax.numpy as jnp
    from timing import seconds_of

    queries = jnp.ones((sequences, heads, 1, width), jnp.bfloat16)
    keys = values = jnp.ones((sequences, heads, length, width), jnp.bfloat16)
    bias = jnp.zeros((1, 1, 1, length), jnp.float32)

    def as_written(queries, keys, values):
        logits = jnp.einsum("bhqd,bhkd->bhqk", queries, keys, preferred_element_type=jnp.float32)
        return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(logits + bias).astype(keys.dtype), values)

    def by_jax(implementation: str, queries, keys, values):
        queries, keys, values = (array.swapaxes(1, 2) for array in (queries, keys, values))
        mask = jnp.ones((1, 1, 1, length), bool)
        return jax.nn.dot_product_attention(queries, keys, values, mask=mask, implementation=implementation)

    forms = {"the models'": as_written} | {
        f"dot_product_attention, {name}": functools.partial(by_jax, name) for name in ("xla", "cudnn")
    }
    for name, form in forms.items():
        what = f"attention of {sequences} sequences in one layer, {name}"
        compiled = jax.jit(form)
        try:
            seconds = seconds_of(lambda compiled=compiled: compiled(queries, keys, values), 10)
        except Exception as error:  # cuDNN refuses some shapes, and a CPU
            print(f"    {what}: {type(error).__name__}")
            continue
        figures.add(what, 1e6 * seconds, "us")


def scoring(sizes: Sizes, figures: Figures) -> None:
    """Time CLIP's image tower at the size of ViT-B/32."""
    import jax
    from decode import random_params
    from timing import seconds_of
    from tiny import CLIP_CONFIG

    from dm_generations.inference.decoder import Decoding
    from dm_generations.inference.scorer import Scorer
    from dm_generations.models.clip.network import CLIPConfig
    from dm_generations.models.loading import Checkpoint, load_checkpoint

    config = CLIPConfig() if sizes is FULL else CLIPConfig.from_dict(CLIP_CONFIG)
    params = random_params("clip", config)
    checkpoint = Checkpoint("clip", config, params, "random", "0" * 64, Path(os.devnull))
    tokenizer = load_checkpoint(None, "clip").load_tokenizer()
    size = 256 if sizes is FULL else 16
    images = jax.device_put(np.random.default_rng(0).integers(256, size=(sizes.scored, size, size, 3), dtype=np.uint8))
    scorer = Scorer(checkpoint, tokenizer, sizes.scored, towers=("image",))
    seconds = seconds_of(lambda: scorer.image_features(Decoding(len(images), images.shape[1:], iter([images]))))
    theirs = torch_tower_seconds(config.vision_config, sizes.scored)
    note = "torch: the transformer alone, in TF32"
    torch = None if theirs is None else sizes.scored / theirs
    figures.add(f"images a second in batches of {sizes.scored}, float32", sizes.scored / seconds, "", torch, note)


def torch_tower_seconds(config: Any, batch_size: int) -> float | None:
    """Return the seconds of torch's own transformer of this size for a batch; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
    layer = torch.nn.TransformerEncoderLayer(*sizes, norm_first=True, batch_first=True)
    tower = torch.nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=False).to(device).eval()
    x = torch.randn(batch_size, (config.image_size // config.patch_size) ** 2 + 1, config.hidden_size, device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with torch.inference_mode():
        tower(x), wait()
        return min(timed(lambda: (tower(x), wait())) for _ in range(3))


def start(sizes: Sizes, figures: Figures) -> None:
    """Time whole commands, from an empty cache of programs on."""
    from start import starts

    for what, seconds in itertools.islice(starts(), None if sizes is FULL else 1):
        figures.add(what, seconds, "s")


PARTS: dict[str, Callable[[Sizes, Figures], None]] = {
    "correctness": correctness,
    "mini": functools.partial(sampling, part="mini"),
    "graphs": graphs,
    "decoding": decoding,
    "mega": functools.partial(sampling, part="mega"),
    "files": files,
    "limits": limits,
    "scoring": scoring,
    "start": start,
}


def timed(function: Callable) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def codec(sizes: Sizes) -> tuple[Any, dict]:
    """Return config and weights of a VQGAN: random ones of full size, or the one that ships."""
    from decode import codec_of

    return codec_of(None if sizes is FULL else "embedded")


def add_peak(figures: Figures, what: str) -> None:
    """Add the most memory that this process has held on a device so far; a CPU does not tell."""
    import jax

    if statistics := jax.local_devices()[0].memory_stats():
        figures.add(f"{what}: peak memory of the device so far", statistics["peak_bytes_in_use"] / 1e9, "GB")


# The command.


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder (default: gpu-results)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all, in this order)")
    parser.add_argument("--again", action="store_true", help="also parts that are there")
    parser.add_argument("--minutes", type=float, default=8, help="start no part after so many (default: 8)")
    parser.add_argument("--tiny", action="store_true", help="small models and few images, to try the program itself")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)  # what a process of its own measures
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # of a GPU's memory torch needs a part
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if args.only:
        measure(args.only, TINY if args.tiny else FULL, args.out)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    deadline, failed = time.monotonic() + 60 * args.minutes, []
    for part in args.parts:
        if part in load(args.out)["parts"] and not args.again:
            print(f"{part}: is there")
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"{part}: no time left; the same command goes on here")
            failed.append(part)
            continue
        print(f"{part}:", flush=True)
        command = [sys.executable, __file__, "--only", part, "--out", str(args.out), *["--tiny"] * args.tiny]
        flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS.get(part, '')}".strip()
        try:
            if subprocess.run(command, timeout=left + 60, env=os.environ | {"XLA_FLAGS": flags}).returncode:
                failed.append(part)
        except subprocess.TimeoutExpired:
            print(f"{part}: stopped, it took too long")
            failed.append(part)
    results = load(args.out)
    wrong = [
        figure["what"] for part in results["parts"].values() for figure in part["figures"] if not figure.get("ok", 1)
    ]
    for what in (*(f"{part} has no figures" for part in failed), *(f"WRONG: {what}" for what in wrong)):
        print(what)
    print(args.out / "results.md")
    return 1 if failed or wrong else 0


def measure(part: str, sizes: Sizes, out: Path) -> None:
    """Measure a part in this process and store its figures."""
    import jax

    from dm_generations.runtime import compile_cache

    if part == "correctness":
        compile_cache.enable()
    machine = {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "sizes": "full"}
    machine |= {"sizes": "tiny"} if sizes is TINY else {}
    results = load(out)
    if results.setdefault("machine", machine) != machine:
        raise SystemExit(f"{out} has figures of {results['machine']}, this is {machine}: give another --out")
    figures, started = Figures(), time.perf_counter()
    PARTS[part](sizes, figures)
    seconds = time.perf_counter() - started
    print(f"    {seconds:.0f} s", flush=True)
    about = {"date": f"{datetime.date.today()}", "seconds": round(seconds, 1), "versions": versions()}
    results["parts"][part] = about | {"figures": figures}
    write_atomic(out / "results.json", json.dumps(results, indent=1).encode())
    write_atomic(out / "results.md", "\n".join(table(results)).encode() + b"\n")


def versions() -> str:
    """Return the versions that figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = [f"Python {sys.version_info.major}.{sys.version_info.minor}"]
    for name in ("jax", "jaxlib", "flax", "numpy", "pillow", "torch"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def load(out: Path) -> dict[str, Any]:
    """Return what results.json holds."""
    file = out / "results.json"
    return json.loads(file.read_text()) if file.exists() else {"parts": {}}


def table(results: dict[str, Any]) -> Iterator[str]:
    """Return the lines of results.md."""
    small = ", with small models: these figures say nothing" if results["machine"]["sizes"] == "tiny" else ""
    yield f"Measured on {results['machine']['device']} (`python benchmarks/gpu.py`){small}."
    for name in PARTS:
        if part := results["parts"].get(name):
            yield from ("", f"### {name}", "", f"{part['date']}, in {part['seconds']:.0f} s; {part['versions']}.", "")
            yield from ("| what | measured | torch | note |", "|---|---|---|---|")
            for figure in part["figures"]:
                yield f"| {' | '.join(cells(figure))} |"


if __name__ == "__main__":
    sys.exit(main())
