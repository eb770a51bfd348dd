"""Pictures while they are drawn: the codes so far, made whole so that a codec can decode them.

N: pictures   L: codes of a picture, row-major over its grid
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dm_generations.decode.codec import Codec
from dm_generations.errors import UserError
from dm_generations.export import filenames
from dm_generations.export.encoders import Encoding
from dm_generations.files import write_atomic
from dm_generations.generate.sweep import Draw


def filled(tokens: np.ndarray, token_count: int) -> np.ndarray:
    """The first codes of pictures (N, count), count at least 1, as whole ones (N, L) in the same dtype.

    What is not drawn yet is each picture's own first code: that of its upper left corner, which mostly is background,
    so a picture grows on its own. Any one code of the codebook, as min-dalle takes its last, is a pattern that depends
    on the codec, often a loud one; the latest code or the commonest one changes from step to step.
    """
    missing = token_count - tokens.shape[1]
    return np.concatenate([tokens, np.repeat(tokens[:, :1], missing, axis=1)], axis=1)


def write_progress(out_dir: Path, draws: Sequence[Draw], tokens: np.ndarray, codec: Codec) -> list[Path]:
    """Write a PNG of each picture as far as it is drawn, whole or not at all; the paths, in the order of `draws`.

    draws: N of them   tokens: their first codes (N, count) uint16, as `Generator.stream` gives them
    Raises UserError for a folder or disk that takes nothing more.
    """
    paths = [out_dir / progress_file(draw, tokens.shape[1]) for draw in draws]
    pictures = codec.decode(filled(tokens, codec.token_count))
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for path, picture in zip(paths, pictures, strict=True):
            write_atomic(path, Encoding().encode(picture))
    except OSError as error:
        raise UserError(f"cannot write into {str(out_dir)!r}: {error.strerror}; choose another folder") from error
    return paths


def progress_file(draw: Draw, count: int) -> str:
    """`8d3c0b51_0_42_0128_a prompt.png`: a picture after `count` codes, at most 255 bytes.

    Its first field tells combinations of prompts and settings apart, which share keys. Steps of a picture follow each
    other in the order of names.
    """
    combination = hashlib.sha256(repr(draw.combination).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return filenames.step_file(combination, draw.key0, draw.key1, count, draw.combination.prompt)
