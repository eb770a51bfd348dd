"""What the three trainers share: the optimiser, bfloat16 products, a run of the package, image grids.

N, B: rows of a batch   I, O: input and output width of a kernel   H, W, S: pixels
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from dm_generations.training.optimizers import make_muon, make_schedule
from dm_generations.training.run import Run


def _sharding(spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), spec)


def replicate(tree: Any) -> Any:
    """Copy every array of a tree to every local device."""
    return jax.device_put(tree, _sharding(PartitionSpec()))


def shard_batch(batch: Any) -> Any:
    """Divide the first axis of every array of a tree among the local devices.

    Raises:
        ValueError: The number of devices does not divide the batch size.
    """
    return jax.device_put(batch, _sharding(PartitionSpec("batch")))


def make_optimizer(
    learning_rate: float, steps: int, warmup: int, weight_decay: float = 0.01, adam_share: float = 0.4
) -> optax.GradientTransformation:
    """Make the package's Muon, with gradients clipped to norm 1.

    Args:
        learning_rate: Peak rate of Muon, after a linear warm-up; a cosine takes it to zero.
        steps: Length of the schedule.
        warmup: Steps of the linear warm-up.
        weight_decay: Decay of hidden kernels, multiplied with the learning rate.
        adam_share: Rate of Adam as a share of Muon's.
    """
    muon_rate, adam_rate = (
        make_schedule("cosine", peak, steps, warmup) for peak in (learning_rate, adam_share * learning_rate)
    )
    return optax.chain(optax.clip_by_global_norm(1.0), make_muon(muon_rate, adam_rate, weight_decay))


def has_bfloat16_units() -> bool:
    """Tell whether the first device multiplies bfloat16 matrices faster than float32: accelerators, CPUs with AMX."""
    if jax.default_backend() != "cpu":
        return True
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(errors="replace").split()
    except OSError:
        return False


@jax.custom_vjp
def bfloat16_matmul(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply in bfloat16 and sum in float32, in the gradients too.

    JAX would derive gradients that multiply float32 by bfloat16.

    Args:
        rows: float32 (N, I).
        kernel: float32 (I, O).

    Returns:
        float32 (N, O).
    """
    return _round_and_multiply(rows, kernel, ((1,), (0,)))[0]


def _round_and_multiply(
    left: jax.Array, right: jax.Array, contracted: tuple[tuple[int], tuple[int]]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    rounded = left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)
    return lax.dot_general(*rounded, (contracted, ((), ())), preferred_element_type=jnp.float32), rounded


def _bfloat16_matmul_gradients(
    rounded: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows, kernel = rounded
    return (
        _round_and_multiply(gradient, kernel, ((1,), (1,)))[0],
        _round_and_multiply(rows, gradient, ((0,), (0,)))[0],
    )


bfloat16_matmul.defvjp(lambda rows, kernel: _round_and_multiply(rows, kernel, ((1,), (0,))), _bfloat16_matmul_gradients)


def use_bfloat16_dense(
    call: Callable[..., jax.Array], args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext
) -> jax.Array:
    """Intercept dense layers without bias and multiply them in bfloat16, for `flax.linen.intercept_methods`.

    Weights and activations stay float32, as in Micikevicius et al., "Mixed Precision Training", 2018,
    https://arxiv.org/abs/1710.03740.
    """
    layer = context.module
    if not isinstance(layer, nn.Dense) or layer.use_bias or layer.is_initializing():
        return call(*args, **kwargs)
    (x,) = args
    return bfloat16_matmul(x.reshape(-1, x.shape[-1]), layer.variables["params"]["kernel"]).reshape(*x.shape[:-1], -1)


def to_float32(params: Any) -> Any:
    """Convert weights to float32. In float16, as models are saved, the optimiser's squares would overflow."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)


def open_run(folder: Path, state: Any, save_every: int, args: argparse.Namespace) -> Run:
    """Open a run of the package, with its state on every device. It shows its curve, and resumes with the same flags.

    Args:
        folder: Folder of the run, made if it is missing.
        state: State to start from, a tree of arrays.
        save_every: Steps between saved states.
        args: Flags of the trainer; only numbers and switches count.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int | float)}
    return Run(folder, state, settings, save_every, put=replicate)


def make_grid(images: np.ndarray, columns: int) -> Image.Image:
    """Lay images, uint8 (N, S, S, 3), out in rows of `columns`."""
    size = images.shape[1]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * size, columns * size, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * size, i % columns * size
        sheet[y : y + size, x : x + size] = image
    return Image.fromarray(sheet)
