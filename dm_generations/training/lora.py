"""LoRA: low-rank changes of chosen dense layers (Hu et al., 2021, https://arxiv.org/abs/2106.09685), merged on saving.

I, O: input and output width of a kernel   r: rank
"""

import contextlib
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dm_generations.errors import UserError, short_repr
from dm_generations.models.base import TrainableModel
from dm_generations.weights.native import flatten, unflatten

# Of attention, in all models: DalleBart; minDALL-E; DALLE-pytorch; LlamaGen.
DEFAULT_LAYERS: Final = (
    *(r"\b[qkv]_proj$|\bout_proj$", r"\battn/(query|key|value|proj)$", r"\bto_(qkv|out)$"),
    r"^transformer/.*\battn/(qkv|out)$",
)
_MAX_LISTED: Final = 5

Adapters = dict[str, dict[str, Any]]  # by the layer's path: a (I, r), b (r, O)


def find_layers(model: TrainableModel, params: dict, patterns: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Find the dense layers whose path matches a pattern.

    Args:
        model: The network.
        params: Its parameters.
        patterns: Regular expressions, searched for in paths such as
            "model/decoder/layers/FlaxBartDecoderLayer_0/FlaxBartAttention_0/q_proj".

    Returns:
        The shape (I, O) of their kernels by path.

    Raises:
        UserError: A pattern is broken, or none matches.
    """
    dense = _dense_layers(model, params)
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise UserError(f"--lora-layers: {short_repr(error.pattern)} is no regular expression ({error})") from error
    found = {path: shape for path, shape in dense.items() if any(each.search(path) for each in compiled)}
    if not found:
        some = ", ".join(list(dense)[:_MAX_LISTED])
        raise UserError(f"--lora-layers match none of the {len(dense)} dense layers, such as {some}")
    return found


def _dense_layers(model: Any, params: dict) -> dict[str, tuple[int, int]]:
    paths: list[str] = []

    def note(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if isinstance(context.module, nn.Dense):
            paths.append("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(model.apply, {"params": params}, *model.example_inputs(model.config))
    flat = flatten(params)
    return {path: flat[f"{path}/kernel"].shape for path in dict.fromkeys(paths)}


def make_adapters(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> Adapters:
    """Make adapters that change nothing yet: a is random, b is zero."""
    rng = np.random.default_rng([seed, 2])
    return {
        path: {
            "a": (rng.standard_normal((rows, rank)) / np.sqrt(rows)).astype(np.float32),
            "b": np.zeros((rank, columns), np.float32),
        }
        for path, (rows, columns) in shapes.items()
    }


def use_adapters(adapters: Adapters, scale: float) -> contextlib.AbstractContextManager:
    """Return a context in which the dense layers of `adapters` add x a b, times `scale`, to what they compute."""

    def add(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        out = call(*args, **kwargs)
        if not isinstance(context.module, nn.Dense):
            return out
        adapter = adapters.get("/".join(context.module.path))
        if adapter is None:
            return out
        x = args[0]
        low = jnp.dot(x, adapter["a"].astype(x.dtype))
        return out + (jnp.dot(low, adapter["b"].astype(x.dtype)) * scale).astype(out.dtype)

    return nn.intercept_methods(add)


def merge_adapters(params: dict, adapters: Adapters, scale: float) -> dict:
    """Return parameters on the host with the adapters added to their kernels, which become float32."""
    flat = dict(flatten(params))
    for path, adapter in adapters.items():
        change = np.asarray(adapter["a"], np.float32) @ np.asarray(adapter["b"], np.float32)
        flat[f"{path}/kernel"] = np.asarray(flat[f"{path}/kernel"], np.float32) + scale * change
    return unflatten(flat)
