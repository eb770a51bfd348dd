"""Aesthetic head: dense layers from a CLIP image vector of length 1 to one number.

LAION's `sa_0_4_vit_*_linear.pth` has one layer. The heads of improved-aesthetic-predictor have five, with dropout in
between, which only training uses; one kind has ReLUs in between too.

B: batch   P: width of CLIP's vectors
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from dm_generations.errors import UserError, short_repr
from dm_generations.models.base import MAX_LAYERS, WIDTH, check_config, select_fields


@dataclass(frozen=True)
class AestheticConfig:
    """What the layers are.

    Attributes:
        widths: What the first layer reads, then what each gives, at last 1.
        has_relu: Whether there is a ReLU between two layers.
    """

    widths: tuple[int, ...] = (512, 1)
    has_relu: bool = False

    def __post_init__(self) -> None:
        """Raise UserError for a value that no head can have."""
        check_config("aesthetic head", self, {"widths": WIDTH})
        if not 2 <= len(self.widths) <= MAX_LAYERS or self.widths[-1] != 1:
            raise UserError(f"aesthetic head config: widths must end at 1, unlike {short_repr(list(self.widths))}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AestheticConfig":
        """Return the config of a `config.json`."""
        return cls(**select_fields(cls, values))


class AestheticHead(nn.Module):
    """The layers, `layers_0` and so on."""

    config: AestheticConfig
    dtype: Any = None

    @staticmethod
    def example_inputs(config: AestheticConfig) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""
        return [jax.ShapeDtypeStruct((1, config.widths[0]), "float32")]

    @nn.compact
    def __call__(self, vectors: jax.Array) -> jax.Array:
        """Return scores (B,) of vectors (B, P) of length 1."""
        x = vectors
        for number, width in enumerate(self.config.widths[1:]):
            if number and self.config.has_relu:
                x = nn.relu(x)
            x = nn.Dense(width, dtype=self.dtype, name=f"layers_{number}")(x)
        return x[:, 0]
