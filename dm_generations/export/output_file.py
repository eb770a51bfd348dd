"""One output file: the images on it, and its bytes as PNG, WebP, JPEG or NumPy, with a record of its rows inside.

    png          chunks tEXt, or iTXt for what is not Latin-1: Description, Software, Comment
    webp, jpeg   EXIF: ImageDescription (UTF-8), Software, UserComment

Description is the prompt; the comment is the record as JSON in ASCII: the row's columns by name, with the texts of
its prompts, the rank of the image in its group, and the name and hash of the models. A gallery's record has what its
images share, and a list `images` with the rest. Numbers that JSON has no form for are null.

H, W: pixels of one image   L: tokens of one image
"""

import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dm_generations import __version__
from dm_generations.archive import ImageRow, ModelInfo
from dm_generations.archive.records import PARAM_COLUMNS, TOKEN_DTYPE
from dm_generations.export.captions import Strips
from dm_generations.export.manifest import finite_score, json_value
from dm_generations.export.plan import GroupPlan, Layout, Target
from dm_generations.export.writers import Member, Shard
from dm_generations.inference.decoder import RowKey

Record = dict[str, Any]

EXTENSIONS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
PNG_EFFORTS = ("default", "small")
JPEG_QUALITY = 90
_THUMBNAIL_QUALITY = 80
SOFTWARE = f"dm_generations {__version__}"

# Pixels on the longer side that each format takes.
_MAX_SIDES = {"png": (1 << 31) - 1, "webp": (1 << 14) - 1, "jpeg": 65_500}
# zlib finds no repeats in decoded images, only runs: a quarter of the time of Pillow's default, for the same size.
_RUNS_ONLY = {"compress_level": 1, "compress_type": zlib.Z_RLE}

_SHARED = ("prompt_id", "prompt", "sc_prompt_id", "sc_prompt", *PARAM_COLUMNS, "extra_settings")
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


class Decoded(Protocol):
    """Images that are being decoded."""

    def images(self) -> np.ndarray:
        """Wait for the images (n, H, W, 3) uint8."""


class TokenDecoder(Protocol):
    """What turns tokens into images: a codec, or PassthroughDecoder."""

    @property
    def batch_size(self) -> int:
        """How many images `start` should get at a time."""

    def start(self, tokens: np.ndarray, keys: Sequence[RowKey]) -> Decoded:
        """Start decoding (n, L) uint16 of rows with these keys."""


@dataclass
class PassthroughDecoder:
    """Stands for a codec where tokens are written as they are: its images are their tokens (n, L)."""

    batch_size = 1  # rows of an archive may differ in length
    tokens: np.ndarray | None = None

    def start(self, tokens: np.ndarray, keys: Sequence[RowKey]) -> "PassthroughDecoder":
        """Take tokens (n, L)."""
        return PassthroughDecoder(tokens)

    def images(self) -> np.ndarray:
        """Return the tokens."""
        assert self.tokens is not None, "started"
        return self.tokens


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
    settings = {name: getattr(row.params, name) for name in PARAM_COLUMNS}
    if row.extra_settings:
        settings["extra_settings"] = row.extra_settings
    record: Record = {"id": row.id} | {name: json_value(value) for name, value in (texts | settings).items()}
    record |= {"rank": rank} | {name: json_value(getattr(row, name)) for name in _OWN}
    return record | {"generator": _model(row.generator_id, models), "codec": _model(row.codec_id, models)}


def gallery_record(images: list[Record]) -> Record:
    """Return the record of a gallery of these images, which are of one group, best first."""
    shared = {name: images[0][name] for name in _SHARED if name in images[0]}
    rest = [{name: value for name, value in record.items() if name not in shared} for record in images]
    return shared | {"images": rest}


def record_json(record: Record) -> bytes:
    """Return a record as JSON in ASCII, the same bytes for the same record."""
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode("ascii")


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
            block = _exif_block({name: value for name, value in (record | cut).items() if name != "images"})
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


@dataclass(frozen=True)
class EncodeContext:
    """What all files of an export share; goes to the threads that encode.

    Attributes:
        models: Those of the archive, by id, for records.
        decoder: What decodes in place of the codec's own decoder, for records.
    """

    layout: Layout
    encoding: Encoding
    strips: Strips
    has_metadata: bool
    models: Mapping[int, ModelInfo]
    decoder: Record | None = None


@dataclass(eq=False, slots=True)
class OutputFile:
    """A file that is filled image by image: a grid, row by row, black where there is none; one image is a grid of one.

    Attributes:
        path: Where it goes, relative to the output folder.
        replaced_path: What can go once it is there.
        rows: The rows on it, with their cells; those that cannot be decoded are left out.
        shard: The file that it is put into; None for one of its own.
        grid: Columns and rows.
        decoded_grid: Those of the pixels that `place_all` gets; those beyond `grid` are cut off.
        pixels: (rows * H, cols * W, 3) uint8, once an image is placed; tokens (L,) in files of tokens.
    """

    path: str
    replaced_path: str | None
    plan: GroupPlan
    target: Target
    rows: list[tuple[int, ImageRow]]
    shard: Shard | None = None
    grid: tuple[int, int] = (1, 1)
    decoded_grid: tuple[int, int] = (1, 1)
    pixels: np.ndarray | None = None
    placed_count: int = 0

    @property
    def is_full(self) -> bool:
        """Whether all images that were to be placed are."""
        return self.placed_count == len(self.rows)

    def place(self, cell: int, image: np.ndarray) -> None:
        """Put an image (H, W, 3) uint8 into a cell, counted along the rows."""
        self.placed_count += 1
        cols, rows = self.grid
        if cols * rows == 1:
            self.pixels = image
            return
        height, width, channels = image.shape
        if self.pixels is None:
            self.pixels = np.zeros((rows * height, cols * width, channels), np.uint8)
        row, col = divmod(cell, cols)
        self.pixels[row * height : (row + 1) * height, col * width : (col + 1) * width] = image

    def place_all(self, pixels: np.ndarray) -> None:
        """Put all images at once, (rows * H, cols * W, 3) uint8; cells without an image become black."""
        self.placed_count = len(self.rows)
        height, width = pixels.shape[0] // self.decoded_grid[1], pixels.shape[1] // self.decoded_grid[0]
        cols, rows = self.grid
        self.pixels = pixels[: rows * height, : cols * width].copy()  # the decoder's are read-only
        for cell in set(range(rows * cols)).difference(cell for cell, _ in self.rows):
            row, col = divmod(cell, cols)
            self.pixels[row * height : (row + 1) * height, col * width : (col + 1) * width] = 0

    def encode(self, context: EncodeContext) -> bytes:
        """Return the bytes of the file."""
        pixels = self.pixels
        assert pixels is not None, "filled"
        if context.layout.mode == "npy":
            return encode_npy(pixels)
        if self.target.incomplete_path is not None and context.strips:
            pixels = context.strips.add(pixels, *self.grid, self._caption(), self._labels())
        return context.encoding.encode(pixels, self._record(context) if context.has_metadata else None)

    def encode_thumbnail(self) -> bytes:
        """Return a WebP file of the image at half its size."""
        assert self.pixels is not None, "filled"
        image = Image.fromarray(self.pixels).reduce(2)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=_THUMBNAIL_QUALITY)
        return buffer.getvalue()

    def encode_members(self, context: EncodeContext) -> list[Member]:
        """Return what goes into the shard: the file, and in a tar also its row as JSON and its prompt."""
        image = self.encode(context)
        if context.layout.mode == "zip":
            return [(self.target.path, image)]
        ((_, row),) = self.rows
        record = self._record(context)
        record["tokens"] = np.frombuffer(row.quantvec, TOKEN_DTYPE).tolist()
        key, prompt = f"{row.id:09d}", (self.plan.prompt or "").encode("utf-8", "replace")
        if decoding := context.layout.decoding(self.target.ranks.start):
            key += f"-{decoding + 1}"
        return [
            (key + context.encoding.extension, image),
            (f"{key}.json", record_json(record)),
            (f"{key}.txt", prompt),
        ]

    def _record(self, context: EncodeContext) -> Record:
        first, plan, layout = self.target.ranks.start, self.plan, context.layout
        records = []
        for cell, row in self.rows:
            rank = layout.rank(first + cell)
            record = image_record(row, plan.prompt, plan.sc_prompt, rank, context.models)
            if context.decoder is not None:
                record["decoder"] = context.decoder | {"decoding": layout.decoding(first + cell)}
            records.append(record)
        return records[0] if self.target.incomplete_path is None else gallery_record(records)

    def _caption(self) -> tuple[str, str]:
        params, sc_prompt = self.plan.key.params, self.plan.sc_prompt
        line = f"k={params.top_k}, p={params.top_p}, t={params.temperature}, c={params.cond_scale}"
        if sc_prompt is not None:
            line += f", against: {sc_prompt}"
        return self.plan.prompt or "", line

    def _labels(self) -> list[str]:
        """Return scores by cell; nothing where there is no image or no score."""
        score_by_cell = {cell: finite_score(row) for cell, row in self.rows}
        scores = [score_by_cell.get(cell) for cell in range(len(self.target.ranks))]
        return ["" if score is None else f"{score:.2f}" for score in scores]


def thumbnail_side(path: Path) -> int:
    """Return the width of a thumbnail; 0 if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.width
    except (OSError, ValueError):
        return 0


def fill_cells(tokens_by_cell: Mapping[int, np.ndarray], cell_count: int) -> np.ndarray:
    """Return the tokens of a gallery that is decoded as one.

    A cell without an image gets one of the others: what is decoded there changes the images next to it a little, and
    this is the least visible.

    Args:
        tokens_by_cell: (L,) each, at least one.
        cell_count: Cells of the gallery.

    Returns:
        (cell_count, L).
    """
    present = list(tokens_by_cell.values())
    return np.stack([tokens_by_cell.get(cell, present[cell % len(present)]) for cell in range(cell_count)])
