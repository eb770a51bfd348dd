"""A dense layer that multiplies few rows at the speed of memory, also on a CPU.

Sampling multiplies a few rows by every matrix of a model, once for each token. XLA's product for CPUs rearranges the
whole matrix first, which takes longer than the product itself. It does not where the matrix is on the left, lies with
the inputs of an output next to each other, and is cut into parts, which it also computes on one core each.

K: inputs   N: outputs   P: parts
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dm_generations.runtime.device import core_count

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
        is_split = self.has_variable("params", SPLIT)
        kernel: Any
        if is_split:
            kernel = self.get_variable("params", SPLIT)
        else:
            kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        promoted: Any = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        inputs, kernel, bias = promoted
        # One matrix product over all rows: on a CPU, XLA computes the gradient of the kernel in 0.6 of the time.
        rows = inputs.reshape(-1, inputs.shape[-1])
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
