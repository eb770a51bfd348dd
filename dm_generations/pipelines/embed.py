"""CLIP's vectors of what is not in an archive: a text, an image file, a folder of them."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from dm_generations.errors import UserError
from dm_generations.inference.scorer import Scorer
from dm_generations.models.clip.preprocessing import Preprocessing
from dm_generations.models.loading import Checkpoint
from dm_generations.pipelines.init_tokens import read_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def embed_text(text: str, clip: Checkpoint) -> np.ndarray:
    """Return the vector of a text, float32 (P,) of unit length. Only the text tower runs."""
    return Scorer.from_checkpoint(clip, 1, ["text"]).text_features([text])[0]


def embed_images(paths: list[Path], clip: Checkpoint, batch_size: int = 32) -> np.ndarray:
    """Return the vectors of image files, float32 (n, P), rows of unit length.

    Each is cropped to its middle square and resized as the CLIP wants it. Only the image tower runs.

    Raises:
        UserError: Pillow cannot read a file.
    """
    size = clip.config.vision_config.image_size
    resample = Image.Resampling(Preprocessing.from_folder(clip.folder, size).resample)
    scorer = Scorer.from_checkpoint(clip, min(batch_size, len(paths)) or 1, ["image"])
    features = [np.empty((0, clip.config.projection_dim), np.float32)]
    for start in range(0, len(paths), batch_size):
        images = [read_image(path, size, resample) for path in paths[start : start + batch_size]]
        features.append(scorer.image_features(np.stack(images)))
    return np.concatenate(features)


def list_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, in order of their paths.

    Raises:
        UserError: It cannot be read, or holds none.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {str(error.filename)!r}: {error.strerror}") from error

    found = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    ]
    if not found:
        raise UserError(f"{str(folder)!r} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(found)
