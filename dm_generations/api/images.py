"""Images with their prompt, settings and scores, and lists of them, which notebooks show.

L: tokens of an image   H, W: its pixels
"""

import base64
import functools
import html
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, overload

from dm_generations.archive import ModelInfo
from dm_generations.archive.records import BadTokensError, count_tokens, square_side, tokens_from_blob
from dm_generations.errors import UserError, printable
from dm_generations.sampling.params import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from dm_generations.inference.decoder import Decoder
    from dm_generations.models.loading import Checkpoint

SCORES: Final = ("clip_score_input", "clip_score_tokenized")
_MAX_SHOWN = 64  # images of a list in a notebook
_MAX_SHOWN_PIXELS = 1 << 21  # of them together
_BATCH_SIZES = (1, 8, 32)  # each is compiled once
_SHORT_NAMES = {"top_k": "k", "top_p": "p", "temperature": "t", "cond_scale": "c"}  # as in file names


class FindDecoder(Protocol):
    """Finds what decodes images that record this codec, None if they record none."""

    def __call__(self, codec: ModelInfo | None, token_count: int) -> "Decoder":
        """Return the decoder. Raises UserError if it is not at hand."""


@dataclass(frozen=True, eq=False, repr=False)
class ImageRecord:
    """One image: its tokens, what they were sampled with, and its scores. In a notebook it shows the image.

    Attributes:
        id: In the archive; None before it is stored.
        prompt: The text.
        sc_prompt: The unconditional prompt; None is the model's own empty one.
        settings: The sampling settings.
        key: The words of its random key, (key0, key1).
        scores: Those that it has, by name: `clip_score_input` for the prompt as typed, `clip_score_tokenized` for the
            prompt as CLIP reads it.
        log_prob: Logarithm of the probability of its tokens, None if unknown.
        dtype: What the model computed in, None if unknown.
        model: What sampled it, None if unknown.
        codec: What decodes it, None if unknown.
        quantvec: The tokens as stored: little-endian uint16.
        quantvec_md5: Their MD5 as stored, None if unknown.
    """

    id: int | None
    prompt: str | None
    sc_prompt: str | None
    settings: SamplingParams
    key: tuple[int, int]
    scores: Mapping[str, float]
    log_prob: float | None
    dtype: str | None
    model: ModelInfo | None
    codec: ModelInfo | None
    quantvec: bytes
    quantvec_md5: str | None
    find_decoder: FindDecoder = field(kw_only=True)

    @property
    def tokens(self) -> "np.ndarray":
        """The tokens, uint16 (L,).

        Raises:
            UserError: They are damaged.
        """
        codec = self.codec
        count = count_tokens(codec.token_shape) if codec is not None and codec.token_shape else None
        try:
            return tokens_from_blob(self.quantvec, self.quantvec_md5, count, (codec and codec.codebook_size) or 1 << 16)
        except BadTokensError as error:
            raise UserError(f"image {self.id}: {error}") from error

    def image(self, decoder: "Decoder | None" = None) -> "Image":
        """Decode the image.

        Args:
            decoder: Of its codec; None is the codec that the image records, where that is the embedded one or came
                with the generator.

        Returns:
            An image of Pillow, RGB.

        Raises:
            UserError: The tokens are damaged, or there is no decoder for them at hand.
        """
        return decode_images([self], decoder)[0]

    def __repr__(self) -> str:
        number = "" if self.id is None else f" {self.id}"
        prompt = "no prompt" if self.prompt is None else repr(printable(self.prompt, 60))
        # A damaged archive can hold any text in place of a number.
        values = [f"{name}={printable(str(value), 20)}" for name, value in asdict(self.settings).items()]
        values += [f"{name}={score:.2f}" for name, score in self.scores.items() if name == "clip_score_input"]
        return f"<image{number} of {prompt}: {', '.join(values)}, key={printable(f'{self.key[0]}:{self.key[1]}', 30)}>"

    def _repr_png_(self) -> bytes | None:
        try:
            return _png(self.image())
        except UserError:  # a notebook shows the text of `repr` then
            return None


def decode_images(images: Iterable[ImageRecord], decoder: "Decoder | None" = None) -> "list[Image]":
    """Decode images of any codecs; see `ImageRecord.image`."""
    import numpy as np
    from PIL import Image

    from dm_generations.inference.decoder import RowKey

    images = list(images)
    tokens = [image.tokens for image in images]
    places: dict[Decoder, list[int]] = {}
    for place, image in enumerate(images):
        own = decoder or image.find_decoder(image.codec, len(tokens[place]))
        places.setdefault(own, []).append(place)
    decoded: list[Any] = [None] * len(images)
    for own, listed in places.items():
        if decoder is None:
            own.set_batch_size(next((size for size in _BATCH_SIZES if size >= len(listed)), _BATCH_SIZES[-1]))
        same = [place for place in listed if len(tokens[place]) == own.token_count]
        if len(same) < len(listed):
            wrong = next(place for place in listed if place not in same)
            raise UserError(
                f"image {images[wrong].id} has {len(tokens[wrong]):,} tokens, the codec {own.name!r:.100} "
                f"{own.token_count:,}; give the codec it was made with: Decoder.load('FOLDER')"
            )
        keys = [RowKey.of(images[place]) for place in listed]
        decoded_images = own(np.stack([tokens[place] for place in listed]), keys)
        for place, pixels in zip(listed, decoded_images, strict=True):
            decoded[place] = Image.fromarray(pixels)
    return decoded


def embedded_decoder(codec: ModelInfo | None, token_count: int) -> "Decoder":
    """Return the decoder of the codec that ships, for images that it made.

    Args:
        codec: What the images record.
        token_count: L.

    Raises:
        UserError: Another codec made them, or one that they do not record and that has another grid.
    """
    embedded = _embedded_codec()
    side = None if codec is None else square_side(codec.token_shape)
    grid = math.isqrt(token_count) if side is None else side
    is_embedded = grid == embedded.config.grid if codec is None else codec.sha256 == embedded.sha256
    if not is_embedded:
        what = "a codec that it does not record" if codec is None else f"codec {codec.name!r:.100}"
        raise UserError(f"this image was made with {what}; give it as image(Decoder.load('FOLDER'))")
    return _embedded_decoder(grid)


@functools.cache
def _embedded_codec() -> "Checkpoint":
    from dm_generations.models.loading import load_checkpoint

    return load_checkpoint(None, "codec")


@functools.lru_cache(maxsize=4)
def _embedded_decoder(grid: int) -> "Decoder":
    from dm_generations.inference.decoder import Decoder

    return Decoder.load(None, batch_size=1, grid=grid)


class ImageList(ABC, Sequence[ImageRecord]):
    """Images, which a notebook shows as a grid with labels."""

    @abstractmethod
    def __repr__(self) -> str: ...

    def grid(self, rows: str = "temperature", columns: str = "cond_scale") -> "ImageGrid":
        """Arrange the images by two settings, as a table for notebooks.

        Args:
            rows: The setting that has a row for each value: "top_k", "top_p", "temperature", "cond_scale" or "prompt".
            columns: The setting that has a column for each value.

        Raises:
            UserError: There is no such setting.
        """
        return ImageGrid(self, rows, columns)

    def images(self, decoder: "Decoder | None" = None) -> "list[Image]":
        """Decode all; see `ImageRecord.image`. For more than memory holds there is `Decoder.decode_batches`."""
        return decode_images(self, decoder)

    def _repr_html_(self) -> str:
        try:
            shown, figures = _figures(self)
        except UserError as error:  # the archive is closed, for instance
            return f"<p>{html.escape(f'{self!r}: {error}')}</p>"
        flow = f"<div style='display:flex;flex-wrap:wrap;gap:4px'>{''.join(figures)}</div>"
        return f"<p>{html.escape(repr(self))}</p>{flow}{_rest(len(self) - len(shown))}"


class ListedImages(ImageList):
    """Images of a list."""

    def __init__(self, images: Sequence[ImageRecord]):
        """Take the images."""
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> "ListedImages": ...
    def __getitem__(self, index: int | slice) -> "ImageRecord | ListedImages":
        """Return an image, or those of a slice."""
        return ListedImages(self._images[index]) if isinstance(index, slice) else self._images[index]

    def __repr__(self) -> str:
        return f"<{len(self):,} {'image' if len(self) == 1 else 'images'}>"


class ImageGrid:
    """Images by two settings, which a notebook shows as a table; see `ImageList.grid`."""

    def __init__(self, images: ImageList, rows: str, columns: str):
        """Take images and the names of two settings. Raises UserError for other names."""
        for name in (rows, columns):
            if name not in (names := ("prompt", *_SHORT_NAMES)):
                raise UserError(f"there is no setting {name!r:.60}; settings are {', '.join(names)}")
        self._images, self._rows, self._columns = images, rows, columns

    def __repr__(self) -> str:
        return f"{self._images!r} by {self._rows} and {self._columns}"

    def _repr_html_(self) -> str:
        try:
            shown, figures = _figures(self._images, (self._rows, self._columns))
        except UserError as error:
            return f"<p>{html.escape(f'{self!r}: {error}')}</p>"
        rows, columns = ([_value(image, name) for image in shown] for name in (self._rows, self._columns))
        cells: dict[tuple[str, str], str] = {}
        for *place, figure in zip(rows, columns, figures, strict=True):
            cells[place[0], place[1]] = cells.get((place[0], place[1]), "") + figure
        header = "".join(f"<th>{html.escape(f'{self._columns} {column}')}</th>" for column in dict.fromkeys(columns))
        body = "".join(
            f"<tr><th>{html.escape(f'{self._rows} {row}')}</th>"
            + "".join(
                f"<td><div style='display:flex;flex-wrap:wrap;gap:4px'>{cells.get((row, column), '')}</div></td>"
                for column in dict.fromkeys(columns)
            )
            + "</tr>"
            for row in dict.fromkeys(rows)
        )
        title, rest = html.escape(repr(self)), _rest(len(self._images) - len(shown))
        return f"<p>{title}</p><table><tr><th></th>{header}</tr>{body}</table>{rest}"


def _value(image: ImageRecord, name: str) -> str:
    return printable(str(image.prompt if name == "prompt" else getattr(image.settings, name)), 60)


def _figures(images: ImageList, unlabelled: Collection[str] = ()) -> tuple[list[ImageRecord], list[str]]:
    """Return the images that a notebook shows, not too many, with HTML for each. Raises UserError.

    Args:
        images: The images.
        unlabelled: Settings that labels leave out.
    """
    shown = list(images[:_MAX_SHOWN])
    side = max((max((image.codec and image.codec.image_shape) or (1,)) for image in shown), default=1)
    shown = shown[: max(4, _MAX_SHOWN_PIXELS // side**2)]
    try:
        sources = [data_url(image) for image in decode_images(shown)]
    except UserError:  # the labels say what there is
        sources = [""] * len(shown)
    figures = [
        "<figure style='margin:0;max-width:16em'>"
        + (f"<img src='{source}' style='display:block'>" if source else "")
        + f"<figcaption style='font-size:smaller'>{html.escape(label)}</figcaption></figure>"
        for source, label in zip(sources, _labels(shown, unlabelled), strict=True)
    ]
    return shown, figures


def _rest(count: int) -> str:
    return f"<p>and {count:,} more</p>" if count > 0 else ""


def _labels(images: Sequence[ImageRecord], unlabelled: Collection[str]) -> list[str]:
    """Return a line for each image with what differs between them, and its score."""
    settings = [asdict(image.settings) for image in images]
    names = [name for name in _SHORT_NAMES if name not in unlabelled]
    varying = [name for name in names if len({str(values[name]) for values in settings}) > 1]
    has_prompts = "prompt" not in unlabelled and len({image.prompt for image in images}) > 1
    labels = []
    for image, values in zip(images, settings, strict=True):
        parts = [printable(str(image.prompt), 60)] if has_prompts else []
        parts += [settings_label(values, varying)] if varying else []
        if (score := image.scores.get(SCORES[0])) is not None:
            parts.append(f"{score:.1f}")
        labels.append(" · ".join(parts))
    return labels


def settings_label(values: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return settings in short, as file names have them: `k=256 c=3.0`."""
    return " ".join(f"{_SHORT_NAMES[name]}={printable(str(values[name]), 20)}" for name in names)


def table_html(title: str, header: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """Return a table whose texts are escaped."""

    def line(values: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(printable(str(value)))}</{tag}>" for value in values) + "</tr>"

    body = line(header, "th") + "".join(line(row, "td") for row in rows)
    return f"<p>{html.escape(title)}</p><table>{body}</table>" + (f"<p>{html.escape(note)}</p>" if note else "")


def _png(image: "Image") -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def data_url(image: "Image") -> str:
    """Return an image as the URL of a PNG."""
    return f"data:image/png;base64,{base64.b64encode(_png(image)).decode('ascii')}"
