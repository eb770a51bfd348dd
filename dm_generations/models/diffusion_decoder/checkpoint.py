"""Files of diffusion decoders: the state dict that guided-diffusion's trainer saves, `model*.pt` or `ema_*.pt`.

Sizes follow from names and shapes. How the heads are cut, the order of queries, keys and values, the noise and the size
of images do not: they are those of a known decoder of the same sizes, or lie in a JSON file next to it,
`<name of the file>.json` or `config.json`, under the names of the original's options.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError, short_repr
from dm_generations.models.base import RawCheckpoint, prefix_errors
from dm_generations.models.diffusion_decoder.network import DiffusionDecoderConfig
from dm_generations.weights.native import CONFIG_FILE, FORMAT, read_json_object, unflatten
from dm_generations.weights.state_dict import (
    Shape,
    check_tensors,
    convolution_kernel,
    count_numbered,
    find_state,
    get_tensor,
    join_list_indices,
    torch_name,
)
from dm_generations.weights.torch_file import read_torch

MODEL_FILE = "model-latest.pt"
_SIZES = ("num_channels", "level_channels", "attention_levels", "num_res_blocks", "emb_input_dims", "emb_output_dims")
# Of Jack000's three: the sizes as tensors tell them, and what they do not tell.
_PRESETS: tuple[tuple[tuple, dict[str, Any]], ...] = (
    (
        (256, (256, 256, 512, 512, 1024, 1024), (3, 4, 5), 2, 256, 512),
        {"image_size": 256, "num_head_channels": 64, "noise_schedule": "linear"},
    ),
    (
        (256, (256, 256, 512, 768, 1024), (2, 3, 4), 2, 256, 512),
        {"image_size": 128, "num_heads": 4, "noise_schedule": "linear"},
    ),
    (
        (192, (192, 384, 576, 768), (1, 2, 3), 3, 256, 512),
        {"image_size": 64, "num_head_channels": 64, "noise_schedule": "cosine", "use_new_attention_order": True},
    ),
)
# Options of the JSON file that tensors do not tell, and those that change the network and that no decoder has on.
_OPTIONS = (
    *("image_size", "num_heads", "num_head_channels", "use_new_attention_order"),
    *("noise_schedule", "diffusion_steps", "rescale_timesteps"),
)
_UNSUPPORTED = ("class_cond", "predict_xstart")


def read_guided_diffusion(path: Path) -> RawCheckpoint | None:
    """Read a decoder of guided-diffusion; None for anything else.

    Args:
        path: The file, or a folder with `model-latest.pt`.

    Raises:
        UserError: It is another model of guided-diffusion, or not one whose options are known.
    """
    file = path / MODEL_FILE if path.is_dir() else path
    if file.suffix != ".pt" or not file.is_file():
        return None
    content = read_torch(file)
    if isinstance(content, Mapping) and "param_groups" in content:
        raise UserError(f"{file} is the state of an optimiser: give the model*.pt or ema_*.pt that lies with it")
    state = find_state(content)
    if not isinstance(state, Mapping) or not {"time_embed.0.weight", "input_blocks.0.0.weight"} <= state.keys():
        return None
    tensors = check_tensors(state, file)
    _check_kind(tensors, file)
    with prefix_errors(file):
        sizes = _sizes(tensors, file)
        config = DiffusionDecoderConfig(**sizes, **_options(file, sizes))
    flat = {_path(name, array): _kernel(array) for name, array in tensors.items()}
    return RawCheckpoint("diffusion_decoder", config, unflatten(flat, file), (file,), name_in_file=_name_in_file)


def _check_kind(state: Mapping[str, np.ndarray], file: Path) -> None:
    """Raise UserError for other models of guided-diffusion."""
    in_channels = get_tensor(state, "input_blocks.0.0.weight", 4, file).shape[1]
    if in_channels != 3:
        raise UserError(
            f"{file} reads {in_channels} channels, as super-resolution models do: give a decoder, which reads 3"
        )
    if "external_block.op.weight" not in state:
        raise UserError(f"{file} is a diffusion model that reads no tokens: give one with external_block")
    if "label_emb.weight" in state:
        raise UserError(f"{file} reads classes, which no decoder does")
    if any(name.endswith((".0.op.weight", ".conv.weight")) and "_blocks." in name for name in state):
        raise UserError(f"{file} was trained without resblock_updown, which is not supported")


def _sizes(state: Mapping[str, np.ndarray], file: Path) -> dict[str, Any]:
    """What names and shapes tell of the config."""
    outputs = count_numbered(state, "output_blocks.{}.0.in_layers.2.weight")
    is_upsampling = re.compile(r"output_blocks\.\d+\.[12]\.in_layers\.2\.weight")
    levels = 1 + sum(map(bool, map(is_upsampling.fullmatch, state)))
    blocks = outputs // levels - 1
    if blocks < 1 or outputs % levels:
        raise UserError(f"{outputs} output_blocks do not make {levels} levels: it is cut short, or no decoder")
    firsts = [1 + level * (blocks + 1) for level in range(levels)]
    condition = get_tensor(state, "external_block.op.weight", 4, file)
    first = get_tensor(state, "input_blocks.1.0.emb_layers.1.weight", 2, file)
    channels = tuple(
        get_tensor(state, f"input_blocks.{number}.0.in_layers.2.weight", 4, file).shape[0] for number in firsts
    )
    return {
        "num_channels": get_tensor(state, "time_embed.0.weight", 2, file).shape[1],
        "level_channels": channels,
        "attention_levels": tuple(
            i for i, number in enumerate(firsts) if f"input_blocks.{number}.1.qkv.weight" in state
        ),
        "num_res_blocks": blocks,
        "emb_input_dims": condition.shape[1],
        "emb_output_dims": condition.shape[0],
        "learn_sigma": get_tensor(state, "out.2.weight", 4, file).shape[0] == 6,
        "use_scale_shift_norm": first.shape[0] == 2 * channels[0],
    }


def _options(file: Path, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What names and shapes do not tell: from the JSON file next to it, else from the known decoder of these sizes."""
    known = next((dict(rest) for key, rest in _PRESETS if key == tuple(sizes[name] for name in _SIZES)), None)
    values: dict[str, Any] = {}
    json_files = [file.with_suffix(".json"), file.with_name(CONFIG_FILE)]
    for json_file in filter(Path.is_file, json_files):
        found = read_json_object(json_file)
        found = found.get("model_and_diffusion", found)
        if isinstance(found, dict) and found.get("format") != FORMAT and set(_OPTIONS) & found.keys():
            with prefix_errors(json_file):
                values = _check_options(found, sizes)
            break
    missing = [] if known else [name for name in ("noise_schedule",) if name not in values]
    if not known and values.keys().isdisjoint(("num_heads", "num_head_channels")):
        missing.append("num_heads or num_head_channels")
    if missing:
        raise UserError(
            f"its sizes are those of no known decoder: put {', '.join(missing)} and the other options that it was "
            f"trained with into {json_files[0].name}"
        )
    return (known or {"image_size": 8 << (len(sizes["level_channels"]) - 1)}) | values


def _check_options(values: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    for name in _UNSUPPORTED:
        if values.get(name):
            raise UserError(f"{name} is {short_repr(values[name])}, which is not supported")
    for name in ("num_channels", "num_res_blocks", "emb_input_dims", "emb_output_dims", "learn_sigma"):
        if values.get(name, sizes[name]) != sizes[name]:
            raise UserError(f"{name} is {short_repr(values[name])}, the tensors say {sizes[name]}")
    return {name: values[name] for name in _OPTIONS if name in values}


def _path(name: str, array: np.ndarray) -> str:
    *modules, leaf = join_list_indices(name).split(".")
    if leaf == "weight":
        leaf = "scale" if array.ndim == 1 else "kernel"
    return "/".join([*modules, leaf])


def _kernel(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        return array.T
    return array.transpose(2, 1, 0) if array.ndim == 3 else convolution_kernel(array)


def _name_in_file(path: str, shape: Shape) -> tuple[str, Shape]:
    """Name and shape in the file of a parameter of `UNet`."""
    name, shape = torch_name(path, shape)
    return re.sub(r"_(?=\d)", ".", name), shape


def preset_config(image_size: int) -> DiffusionDecoderConfig:
    """Return the config of the known decoder of 256, 128 or 64 pixels."""
    key, rest = next((key, rest) for key, rest in _PRESETS if rest["image_size"] == image_size)
    return dataclasses.replace(DiffusionDecoderConfig(**dict(zip(_SIZES, key, strict=True)), **rest))
