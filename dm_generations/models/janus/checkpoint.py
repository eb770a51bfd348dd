"""Checkpoints of Janus: as DeepSeek published them, and as transformers has them.

A folder with `config.json`, weights in one or several files, and `tokenizer.json`. It holds the generator, and as its
codec that of LlamaGen, which the generator alone could not tell from other codecs. What makes texts is not read, nor is
what reads images. The original's config.json leaves out what is LLaMA's default.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dm_generations.errors import UserError, short_repr
from dm_generations.models.base import RawCheckpoint, prefix_errors
from dm_generations.models.clip.checkpoint import WEIGHT_FILES, find_weight_files, read_tensors
from dm_generations.models.janus.network import JanusConfig
from dm_generations.models.llamagen import checkpoint as llamagen
from dm_generations.models.vqgan.checkpoint import vqgan_name_in_file
from dm_generations.weights.native import CONFIG_FILE, read_config, unflatten
from dm_generations.weights.state_dict import (
    Shape,
    TensorNames,
    count_numbered,
    get_tensor,
    refuse_stubs,
    strip_prefix,
)

_PIXELS_A_TOKEN = 16
_DEFAULT_GRID = 24


class _Layout(NamedTuple):
    """How one of the two programs names things."""

    text_config: str  # in config.json
    language_model: str
    tokens: str
    aligner: tuple[str, str]
    head: tuple[str, str]
    codec: str

    def names(self) -> TensorNames:
        """Names of the tensors, and paths of the parameters."""
        model, layer = self.language_model, "transformer/layers_{i}/"
        block = model + "layers.{i}."
        attention = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}
        heads = zip((*self.aligner, *self.head), ("aligner_in", "aligner_out", "head_in", "head_out"), strict=True)
        pairs = [
            (model + "embed_tokens.weight", "text/embedding"),
            (self.tokens + ".weight", "tokens/embedding"),
            (model + "norm.weight", "transformer/norm/scale"),
            (block + "input_layernorm.weight", layer + "attn_norm/scale"),
            (block + "post_attention_layernorm.weight", layer + "mlp_norm/scale"),
            (block + "mlp.{part}_proj.weight", layer + "mlp/{part}/kernel"),
            *((block + f"self_attn.{name}.weight", layer + f"attn/{path}/kernel") for name, path in attention.items()),
        ]
        for name, path in heads:
            pairs += [(f"{name}.weight", f"{path}/kernel"), (f"{name}.bias", f"{path}/bias")]
        return TensorNames(pairs)


_LAYOUTS = {
    "janus": _Layout(
        "text_config",
        "model.language_model.",
        "model.generation_embeddings",
        ("model.generation_aligner.fc1", "model.generation_aligner.hidden_layers.0"),
        ("model.generation_head.proj_out", "model.generation_head.vision_head"),
        "model.vqmodel.",
    ),
    "multi_modality": _Layout(
        "language_config",
        "language_model.model.",
        "gen_embed",
        ("gen_aligner.layers.0", "gen_aligner.layers.2"),
        ("gen_head.output_mlp_projector", "gen_head.vision_head"),
        "gen_vision_model.",
    ),
}


class _Found(NamedTuple):
    """A folder of Janus."""

    values: dict[str, Any]  # of config.json
    layout: _Layout
    state: dict[str, np.ndarray]
    files: tuple[Path, ...]
    file_of: dict[str, Path]  # by the name of a tensor


def read_generator(path: Path) -> RawCheckpoint | None:
    """Read the text model of a folder, with its tokenizer; None for anything else."""
    found = _read(path)
    if found is None:
        return None
    names, state = found.layout.names(), found.state
    params = names.rename(state)
    with prefix_errors(path / CONFIG_FILE):
        config = _config(found, path)
    file_by_prefix = {parameter: found.file_of[names.name_of(parameter) or ""] for parameter in params}
    return RawCheckpoint(
        *("janus", config, unflatten(params, path), found.files, path, "janus"),
        file_by_prefix=file_by_prefix | {"": path if len(found.files) > 1 else found.files[0]},
        name_in_file=names.name_in_file,
    )


def read_codec(path: Path) -> RawCheckpoint | None:
    """Read the codec of a folder; None for anything else."""
    found = _read(path)
    if found is None:
        return None
    prefix, grid = found.layout.codec, _grid(found.values)
    state = strip_prefix(found.state, prefix)
    if not state:
        raise UserError(f"{found.files[0]} lacks its codec, {prefix}quantize.embedding.weight and others")
    file = found.file_of[prefix + next(iter(state))]
    if any(name.startswith("decoder.conv_blocks.") for name in state):
        return llamagen.codec_of_state(llamagen.taming_names(state), file, llamagen.vq_name_in_file, grid, prefix)
    levels = count_numbered(state, "decoder.up.{}.block.0.conv1.weight")
    reversed_state = {_reverse_levels(name, levels): array for name, array in state.items()}
    return llamagen.codec_of_state(reversed_state, file, _codec_name_in_file, grid, prefix)


def _read(path: Path) -> _Found | None:
    values = read_config(path) if path.is_dir() else None
    if values is None or values.get("model_type") not in _LAYOUTS:
        return None
    files = find_weight_files(path)
    if not files:
        raise UserError(f"{path} lacks its weights: {' or '.join(WEIGHT_FILES)}")
    state: dict[str, np.ndarray] = {}
    file_of: dict[str, Path] = {}
    for file in files:
        tensors = read_tensors(file)
        refuse_stubs(tensors, file)
        state |= tensors
        file_of |= dict.fromkeys(tensors, file)
    return _Found(values, _LAYOUTS[values["model_type"]], state, files, file_of)


def _config(found: _Found, path: Path) -> JanusConfig:
    """The config that config.json and shapes tell."""
    text = found.values.get(found.layout.text_config)
    if not isinstance(text, Mapping):
        raise UserError(f"{found.layout.text_config} is missing")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{found.layout.text_config}: rope_parameters {short_repr(rope)} are not supported")
    for name in ("attention_bias", "mlp_bias"):
        if text.get(name):
            raise UserError(f"{found.layout.text_config}: {name} {short_repr(text[name])} is not supported, only false")

    def shape(name: str) -> Shape:
        return get_tensor(found.state, f"{name}.weight", 2, found.file_of.get(f"{name}.weight", path)).shape

    image_vocab_size, image_embed_dim = shape(found.layout.tokens)
    sizes = dict(text) | ({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})
    sizes |= {"image_vocab_size": image_vocab_size, "image_embed_dim": image_embed_dim}
    sizes |= {"aligner_dim": shape(found.layout.aligner[0])[0], "head_hidden": shape(found.layout.head[0])[0]}
    sizes.pop("max_text_length", None)
    return JanusConfig.from_dict(sizes | {"block_size": _grid(found.values) ** 2})


def _grid(values: Mapping[str, Any]) -> int:
    """Tokens a side: as many as the part that reads images has patches."""
    vision = values.get("vision_config")
    vision = vision if isinstance(vision, Mapping) else {}
    parameters = vision.get("params", vision)  # the original's are one level further down
    parameters = parameters if isinstance(parameters, Mapping) else {}
    size, patch = parameters.get("image_size"), parameters.get("patch_size", _PIXELS_A_TOKEN)
    if type(size) is int and type(patch) is int and 0 < patch <= size:
        return size // patch
    return _DEFAULT_GRID


def _reverse_levels(name: str, levels: int) -> str:
    """Number the decoder's levels from the other end: transformers has the lowest resolution first, taming last."""
    return re.sub(r"decoder\.up\.(\d+)\.", lambda match: f"decoder.up.{levels - 1 - int(match[1])}.", name)


def _codec_name_in_file(path: str, shape: Shape, levels: int) -> tuple[str, Shape]:
    name, shape = vqgan_name_in_file(path, shape)
    return _reverse_levels(name, levels), shape
