"""The codec's decoder on the devices: batches of tokens to pictures.

B: batch, fixed   n: pictures asked for   L: tokens of a picture, row-major over its grid   H, W: pixels of a picture
R, C: rows and columns of pictures on a sheet
"""

import copy
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dm_generations.beside import Beside, count_at_once
from dm_generations.decode.memory import check_fits, fitting_batch_size, is_out_of_memory, largest_bytes
from dm_generations.errors import UserError
from dm_generations.models.registry import get_kind
from dm_generations.programs import Kept, remembered

_AXIS = "pictures"


class Codec:
    """One compiled decoder, its batch divided among the local devices.

    Every call has the shape (B, L): short batches are padded, to compile once. Where a batch does not fit into the
    memory of a device, B is halved and the batch decoded in parts.
    """

    def __init__(
        self,
        kind: str,
        config: Any,
        params: dict,
        batch_size: int | Literal["auto"],
        dtype: str = "float32",
        grid: int | None = None,
    ):
        """kind: of the network, a codec in `registry.KINDS`   params: as in a checkpoint   dtype: of activations

        batch_size: pictures at a time, of all devices together; rounded up to as many for each device. "auto" is what
        their memory holds, or less where more would be no faster.
        grid: codes a side; None is the size that the codec was made for. The networks are convolutions all over, and
        attention over whatever there is, so that they decode other grids to pictures of another size.
        """
        self.grid = grid or config.grid
        self.token_count = self.grid**2
        self.codebook_size = config.codebook_size
        self.image_size = config.image_size // config.grid * self.grid
        # What is decoded as one: the shape of its tokens, its rows and columns of pictures, and a name.
        self._item, self._sheet, self._what = (self.token_count,), (1, 1), "picture"
        self._devices = jax.local_devices()
        self._mesh = mesh = Mesh(self._devices, (_AXIS,))
        self._rows = NamedSharding(mesh, PartitionSpec(_AXIS))
        self._network = kind, config, dtype
        decoder = get_kind(kind).make_decoder(config, np.dtype(dtype), self._devices[0].platform)
        self._params = decoder.prepare_params(params, NamedSharding(mesh, PartitionSpec()))

        def to_uint8(params, tokens):  # (b, L) or grids (b, h, w), uint16 -> (b, H, W, 3) uint8, of one device
            pixels = decoder.decode(params, tokens.astype(jnp.int32))
            # Truncated, not rounded: what the 2022 script wrote.
            return (jnp.clip(pixels, 0.0, 1.0) * jnp.float32(255)).astype(jnp.uint8)

        if batch_size == "auto":
            largest = self._largest_bytes(to_uint8)
            batch_size = len(self._devices) * fitting_batch_size(largest, self.image_size, self._devices)
        self._compile(to_uint8, batch_size)

    @classmethod
    def from_checkpoint(
        cls, checkpoint, batch_size: int | Literal["auto"], dtype: str = "float32", grid: int | None = None
    ) -> "Codec":
        """The codec of a loaded checkpoint."""
        return cls(checkpoint.kind, checkpoint.config, checkpoint.params, batch_size, dtype, grid)

    def tiled(self, rows: int, cols: int) -> "Codec":
        """This codec for sheets of R x C pictures that are decoded as one token grid, so that there are no seams.

        It takes tokens (n, R * C, L), along the rows of the sheet, and gives (n, R * H, C * W, 3). Weights are shared;
        a batch is of as many sheets as come near this codec's pictures. UserError for a sheet that memory cannot hold.
        """
        of_grids, side = self._of_one_device, self.grid

        def to_uint8(params, tokens):
            grids = tokens.reshape(-1, rows, cols, side, side).transpose(0, 1, 3, 2, 4)
            return of_grids(params, grids.reshape(-1, rows * side, cols * side))

        sheets = copy.copy(self)
        sheets._item, sheets._sheet = (rows * cols, self.token_count), (rows, cols)
        sheets._what = f"sheet of {cols} x {rows} pictures"
        check_fits(sheets._largest_bytes(to_uint8), self._devices[0], sheets._what)
        sheets._compile(to_uint8, max(1, self.batch_size // (rows * cols)))
        return sheets

    def _largest_bytes(self, to_uint8: Callable) -> int:
        """Of decoding one item; see `memory.largest_bytes`."""
        return remembered(
            lambda: largest_bytes(partial(to_uint8, self._params), self._item),
            *("largest array", self._network, self._item, self._sheet),
        )

    def _compile(self, to_uint8: Callable, batch_size: int) -> None:
        """to_uint8: (params, tokens of a batch) to pictures, of one device   batch_size: of all, to be rounded up"""
        self._of_one_device = to_uint8
        self.batch_size = -(-batch_size // len(self._devices)) * len(self._devices)
        function = _on_each_device(to_uint8, self._mesh) if len(self._devices) > 1 else to_uint8
        self._to_uint8 = Kept(jax.jit(function), closed_over=(self._network, self.grid, self._sheet))
        self._compiled: set[int] = set()  # sizes of batches
        self.at_once = count_at_once(self._devices)  # batches
        self._slots = threading.Semaphore(self.at_once) if self.at_once > 1 else None

    def start(self, tokens: np.ndarray) -> "Decoding":
        """Begin decoding `tokens` (n, L) uint16, for any n; does not wait for the pictures.

        Raises UserError for codes outside the codebook, of which the network would make pictures of NaN, and when
        not even one picture for each device fits into memory.
        """
        if tokens.size and int(tokens.max()) >= self.codebook_size:
            raise UserError(f"code {int(tokens.max()):,} is outside the codec's codebook of {self.codebook_size:,}")
        return Decoding(self, tokens)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Pictures (n, H, W, 3) uint8 of `tokens` (n, L) uint16. Raises as `start`."""
        return self.start(tokens).pictures()

    def _start_batch(self, tokens: np.ndarray, batch_size: int) -> Callable[[], jax.Array]:
        """What waits for the pictures (B, H, W, 3), and raises what went wrong."""
        padded = np.zeros((batch_size, *self._item), np.uint16)  # new: the device may read it later
        padded[: len(tokens)] = tokens
        run = partial(self._to_uint8, self._params, jax.device_put(padded, self._rows))
        if self._slots is not None and batch_size in self._compiled:
            return Beside(lambda: jax.block_until_ready(run()), self._slots).result
        self._compiled.add(batch_size)
        return partial(jax.block_until_ready, run())

    def _halve(self, batch_size: int, error: Exception) -> None:
        """After a batch of this size did not fit."""
        if batch_size <= len(self._devices):
            raise UserError(
                f"not enough memory to decode one {self._what} at a time; end what else uses the device, "
                "or give --dtype bfloat16"
            ) from error
        halved = -(-batch_size // 2 // len(self._devices)) * len(self._devices)
        self.batch_size = min(self.batch_size, halved)


class Decoding:
    """Pictures on their way from a codec; keeps the tokens until they are there."""

    def __init__(self, codec: Codec, tokens: np.ndarray):
        self._codec = codec
        self._count = len(tokens)
        self._parts: list[tuple[np.ndarray, int, Callable]] = []  # tokens (at most B, L), B, what waits for pictures
        self._start(tokens)

    def __len__(self) -> int:
        """n"""
        return self._count

    def pictures(self) -> np.ndarray:
        """Wait for them, once: (n, H, W, 3) uint8."""
        found = [jax.device_get(pictures)[:count] for pictures, count in self.on_device()]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def on_device(self) -> Iterator[tuple[jax.Array, int]]:
        """Wait for them, once: batches (B, H, W, 3) uint8 where they are, and how many pictures each holds."""
        while self._parts:
            tokens, batch_size, wait = self._parts.pop(0)
            try:
                pictures = wait()
            except jax.errors.JaxRuntimeError as error:  # of a computation that began without an error
                if not is_out_of_memory(error):
                    raise
                self._codec._halve(batch_size, error)
                del wait
                yield from self._codec.start(tokens).on_device()
            else:
                yield pictures, len(tokens)

    def _start(self, tokens: np.ndarray) -> None:
        first = 0
        while first < len(tokens) or not self._parts:
            size = self._codec.batch_size
            part = tokens[first : first + size]
            try:
                self._parts.append((part, size, self._codec._start_batch(part, size)))
                first += size
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._codec._halve(size, error)


def _on_each_device(function: Callable, mesh: Mesh) -> Callable:
    """`function` of parameters, on all devices, and rows, divided among them."""
    specs = {"in_specs": (PartitionSpec(), PartitionSpec(_AXIS)), "out_specs": PartitionSpec(_AXIS)}
    return jax.shard_map(function, mesh=mesh, **specs)
