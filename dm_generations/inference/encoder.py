"""Images to tokens, on a device.

n: images   S: pixels a side of the codec's images   L: tokens of an image, row-major over its grid
"""

import jax
import jax.numpy as jnp
import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.loading import Checkpoint
from dm_generations.runtime.device import matmul_precision, put_params


def check_encoder(codec: Checkpoint) -> None:
    """Raise UserError if a codec has no encoder: min-dalle's `detoker.pt`, for one, has only a decoder."""
    if not codec.params.keys() >= set(codec.network_class.ENCODER_PARTS):
        raise UserError(f"codec {codec.name!r} has no encoder to make tokens of an image; give one with it as --codec")


class Encoder:
    """The encoder of an image codec, in float32. Each number of images is compiled once."""

    def __init__(self, codec: Checkpoint):
        """Put the codec on the device.

        Raises:
            UserError: It has no encoder.
        """
        check_encoder(codec)
        network = codec.network_class(codec.config, jnp.float32)
        self._params = put_params(codec.params)

        def encode(params, pixels):  # (n, S, S, 3) uint8 -> (n, L) uint16
            with matmul_precision(jnp.float32):
                _, tokens = network.apply({"params": params}, pixels.astype(jnp.float32) / 255, method="encode")
            return tokens.astype(jnp.uint16)

        self._encode = jax.jit(encode)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Encode images.

        Args:
            pixels: (n, S, S, 3) uint8, sRGB.

        Returns:
            (n, L) uint16.
        """
        return jax.device_get(self._encode(self._params, jax.device_put(pixels)))
