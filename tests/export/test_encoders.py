"""PNG files: pixels come back, at the sizes that are promised."""

import io

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dm_generations.archive import Archive
from dm_generations.export.output_file import PNG_EFFORTS, Encoding
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


IMAGES = {
    "smooth": smooth(),
    "noise": RNG.integers(256, size=(256, 256, 3), dtype=np.uint8),
    "flat": np.full((256, 256, 3), 200, np.uint8),
    "gallery": smooth(512, 1024),
    "one pixel": np.uint8([[[1, 2, 3]]]),
    "one row": smooth(2, 300)[:1],
    "one column": smooth(300, 2)[:, :1],
    "long rows": smooth(4, 30_000),
    "not contiguous": np.asfortranarray(smooth()),
}


def decoded(data) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


@pytest.mark.parametrize("effort", PNG_EFFORTS)
@pytest.mark.parametrize("name", IMAGES)
def test_the_pixels_come_back(name, effort):
    np.testing.assert_array_equal(decoded(Encoding(png=effort).encode(IMAGES[name])), IMAGES[name])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**32 - 1), st.sampled_from(PNG_EFFORTS), st.integers(1, 8)
)
def test_the_pixels_of_any_image_come_back(height, width, seed, effort, bits):
    pixels = np.random.default_rng(seed).integers(1 << bits, size=(height, width, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(Encoding(png=effort).encode(pixels)), pixels)


@pytest.mark.e2e
def test_sizes_against_pillows_default():
    """On three images of 16 unlike ones of the shipped archive each."""
    checkpoint = load_checkpoint(None, "codec")
    with Archive.open(ROOT / "archive" / "emoji.db") as archive:
        different = list(dict.fromkeys(row.quantvec for row in archive.read_rows(range(1, 6049))))
    tokens = np.stack([np.frombuffer(quantvec, "<u2") for quantvec in different[:: len(different) // 48][:48]])
    cells = Decoder.from_checkpoint(checkpoint, len(tokens)).decode(tokens)
    size = cells.shape[1]
    images = cells.reshape(3, 4, 4, size, size, 3).swapaxes(2, 3).reshape(3, 4 * size, 4 * size, 3)
    default, small = (
        sum(len(Encoding(png=effort).encode(pixels)) for pixels in images) for effort in ("default", "small")
    )
    pillow = 0
    for pixels in images:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        pillow += len(buffer.getvalue())
    assert default <= 1.01 * pillow and small <= 0.995 * pillow
    assert len(Encoding().encode(IMAGES["flat"])) < IMAGES["flat"].nbytes / 100
