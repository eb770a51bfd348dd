"""The values that an archive stores and returns, and checks of token vectors. Needs no NumPy.

Units: `key0` and `key1` are the uint32 words of the image's PRNG key; times are UTC Unix seconds; scores are CLIP
logits. `quantvec` holds the tokens: little-endian uint16, in the order of the codec's token shape. `extra_settings` are
the sampler's settings beyond those of `SamplingParams`, as `canonical_settings` writes them. `log_prob` is the natural
logarithm of the probability of the sampled tokens, `dtype` what the model computed in, one of DTYPES. The first
`init_count` tokens were copied from an initial image, not sampled, and `init_md5` is the hex MD5 of their bytes, ""
where there are none.
"""

import array
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from dm_generations.archive.connection import ArchiveError, Row
from dm_generations.errors import one_line, short_repr
from dm_generations.sampling.params import SamplingParams

if TYPE_CHECKING:
    import numpy as np

DType = Literal["float32", "bfloat16", "float16"]
ModelKind = Literal["generator", "codec", "clip", "scorer"]
# Of an image's tokens: (height, width); (length,); or ((height, width), ...) of several scales, coarsest first.
TokenShape = tuple[Any, ...]

DTYPES: Final[tuple[DType, ...]] = ("float32", "bfloat16", "float16")
# What a column of images refers to.
MODEL_KINDS: Final[dict[str, ModelKind]] = {"generator_id": "generator", "codec_id": "codec", "clip_id": "clip"}
ALL_MODEL_KINDS: Final[tuple[ModelKind, ...]] = (*MODEL_KINDS.values(), "scorer")
MAX_TOKENS: Final = 2**24  # of one image; far above any codec
MAX_SHAPE_LENGTH: Final = 10_000  # characters of JSON
BYTES_PER_TOKEN: Final = 2
TOKEN_DTYPE = "<u2"  # of NumPy: little-endian uint16, also on big-endian machines
_ALL_BYTES: Final = bytes(range(256))


class BadTokensError(Exception):
    """A stored token vector cannot be decoded; the text says why."""


@dataclass(frozen=True, slots=True)
class GroupKey:
    """What all images of a group share."""

    prompt_id: int
    sc_prompt_id: int
    params: SamplingParams
    extra_settings: str = ""

    def values(self) -> Row:
        """Return the values of GROUP_COLUMNS."""
        return self.prompt_id, self.sc_prompt_id, *self.params.values(), self.extra_settings


@dataclass(frozen=True, slots=True)
class Group:
    """The images of one prompt and one setting."""

    key: GroupKey
    count: int


def key_words(key0: Any, key1: Any) -> tuple[int, int]:
    """Return a key as words of 32 bits; 0 for what a damaged file has in place of a number."""
    word0, word1 = (word & 0xFFFFFFFF if isinstance(word, int) else 0 for word in (key0, key1))
    return word0, word1


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image as stored. `quantvec` is always bytes; the other values of a damaged file can have any type."""

    id: int
    prompt_id: int
    sc_prompt_id: int
    params: SamplingParams
    key0: int
    key1: int
    quantvec: bytes
    quantvec_md5: str | None
    clip_score_input: float | None
    clip_score_tokenized: float | None
    generator_id: int | None
    codec_id: int | None
    sampler_version: int | None = None
    log_prob: float | None = None
    dtype: str | None = None
    init_count: int = 0
    init_md5: str = ""
    time_end: float | None = None
    extra_settings: str = ""

    @property
    def key(self) -> tuple[int, int]:
        """See `key_words`."""
        return key_words(self.key0, self.key1)


@dataclass(frozen=True, slots=True)
class ClassLabel:
    """A prompt that is a class, not a text: its number in a vocabulary that the archive has."""

    vocabulary: str
    label: int

    def __str__(self) -> str:
        return f"{self.vocabulary} {self.label}"


@dataclass(frozen=True, slots=True)
class NewImage:
    """One image to store. Its prompts are texts, or a class, whose ids the archive finds or makes."""

    prompt: str | ClassLabel
    sc_prompt: str | None  # None: the model's own empty unconditional prompt
    params: SamplingParams
    key0: int
    key1: int
    quantvec: bytes
    time_start: float | None
    time_end: float | None
    clip_score_input: float | None = None
    clip_score_tokenized: float | None = None
    time_scored: float | None = None
    log_prob: float | None = None
    dtype: str | None = None
    init_count: int = 0
    init_md5: str = ""
    extra_settings: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """Which weights sample, decode or score an image. Two are the same model if kind, sha256 and config are equal.

    Attributes:
        kind: A ModelKind.
        name: For people; models can share it.
        sha256: Of the weights, 64 lower-case hex digits.
        config: The model's configuration.
        token_shape: Of an image's tokens; like the next two, only for codecs.
        codebook_size: Number of tokens in the codebook.
        image_shape: (height, width) of the image in pixels.
    """

    kind: str
    name: str
    sha256: str
    config: dict[str, Any] = field(hash=False)
    token_shape: TokenShape | None = None
    codebook_size: int | None = None
    image_shape: tuple[int, int] | None = None

    def matches(self, other: "ModelInfo") -> bool:
        """Returns whether both are the same model: the same weights, and no option that has another value.

        Options that only one of them has do not count, so that an archive of an older version can be filled further.

        Args:
            other: the model to compare with; a codec without a token shape matches one with any.
        """
        if (self.kind, self.sha256) != (other.kind, other.sha256):
            return False
        if other.token_shape not in (None, self.token_shape):
            return False
        if not isinstance(self.config, dict) or not isinstance(other.config, dict):  # of a damaged archive
            return False
        return all(self.config[name] == other.config[name] for name in self.config.keys() & other.config.keys())


PARAM_COLUMNS: Final = tuple(SamplingParams.__dataclass_fields__)
GROUP_COLUMNS: Final = ("prompt_id", "sc_prompt_id", *PARAM_COLUMNS, "extra_settings")
_ROW_FIELDS: Final = tuple(ImageRow.__dataclass_fields__)
IMAGE_COLUMNS: Final = (*_ROW_FIELDS[:3], *PARAM_COLUMNS, *_ROW_FIELDS[4:])
INSERT_COLUMNS: Final = (
    *GROUP_COLUMNS[:-1],
    *("key0", "key1", "quantvec", "quantvec_md5", "clip_score_input", "clip_score_tokenized"),
    *("time_start", "time_end", "time_scored"),
    *MODEL_KINDS,
    *("sampler_version", "log_prob", "dtype", "init_count", "init_md5", "extra_settings"),
)
CHECKED_COLUMNS: Final = ("quantvec", "quantvec_md5", "init_count", "init_md5", "extra_settings")  # by check_image
_GROUP_TYPES: Final = (int, int, int, float, float, float)  # of the numbers of GROUP_COLUMNS


def parse_group_key(values: Row) -> GroupKey:
    """Read the columns of a group.

    Args:
        values: Of GROUP_COLUMNS. Whole numbers may be stored as reals, and reals as whole numbers.

    Raises:
        ArchiveError: A setting is not a number, or the extra settings are not a text.
    """
    *numbers, extra_settings = values
    if not isinstance(extra_settings, str):
        raise ArchiveError(f"some images have extra_settings {extra_settings!r:.40}; `verify` lists them")
    if tuple(map(type, numbers)) != _GROUP_TYPES:
        for name, to_type, value in zip(GROUP_COLUMNS, _GROUP_TYPES, numbers, strict=False):
            is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            if not is_whole and not (isinstance(value, float) and to_type is float):
                raise ArchiveError(f"some images have {name} {value!r:.40}; `verify` lists them")
        try:
            numbers = [to_type(value) for to_type, value in zip(_GROUP_TYPES, numbers, strict=True)]
        except OverflowError as error:
            raise ArchiveError("some images have a setting that is too large; `verify` lists them") from error
    prompt_id, sc_prompt_id, *params = numbers
    return GroupKey(prompt_id, sc_prompt_id, SamplingParams(*params), extra_settings)


def parse_image(values: Row) -> ImageRow:
    """Read an image from the values of IMAGE_COLUMNS; tokens that are not a blob become b""."""
    row_id, prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, *rest = values
    row = ImageRow(row_id, prompt_id, sc_prompt_id, SamplingParams(top_k, top_p, temperature, cond_scale), *rest)
    # Every length check of the callers fails for b"".
    return row if isinstance(row.quantvec, bytes) else replace(row, quantvec=b"")


def parse_model(values: Row) -> ModelInfo:
    """Read a model from its columns, in the order of `ModelInfo`.

    Raises:
        ArchiveError: The config is not a JSON object, or another value has the wrong type.
    """
    kind, name, sha256, config, token_shape, codebook_size, image_shape = values
    if not (isinstance(kind, str) and isinstance(name, str) and isinstance(sha256, str)):
        raise ArchiveError("its kind, name or sha256 is not a text")
    if not isinstance(codebook_size, int | None):
        raise ArchiveError(f"its codebook_size {codebook_size!r:.100} is not a whole number")
    shape = None if token_shape is None else parse_token_shape(token_shape)
    pixels = None if image_shape is None else parse_image_shape(image_shape)
    return ModelInfo(kind, name, sha256, parse_config(config), shape, codebook_size, pixels)


def model_values(model: ModelInfo) -> Row:
    """Return kind, sha256, config, name, codebook_size, token_shape and image_shape as an archive stores them."""
    config = json.dumps(model.config, sort_keys=True, separators=(",", ":"))
    shapes = (
        None if shape is None else json.dumps(shape, separators=(",", ":"))
        for shape in (model.token_shape, model.image_shape)
    )
    return model.kind, model.sha256, config, model.name, model.codebook_size, *shapes


def parse_token_shape(text: object) -> TokenShape:
    """Read a token shape from JSON: `[16,16]`, `[256]`, `[[1,1],[2,2],[4,4]]`.

    Raises:
        ArchiveError: It is something else, or has more than MAX_TOKENS tokens.
    """
    shape = _parse_shape(text)
    is_scales = all(isinstance(scale, tuple) and len(scale) == 2 and all(map(_is_size, scale)) for scale in shape)
    if shape and (is_scales or (len(shape) <= 2 and all(map(_is_size, shape)))) and count_tokens(shape) <= MAX_TOKENS:
        return shape
    raise ArchiveError(f"its token_shape {text!r:.100} is not a shape of tokens")


def parse_image_shape(text: object) -> tuple[int, int]:
    """Read (height, width) in pixels from JSON.

    Raises:
        ArchiveError: It is something else.
    """
    match _parse_shape(text):
        case (height, width) if _is_size(height) and _is_size(width):
            return height, width
    raise ArchiveError(f"its image_shape {text!r:.100} is not a height and a width")


def _parse_shape(text: object) -> tuple[Any, ...]:
    try:
        shape = json.loads(text) if isinstance(text, str) and len(text) <= MAX_SHAPE_LENGTH else None
    except (ValueError, RecursionError):
        shape = None
    if not isinstance(shape, list):
        return ()
    return tuple(tuple(scale) if isinstance(scale, list) else scale for scale in shape)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= MAX_TOKENS


def count_tokens(shape: TokenShape) -> int:
    """Return the number of tokens of an image."""
    if isinstance(shape[0], tuple):
        return sum(height * width for height, width in shape)
    return math.prod(shape)


def square_side(shape: TokenShape | None) -> int | None:
    """Return the side of a square token grid; None for every other shape."""
    match shape:
        case (int(height), int(width)) if height == width:
            return height
    return None


def format_shape(shape: TokenShape) -> str:
    """Return a shape for people: `16x16`, `256`, `1x1+2x2+4x4`."""
    if isinstance(shape[0], tuple):
        return "+".join(f"{height}x{width}" for height, width in shape)
    return "x".join(map(str, shape))


def canonical_settings(settings: Mapping[str, Any]) -> str:
    """Return extra settings as an archive stores them: JSON with sorted keys and without spaces, "" for none.

    Raises:
        ArchiveError: A name is not a text, or a value is not JSON (NaN and infinity are not).
    """
    try:
        if all(isinstance(name, str) and name for name in settings):
            return json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False) if settings else ""
    except (TypeError, ValueError, RecursionError) as error:
        raise ArchiveError(f"extra settings {short_repr(settings)} are not JSON: {one_line(error)}") from error
    raise ArchiveError(f"extra settings {short_repr(settings)} have a name that is not a text")


def is_canonical(text: object) -> bool:
    """Return whether extra settings are stored as `canonical_settings` writes them."""
    if not isinstance(text, str):
        return False
    try:
        return not text or canonical_settings(parse_config(text)) == text
    except ArchiveError:
        return False


def parse_config(text: object) -> dict[str, Any]:
    """Read a model's configuration.

    Raises:
        ArchiveError: Not a JSON object.
    """
    try:
        config = json.loads(cast(str, text))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArchiveError("config is not JSON") from error
    if not isinstance(config, dict):
        raise ArchiveError("config is not a JSON object")
    return config


def parse_text(value: object) -> str | None:
    """Read a prompt: bytes that are not UTF-8 become U+FFFD; NULL is None."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return None if value is None else str(value)


def quantvec_md5(quantvec: bytes) -> str:
    """Return the hex MD5 of a token vector, a checksum."""
    return hashlib.md5(quantvec, usedforsecurity=False).hexdigest()


def init_md5(quantvec: bytes, init_count: int) -> str:
    """Return the hex MD5 of the first `init_count` tokens, "" if there are none."""
    return quantvec_md5(quantvec[: BYTES_PER_TOKEN * init_count]) if init_count else ""


def grid_side(byte_count: int) -> int | None:
    """Return the side of the square grid that a token vector of this many bytes fills, None if there is none."""
    token_count, odd = divmod(byte_count, BYTES_PER_TOKEN)
    side = math.isqrt(token_count)
    return side if side and not odd and side * side == token_count else None


def max_token(quantvec: bytes) -> int:
    """Return the largest token of a non-empty vector."""
    tokens = array.array("H", quantvec)
    if sys.byteorder == "big":
        tokens.byteswap()
    return max(tokens)


def tokens_below(quantvec: bytes, codebook_size: int) -> bool:
    """Return whether every token is below `codebook_size`.

    Runs for each row that is written or verified. So it first looks at the high bytes alone, with `bytes.translate`,
    which is fast; that decides nearly every case.
    """
    high_limit = codebook_size >> 8
    if not quantvec[1::2].translate(None, delete=_ALL_BYTES[:high_limit]):
        return True
    return max_token(quantvec) < codebook_size


def check_init(quantvec: bytes, init_count: int, md5: str) -> None:
    """Check that a vector has `init_count` initial tokens with this MD5.

    Raises:
        ArchiveError: It does not have them.
    """
    token_count = len(quantvec) // BYTES_PER_TOKEN
    if not 0 <= init_count <= token_count:
        raise ArchiveError(f"init_count is {init_count}, not from 0 to the {token_count} tokens of the image")
    if init_md5(quantvec, init_count) != md5:
        raise ArchiveError(f"init_md5 is {md5!r:.40}, not that of the first {init_count} tokens")


def check_tokens(quantvec: bytes, codec: ModelInfo) -> None:
    """Check that a vector fills the codec's token shape with tokens of its codebook.

    Raises:
        ArchiveError: It does not, or the codec has no sizes.
    """
    if codec.token_shape is None or codec.codebook_size is None:
        raise ArchiveError(f"codec {codec.name!r:.100} has no token shape and codebook size")
    expected = count_tokens(codec.token_shape) * BYTES_PER_TOKEN
    if len(quantvec) != expected:
        raise ArchiveError(
            f"a token vector has {len(quantvec)} bytes; codec {codec.name!r:.100} needs {expected}"
            f" ({format_shape(codec.token_shape)} uint16)"
        )
    if not tokens_below(quantvec, codec.codebook_size):
        raise ArchiveError(
            f"a token vector holds a token that codec {codec.name!r:.100} ({codec.codebook_size} tokens) does not have"
        )


def check_image(
    codec: ModelInfo | None, quantvec: object, md5: object, init_count: object, initial_md5: Any, extra_settings: object
) -> str:
    """Check what an image that is copied says of its tokens and extra settings; return the MD5 of its tokens.

    Args:
        codec: Its codec; None if it is unknown.
        quantvec: Its tokens; this and the next ones are of CHECKED_COLUMNS.
        md5: Of its tokens; None is not checked.
        init_count: Its number of initial tokens.
        initial_md5: Of these.
        extra_settings: See `canonical_settings`.

    Raises:
        ArchiveError: Something is wrong.
    """
    if not isinstance(quantvec, bytes):
        raise ArchiveError("quantvec is not a blob")
    if codec is not None:
        check_tokens(quantvec, codec)
    found = quantvec_md5(quantvec)
    if md5 not in (None, found):
        raise ArchiveError("quantvec_md5 is not the MD5 of the tokens")
    if (init_count, initial_md5) != (0, ""):
        if not isinstance(init_count, int):
            raise ArchiveError(f"init_count is {init_count!r:.40}, not a whole number")
        check_init(quantvec, init_count, initial_md5)
    if extra_settings != "" and not is_canonical(extra_settings):
        raise ArchiveError("extra_settings are not canonical JSON")
    return found


def tokens_from_blob(
    blob: object, md5: str | None, token_count: int | None, codebook_size: int
) -> "np.ndarray[Any, np.dtype[np.uint16]]":
    """Read the tokens of one image, checked.

    An archive may come from anywhere, so `blob` may be whatever SQLite stores.

    Args:
        blob: The image's `quantvec`.
        md5: Its `quantvec_md5`; None is not checked.
        token_count: How many tokens there must be; None is any count but 0.
        codebook_size: Every token must be below it.

    Returns:
        (token_count,) uint16.

    Raises:
        BadTokensError: The tokens cannot be decoded; the text says why.
    """
    import numpy as np

    if not isinstance(blob, bytes):
        raise BadTokensError(f"its tokens are stored as {type(blob).__name__}, not as a blob")
    if token_count is None:
        if not blob or len(blob) % BYTES_PER_TOKEN:
            raise BadTokensError(f"its token blob of {len(blob):,} bytes is not a row of uint16")
        token_count = len(blob) // BYTES_PER_TOKEN
    expected = token_count * BYTES_PER_TOKEN
    if len(blob) != expected:
        raise BadTokensError(f"its token blob is {len(blob):,} bytes, not {expected:,} ({token_count:,} x uint16)")
    if md5 is not None and quantvec_md5(blob) != str(md5).lower():
        raise BadTokensError("its tokens do not match their MD5")
    tokens = np.frombuffer(blob, TOKEN_DTYPE)
    largest = int(tokens.max())
    if largest >= codebook_size:
        raise BadTokensError(f"it holds token {largest:,}, the codebook ends at {codebook_size - 1:,}")
    return tokens
