"""Time image encoders against Pillow's default PNG: milliseconds of a core, bytes, images a second on threads.

The last figure is for as many processes as there are cores, which share no interpreter lock.

    python benchmarks/encode.py                       # the archive that ships, 16 images in each of 256x256
    python benchmarks/encode.py --images FOLDER     # PNG files of your own

Sixteen images of the shipped archive have more flat parts than one image of VQGAN f16 of the same 256x256 pixels.
"""

import argparse
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from dm_generations.export.output_file import Encoding

ROOT = Path(__file__).resolve().parent.parent
ENCODERS: dict[str, Callable] = {
    "Pillow PNG, default": lambda pixels: pillow_png(pixels),
    "Pillow PNG, level 1, Huffman only": lambda pixels: pillow_png(pixels, compress_level=1, compress_type=2),
    "--png default": Encoding().encode,
    "--png small": Encoding(png="small").encode,
    "--format webp": Encoding("webp").encode,
    "--format webp --quality 90": Encoding("webp", 90).encode,
    "--format jpeg": Encoding("jpeg").encode,
}


def pillow_png(pixels: np.ndarray, **options) -> memoryview:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getbuffer()


def shipped_images(count: int) -> list[np.ndarray]:
    """Return (256, 256, 3) uint8 arrays, each of 16 different images of the shipped archive."""
    from dm_generations.archive import Archive
    from dm_generations.inference.decoder import Decoder
    from dm_generations.models.loading import load_checkpoint

    codec = Decoder.from_checkpoint(load_checkpoint(None, "codec"), 64)
    with Archive.open(ROOT / "archive" / "emoji.db") as archive:
        rows = (row for group in archive.groups() for row in archive.rows(group.key))
        different = list(dict.fromkeys(row.quantvec for row in rows))
    if 16 * count > len(different):
        raise SystemExit(f"--count {count}: the archive that ships suffices for {len(different) // 16}")
    spread = different[:: len(different) // (16 * count)][: 16 * count]
    tokens = np.stack([np.frombuffer(quantvec, "<u2") for quantvec in spread])
    images = codec.decode(tokens).reshape(count, 4, 4, 64, 64, 3)
    return list(images.swapaxes(2, 3).reshape(count, 256, 256, 3))


def core_time(encode: Callable, images: list[np.ndarray], repeats: int) -> float:
    """Return the seconds of this thread for one image: the best of `repeats` passes."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        for pixels in images:
            encode(pixels)
        times.append((time.thread_time() - start) / len(images))
    return min(times)


def rate(encode: Callable, images: list[np.ndarray], threads: int, seconds: float = 2.0) -> float:
    """Return images a second on this many threads."""
    with ThreadPoolExecutor(threads) as pool:
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            count += len(list(pool.map(encode, images)))
        return count / elapsed


def process_rates(names: Iterable[str], images: list[np.ndarray], processes: int) -> Iterator[float]:
    """Return images a second of each encoder on this many processes of one thread each."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/images.npz"
        np.savez(path, *images)
        with context.Pool(processes, _start_process, (path, context.Barrier(processes))) as pool:
            for name in names:
                yield sum(pool.map(_rate_of_process, [name] * processes, chunksize=1))


def _start_process(path: str, barrier: multiprocessing.Barrier) -> None:
    global _images, _together
    _images, _together = list(np.load(path).values()), barrier


def _rate_of_process(name: str) -> float:
    ENCODERS[name](_images[0])
    _together.wait()  # each process takes one of these calls, and all run at the same time
    return rate(ENCODERS[name], _images, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of PNG files (default: from the shipped archive)")
    parser.add_argument("--count", type=int, default=36, help="images (default: 36)")
    parser.add_argument("--repeats", type=int, default=3, help="passes, of which the best counts (default: 3)")
    args = parser.parse_args()
    if args.images:
        files = sorted(args.images.rglob("*.png"))[: args.count]
        images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    else:
        images = shipped_images(args.count)
    cores = os.cpu_count() or 1
    threads = sorted({1, cores, *(count for count in (2, 4, 8, 16, 32) if count < cores)})
    print(f"{len(images)} images; load {os.getloadavg()[0]:.1f} on {cores} cores")
    heading = f"images/s on {', '.join(map(str, threads))} threads; on {cores} processes"
    print(f"{'':28}{'ms':>8}{'times':>8}{'KB':>8}{'size':>8}   {heading}")
    base: tuple[float, float] | None = None
    for (name, encode), of_processes in zip(ENCODERS.items(), process_rates(ENCODERS, images, cores), strict=True):
        size = sum(len(encode(pixels)) for pixels in images) / len(images)
        seconds = core_time(encode, images, args.repeats)
        base = base or (seconds, size)
        rates = ", ".join(f"{rate(encode, images, count):,.0f}" for count in threads)
        shares = f"{seconds * 1e3:8.2f}{base[0] / seconds:8.1f}{size / 1024:8.1f}{size / base[1]:8.3f}"
        print(f"{name:28}{shares}   {rates}; {of_processes:,.0f}", flush=True)


if __name__ == "__main__":
    main()
