"""Pillow's resampling, repeated on the device: the very bytes."""

import jax
import numpy as np
import pytest
from PIL import Image

from dm_generations.models.clip.preprocessing import FILTERS, resize

SIZES = [(256, 256, 224, 224), (64, 64, 224, 224), (96, 128, 24, 32), (50, 71, 60, 80), (7, 5, 7, 12), (1, 3, 1, 4)]
RESIZE = jax.jit(resize, static_argnums=(1, 2, 3))


@pytest.mark.parametrize("resample", list(FILTERS))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bytes_are_those_of_pillow(size, resample):
    height, width, new_height, new_width = size
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    images[1] = (images[1] > 127) * 255  # overshoots at both ends
    found = np.asarray(RESIZE(images, new_height, new_width, resample))
    assert found.dtype == np.uint8
    for image, own in zip(images, found, strict=True):
        expected = Image.fromarray(image).resize((new_width, new_height), resample)
        np.testing.assert_array_equal(own, np.asarray(expected))
