"""Pixels and tokens to the bytes of files: PNG, WebP, JPEG, NumPy; with a record of the image's row inside.

    png          chunks tEXt, or iTXt where Latin-1 does not do: Description, Software, Comment
    webp, jpeg   EXIF: ImageDescription (UTF-8), Software, UserComment

Description is the prompt; the comment is the record as JSON in ASCII: the row's columns by name, with the texts of
its prompts, the rank of the image in its group, and the name and hash of the models. A gallery's record has what its
images share, and a list `pictures` with the rest. Numbers that JSON lacks are null.
"""

import io
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dm_generations import __version__
from dm_generations.archive import ImageRow, ModelInfo

Record = dict[str, Any]

EXTENSIONS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
PNG_EFFORTS = ("default", "small")
JPEG_QUALITY = 90
SOFTWARE = f"dm_generations {__version__}"

# Pixels on the longer side that each format takes.
_MAX_SIDES = {"png": (1 << 31) - 1, "webp": (1 << 14) - 1, "jpeg": 65_500}
# zlib finds no repeats in decoded images, only runs: a quarter of the time of Pillow's default, for the same size.
_RUNS_ONLY = {"compress_level": 1, "compress_type": zlib.Z_RLE}

_SHARED = ("prompt_id", "prompt", "sc_prompt_id", "sc_prompt", "top_k", "top_p", "temperature", "cond_scale")
_OWN = (
    *("key0", "key1", "sampler_version", "dtype", "init_count", "init_md5"),
    *("log_prob", "clip_score_input", "clip_score_tokenized", "quantvec_md5"),
)
_IMAGE_DESCRIPTION, _SOFTWARE, _EXIF_IFD, _USER_COMMENT = 0x010E, 0x0131, 0x8769, 0x9286
_ASCII = b"ASCII\0\0\0"  # the character code that a UserComment starts with
_JPEG_EXIF_BYTES = 65_000  # a JPEG segment holds 65,533 bytes
_JPEG_TEXT_CHARACTERS = 2_000  # up to 12 bytes each in JSON, and 4 in the description


@dataclass(frozen=True)
class Encoding:
    """How pixels become a file.

    Attributes:
        format: A key of EXTENSIONS.
        quality: 1 to 100, of webp (None: lossless) and jpeg (None: JPEG_QUALITY).
        png: One of PNG_EFFORTS; "small" takes some 20 times as long for 2% less.
    """

    format: str = "png"
    quality: int | None = None
    png: str = "default"

    @property
    def extension(self) -> str:
        """Of file names, with its dot."""
        return EXTENSIONS[self.format]

    @property
    def max_side(self) -> int:
        """Pixels on the longer side that the format takes."""
        return _MAX_SIDES[self.format]

    def encode(self, pixels: np.ndarray, record: Record | None = None) -> bytes:
        """Return a file of `pixels` with `record` inside.

        Args:
            pixels: (H, W, 3) uint8, sRGB.
            record: What `image_record` or `gallery_record` gives; None for a file without it.
        """
        buffer = io.BytesIO()
        image = Image.fromarray(pixels)
        if self.format == "png":
            effort = {"optimize": True} if self.png == "small" else _RUNS_ONLY
            image.save(buffer, "PNG", pnginfo=_png_info(record) if record else None, **effort)
            return buffer.getvalue()
        tags = {"exif": _exif(record, self.format == "jpeg")} if record else {}
        if self.format == "jpeg":
            image.save(buffer, "JPEG", quality=self.quality or JPEG_QUALITY, **tags)
        elif self.quality is None:
            # Method and quality 0 are libwebp's quickest search: a PNG's size, in less than its time.
            image.save(buffer, "WEBP", lossless=True, method=0, quality=0, **tags)
        else:
            image.save(buffer, "WEBP", quality=self.quality, **tags)
        return buffer.getvalue()


def encode_npy(tokens: np.ndarray) -> bytes:
    """Return tokens as a NumPy file, as the DALL-3 fork of DALLE-pytorch writes them for its diffusion decoder.

    Args:
        tokens: (L,), row-major over the grid.

    Returns:
        A `.npy` file of int64 in one dimension.
    """
    buffer = io.BytesIO()
    np.save(buffer, tokens.astype("<i8"), allow_pickle=False)
    return buffer.getvalue()


def image_record(
    row: ImageRow, prompt: str | None, sc_prompt: str | None, rank: int, models: Mapping[int, ModelInfo]
) -> Record:
    """Return the record of one image; values of a 2022 archive, which may be of any type, become JSON's.

    Args:
        rank: In its group, from 0.
        models: Those of the archive, by id.
    """
    texts = {"prompt_id": row.prompt_id, "prompt": prompt, "sc_prompt_id": row.sc_prompt_id, "sc_prompt": sc_prompt}
    shared = texts | asdict(row.params)
    record: Record = {"id": row.id} | {name: json_value(shared[name]) for name in _SHARED}
    record |= {"rank": rank} | {name: json_value(getattr(row, name)) for name in _OWN}
    return record | {"generator": _model(row.generator_id, models), "codec": _model(row.codec_id, models)}


def gallery_record(images: list[Record]) -> Record:
    """Return the record of a gallery of these images, which are of one group, best first."""
    shared = {name: images[0][name] for name in _SHARED}
    rest = [{name: value for name, value in record.items() if name not in shared} for record in images]
    return shared | {"pictures": rest}


def record_json(record: Record) -> bytes:
    """Return a record as JSON in ASCII, the same bytes for the same record."""
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode("ascii")


def json_value(value: object) -> str | int | float | None:
    """Return what JSON has for a value of a 2022 archive, which may be of any type that SQLite stores."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value  # type: ignore[return-value]


def _png_info(record: Record) -> PngInfo:
    texts = {"Description": record["prompt"], "Software": SOFTWARE, "Comment": record_json(record).decode()}
    info = PngInfo()
    for keyword, text in texts.items():
        if text:
            info.add_text(keyword, _utf8(text.replace("\0", "\ufffd")).decode())  # a chunk takes no NUL
    return info


def _exif(record: Record, is_jpeg: bool) -> bytes:
    """Return EXIF with `record`; for a JPEG, which has 64 KB for it, long prompts are cut and long lists left out."""
    block = _exif_block(record)
    if is_jpeg and len(block) > _JPEG_EXIF_BYTES:
        cut = {name: (record[name] or "")[:_JPEG_TEXT_CHARACTERS] or None for name in ("prompt", "sc_prompt")}
        block = _exif_block(record | cut)
        if len(block) > _JPEG_EXIF_BYTES:
            block = _exif_block({name: value for name, value in (record | cut).items() if name != "pictures"})
    return block


def _exif_block(record: Record) -> bytes:
    tags = Image.Exif()
    if record["prompt"]:
        tags[_IMAGE_DESCRIPTION] = _utf8(record["prompt"])
    tags[_SOFTWARE] = SOFTWARE
    tags.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII + record_json(record)
    return tags.tobytes()


def _utf8(text: str) -> bytes:
    """Return `text` in UTF-8, with U+FFFD for lone surrogates, which have none."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _model(model_id: int | None, models: Mapping[int, ModelInfo]) -> dict[str, str] | None:
    model = None if model_id is None else models.get(model_id)
    return None if model is None else {"name": model.name, "sha256": model.sha256}
