"""The codec's decoder on the device: a batch of tokens to pictures.

B: batch, fixed   n: pictures asked for, at most B   L: tokens of a picture, row-major over its grid
H, W: pixels of a picture
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.networks import network_class
from dm_generations.models.placement import computable, placed


class Codec:
    """One compiled decoder. Every call has the shape (B, L): short batches are padded, to compile once."""

    def __init__(
        self, kind: str, config: Any, params: dict, batch_size: int, dtype: str = "float32", grid: int | None = None
    ):
        """`kind`: of the network, a codec of `networks.ROLES`   `params`: as in a checkpoint, `dtype`: of activations

        grid: codes a side; None is the size that the codec was made for. The networks are convolutions all over, and
        attention over whatever there is, so that they decode other grids to pictures of another size.
        """
        self.batch_size = batch_size
        self.grid = grid or config.grid
        self.token_count = self.grid**2
        self.codebook_size = config.codebook_size
        self.image_size = config.image_size // config.grid * self.grid
        network = network_class(kind)
        model = network(config, jnp.dtype(dtype))

        def to_uint8(params, tokens):  # (B, L) uint16 -> (B, H, W, 3) uint8
            variables = {"params": computable(params)}
            pixels = model.apply(variables, tokens.astype(jnp.int32), method="decode_code")
            # Truncated, not rounded: what the 2022 script wrote.
            return (jnp.clip(pixels, 0.0, 1.0) * jnp.float32(255)).astype(jnp.uint8)

        self._params = placed({name: params[name] for name in network.DECODER_PARTS})
        self._to_uint8 = jax.jit(to_uint8)

    @classmethod
    def from_checkpoint(cls, checkpoint, batch_size: int, dtype: str = "float32", grid: int | None = None) -> "Codec":
        """The codec of a loaded checkpoint."""
        return cls(checkpoint.kind, checkpoint.config, checkpoint.params, batch_size, dtype, grid)

    def start(self, tokens: np.ndarray) -> jax.Array:
        """Begin decoding `tokens` (n, L) uint16; returns (B, H, W, 3) uint8 on the device, not waited for.

        The first n pictures are those asked for. Raises UserError for codes outside the codebook, of which
        the network would make pictures of NaN.
        """
        if tokens.size and int(tokens.max()) >= self.codebook_size:
            raise UserError(f"code {int(tokens.max()):,} is outside the codec's codebook of {self.codebook_size:,}")
        padded = np.zeros((self.batch_size, self.token_count), np.uint16)  # new: the device may read it later
        padded[: len(tokens)] = tokens
        return self._to_uint8(self._params, jax.device_put(padded))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Pictures (n, H, W, 3) uint8 of `tokens` (n, L) uint16, n at most B."""
        return jax.device_get(self.start(tokens))[: len(tokens)]
