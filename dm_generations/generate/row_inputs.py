"""What the compiled sampling loops read of a batch of rows."""

from typing import NamedTuple

import jax


class RowInputs(NamedTuple):
    """B rows. T: text tokens."""

    input_ids: jax.Array  # (2B, T) int32, the B prompts, then the B unconditional prompts
    attention_mask: jax.Array  # (2B, T) int32, 1 for text, 0 for padding
    keys: jax.Array  # (B, 2) uint32
    top_k: jax.Array  # (B,) int32
    top_p: jax.Array  # (B,) float32, as the two below
    temperature: jax.Array
    cond_scale: jax.Array
