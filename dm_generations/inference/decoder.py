"""Tokens to images, on the devices.

B: batch, fixed   n: images asked for   L: tokens of an image, row-major over its grid   H, W: pixels of an image
R, C: rows and columns of images on a sheet
"""

import copy
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dm_generations.archive.records import key_words
from dm_generations.errors import UserError
from dm_generations.models.loading import MAX_CODEBOOK_SIZE, Checkpoint, load_checkpoint
from dm_generations.models.registry import get_kind
from dm_generations.runtime import compile_cache
from dm_generations.runtime.device import (
    WEIGHTS_ADVICE,
    BatchRunner,
    Work,
    batch_concurrency,
    free_bytes,
    free_bytes_of_each,
    largest_array_bytes,
    memory_errors,
)

if TYPE_CHECKING:
    from dm_generations.inference.diffusion import Diffusion

_AXIS = "images"
# Pixels of a batch beyond which more are no faster: a CPU is busy with one image, a GPU with some dozens.
_ENOUGH_PIXELS = {"cpu": 1 << 20, "elsewhere": 1 << 24}
_COPIES = 6  # of the largest array: what a convolution reads, adds and writes, and the workspace of its library
_MEMORY_SHARE = 0.5  # of the free memory; the next batch is under way while the last one is fetched


class RowKey(NamedTuple):
    """What a diffusion decoder reads of an image besides its tokens.

    Attributes:
        key0: Of its row, a word of 32 bits.
        key1: The second word.
        decoding: Which of the images that it makes of the row, from 0.
        prompt: For guidance.
    """

    key0: int = 0
    key1: int = 0
    decoding: int = 0
    prompt: str | None = None

    @classmethod
    def of(cls, image: Any) -> "RowKey":
        """Return the key of an image with `key` and `prompt`; what it lacks is left as it is here."""
        return cls(*key_words(*getattr(image, "key", (0, 0))), 0, getattr(image, "prompt", None))


class HasTokens(Protocol):
    """An image as tokens."""

    @property
    def tokens(self) -> np.ndarray:
        """(L,) whole numbers."""


class Decoder:
    """The decoder of an image codec, compiled once, with its batch divided among the local devices.

    Every call has the shape (B, L): short batches are padded. When a device runs out of memory, the batch is halved
    and computed again.

    Attributes:
        grid: Tokens a side of an image.
        token_count: L.
        codebook_size: Tokens are below it.
        image_size: Pixels a side of an image.
        name: Of the codec.
        on_step: Called, by a decoder that takes steps, with how many of a batch are done, and of how many.
    """

    name = "codec"
    on_step: Callable[[int, int], None] | None = None
    _enough_pixels: Mapping[str, int] = _ENOUGH_PIXELS

    def __init__(
        self,
        kind: str,
        config: Any,
        params: dict,
        batch_size: int | Literal["auto"],
        dtype: str = "float32",
        grid: int | None = None,
    ):
        """Put the decoder on the devices.

        Args:
            kind: Of the network, one of the codecs in `models.registry.KINDS`.
            config: Of the network.
            params: As in a checkpoint.
            batch_size: Images at a time, of all devices together; rounded up to as many for each device. "auto" is
                what their memory holds, or less where more would be no faster.
            dtype: Of activations.
            grid: Tokens a side; None is the size that the codec was trained at. The networks are convolutions, with
                attention over all positions, so they decode other grids to images of another size.
        """
        grid = grid or config.grid
        self._set_sizes(grid, config.codebook_size, config.image_size // config.grid * grid)
        decoder = get_kind(kind).make_decoder(config, np.dtype(dtype), self._devices[0].platform)
        with memory_errors(WEIGHTS_ADVICE):
            self._params = decoder.prepare_params(params, self._replicate)

        rounds_pixels = getattr(config, "rounds_pixels", False)  # others are truncated, as the 2022 script did it

        def to_uint8(params, tokens):  # (b, L) or grids (b, h, w), unsigned -> (b, H, W, 3) uint8, of one device
            pixels = decoder.decode(params, tokens.astype(jnp.int32))
            pixels = jnp.clip(pixels, 0.0, 1.0) * jnp.float32(255)
            return (jnp.round(pixels) if rounds_pixels else pixels).astype(jnp.uint8)

        self._set_function(to_uint8)
        self.set_batch_size(self._auto_batch_size() if batch_size == "auto" else batch_size)

    def _set_sizes(self, grid: int, codebook_size: int, image_size: int) -> None:
        """Set what does not depend on the network, and the devices."""
        self.grid, self.token_count = grid, grid**2
        self.codebook_size, self.image_size = codebook_size, image_size
        self._token_dtype = np.uint16 if codebook_size <= MAX_CODEBOOK_SIZE else np.uint32
        # What is decoded as one: the shape of its tokens, its rows and columns of images, and a name.
        self._item_shape: tuple[int, ...] = (self.token_count,)
        self._sheet_shape, self._item_name = (1, 1), "image"
        self._devices = jax.local_devices()
        self._mesh = Mesh(self._devices, (_AXIS,))
        self._shard_batch = NamedSharding(self._mesh, PartitionSpec(_AXIS))
        self._replicate = NamedSharding(self._mesh, PartitionSpec())

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        batch_size: int | Literal["auto"],
        dtype: str = "float32",
        grid: int | None = None,
        diffusion: "Diffusion | None" = None,
    ) -> "Decoder":
        """Make the decoder of a loaded checkpoint.

        Args:
            checkpoint: Of a codec.
            batch_size: See `Decoder`, as for the next two.
            dtype: Of activations.
            grid: Tokens a side.
            diffusion: What decodes in place of the codec's own decoder; it reads the codec's codebook.
        """
        if diffusion is not None:
            from dm_generations.inference.diffusion import DiffusionDecoder

            return DiffusionDecoder(checkpoint, diffusion, batch_size, dtype, grid)
        decoder = cls(checkpoint.kind, checkpoint.config, checkpoint.params, batch_size, dtype, grid)
        decoder.name = checkpoint.name
        return decoder

    @classmethod
    def load(
        cls,
        codec: str | os.PathLike[str] | None = None,
        batch_size: int | Literal["auto"] = 32,
        dtype: str = "float32",
        grid: int | None = None,
        diffusion: "Diffusion | None" = None,
    ) -> "Decoder":
        """Load a codec from a folder, a file or the Hugging Face hub; None is the one that ships.

        >>> Decoder.load()
        <Decoder embedded/vqgan: 8x8 tokens below 4,096 to images of 64 px>

        Args:
            codec: The codec.
            batch_size: See `Decoder`, as for the next two.
            dtype: Of activations.
            grid: Tokens a side.
            diffusion: What decodes in place of the codec's own decoder: `Diffusion.load` of
                `dm_generations.inference.diffusion` reads one.

        Raises:
            UserError: The codec is missing or broken, or memory does not hold it.
        """
        compile_cache.enable()
        return cls.from_checkpoint(load_checkpoint(codec, "codec"), batch_size, dtype, grid, diffusion)

    def __repr__(self) -> str:
        tokens = f"{self.grid}x{self.grid} tokens below {self.codebook_size:,}"
        return f"<Decoder {self.name}: {tokens} to images of {self.image_size} px>"

    def __call__(self, tokens: np.ndarray | Sequence, keys: Sequence[RowKey] | None = None) -> np.ndarray:
        """Decode images.

        >>> Decoder.load()([[7] * 64, [8] * 64]).shape
        (2, 64, 64, 3)

        Args:
            tokens: Whole numbers (n, L), or (L,) of one image.
            keys: What a diffusion decoder reads of each image besides; None is the same for all. Other decoders do not
                read it.

        Returns:
            (n, H, W, 3) uint8.

        Raises:
            UserError: The tokens are not of this shape, or one is outside the codebook; or memory is too small.
        """
        array = np.atleast_2d(np.asarray(tokens))
        if array.shape[1:] != self._item_shape or array.dtype.kind not in "iu":
            raise UserError(
                f"tokens are {array.dtype} {array.shape}; this codec takes whole numbers (n, {self.token_count})"
            )
        if array.size and (array.min() < 0 or array.max() >= self.codebook_size):
            wrong = int(array.min() if array.min() < 0 else array.max())
            raise UserError(f"token {wrong:,} is outside the codec's codebook of {self.codebook_size:,}")
        return self.decode(array.astype(self._token_dtype), keys)

    def decode_batches(self, images: Iterable[HasTokens]) -> Iterator[tuple[list[HasTokens], np.ndarray]]:
        """Decode many images in batches, with the next batch under way while the last one is used.

        >>> from dm_generations import Archive
        >>> decoder = Decoder.load(batch_size=8)
        >>> with Archive.open("archive/emoji.db") as archive:
        ...     for images, pixels in decoder.decode_batches(archive.images(prompt="a rocket", cond_scale=3, best=1)):
        ...         print(len(images), pixels.shape)
        8 (8, 64, 64, 3)
        8 (8, 64, 64, 3)
        2 (2, 64, 64, 3)

        Args:
            images: Anything with `tokens` (L,), and for a diffusion decoder `key` and `prompt`: the images of an
                archive, say, which are read as they are needed.

        Yields:
            Up to `batch_size` of the images, and their pixels (n, H, W, 3) uint8.

        Raises:
            UserError: As a call of this decoder.
        """
        running: tuple[list[HasTokens], Decoding] | None = None
        remaining = iter(images)
        while batch := list(itertools.islice(remaining, self.batch_size)):
            for image in batch:
                if image.tokens.shape != self._item_shape:
                    raise UserError(f"{image!r:.200} has {image.tokens.size:,} tokens, the codec {self.token_count:,}")
            keys = [RowKey.of(image) for image in batch]
            started = batch, self.start(np.stack([image.tokens for image in batch]).astype(self._token_dtype), keys)
            if running is not None:
                yield running[0], running[1].images()
            running = started
        if running is not None:
            yield running[0], running[1].images()

    def tiled(self, rows: int, cols: int) -> "Decoder":
        """Make a decoder for sheets of R x C images, each decoded as one token grid so that there are no seams.

        It takes tokens (n, R * C, L), along the rows of the sheet, and returns (n, R * H, C * W, 3). Weights are
        shared. A batch has about as many images as this decoder's.

        Raises:
            UserError: Memory is too small for a sheet.
        """
        decode_grids, side = self._of_one_device, self.grid

        def to_uint8(params, tokens):
            grids = tokens.reshape(-1, rows, cols, side, side).transpose(0, 1, 3, 2, 4)
            return decode_grids(params, grids.reshape(-1, rows * side, cols * side))

        sheets = copy.copy(self)
        sheets._item_shape, sheets._sheet_shape = (rows * cols, self.token_count), (rows, cols)
        sheets._item_name = f"sheet of {cols} x {rows} images"
        sheets._set_function(to_uint8)
        sheets.set_batch_size(self.batch_size // (rows * cols))
        sheets._check_memory("put fewer images on it")
        return sheets

    @property
    def batch_size(self) -> int:
        """Images (or sheets) of a batch, of all devices together."""
        return self._runner.size

    @property
    def concurrency(self) -> int:
        """Batches that are computed at the same time."""
        return self._runner.concurrency

    def set_batch_size(self, wanted: int) -> None:
        """Decode `wanted` images at a time, rounded up to as many for each device."""
        count = len(self._devices)
        message = (
            f"not enough memory to decode one {self._item_name} at a time; close other programs that use the device, "
            "or use --dtype bfloat16"
        )
        size = max(1, -(-wanted // count)) * count
        self._runner = BatchRunner(size, self._count_concurrent(), message, step=count)

    def _count_concurrent(self) -> int:
        return batch_concurrency(self._devices)

    def compile(self) -> jax.ShapeDtypeStruct:
        """Compile ahead of the first batch, and return the shape of a batch of images, (B, H, W, 3) uint8."""
        return self._to_uint8.lower(self._params, self._batch_shape(self.batch_size)).compile().out_info

    def start(self, tokens: np.ndarray, keys: Sequence[RowKey] | None = None) -> "Decoding":
        """Start decoding; does not wait for the images.

        Args:
            tokens: (n, L) uint16, or uint32 of a codebook of more than 65,536; for any n. Of a tiled decoder
                (n, R * C, L).
            keys: See `__call__`.

        Raises:
            UserError: A token is outside the codebook (the network would make an image of NaN), or memory is too
                small for one image on each device.
        """
        if tokens.size and int(tokens.max()) >= self.codebook_size:
            raise UserError(f"token {int(tokens.max()):,} is outside the codec's codebook of {self.codebook_size:,}")
        keys = [RowKey()] * len(tokens) if keys is None else keys
        arrays = (
            tokens.astype(self._token_dtype, copy=False),
            *self._row_arrays(keys),
        )

        def take(first: int, size: int) -> tuple[list[np.ndarray], int]:
            parts = [array[first : first + size] for array in arrays]
            batch = [np.zeros((size, *part.shape[1:]), part.dtype) for part in parts]  # the device may read it later
            for padded, part in zip(batch, parts, strict=True):
                padded[: len(part)] = part
            return batch, first + len(parts[0])

        rows, cols = self._sheet_shape
        image_shape = rows * self.image_size, cols * self.image_size, 3
        work = Work(len(tokens), take, lambda batch: self.decode_batch(*batch))
        return Decoding(len(tokens), image_shape, self._runner.run(work))

    def _row_arrays(self, keys: Sequence[RowKey]) -> tuple[np.ndarray, ...]:
        """Return what decoding needs of n images besides their tokens, arrays of n rows."""
        return ()

    def decode(self, tokens: np.ndarray, keys: Sequence[RowKey] | None = None) -> np.ndarray:
        """Return images (n, H, W, 3) uint8 of `tokens` (n, L) uint16. Takes and raises as `start`."""
        return self.start(tokens, keys).images()

    def decode_batch(self, tokens: np.ndarray, *row_arrays: np.ndarray) -> jax.Array:
        """Start decoding one whole batch, without a retry when memory runs out; `start` is made of these.

        Args:
            tokens: (B, L) uint16; of a tiled decoder (B, R * C, L).
            row_arrays: What else a decoder reads of each row: that of a codec, nothing.

        Returns:
            Images (B, H, W, 3) uint8 on the devices, which may not be computed yet.
        """
        return self._to_uint8(self._params, jax.device_put(tokens, self._shard_batch))

    def _batch_shape(self, batch_size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *self._item_shape), self._token_dtype, sharding=self._shard_batch)

    def _set_function(self, to_uint8: Callable) -> None:
        """Take (params, tokens of a batch) -> images, of one device, as what this decoder computes."""
        self._of_one_device = to_uint8
        self._to_uint8 = self._compiled(to_uint8, (False, True))

    def _compiled(self, function: Callable, is_sharded: Sequence[bool]) -> Any:
        """Compile a function of one device for all devices, by which of its arguments are divided among them."""
        if len(self._devices) > 1:
            specs = tuple(PartitionSpec(_AXIS) if flag else PartitionSpec() for flag in is_sharded)
            function = jax.shard_map(function, mesh=self._mesh, in_specs=specs, out_specs=PartitionSpec(_AXIS))
        return jax.jit(function)

    def _auto_batch_size(self) -> int:
        """Return a power of two for each device: enough to keep it busy, or less if memory is too small for that."""
        platform = self._devices[0].platform
        enough = self._enough_pixels.get(platform, self._enough_pixels["elsewhere"]) // self.image_size**2
        size = 1 << max(enough, 1).bit_length() - 1
        free = free_bytes_of_each(self._devices)
        while size > 1 and self._largest_bytes(size * len(self._devices)) * _COPIES > free * _MEMORY_SHARE:
            size //= 2
        return size * len(self._devices)

    def _check_memory(self, advice: str) -> None:
        """Raise UserError, with some advice, where decoding one item takes more memory than is free.

        For what grows faster than its pixels: the attention of a sheet holds a number for each pair of its tokens. A
        CPU that is asked for too much may grant it, and end the program later.
        """
        items = self.batch_size // len(self._devices)
        needed = 2 * self._largest_bytes(self.batch_size) / items  # what the largest step reads and writes
        free = free_bytes(self._devices[0])
        if needed > free:
            raise UserError(
                f"one {self._item_name} takes {needed / 1e9:,.1f} GB to decode, and {free / 1e9:,.1f} GB are free; "
                f"{advice}"
            )

    def _largest_bytes(self, batch_size: int) -> int:
        """Return the bytes of the largest array on a device while a batch is decoded.

        JAX traces the program for it, and reuses that for the first batch.
        """
        return largest_array_bytes(self._to_uint8.trace(self._params, self._batch_shape(batch_size)).jaxpr.jaxpr)


class Decoding:
    """Images that are being decoded."""

    def __init__(self, count: int, image_shape: tuple[int, int, int], batches: Iterator[jax.Array]):
        """Take batches that are being computed.

        Args:
            count: n.
            image_shape: (H, W, 3).
            batches: Images (B, H, W, 3), the last one padded.
        """
        self._count, self._image_shape, self._batches = count, image_shape, batches

    def __len__(self) -> int:
        """Return n."""
        return self._count

    def images(self) -> np.ndarray:
        """Wait for the images, once: (n, H, W, 3) uint8."""
        parts = [jax.device_get(images)[:count] for images, count in self.on_device()]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, *self._image_shape), np.uint8), *parts])

    def on_device(self) -> Iterator[tuple[jax.Array, int]]:
        """Wait for the images, once: batches (B, H, W, 3) uint8 where they are, and how many images each holds."""
        left = self._count
        for images in self._batches:
            count = min(left, len(images))
            left -= count
            yield images, count
