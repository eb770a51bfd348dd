"""State dicts under PyTorch's names, made from our own parameter trees: what the readers of checkpoints must undo."""

import functools
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch_files

from dm_generations.models.registry import get_kind, parameter_shapes
from dm_generations.weights.native import flatten


def random_params(kind: str, config, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights by path, of a size that keeps activations near 1; biases and scales are not 0 and 1."""
    rng = np.random.default_rng(seed)
    flat = {}
    for name, shape in parameter_shapes(kind, config).items():
        scale = np.prod(shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.1 if name.endswith("bias") else 1
        flat[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
    return flat


def taming_state(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """VQGAN parameters by path as taming-transformers names and lays them out."""
    state = {}
    for name, array in flat.items():
        name = re.sub(r"/(down|up)_(\d+)/", r".\1.\2.", name)
        name = re.sub(r"(\.\d+\.)(block|attn)_(\d+)", r"\1\2.\3", name).replace("/", ".")
        name = re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)
        state[name] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
    return state


def saved(path: Path, state: dict[str, np.ndarray]) -> Path:
    """A state dict as torch.save writes it; returns `path`."""
    return torch_files.save(path, {name: torch_files.tensor(array) for name, array in state.items()})


def assert_same(tree: dict, flat: dict[str, np.ndarray]) -> None:
    """The nested `tree` holds exactly the arrays of `flat`, and none of its own."""
    found = flatten(tree)
    assert found.keys() == flat.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, flat[name], err_msg=name)
        assert not array.flags.owndata and not array.flags.writeable, f"{name} was copied"


def applied(source, method: str | Callable, *inputs: np.ndarray, dtype: str = "float32"):
    """What `method` of a loaded network gives, or a function of the network and the inputs."""
    params = jax.tree.map(lambda array: np.asarray(array, np.float32), source.params)
    return compiled(get_kind(source.kind).network_class(source.config, dtype), method)(params, *inputs)


@functools.cache
def compiled(network: Any, method: str | Callable) -> Callable:
    """A method of a network as a compiled function of the parameters and the inputs."""
    return jax.jit(lambda params, *inputs: network.apply({"params": params}, *inputs, method=method))


def is_mapped(array: Any) -> bool:
    """Whether an array is a view of a mapped file."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def nhwc(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 3, 1)


def assert_close(found, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """Within `tolerance`, relative to the largest expected value."""
    error = np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.2e}"
