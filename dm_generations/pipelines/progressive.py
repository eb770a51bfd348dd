"""Unfinished images as PNG files, for `--progressive`.

L: tokens of an image, row-major over its grid
"""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dm_generations.atomic_io import write_atomic
from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder
from dm_generations.paths import sanitize_file_name, utf8_path
from dm_generations.pipelines.sweep import Sample


def pad_tokens(tokens: np.ndarray, token_count: int) -> np.ndarray:
    """Fill up unfinished images with each one's own first token, so that they can be decoded.

    That is the token of the upper left corner, which mostly is background, so an image grows on its own. Any one token
    of the codebook, as min-dalle takes its last, is a pattern that depends on the codec, often a loud one.

    Args:
        tokens: The first tokens of n images, (n, count) with count at least 1.
        token_count: L.

    Returns:
        (n, L), of the same dtype.
    """
    missing = token_count - tokens.shape[1]
    return np.concatenate([tokens, np.repeat(tokens[:, :1], missing, axis=1)], axis=1)


def write_partial_images(
    out_dir: Path, samples: Sequence[Sample], step: int, tokens: np.ndarray, decoder: Decoder
) -> list[Path]:
    """Write a PNG of each unfinished image.

    Args:
        out_dir: Folder to write to; it is created if there is none.
        samples: n samples.
        step: How many steps were made.
        tokens: Their first tokens, (n, count) uint16.
        decoder: Of the images.

    Returns:
        The paths, in the order of `samples`.

    Raises:
        UserError: The folder cannot be written.
    """
    paths = [utf8_path(out_dir, partial_image_name(sample, step)) for sample in samples]
    images = decoder.decode(pad_tokens(tokens, decoder.token_count))
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for path, image in zip(paths, images, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG", compress_level=1)
            write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"cannot write into {str(out_dir)!r}: {error.strerror}; choose another folder") from error
    return paths


def partial_image_name(sample: Sample, step: int) -> str:
    """Return `8d3c0b51_0_42_0128_a prompt.png` for an image after `step` steps, at most 255 bytes.

    The first field is a hash of the combination, because combinations share keys. The steps of an image follow each
    other in the order of names.
    """
    combination = hashlib.sha256(repr(sample.combination).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    name = f"{combination}_{sample.key0}_{sample.key1}_{step:04d}_{sample.combination.prompt}"
    return sanitize_file_name(name, ".png")
