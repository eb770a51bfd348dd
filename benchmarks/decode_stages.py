"""Time and memory of the stages of a decode, and of the whole. Run by decode.py."""

import argparse
import dataclasses
import io
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from decode_kit import write_archive_2022
from tiny import CODEBOOK_SIZE, GRID, tiny_vqgan

from dm_generations.archive import Archive
from dm_generations.archive.records import tokens_from_blob
from dm_generations.atomic_io import write_atomic
from dm_generations.cli import main as run_command
from dm_generations.export.exporter import ExportOptions, export_archive
from dm_generations.export.output_file import Encoding
from dm_generations.inference.decoder import Decoder
from dm_generations.models.loading import Checkpoint, load_checkpoint
from dm_generations.models.vqgan.network import VQGAN, VQGANConfig
from dm_generations.weights import native

STAGES = ("read", "to device", "decode", "fetch", "encode", "write")
MODES = {"images": (), "gallery": (), "npy": (), "tar": ("--shard-size", "1000"), "zip": ()}
IMAGES_OF_A_PROMPT = 40


def pipeline(args: argparse.Namespace, config: VQGANConfig, params: dict, tokens: np.ndarray) -> None:
    """Print images a second of each stage and on disk, and peak memory, each structure in a process of its own.

    tokens: (count, L) uint16
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_archive_2022(folder / "archive.db", tokens)
        native.save(folder / "codec", "vqgan", dataclasses.asdict(config), params)
        print(f"{args.count} images in batches of {args.batch_size}; images/s, of a stage where it runs alone")
        print(f"{'':8}{'on disk':>10}{''.join(f'{stage:>11}' for stage in STAGES)}   peak memory of host, device")
        for structure in ("simple", "ours"):
            run_again("--structure", structure, "--folder", name)


def pipeline_process(args: argparse.Namespace) -> None:
    """Time one structure in this process: the whole from its start, then stage by stage."""
    folder = Path(args.folder)
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))  # a new one: both structures compile
    started = time.perf_counter()
    checkpoint = load_checkpoint(str(folder / "codec"), "codec")
    if args.structure == "simple":
        stages = simple_stages(checkpoint, args.batch_size, folder)
        in_turn(stages, args.batch_size)
        seconds = time.perf_counter() - started
        peak = peak_memory()
    else:
        options = ExportOptions(
            folder / "images", codec=str(folder / "codec"), dtype=args.dtype, batch_size=args.batch_size
        )
        with Archive.open(folder / "archive.db") as archive:
            report = export_archive(archive, options)
        assert report.written == args.count, report.problems
        seconds = time.perf_counter() - started
        peak = peak_memory()
        stages = our_stages(checkpoint, args.batch_size, args.dtype, folder)
        in_turn(stages, args.batch_size)
    seconds_by_stage = in_turn(stages, args.batch_size)  # everything is compiled by now
    rates = "".join(f"{args.count / seconds_by_stage[stage]:11,.1f}" for stage in STAGES)
    print(f"{args.structure:8}{args.count / seconds:10,.2f}{rates}   {peak}", flush=True)


def in_turn(stages: dict[str, Callable], batch_size: int) -> Counter[str]:
    """Return the seconds of each stage for all images, one stage after the other."""
    seconds = Counter()

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[stage] += time.perf_counter() - started

    with timed("read"):
        tokens = stages["read"]()
    for first in range(0, len(tokens), batch_size):
        batch = tokens[first : first + batch_size]
        with timed("to device"):
            placed = jax.block_until_ready(stages["to device"](batch))
        with timed("decode"):
            pixels = jax.block_until_ready(stages["decode"](placed))
        with timed("fetch"):
            images = stages["fetch"](pixels)[: len(batch)]
        with timed("encode"):
            files = [stages["encode"](image) for image in images]
        with timed("write"):
            for number, file in enumerate(files, first):
                stages["write"](number, file)
    return seconds


def simple_stages(checkpoint: Checkpoint, batch_size: int, folder: Path) -> dict[str, Callable]:
    """Make the simple structure: the plain network, float images, Pillow's defaults."""
    model = VQGAN(checkpoint.config)
    params = jax.tree.map(
        jnp.asarray, {name: part for name, part in checkpoint.params.items() if name not in VQGAN.ENCODER_PARTS}
    )
    decode = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens, method="decode_code"))

    def read() -> np.ndarray:
        connection = sqlite3.connect(folder / "archive.db")
        rows = connection.execute("SELECT quantvec FROM images ORDER BY clip_score_input DESC").fetchall()
        connection.close()
        return np.stack([np.frombuffer(blob, "<u2") for (blob,) in rows])

    return {
        "read": read,
        "to device": lambda tokens: jnp.asarray(padded(tokens, batch_size).astype(np.int32)),
        "decode": lambda tokens: decode(params, tokens),
        "fetch": lambda pixels: (np.asarray(pixels).clip(0, 1) * 255).astype(np.uint8),
        "encode": pillow_png,
        "write": lambda number, file: (folder / f"{number}.png").write_bytes(file),
    }


def pillow_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def our_stages(checkpoint: Checkpoint, batch_size: int, dtype: str, folder: Path) -> dict[str, Callable]:
    """Make the stages of the decode command, with one encoding thread."""
    codec = Decoder.from_checkpoint(checkpoint, batch_size, dtype)
    encode = Encoding().encode

    def read() -> np.ndarray:
        with Archive.open(folder / "archive.db") as archive:
            rows = (row for group in archive.groups() for row in archive.rows(group.key))
            expected = codec.token_count, codec.codebook_size
            return np.stack([tokens_from_blob(row.quantvec, row.quantvec_md5, *expected) for row in rows])

    return {
        "read": read,
        "to device": lambda tokens: padded(tokens, codec.batch_size),
        "decode": codec.decode_batch,  # it copies the tokens
        "fetch": jax.device_get,
        "encode": encode,
        "write": lambda number, file: write_atomic(folder / f"{number}.png", file),
    }


def padded(tokens: np.ndarray, batch_size: int) -> np.ndarray:
    """Pad tokens (at most batch_size, L) to (batch_size, L), in their dtype."""
    batch = np.zeros((batch_size, tokens.shape[1]), tokens.dtype)
    batch[: len(tokens)] = tokens
    return batch


def memory(args: argparse.Namespace) -> None:
    """Print the peak memory of decodes of small and large archives, each in a process of its own, with a tiny codec."""
    tokens = np.random.default_rng(1).integers(CODEBOOK_SIZE, size=(IMAGES_OF_A_PROMPT, GRID**2), dtype=np.uint16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_vqgan(folder / "codec")
        for count in (1, *args.counts):
            prompts = tuple(f"boat number {number}" for number in range(-(-count // IMAGES_OF_A_PROMPT)))
            write_archive_2022(folder / f"{count}.db", tokens, prompts)
        run_again("--structure", "images", "--folder", name, "--count", "1", stdout=subprocess.DEVNULL)  # compiles
        for mode in args.modes:
            for count in args.counts:
                run_again("--structure", mode, "--folder", name, "--count", str(count))


def memory_process(args: argparse.Namespace) -> None:
    """Decode once in this process."""
    folder, mode = Path(args.folder), args.structure
    out = folder / f"{mode} {args.count}"
    started = time.perf_counter()
    archive = ["--db", str(folder / f"{args.count}.db"), "--codec", str(folder / "codec")]
    with redirect_stdout(io.StringIO()):
        status = run_command(["decode", *archive, "--out-dir", str(out), "--mode", mode, *MODES[mode]])
    assert status == 0, status
    seconds = time.perf_counter() - started
    print(f"{mode:8}{args.count:>7,} images: peak memory {peak_memory()}, {seconds:.0f} s", flush=True)


def run_again(*flags: str, **options) -> None:
    """Run this program with its own arguments and more. `options` are those of `subprocess.run`."""
    subprocess.run([sys.executable, *sys.argv, *flags], check=True, **options)


def peak_memory() -> str:
    """Return the peak memory of this process so far, of the host, and of the device if JAX knows it."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    held = [device.memory_stats() or {} for device in jax.local_devices()]
    on_device = sum(found.get("peak_bytes_in_use", 0) for found in held)
    return f"{host:,.0f} MB" + (f", {on_device / 2**20:,.0f} MB" if on_device else "")
