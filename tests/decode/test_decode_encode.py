"""The PNG encoder: pixels come back from any reader, at the sizes and times that are promised."""

import io
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dm_generations.archive import Archive
from dm_generations.decode.png import EFFORTS, _paeth, encode_png
from dm_generations.inference.decoder import Decoder
from dm_generations.models.loading import load_checkpoint

RNG = np.random.default_rng(0)


def smooth(height=256, width=256, seed=0, noise=2.0):
    """Pixels (height, width, 3) uint8 as a decoder gives them: colours that blend, edges, a little noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, size=(max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    pixels = np.where(pixels > 150, 255 - pixels / 4, pixels) + rng.normal(0, noise, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


PICTURES = {
    "smooth": smooth(),
    "noise": RNG.integers(256, size=(256, 256, 3), dtype=np.uint8),
    "flat": np.full((256, 256, 3), 200, np.uint8),
    "half flat": np.concatenate([smooth(128), np.full((300, 256, 3), 255, np.uint8)]),
    "drawing": (np.indices((256, 256)).sum(0)[..., None] // 40 % 2 * np.uint8([255, 3, 90])).astype(np.uint8),
    "gallery": smooth(512, 1024),
    "one pixel": np.uint8([[[1, 2, 3]]]),
    "one row": smooth(2, 300)[:1],
    "one column": smooth(300, 2)[:, :1],
    "long rows": smooth(4, 30_000),
}


def pillow_png(pixels, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def decoded(data) -> np.ndarray:
    picture = Image.open(io.BytesIO(data))
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", PICTURES)
def test_the_pixels_come_back(name, effort):
    np.testing.assert_array_equal(decoded(encode_png(PICTURES[name], effort)), PICTURES[name])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**32 - 1), st.sampled_from(EFFORTS), st.integers(1, 8))
def test_the_pixels_of_any_picture_come_back(height, width, seed, effort, bits):
    pixels = np.random.default_rng(seed).integers(1 << bits, size=(height, width, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(encode_png(pixels, effort)), pixels)


def filtered_by_the_book(data: bytes) -> list[int]:
    """The filters of a PNG's rows, after a plain decoder of the standard has checked every byte of a small file."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size)[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + size
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">2I5B", chunks[0][1])
    assert rest == [8, 2, 0, 0, 0]
    stream = zlib.decompress(chunks[1][1])
    assert len(stream) == height * (1 + 3 * width)
    return list(stream[:: 1 + 3 * width])


def test_files_keep_to_the_standard():
    used = {number for name in PICTURES for number in filtered_by_the_book(encode_png(PICTURES[name]))}
    assert used == {1, 2, 3, 4}
    assert {*filtered_by_the_book(encode_png(PICTURES["smooth"], "fast"))} == {4}


def test_the_paeth_filter_is_the_standards():
    """For all bytes that can lie around one: the first of left, above and corner that is nearest to the estimate."""
    left, above = np.indices((256, 256)).astype(np.uint8)
    band, out = np.zeros((256, 256), np.uint8), np.empty((256, 256), np.uint8)
    for corner in range(256):
        around = np.stack([left, above, np.full_like(left, corner)])
        distances = abs(around.astype(np.int16) - (left.astype(np.int16) + above - corner))
        expected = np.take_along_axis(around, distances.argmin(axis=0)[None], axis=0)[0]
        assert _paeth(band, *around, out) == 4
        np.testing.assert_array_equal(-out, expected)


@pytest.mark.parametrize("effort", ["default", "fast"])
def test_threads_do_not_disturb_each_other(effort):
    """Each has its own scratch memory, which pictures of other sizes have used."""
    alone = {name: encode_png(pixels, effort) for name, pixels in PICTURES.items()}
    names = [*PICTURES] * 4
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda name: encode_png(PICTURES[name], effort), names))
    assert together == [alone[name] for name in names]


def test_the_same_pixels_give_the_same_bytes():
    for effort in EFFORTS:
        copy = np.asfortranarray(PICTURES["smooth"])
        assert encode_png(copy, effort) == encode_png(PICTURES["smooth"], effort)


@pytest.fixture(scope="module")
def vqgan_pictures():
    """Three pictures (256, 256, 3) uint8, of 16 unlike ones from all over the shipped archive each."""
    checkpoint = load_checkpoint(None, "codec")
    with Archive.open(ROOT / "archive" / "emoji.db") as archive:
        different = list(dict.fromkeys(row.quantvec for row in archive.read_rows(range(1, 6049))))
    tokens = np.stack([np.frombuffer(quantvec, "<u2") for quantvec in different[:: len(different) // 48][:48]])
    pictures = Decoder.from_checkpoint(checkpoint, len(tokens)).decode(tokens)
    return list(pictures.reshape(3, 4, 4, 64, 64, 3).swapaxes(2, 3).reshape(3, 256, 256, 3))


def test_sizes_against_pillows_default(vqgan_pictures):
    """On 97 pictures of VQGAN f16 in 256x256, which are richer, default 0.990 and small 0.988."""
    pillow = sum(len(pillow_png(pixels)) for pixels in vqgan_pictures)
    share = {effort: sum(len(encode_png(pixels, effort)) for pixels in vqgan_pictures) / pillow for effort in EFFORTS}
    assert share["default"] <= 1.002 and share["small"] <= 0.995 and share["fast"] <= 1.15, share


def test_flat_pictures_are_small_too():
    for effort in EFFORTS:
        assert len(encode_png(PICTURES["flat"], effort)) < PICTURES["flat"].nbytes / 100


@pytest.mark.parametrize("effort", ["default", "fast"])
def test_other_threads_run_meanwhile(effort):
    """The GIL is released: a thread that counts goes on while pictures of 48 MB are encoded."""
    pixels = np.tile(PICTURES["smooth"], (16, 16, 1))
    counted, is_over = [0], threading.Event()

    def count():
        while not is_over.is_set():
            counted[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    start = time.perf_counter()
    encode_png(pixels, effort)
    elapsed = time.perf_counter() - start
    is_over.set()
    thread.join()
    assert counted[0] > elapsed / 0.001 / 20
