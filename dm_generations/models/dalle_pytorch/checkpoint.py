"""`dalle.pt` of DALLE-pytorch and of Jack000's fork: a generator, and the codec that it was trained with.

The file is a dict of `hparams`, `vae_params`, `weights` and more, as `train_dalle.py` saves it. `weights` names modules
by how the version at hand nests its wrappers (`...layers.0.0.fn.fn.fn.to_qkv.weight`), so layers are recognised by
their end, and options that leave a trace in the weights are read from there, not from `hparams`:

- shift_tokens: one wrapper more around a feed-forward block. sandwich_norm: `norm_out`. rotary_emb: `pos_emb`.
- conv_like: version 1.5.0 (23 March 2022) moved the window of the convolution from around the query to up and left of
  it, with the same weights. Files have a `version` since December 2021, so one without it is centred; unless its
  attention has one wrapper more than its feed-forward blocks, which came with 1.4.0, two months before that change.
- sampling_order: Jack000's fork of November 2021 applies top_p before temperature. It saves no `version`, has 16 x 16
  tokens and a table of rotary angles of four axes, as had DALLE-pytorch until then; the latter never sampled by top_p,
  so a file of either kind is taken for the fork's.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError, short_repr
from dm_generations.models.base import RawCheckpoint, prefix_errors
from dm_generations.models.dalle_pytorch.config import DallePytorchConfig
from dm_generations.models.dvae import checkpoint as dvae
from dm_generations.models.vqgan import checkpoint as vqgan
from dm_generations.weights.mmap import is_apple_double
from dm_generations.weights.native import unflatten
from dm_generations.weights.state_dict import (
    Shape,
    check_tensors,
    count_numbered,
    find_state,
    get_tensor,
    split_list_indices,
    strip_prefix,
    torch_name,
)
from dm_generations.weights.torch_file import read_torch

_FILE = "dalle.pt"
_TOKENIZERS = ("tokenizer.json", "*.model", "*.bpe", "vocab.txt", "bpe_simple_vocab_16e6.txt*")
_FORK_GRID = 16
_CAUSAL_CONV_VERSION = (1, 5)

# Layer number, attention (0, f) or feed-forward (1, g), wrappers, what is wrapped.
_BLOCK = re.compile(
    r"transformer\.layers\.(?:layers\.(\d{1,9})\.([01])|blocks\.(\d{1,9})\.([fg])\.net)\.((?:fn\.)*)(.*)"
)
_LAYER_PATH = re.compile(r"transformer/(attn|ff)(_wrapping)?_(\d+)/(.*)")
_HEAD_NORM = {"to_logits.0.weight": "to_logits/norm/scale", "to_logits.0.bias": "to_logits/norm/bias"}
_POSITIONS = re.compile(r"image_pos_emb\.weights[._]([01])")
# Buffers that follow from the config, and the tied embeddings, which are parts of to_logits.1.
_SKIPPED = re.compile(r"vae\..*|logits_mask|(text_emb|image_emb)\.linear\..*")


def read_generator(path: Path) -> RawCheckpoint | None:
    """Read the network of a `dalle.pt` or of a folder with one; None for anything else."""
    found = _read_content(path)
    if found is None:
        return None
    file, content = found
    state = _network_state(content, file)
    config = _config(content, state, file)
    tensors = {name: _parameters(name, array, config, file) for name, array in state.items()}
    params = unflatten({path: array for parts in tensors.values() for path, array in parts.items()}, file)
    names = {path: name for name, parts in tensors.items() for path in parts}
    angles = state["transformer.pos_emb"].shape if config.rotary_emb else ()
    named = functools.partial(_name_in_file, names=names, config=config, wrappers=_wrappers(state), angles=angles)
    tokenizers = (found for pattern in _TOKENIZERS for found in sorted(file.parent.glob(pattern)))
    tokenizer = next((found for found in tokenizers if not is_apple_double(found)), None)
    return RawCheckpoint("dalle_pytorch", config, params, (file,), tokenizer, "dalle_pytorch", name_in_file=named)


def read_codec(path: Path) -> RawCheckpoint | None:
    """Read the VAE inside a `dalle.pt`: DALLE-pytorch's own, a VQGAN or OpenAI's.

    Its images have as many tokens as the network's, whatever size it was trained at.

    Returns:
        None if there is no such file, or if it holds no VAE.
    """
    found = _read_content(path)
    if found is None:
        return None
    file, content = found
    state = check_tensors(strip_prefix(content["weights"], "vae."), file, "vae.")
    grid = _config(content, _network_state(content, file), file).image_fmap_size
    if any(name.startswith("model.") for name in state):
        return _vqgan(strip_prefix(state, "model."), grid, file)
    if any(name.startswith("dec.") for name in state):
        return _openai_vae(state, grid, file)
    if "codebook.weight" in state or (state and content["vae_params"] is not None):
        config = dvae.discrete_vae_config(content["vae_params"], file)
        config = replace(config, image_size=grid * 2**config.num_layers)
        named = functools.partial(dvae.discrete_vae_name_in_file, prefix="vae.")
        params = dvae.discrete_vae_params(state, file)
        return RawCheckpoint("discrete_vae", config, params, (file,), name_in_file=named)
    return None


def _vqgan(state: dict[str, np.ndarray], grid: int, file: Path) -> RawCheckpoint:
    prefix = "vae.model."
    halvings = count_numbered(state, "decoder.up.{}.block.0.conv1.weight") - 1
    resolution = grid * 2 ** max(0, halvings)
    config = vqgan.config_from_shapes(state, file, resolution, prefix, is_signed=True)
    named = functools.partial(vqgan.vqgan_name_in_file, prefix=prefix)
    return RawCheckpoint("vqgan", config, vqgan.vqgan_params(state, file), (file,), name_in_file=named)


def _openai_vae(state: dict[str, np.ndarray], grid: int, file: Path) -> RawCheckpoint:
    parts = {"decoder": strip_prefix(state, "dec."), "encoder": strip_prefix(state, "enc.")}
    config = dvae.openai_vae_config(parts["decoder"], file, prefix="vae.dec.")
    config = replace(config, image_size=config.image_size // config.grid * grid)
    params = {name: dvae.openai_vae_params(part, file) for name, part in parts.items() if part}
    named = functools.partial(dvae.openai_vae_name_in_file, decoder="vae.dec.", encoder="vae.enc.")
    return RawCheckpoint("openai_vae", config, params, (file,), name_in_file=named)


def _find_file(path: Path) -> Path | None:
    if not path.is_dir():
        return path if path.suffix in (".pt", ".pth") else None
    if (path / _FILE).is_file():
        return path / _FILE
    files = sorted(file for file in path.glob("*.pt") if not is_apple_double(file))
    return files[0] if len(files) == 1 else None


def _read_content(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The file and what `train_dalle.py` saved in it; None for anything else. UserError if it is broken."""
    file = _find_file(path)
    content = None if file is None else read_torch(file)
    if file is None or not isinstance(content, Mapping) or not {"hparams", "vae_params", "weights"} <= content.keys():
        return None
    if isinstance(content["weights"], str):  # what `auxiliary.pt` has, with advice for whoever reads it
        raise UserError(
            f"{file} holds no weights, DeepSpeed has them in files of its own: merge those with its zero_to_fp32.py, "
            "and save this file's dict with the result as `weights`"
        )
    for name in ("hparams", "weights"):
        if not isinstance(content[name], Mapping) or not all(isinstance(key, str) for key in content[name]):
            raise UserError(f"{file}: {name} is not a dict with names")
    return file, dict(content) | {"weights": find_state(content["weights"])}


def _network_state(content: Mapping[str, Any], file: Path) -> dict[str, np.ndarray]:
    """The tensors of the network by their names in the file."""
    weights = {name: value for name, value in content["weights"].items() if not _SKIPPED.fullmatch(name)}
    return check_tensors(weights, file)


def _config(content: Mapping[str, Any], state: Mapping[str, np.ndarray], file: Path) -> DallePytorchConfig:
    """The config that `hparams` and the tensors tell."""
    hparams = content["hparams"]
    sizes = {}
    for name in ("num_text_tokens", "text_seq_len", "depth"):
        value = hparams.get(name)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise UserError(f"{file}: hparams: {name} must be a whole number above 0, not {short_repr(value)}")
        sizes[name] = value
    text_rows = sizes["num_text_tokens"] + sizes["text_seq_len"]
    blocks = {match[0]: match for match in map(_BLOCK.fullmatch, state) if match}
    inner = {match[6] for match in blocks.values()}
    wrappers = _wrappers(state)
    layer_scale = "scale" in inner
    rotary = state.get("transformer.pos_emb")
    grid = _grid(state, rotary, hparams.get("rotary_emb") is True, sizes["text_seq_len"], file)
    has_new_wrappers = wrappers["attn"] > wrappers["ff"]
    version = content.get("version")
    is_fork = version is None and not has_new_wrappers and grid == _FORK_GRID and (rotary is None or rotary.ndim == 4)
    head = get_tensor(state, "to_logits.1.weight", 2, file)
    image_tokens = head.shape[0] - text_rows
    table = state.get("image_emb.weight")
    if table is not None and table.ndim == 2 and len(table) != image_tokens:
        raise UserError(
            f"{file}: to_logits.1.weight has shape {head.shape} and image_emb.weight {table.shape}, "
            f"which do not match with {text_rows} text tokens"
        )
    from_weights = {
        "num_image_tokens": image_tokens,
        "image_fmap_size": grid,
        "reversible": any(match[3] for match in blocks.values()),
        "shift_tokens": wrappers["ff"] > 1 + layer_scale,  # around it: scale, norm, shift
        "rotary_emb": rotary is not None,
        "sandwich_norm": "norm_out.weight" in inner,
        "layer_scale": layer_scale,
        "conv_like": "causal" if _is_conv_causal(version, has_new_wrappers) else "centred",
        "sparse_layout": _sparse_layout(blocks, state, file),
        "sampling_order": "top_p_first" if is_fork else "temperature_first",
    }
    with prefix_errors(file):
        return DallePytorchConfig.from_dict(dict(hparams) | sizes | from_weights)


def _is_conv_causal(version: Any, has_new_wrappers: bool) -> bool:
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    if numbers is None:
        return has_new_wrappers
    return (int(numbers[1]), int(numbers[2])) >= _CAUSAL_CONV_VERSION


def _grid(
    state: Mapping[str, np.ndarray], rotary: np.ndarray | None, is_rotary: bool, text_seq_len: int, file: Path
) -> int:
    """Tokens a side, from the table of positions in the file. is_rotary: whether that should be one of angles."""
    if rotary is None:
        if is_rotary and "text_pos_emb.weight" not in state:
            raise UserError(f"{file} lacks the tensor transformer.pos_emb")
        text_rows = get_tensor(state, "text_pos_emb.weight", 2, file).shape[0]
        if text_rows != text_seq_len + 1:
            raise UserError(f"{file}: text_pos_emb.weight has {text_rows} rows, text_seq_len {text_seq_len} and <bos>")
        rows = next((array for name, array in state.items() if _POSITIONS.fullmatch(name)), None)
        if rows is None or rows.ndim != 4:
            raise UserError(f"{file} lacks the tensor image_pos_emb.weights_0, or it has not four axes")
        return max(rows.shape[1:3])  # (1, side, 1, dim) or (1, 1, side, dim)
    if rotary.ndim not in (3, 4) or any(size != 1 for size in rotary.shape[:-2]):
        raise UserError(f"{file}: transformer.pos_emb has shape {rotary.shape}, a table of angles is needed")
    count = rotary.shape[-2] - text_seq_len - (rotary.ndim == 3)  # of three axes, it has a row to spare
    side = math.isqrt(max(count, 0))
    if side < 1 or side**2 != count:
        raise UserError(
            f"{file}: transformer.pos_emb has {rotary.shape[-2]} rows: not a square of tokens after "
            f"{text_seq_len} of text"
        )
    return side


def _sparse_layout(
    blocks: Mapping[str, re.Match], state: Mapping[str, np.ndarray], file: Path
) -> tuple[str, ...] | None:
    """Rows of "0" and "1" of the first layer's layout, which DeepSpeed's cache makes that of all sparse layers."""
    names = [name for name, match in blocks.items() if match[6] == "attn_fn.master_layout"]
    if not names:
        return None
    first = min(names, key=lambda name: _layer(blocks[name]))
    layout = get_tensor(state, first, 3, file)
    if layout.shape[1] > 1 << 12 or (layout != layout[:1]).any():
        raise UserError(f"{file}: {first} is too large, or differs between heads, which is not supported")
    return tuple("".join("1" if block else "0" for block in row) for row in layout[0])


def _wrappers(state: Iterable[str]) -> dict[str, int]:
    """How many wrappers are around an attention, and how many around a feed-forward block; 0 where there is none."""
    blocks = [match for match in map(_BLOCK.fullmatch, state) if match]
    return {
        kind: min((len(match[5]) // len("fn.") for match in blocks if match[6] == end), default=0)
        for kind, end in (("attn", "to_qkv.weight"), ("ff", "net.0.weight"))
    }


def _layer(match: re.Match) -> int:
    return int(match[1] or match[3])


def _parameters(name: str, array: np.ndarray, config: DallePytorchConfig, file: Path) -> dict[str, np.ndarray]:
    """Parameters of `DallePytorch` by path that a tensor holds, none if it repeats another.

    They are views, except those of the table of angles. A name that is not known stays as it is. Raises UserError if
    another shape would pass for the parameter's.
    """
    if block := _BLOCK.fullmatch(name):
        if block[6] == "scale":
            _check_tensor_shape(name, array, (1, 1, config.dim), file)
        return _block_params(block, array, config)
    if positions := _POSITIONS.fullmatch(name):
        is_rows, side = positions[1] == "0", config.image_fmap_size
        _check_tensor_shape(name, array, (1, side, 1, config.dim) if is_rows else (1, 1, side, config.dim), file)
        return {f"image_pos_emb_{'rows' if is_rows else 'columns'}": array.reshape(side, config.dim)}
    if name in ("to_logits.1.weight", "to_logits.1.bias"):
        leaf = "kernel" if name.endswith("weight") else "bias"
        if leaf == "bias":
            _check_tensor_shape(name, array, (config.text_rows + config.num_image_tokens,), file)
        text, image = array.T[..., : config.text_rows], array.T[..., config.text_rows :]
        return {f"to_logits/text/{leaf}": text, f"to_logits/image/{leaf}": image}
    if name == "transformer.pos_emb":
        # in float64, so that every machine computes the same float32
        angles = array.reshape(array.shape[-2:])[: config.sequence_length].astype(np.float64)
        tables = {"cos": np.cos(angles), "sin": np.sin(angles)}
        return {f"transformer/rotary_{name}": table.astype(np.float32) for name, table in tables.items()}
    if name in ("text_emb.weight", "image_emb.weight", "text_pos_emb.weight"):
        return {name.replace(".weight", "/embedding"): array}
    return {_HEAD_NORM.get(name, name): array}


def _check_tensor_shape(name: str, array: np.ndarray, shape: Shape, file: Path) -> None:
    if array.shape != shape:
        raise UserError(f"{file}: {name} has shape {array.shape}, its config asks for {shape}")


def _name_in_file(
    path: str,
    shape: Shape,
    names: Mapping[str, str],
    config: DallePytorchConfig,
    wrappers: Mapping[str, int],
    angles: Shape,
) -> tuple[str, Shape]:
    """Name and shape, in the file, of the parameter of this path.

    Args:
        path: of the parameter.
        shape: of the parameter.
        names: of the tensors that became parameters, by path; other names are made as those of this file are.
        config: of the network.
        wrappers: see `_wrappers`.
        angles: the shape of the table of rotary angles, if there is one.
    """
    name = path
    if match := _LAYER_PATH.fullmatch(path):
        kind, is_wrapping, layer, inner = match.groups()
        if config.reversible:
            block = f"blocks.{layer}.{'f' if kind == 'attn' else 'g'}.net."
        else:
            block = f"layers.{layer}.{int(kind == 'ff')}."
        around = "fn." * (int(config.layer_scale) if is_wrapping else wrappers[kind])
        inner = split_list_indices(inner.replace("to_out/", "to_out_0/"))
        name, shape = torch_name(inner, shape, f"transformer.layers.{block}{around}")
        if inner == "scale":
            name, shape = f"transformer.layers.{block}scale", (1, 1, *shape)
    elif match := re.fullmatch(r"to_logits/(text|image)/(kernel|bias)", path):
        rows = shape[-1] + (config.num_image_tokens if match[1] == "text" else config.text_rows)
        name, shape = torch_name(f"to_logits/1/{match[2]}", (*shape[:-1], rows))
    elif path.startswith("to_logits/norm/"):
        name, shape = torch_name(path.replace("norm", "0"), shape)
    elif path.startswith("image_pos_emb_"):
        like = next((name for name in names.values() if _POSITIONS.fullmatch(name)), "image_pos_emb.weights_0")
        is_rows = path.endswith("rows")
        name = like[:-1] + ("0" if is_rows else "1")
        shape = (1, shape[0], 1, shape[1]) if is_rows else (1, 1, *shape)
    elif path.startswith("transformer/rotary_"):
        name, shape = "transformer.pos_emb", (*angles[:-1], shape[-1])
    else:
        name, shape = torch_name(path, shape)
    return names.get(path, name), shape


def _block_params(match: re.Match, array: np.ndarray, config: DallePytorchConfig) -> dict[str, np.ndarray]:
    """The parameter that a tensor of a layer is: none for those of layers that use an earlier one's."""
    layer, inner = _layer(match), match[6]
    kind = "attn" if (match[2] or match[4]) in ("0", "f") else "ff"
    if inner == "attn_fn.master_layout":
        return {}
    if inner == "scale":
        return {f"transformer/{kind}_wrapping_{layer}/scale": array[0, 0]}
    module, _, leaf = inner.rpartition(".")
    if module in ("norm", "norm_out"):
        return {f"transformer/{kind}_wrapping_{layer}/{module}/{'scale' if leaf == 'weight' else leaf}": array}
    sources = config.attn_sources if kind == "attn" else config.ff_sources
    if layer < config.depth and sources[layer] != layer:
        return {}
    module = {"to_out.0": "to_out"}.get(module, module.replace(".", "_"))
    leaf = "kernel" if leaf == "weight" else leaf
    return {f"transformer/{kind}_{layer}/{module}/{leaf}": array.T if leaf == "kernel" else array}
