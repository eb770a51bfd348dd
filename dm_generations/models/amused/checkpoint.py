"""Checkpoints of aMUSEd in the folders of diffusers, and of the `VQModel` that decodes its tokens.

A folder has `transformer/`, `text_encoder/`, `scheduler/`, `tokenizer/` and `vqvae/`, each with a JSON file, and
weights as safetensors, some with `.fp16.` in their name, or of PyTorch. The codec is also read from a `vqvae` folder
alone.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError, short_repr
from dm_generations.models.amused.config import MASKING_SCHEDULES, MICRO_CONDITIONS, AmusedConfig
from dm_generations.models.amused.tokenizer import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from dm_generations.models.base import RawCheckpoint, prefix_errors
from dm_generations.models.clip.checkpoint import flax_from_torch, read_tensors
from dm_generations.models.vqgan.network import VQGANConfig
from dm_generations.weights.native import CONFIG_FILE, read_config, read_json_object, unflatten
from dm_generations.weights.state_dict import (
    Shape,
    convolution_kernel,
    join_list_indices,
    split_list_indices,
    torch_name,
)

INDEX_FILE = "model_index.json"
TRANSFORMER, TEXT_ENCODER, SCHEDULER = "transformer", "text_encoder", "scheduler"
TOKENIZER, VQVAE = "tokenizer", "vqvae"
SCHEDULER_FILE = "scheduler_config.json"
_WEIGHT_FILES = ("{}.safetensors", "{}.fp16.safetensors")
_DIFFUSERS_FILES = (*(name.format("diffusion_pytorch_model") for name in _WEIGHT_FILES), "diffusion_pytorch_model.bin")
_TRANSFORMERS_FILES = (*(name.format("model") for name in _WEIGHT_FILES), "pytorch_model.bin")
_LISTS = re.compile(r"\b(res_blocks|attention_blocks|transformer_layers|to_out|net)_(\d+)/")
_SCHEDULER_FIELDS = {"mask_token_id", "masking_schedule"}
_DEFAULT_SAMPLE_SIZE = 32  # of diffusers' VQModel, in pixels

# Paths of `VQGAN`, and names of diffusers' `VQModel` with list indices joined to names; the first that fits counts.
_CODEC_NAMES = (
    ("/mid/block_1/", "/mid_block/resnets_0/"),
    ("/mid/block_2/", "/mid_block/resnets_1/"),
    ("/mid/attn_1/norm/", "/mid_block/attentions_0/group_norm/"),
    ("/mid/attn_1/proj_out/", "/mid_block/attentions_0/to_out_0/"),
    *((f"/mid/attn_1/{name}/", f"/mid_block/attentions_0/to_{name}/") for name in "qkv"),
    ("/downsample/", "/downsamplers_0/"),
    ("/upsample/", "/upsamplers_0/"),
    ("/down_", "/down_blocks_"),
    ("/up_", "/up_blocks_"),
    ("/block_", "/resnets_"),
    ("/nin_shortcut/", "/conv_shortcut/"),
    ("/norm_out/", "/conv_norm_out/"),
)


def read_generator(path: Path) -> RawCheckpoint | None:
    """Read an aMUSEd of diffusers; None for anything else."""
    if not path.is_dir():
        return None
    if _class_of(path / CONFIG_FILE) == "UVit2DModel":
        raise UserError(f"{path} is only the transformer of an aMUSEd: give the folder that it lies in")
    is_amused = str(_class_of(path / INDEX_FILE)).startswith("Amused")
    if not is_amused and _class_of(path / TRANSFORMER / CONFIG_FILE) != "UVit2DModel":
        return None
    config = _read_generator_config(path)
    files = {
        part: _find_weights(path / part, names)
        for part, names in ((TRANSFORMER, _DIFFUSERS_FILES), (TEXT_ENCODER, _TRANSFORMERS_FILES))
    }
    params = {
        TRANSFORMER: _transformer_params(read_tensors(files[TRANSFORMER]), files[TRANSFORMER]),
        TEXT_ENCODER: flax_from_torch(read_tensors(files[TEXT_ENCODER])),
    }
    tokenizer = path / TOKENIZER if (path / TOKENIZER).is_dir() else None
    prefixes = {f"{part}/": file for part, file in files.items()}
    return RawCheckpoint(
        "amused", config, params, tuple(files.values()), tokenizer, "amused", prefixes, _generator_name_in_file
    )


def read_codec(path: Path) -> RawCheckpoint | None:
    """Read a `VQModel` of diffusers: its folder, or the one of an aMUSEd; None for anything else."""
    folder = next((each for each in (path, path / VQVAE) if _class_of(each / CONFIG_FILE) == "VQModel"), None)
    if folder is None:
        return None
    values = read_json_object(folder / CONFIG_FILE)
    with prefix_errors(folder / CONFIG_FILE):
        config = _codec_config(values, _find_grid(folder))
    file = _find_weights(folder, _DIFFUSERS_FILES)
    levels = len(config.ch_mult)
    flat = {}
    for name, array in read_tensors(file).items():
        codec_path, array = _codec_parameter(name, array, levels)
        flat[codec_path] = array

    def name_in_file(parameter: str, shape: Shape) -> tuple[str, Shape]:
        name = _codec_name(parameter, levels)
        is_dense = "/attentions_0/to_" in name and name.endswith("/kernel")
        return torch_name(split_list_indices(name), shape[2:] if is_dense else shape)

    return RawCheckpoint("vqgan", config, unflatten(flat, file), (file,), name_in_file=name_in_file)


def _class_of(file: Path) -> Any:
    """What a JSON file of diffusers says it is the configuration of; None if there is no such file."""
    return read_json_object(file).get("_class_name") if file.is_file() else None


def _read_part(folder: Path, name: str = CONFIG_FILE, class_name: str | None = None) -> dict[str, Any]:
    """The JSON file of a part of the model. Raises UserError if it is missing, or of another class."""
    file = folder / name
    if not file.is_file():
        raise UserError(f"{file} is missing: an aMUSEd is all folders of its download")
    values = read_json_object(file)
    if class_name is not None and values.get("_class_name") != class_name:
        raise UserError(f"{file}: _class_name is {short_repr(values.get('_class_name'))}, only {class_name!r} is read")
    return values


def _find_weights(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} lacks its weights: {names[0]}; download the whole folder")


def _refuse_options(values: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Raise UserError for an option that has another value than the one that is supported."""
    for name, value in supported.items():
        if values.get(name, value) != value:
            raise UserError(f"{name} is {short_repr(values[name])}, only {value!r} is supported")


# The generator.


def _read_generator_config(folder: Path) -> AmusedConfig:
    file = folder / TRANSFORMER / CONFIG_FILE
    values = _read_part(folder / TRANSFORMER, class_name="UVit2DModel")
    text = _read_part(folder / TEXT_ENCODER)
    scheduler = _read_scheduler(folder / SCHEDULER)
    codec = _read_part(folder / VQVAE, class_name="VQModel")
    with prefix_errors(folder / VQVAE / CONFIG_FILE):
        scale = 2 ** (len(_block_channels(codec)) - 1)
    with prefix_errors(file):
        options = {"use_bias": False, "ln_elementwise_affine": True, "upsample": values.get("downsample", False)}
        _refuse_options(values, options)
        encode_dim = values.get("micro_cond_encode_dim", AmusedConfig.micro_cond_encode_dim)
        if isinstance(encode_dim, int):
            _refuse_options(values, {"micro_cond_embed_dim": MICRO_CONDITIONS * encode_dim})
        size = values.get("sample_size")
        image_size = scale * size if isinstance(size, int) else None
        sizes = {"text_config": text, "text_length": _text_length(folder / TOKENIZER, text), "image_size": image_size}
        config = AmusedConfig.from_dict(values | scheduler | sizes)
        expected = {"encoder_hidden_size": config.text_config.hidden_size}
        expected["cond_embed_dim"] = text.get("projection_dim", config.cond_embed_dim)
        for name, value in expected.items():
            if values.get(name, value) != value:
                raise UserError(
                    f"{name} is {short_repr(values[name])}, the text encoder of this folder gives {value!r}: take "
                    "the one of the same model"
                )
    return config


def _read_scheduler(folder: Path) -> dict[str, Any]:
    """`mask_token_id` and `masking_schedule` of the scheduler. Raises UserError for fields that change more."""
    values = _read_part(folder, SCHEDULER_FILE, "AmusedScheduler")
    own = {name: value for name, value in values.items() if not name.startswith("_")}
    file, advice = folder / SCHEDULER_FILE, "take the scheduler of the same model"
    if unknown := sorted(own.keys() - _SCHEDULER_FIELDS):
        raise UserError(f"{file} has the field {unknown[0]!r:.60}, which is not known: {advice}")
    if "mask_token_id" not in own:
        raise UserError(f"{file} lacks mask_token_id: {advice}")
    schedule = own.setdefault("masking_schedule", MASKING_SCHEDULES[0])
    if schedule not in MASKING_SCHEDULES:
        known = " and ".join(map(repr, MASKING_SCHEDULES))
        raise UserError(f"{file}: masking_schedule is {short_repr(schedule)}, only {known} are known: {advice}")
    return own


def _text_length(folder: Path, text: Mapping[str, Any]) -> Any:
    """How many tokens a prompt is padded to: what its tokenizer says, but not more than the text encoder reads."""
    longest = text.get("max_position_embeddings", 77)
    file = folder / TOKENIZER_CONFIG_FILE
    found = read_json_object(file).get("model_max_length") if file.is_file() else None
    return min(found, longest) if isinstance(found, int) and isinstance(longest, int) else longest


def _transformer_params(tensors: Mapping[str, np.ndarray], file: Path) -> dict:
    flat = {}
    for name, array in tensors.items():
        *modules, leaf = join_list_indices(name).split(".")
        if leaf == "weight":
            is_table = modules[-1:] == ["embeddings"]
            leaf = "scale" if array.ndim == 1 else "embedding" if is_table else "kernel"
            array = array.T if array.ndim == 2 and not is_table else convolution_kernel(array)
        flat["/".join([*modules, leaf])] = array
    return unflatten(flat, file)


def _generator_name_in_file(path: str, shape: Shape) -> tuple[str, Shape]:
    part, _, name = path.partition("/")
    return torch_name(_LISTS.sub(r"\1/\2/", name) if part == TRANSFORMER else name, shape)


# The codec.


def _block_channels(values: Mapping[str, Any]) -> list[int]:
    channels = values.get("block_out_channels")
    if not isinstance(channels, list) or not channels or not all(type(each) is int and each > 0 for each in channels):
        raise UserError(f"block_out_channels is {short_repr(channels)}, not a list of whole numbers above 0")
    return channels


def _find_grid(folder: Path) -> Any:
    """Tokens a side that the model with this codec makes; None for a codec alone, or one without its model."""
    values = read_config(folder.parent / TRANSFORMER)
    return None if values is None or values.get("_class_name") != "UVit2DModel" else values.get("sample_size")


def _codec_config(values: Mapping[str, Any], grid: Any) -> VQGANConfig:
    """The config of a `VQModel`, whose `sample_size` says nothing in aMUSEd: `grid` counts if it is a number."""
    channels = _block_channels(values)
    width, scale = math.gcd(*channels), 2 ** (len(channels) - 1)
    for name, value in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        _refuse_options(values, {name: [value] * len(channels)})
    _refuse_options(values, {"act_fn": "silu", "norm_type": "group"})
    is_amused = values.get("lookup_from_codebook", False)  # other pipelines map pixels to [-1, 1]
    latent = values.get("latent_channels", 3)
    size = scale * grid if type(grid) is int else values.get("sample_size", _DEFAULT_SAMPLE_SIZE)
    return VQGANConfig(
        ch=width,
        ch_mult=tuple(each // width for each in channels),
        num_res_blocks=values.get("layers_per_block", 1),
        attn_resolutions=(),
        resolution=size,
        z_channels=latent,
        n_embed=values.get("num_vq_embeddings", 256),
        embed_dim=latent if values.get("vq_embed_dim") is None else values["vq_embed_dim"],
        in_channels=values.get("in_channels", 3),
        out_ch=values.get("out_channels", 3),
        num_groups=values.get("norm_num_groups", 32),
        is_signed=not is_amused,
        conv_in_ch=None if channels[0] == width else channels[0],
        has_mid_attention=values.get("mid_block_add_attention", True),
        rounds_pixels=True,
    )


def _codec_parameter(name: str, array: np.ndarray, levels: int) -> tuple[str, np.ndarray]:
    """Path and array in `VQGAN` of a tensor of `VQModel`."""
    *modules, leaf = join_list_indices(name).split(".")
    path = "/".join([*modules, ""])
    for ours, theirs in _CODEC_NAMES:
        path = path.replace(theirs, ours)
    path = _flip_levels(path, levels)
    if leaf != "weight":
        return path + leaf, array
    if array.ndim == 1:
        return path + "scale", array
    if path.endswith("embedding/"):
        return path + "embedding", array
    return path + "kernel", array.T[None, None] if array.ndim == 2 else convolution_kernel(array)


def _codec_name(path: str, levels: int) -> str:
    """Path of `VQGAN` as `VQModel` names it."""
    path = _flip_levels(path, levels)
    for ours, theirs in _CODEC_NAMES:
        path = path.replace(ours, theirs)
    return path


def _flip_levels(path: str, levels: int) -> str:
    """Count the decoder's levels from the other end: `VQModel` begins with the lowest resolution."""
    return re.sub(r"/up_(\d{1,4})/", lambda match: f"/up_{levels - 1 - int(match[1])}/", path)
