"""Checkpoints of Open-MAGVIT2's tokenizers: a `.ckpt` of Lightning, and the `.yaml` of its command line.

The moving averages of the weights are used where `use_ema` is on, as the original does. Losses are skipped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError, short_repr
from dm_generations.models.base import RawCheckpoint, prefix_errors
from dm_generations.models.open_magvit2.network import OpenMagvit2Config
from dm_generations.models.vqgan.checkpoint import read_lightning
from dm_generations.weights.native import unflatten
from dm_generations.weights.state_dict import (
    NameInFile,
    Shape,
    check_tensors,
    choose_averages,
    convolution_kernel,
    join_list_indices,
    split_list_indices,
    torch_name,
)

_PARTS = ("encoder.", "decoder.")


def read_tokenizer(path: Path) -> RawCheckpoint | None:
    """Read a tokenizer of Open-MAGVIT2; `path` as `read_taming` takes it, None for anything else."""
    found = read_lightning(path, _is_tokenizer)
    if found is None:
        return None
    state = {name: value for name, value in found.state.items() if str(name).startswith((*_PARTS, "model_ema."))}
    name_in_file: NameInFile = _name_in_file
    if found.values.get("use_ema"):
        state, name_in_file = choose_averages(state, found.file, _name_in_file)
    state = {name: value for name, value in state.items() if name.startswith(_PARTS)}
    with prefix_errors(found.yaml):
        config = _config_from_values(found.values)
    params = unflatten(_params(state, found.file), found.file)
    return RawCheckpoint("open_magvit2", config, params, (found.file,), name_in_file=name_in_file)


def _is_tokenizer(state: Mapping[str, Any]) -> bool:
    return "decoder.adaptive.0.gamma.weight" in state


def _config_from_values(values: Mapping[str, Any]) -> OpenMagvit2Config:
    """Return the config in `init_args` of the YAML.

    Raises:
        UserError: A value is missing or bad, or an option is not supported.
    """
    sizes = values["ddconfig"]
    if not isinstance(sizes, Mapping):
        raise UserError(f"Open-MAGVIT2 config: ddconfig must hold names and values, not {short_repr(sizes)}")
    needed = [name for name in ("ch", "ch_mult", "num_res_blocks", "resolution", "z_channels") if name not in sizes]
    if needed:
        raise UserError(f"Open-MAGVIT2 config: {needed[0]} is missing")
    if sizes.get("double_z"):
        raise UserError(f"Open-MAGVIT2 config: double_z {short_repr(sizes['double_z'])} is not supported, only false")
    config = OpenMagvit2Config.from_dict(dict(sizes))
    expected = {"n_embed": config.codebook_size, "embed_dim": config.z_channels}
    for name, value in expected.items():
        if values.get(name, value) != value:
            raise UserError(
                f"Open-MAGVIT2 config: {name} is {short_repr(values[name])}, z_channels {config.z_channels} asks for "
                f"{value}"
            )
    return config


def _params(state: Mapping[str, Any], file: Path) -> dict[str, np.ndarray]:
    flat = {}
    for name, array in check_tensors(state, file).items():
        *modules, leaf = join_list_indices(name).split(".")
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
        flat["/".join([*modules, leaf])] = array.T if array.ndim == 2 else convolution_kernel(array)
    return flat


def _name_in_file(path: str, shape: Shape) -> tuple[str, Shape]:
    return torch_name(split_list_indices(path), shape)
