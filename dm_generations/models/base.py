"""What the program needs of a model: protocols of networks and configs, what a checkpoint reader returns, and a layer.

B: batch   T: text tokens   L: image tokens, row-major over the grid   V: columns of the logits
h, w: rows and columns of a token grid   H, W: pixels   D: width of a codebook row
"""

import contextlib
import dataclasses
import math
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dm_generations.errors import UserError, short_repr
from dm_generations.runtime.device import core_count, matmul_precision, put_params
from dm_generations.weights.state_dict import Shape, same_name

# The largest sizes that a config may have, far above those of any model that exists: whoever writes a file of a few
# bytes must not decide how long it takes to build a network.
MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY, MAX_POSITIONS = 128, 1 << 20, 1 << 24, 1 << 16
LAYERS, WIDTH, VOCABULARY, POSITIONS = (
    (1, largest) for largest in (MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY, MAX_POSITIONS)
)
ANY_ID = (0, 2**31 - 1)

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
    """Return the entries of `values` that a config has fields for."""
    known = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in values.items() if name in known}


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


@runtime_checkable
class TextToImageModel(Protocol):
    """A network that turns prompts into image tokens: a Linen module whose methods go through `apply`.

    Generation is `encode_prompt`, `init_cache`, then `decode_step` for steps 0 to L - 1.
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
    """Turns prompts into the ids that a model reads."""

    def encode(self, texts: Sequence[str | None], length: int) -> tuple[np.ndarray, np.ndarray]:
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

    def file_of(self, path: str) -> Path:
        """The file that has, or should have, the parameter of this path ("a/b/kernel")."""
        prefix = max((prefix for prefix in self.file_by_prefix if path.startswith(prefix)), key=len, default=None)
        return self.files[0] if prefix is None else self.file_by_prefix[prefix]


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


# A dense layer that multiplies few rows at the speed of memory, also on a CPU.
#
# Sampling multiplies a few rows by every matrix of a model, once for each token. XLA's product for CPUs rearranges the
# whole matrix first, which takes longer than the product itself. It does not where the matrix is on the left, lies with
# the inputs of an output next to each other, and is cut into parts, which it also computes on one core each.
#
# K: inputs   N: outputs   P: parts

SPLIT = "split_kernel"  # (P, N / P, K), in place of "kernel" (K, N)
_LEAST_ROWS = 64  # of a part


class Dense(nn.Dense):
    """`flax.linen.Dense`, whose kernel may also be one of `split_kernels`.

    Attributes:
        product_dtype: Of the result, if it is not the dtype of the factors.
    """

    product_dtype: Any = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Map (..., K) to (..., N)."""
        kernel: Any
        is_split = self.has_variable("params", SPLIT)
        if is_split:
            kernel = self.get_variable("params", SPLIT)
        else:
            kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        rows: Any  # one product over all rows: on a CPU, XLA computes the gradient of the kernel in 0.6 of the time
        rows, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        rows = rows.reshape(-1, rows.shape[-1])
        if is_split:
            outputs = _split_product(rows, kernel, self.product_dtype)
        else:
            outputs = lax.dot(rows, kernel, preferred_element_type=self.product_dtype)
        outputs = outputs.reshape(*inputs.shape[:-1], self.features)
        return outputs if bias is None else outputs + bias.reshape((1,) * (outputs.ndim - 1) + (-1,))


def _split_product(rows: jax.Array, parts: jax.Array, dtype: Any) -> jax.Array:
    """Multiply rows (M, K) by the matrix in `parts` (P, N / P, K) to (M, N)."""
    shared = jnp.broadcast_to(rows[None], (len(parts), *rows.shape))
    batched = (((2,), (2,)), ((0,), (0,)))
    products = lax.dot_general(parts, shared, batched, preferred_element_type=dtype)  # (P, N / P, M)
    return products.reshape(-1, len(rows)).T


def split_kernels(params: dict) -> dict:
    """Return the parameters of dense layers in the form that few rows are multiplied by on a CPU.

    Args:
        params: Nested dict of NumPy arrays, of networks whose kernels (K, N) are all of `Dense`.

    Returns:
        The same with a view of each such kernel, split into a part or more for each core.
    """
    split = {}
    for name, value in params.items():
        if isinstance(value, dict):
            split[name] = split_kernels(value)
        elif name == "kernel":
            split[SPLIT] = value.T.reshape(_part_count(value.shape[1]), -1, value.shape[0])
        else:
            split[name] = value
    return split


def _part_count(outputs: int) -> int:
    """The least divisor of N that is not below the number of cores, or the largest below it."""
    cores = core_count()
    counts = [count for count in range(1, max(1, outputs // _LEAST_ROWS) + 1) if outputs % count == 0]
    return next((count for count in counts if count >= cores), counts[-1])
