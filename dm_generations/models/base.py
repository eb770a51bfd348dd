"""What the program needs of a model: the protocols of networks and configs, and what a checkpoint reader returns.

B: batch   T: text tokens   L: image tokens, row-major over the grid   V: columns of the logits
h, w: rows and columns of a token grid   H, W: pixels   D: width of a codebook row
"""

import contextlib
import contextvars
import dataclasses
import logging
import math
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

import jax
import numpy as np
from flax import linen as nn

from dm_generations.archive.records import ClassLabel
from dm_generations.errors import UserError, short_repr
from dm_generations.runtime.device import matmul_precision, put_params
from dm_generations.sampling.params import ExtraSetting, SamplingParams
from dm_generations.weights.state_dict import Shape, same_name

# The largest sizes that a config may have, far above those of any model that exists: whoever writes a file of a few
# bytes must not decide how long it takes to build a network.
MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY, MAX_POSITIONS = 128, 1 << 20, 1 << 24, 1 << 16
MAX_LEVELS = 16  # of resolution, in an image codec
LAYERS, WIDTH, VOCABULARY, POSITIONS = (
    (1, largest) for largest in (MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY, MAX_POSITIONS)
)
ANY_ID = (0, 2**31 - 1)

_logger = logging.getLogger(__name__)
_UNKNOWN_TEXT = "\U000f0000"  # for private use: no tokenizer was trained on it
_RECOMPUTES: contextvars.ContextVar[bool] = contextvars.ContextVar("recomputes", default=False)

Bounds = Mapping[str, tuple[float, float]]


def check_config(
    owner: str, config: Any, bounds: Bounds, choices: Mapping[str, Collection[str]] = MappingProxyType({})
) -> None:
    """Check type and range of the fields of a config, before a network is built from it.

    Fields of other types than bool, int, float, str and tuple[int, ...] are left to the caller.

    Args:
        owner: The kind of model, for messages.
        config: A dataclass.
        bounds: By name, the smallest and the largest value of each number, and of the numbers in each tuple.
        choices: By name, the values that each string can have.

    Raises:
        UserError: A value is of another type, or out of range.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name
        types = typing.get_args(field.type) if type(None) in typing.get_args(field.type) else (field.type,)
        if value is None and type(None) in types:
            continue
        numbers = value if isinstance(value, tuple) else ()
        if bool in types:
            is_good, expected = type(value) is bool, "true or false"
        elif str in types:
            is_good, expected = value in list(choices[name]), f"one of {', '.join(choices[name])}"
        elif int in types:
            is_good, expected = _is_in_range(value, int, bounds[name]), f"a whole number {_describe(bounds[name])}"
        elif float in types:
            is_good, expected = _is_in_range(value, float, bounds[name]), f"a number {_describe(bounds[name])}"
        elif tuple[int, ...] in types:
            is_good = numbers is value and all(_is_in_range(number, int, bounds[name]) for number in numbers)
            expected = f"a list of whole numbers {_describe(bounds[name])}"
        else:
            continue
        if not is_good:
            raise UserError(f"{owner} config: {name} must be {expected}, not {short_repr(value)}")


def _is_in_range(value: Any, kind: type, bounds: tuple[float, float]) -> bool:
    return type(value) in (int, kind) and bounds[0] <= value <= bounds[1]


def _describe(bounds: tuple[float, float]) -> str:
    return f"from {bounds[0]} to {bounds[1]}" if bounds[0] < bounds[1] else f"equal to {bounds[0]}"


def select_fields(config_class: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `values` that a config has fields for; lists, of JSON, as tuples."""
    known = {field.name for field in dataclasses.fields(config_class)}
    found = {name: value for name, value in values.items() if name in known}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def check_levels(what: str, levels: int, blocks: int, resolution: int) -> None:
    """Check the resolution levels of an image codec.

    Args:
        what: Names the network in messages.
        levels: How many; each but the first has half the resolution of the one before.
        blocks: Of a level.
        resolution: Pixels a side.

    Raises:
        UserError: There are too many, or the resolution cannot be halved so often.
    """
    if not 1 <= levels <= MAX_LEVELS or levels * blocks > MAX_LAYERS:
        raise UserError(
            f"{what} config: ch_mult of {levels} levels with num_res_blocks {blocks} is not supported: "
            f"from 1 to {MAX_LEVELS} levels and {MAX_LAYERS} blocks in all"
        )
    if resolution % 2 ** (levels - 1):
        raise UserError(f"{what} config: resolution {resolution} cannot be halved {levels - 1} times")


@contextlib.contextmanager
def prefix_errors(path: Path) -> Iterator[None]:
    """Within it, put a file or folder before the text of each `UserError` that does not name it."""
    try:
        yield
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error


class GeneratorConfig(Protocol):
    """The config of a text-to-image model: a frozen dataclass."""

    decodes_own_grid: ClassVar[bool]  # its images have its own token grid, whatever grid its codec was trained at

    @property
    def image_length(self) -> int:
        """L."""

    @property
    def codebook_size(self) -> int:
        """Tokens below it are image content; the model can sample no others."""

    @property
    def max_text_length(self) -> int:
        """T."""

    @property
    def text_vocab_size(self) -> int:
        """Rows of the table that a prompt's ids index."""

    @property
    def start_token(self) -> int:
        """What `decode_step` reads at step 0."""

    @property
    def sampling_order(self) -> str:
        """Order of temperature and filters, see `sampling.filter_logits`."""


def extra_settings_of(config: Any) -> Mapping[str, ExtraSetting]:
    """Return the settings that a text-to-image model has beyond `SamplingParams`: its config's `extra_settings`."""
    return getattr(config, "extra_settings", {})


def default_params_of(config: Any) -> SamplingParams | None:
    """Return the settings of a model's own sampling program; None where this program has its own defaults."""
    return getattr(config, "default_params", None)


def class_count_of(config: Any) -> int:
    """Return how many classes a text-to-image model draws; 0 for one that reads texts."""
    return getattr(config, "num_classes", 0)


def check_prompt_kinds(prompts: Sequence[str | ClassLabel], config: Any, name: str) -> None:
    """Check that prompts are what a model takes.

    Args:
        prompts: Texts or classes.
        config: Of the model.
        name: Of the model.

    Raises:
        UserError: One is a class and the model reads texts, or the other way round, or the model has no such class.
    """
    count = class_count_of(config)
    for prompt in prompts:
        if isinstance(prompt, ClassLabel) and not count:
            raise UserError(f"model {name!r} reads texts: give --prompts, not --classes")
        if isinstance(prompt, str) and count:
            raise UserError(f"model {name!r} draws {count:,} classes: give --classes, not the text {prompt!r:.60}")
        if isinstance(prompt, ClassLabel) and not 0 <= prompt.label < count:
            raise UserError(f"model {name!r} has no class {prompt.label}: they are 0 to {count - 1:,}")


def check_texts(prompts: Sequence[str | ClassLabel | None], config: Any, name: str, tokenizer: "Tokenizer") -> None:
    """Warn of texts that a model reads only in part, or not at all.

    Args:
        prompts: Texts or classes; None is the model's own empty text.
        config: Of the model.
        name: Of the model.
        tokenizer: Of the model.

    Raises:
        UserError: As `check_prompt_kinds`, or a text has a token that the model does not have, as a wrong tokenizer
            makes.
    """
    check_prompt_kinds([prompt for prompt in prompts if prompt is not None], config, name)
    if class_count_of(config):
        return
    texts, length = cast(Sequence[str | None], prompts), config.max_text_length
    ids, mask = tokenizer.encode(texts, length + 1)
    if cut := [text for text, is_cut in zip(texts, mask.sum(axis=1) > length, strict=True) if is_cut]:
        _warn_of("longer than the %s tokens that the model reads, so cut there", cut, length)
    with contextlib.suppress(UserError):  # a tokenizer may have no token for what it does not know
        nothing, _ = tokenizer.encode(["", _UNKNOWN_TEXT], length)
        unknown = {*nothing.flat, *getattr(tokenizer, "unknown_ids", ())}
        pairs = zip(texts, ids, strict=True)
        if unread := [text for text, row in pairs if text and text.strip() and unknown.issuperset(row)]:
            _warn_of("without a character that the model knows, so these images may show anything", unread)


def _warn_of(what: str, texts: Sequence[str | None], *values: object) -> None:
    subject = "1 prompt " if len(texts) == 1 else f"{len(texts):,} prompts "
    _logger.warning(f"{subject}{what}: %.60r", *values, texts[0])


@runtime_checkable
class TextToImageModel(Protocol):
    """A network that turns prompts into image tokens: a Linen module whose methods go through `apply`.

    Generation is `encode_prompt`, `init_cache`, then `decode_step` for steps 0 to L - 1. In masked decoding (a config
    with a `masking_schedule`), `decode_step` reads all tokens (B, L), gives logits (B, L, V), and is called as often as
    the extra setting `steps` says. `init_cache` of a model with extra settings also takes their values, (B, E) float32.
    """

    config: Any  # a GeneratorConfig
    dtype: Any  # of activations; logits are float32

    @staticmethod
    def example_inputs(config: Any) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""

    @staticmethod
    def prepare_params(config: Any, params: dict, platform: str) -> tuple[Any, dict]:
        """Config and parameters in the form that generation takes on a "cpu", "gpu" or "tpu", from a checkpoint's."""

    def encode_prompt(self, input_ids: jax.Array, attention_mask: jax.Array) -> Any:
        """What generation reads of prompts (B, T) int32. Axis 0 of every array of the result is B."""

    def init_cache(self, text: Any) -> Any:
        """The state of B generations before step 0, each for its row of `text`."""

    def decode_step(self, cache: Any, token: jax.Array, step: Any) -> tuple[jax.Array, Any]:
        """Logits (B, V) float32 of image token `step`, and the cache for the next step.

        Args:
            cache: From `init_cache` or the step before.
            token: (B,) int32, the token before it; `start_token` at step 0.
            step: int32 scalar, may be traced.
        """


class TrainingLogits(NamedTuple):
    """What a network that reads prompts and all tokens of their images predicts of both, for the loss."""

    image: jax.Array  # (B, L, V) float32
    text: jax.Array | None = None  # (B, N, W) float32; None of a model that does not predict text
    text_targets: jax.Array | None = None  # (B, N) int32, what `text` should predict


class TrainableModel(TextToImageModel, Protocol):
    """A text-to-image model that can be trained."""

    def training_logits(
        self, input_ids: jax.Array, attention_mask: jax.Array, tokens: jax.Array, deterministic: bool = True
    ) -> TrainingLogits:
        """Logits of each token, given those before it and the prompt.

        Args:
            input_ids: (B, T) int32.
            attention_mask: (B, T) int32.
            tokens: (B, L) int32.
            deterministic: Whether dropouts are off; else they need a "dropout" rng.
        """


class CodecConfig(Protocol):
    """The config of an image codec: a frozen dataclass."""

    @property
    def grid(self) -> int:
        """Tokens a side."""

    @property
    def codebook_size(self) -> int:
        """Tokens are below it."""

    @property
    def image_size(self) -> int:
        """Pixels a side."""


@runtime_checkable
class ImageCodec(Protocol):
    """A network between images and token grids: a Linen module whose methods go through `apply`.

    Pixels are RGB, 0 is black and 1 is white.
    """

    ENCODER_PARTS: ClassVar[tuple[str, ...]]  # top-level names of the parameters that `encode` alone needs

    config: Any  # a CodecConfig
    dtype: Any  # of activations

    @staticmethod
    def example_inputs(config: Any) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""

    def encode(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Codebook rows (B, h, w, D) and tokens (B, L) int32 of pixels (B, H, W, 3) float32."""

    def decode_code(self, tokens: jax.Array) -> jax.Array:
        """Pixels (B, H, W, 3) float32, not clipped, of tokens (B, L) int32 or grids of them (B, h, w)."""


class ImageDecoder(Protocol):
    """A codec's decoder on one kind of device: parameters are prepared once, then batches are decoded."""

    def prepare_params(self, params: dict, sharding: jax.sharding.Sharding | None = None) -> dict:
        """Parameters on the devices, from those of a checkpoint, in the form that `decode` takes."""

    def decode(self, params: dict, tokens: jax.Array) -> jax.Array:
        """See `ImageCodec.decode_code`."""


@dataclasses.dataclass(frozen=True)
class NetworkDecoder:
    """The decoder of a codec that decodes with its network as it is."""

    network: Any  # an ImageCodec

    def prepare_params(self, params: dict, sharding: jax.sharding.Sharding | None = None) -> dict:
        """Put the decoder's parameters on the default device, or where `sharding` says, in float32."""
        parts = self.network.ENCODER_PARTS
        return put_params({name: part for name, part in params.items() if name not in parts}, sharding=sharding)

    def decode(self, params: dict, tokens: jax.Array) -> jax.Array:
        """See `ImageCodec.decode_code`."""
        with matmul_precision(self.network.dtype):
            return self.network.apply({"params": params}, tokens, method="decode_code")


class Tokenizer(Protocol):
    """Turns prompts into the ids that a model reads.

    Where the unconditional prompt depends on the prompt, `unconditional_by_prompt` is true, and `encode` takes
    `sampling.params.Unconditional`. That of a model of classes takes `archive.records.ClassLabel`.
    """

    def encode(self, texts: Sequence[Any], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and attention mask, both int32 (B, length). None is the model's unconditional prompt."""


@dataclasses.dataclass(frozen=True)
class RawCheckpoint:
    """A model as its files hold it: config and weights, not yet checked against each other.

    The arrays are views of mapped files, in the dtype of the file.
    """

    kind: str  # a name in `registry.KINDS`
    config: Any  # the network's config
    params: dict  # nested, names of the network
    files: tuple[Path, ...]  # the weight files
    tokenizer: Path | None = None  # file or folder of the prompts' tokenizer
    text_style: str | None = None  # generators: how prompts become ids, see `text.load_tokenizer`
    # For messages. Of weights in several files: the file of the parameters whose paths begin so; "" is for the rest.
    file_by_prefix: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    # For messages too: path and shape of a parameter to its name and shape in the file, whether it is there or not.
    name_in_file: Callable[[str, Shape], tuple[str, Shape]] = same_name
    lineage: dict[str, Any] | None = None  # which weights, archives and options it was trained from, if that is known

    def file_of(self, path: str) -> Path:
        """The file that has, or should have, the parameter of this path ("a/b/kernel")."""
        prefix = max((prefix for prefix in self.file_by_prefix if path.startswith(prefix)), key=len, default=None)
        return self.files[0] if prefix is None else self.file_by_prefix[prefix]


@contextlib.contextmanager
def recompute_layers(is_wanted: bool) -> Iterator[None]:
    """Within it, networks that are traced keep only what enters a layer, and compute the rest again for gradients."""
    token = _RECOMPUTES.set(is_wanted)
    try:
        yield
    finally:
        _RECOMPUTES.reset(token)


def layer_class(layer: Any, *static: int) -> Any:
    """Return the class of a layer, changed within `recompute_layers`; `static` are places of arguments, from 0."""
    # Flax counts the layer itself as the first one.
    return nn.remat(layer, static_argnums=tuple(place + 1 for place in static)) if _RECOMPUTES.get() else layer


def example_images(size: int) -> jax.ShapeDtypeStruct:
    """A batch of one image, (1, size, size, 3) float32."""
    return jax.ShapeDtypeStruct((1, size, size, 3), "float32")


def example_ids(length: int) -> jax.ShapeDtypeStruct:
    """A batch of one row of ids, (1, length) int32."""
    return jax.ShapeDtypeStruct((1, length), "int32")


def token_grid(tokens: jax.Array) -> jax.Array:
    """Tokens as the grids that decoders read.

    Args:
        tokens: (B, L) with L a square, or grids of any shape (B, h, w).

    Returns:
        Grids (B, h, w), row-major.

    Raises:
        ValueError: if L is not a square.
    """
    if tokens.ndim == 3:
        return tokens
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens do not fill a square grid")
    return tokens.reshape(-1, side, side)
