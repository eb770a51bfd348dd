"""`dalle.pt` of DALLE-pytorch and of Jack000's fork: a generator, and the codec that it was trained with.

The file is a dict of `hparams`, `vae_params`, `weights` and more, as `train_dalle.py` saves it. `weights` names modules
by how the version at hand nests its wrappers (`...layers.0.0.fn.fn.fn.to_qkv.weight`), so layers are recognised by
their end, and options that leave a trace in the weights are read from there, not from `hparams`:

- shift_tokens: one wrapper more around a feed-forward block. sandwich_norm: `norm_out`. rotary_emb: `pos_emb`.
- conv_like: version 1.5.0 (23 March 2022) moved the window of the convolution from around the query to up and left of
  it, with the same weights. Files have a `version` since December 2021, so one without it is centred; unless its
  attention has one wrapper more than its feed-forward blocks, which came with 1.4.0, two months before that change.
- sampling_order: Jack000's fork of November 2021 applies top_p before temperature. It saves no `version`, has 16 x 16
  codes and a table of rotary angles of four axes, as had DALLE-pytorch until then; the latter never drew by top_p, so
  a file of either kind is taken for the fork's.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.checkpoints import openai_vae, taming
from dm_generations.models.checkpoints.discrete_vae import discrete_vae_config, discrete_vae_params
from dm_generations.models.checkpoints.own import unflatten
from dm_generations.models.checkpoints.source import Source
from dm_generations.models.checkpoints.torch_names import count, only_tensors, tensor, without_prefix
from dm_generations.models.checkpoints.torch_pickle import read_torch
from dm_generations.models.dalle_pytorch_config import DallePytorchConfig

_FILE = "dalle.pt"
_TOKENIZERS = ("tokenizer.json", "*.model", "*.bpe", "vocab.txt", "bpe_simple_vocab_16e6.txt*")
_FORK_GRID = 16
_CAUSAL_CONV_VERSION = (1, 5)

# Layer number, attention (0, f) or feed-forward (1, g), wrappers, what is wrapped.
_BLOCK = re.compile(
    r"transformer\.layers\.(?:layers\.(\d{1,9})\.([01])|blocks\.(\d{1,9})\.([fg])\.net)\.((?:fn\.)*)(.*)"
)
_HEAD_NORM = {"to_logits.0.weight": "to_logits/norm/scale", "to_logits.0.bias": "to_logits/norm/bias"}
_POSITIONS = re.compile(r"image_pos_emb\.weights[._]([01])")
# Buffers that follow from the config, and the tied embeddings, which are parts of to_logits.1.
_SKIPPED = re.compile(r"vae\..*|logits_mask|(text_emb|image_emb)\.linear\..*")


def generator(path: Path) -> Source | None:
    """The network of a `dalle.pt` or of a folder with one; None for anything else."""
    file = _file(path)
    content = None if file is None else _content(file)
    if content is None:
        return None
    state = _network_state(content, file)
    config = _config(content, state, file)
    params = unflatten(_params(state, config), file)
    tokenizers = (found for pattern in _TOKENIZERS for found in sorted(file.parent.glob(pattern)))
    return Source("dalle_pytorch", config, params, (file,), next(tokenizers, None), "dalle_pytorch")


def codec(path: Path) -> Source | None:
    """The VAE inside a `dalle.pt`: DALLE-pytorch's own, a VQGAN or OpenAI's. None if there is no such file.

    Its pictures have as many codes as the network's, whatever size it was trained at. None also if it has none.
    """
    file = _file(path)
    content = None if file is None else _content(file)
    if content is None:
        return None
    state = only_tensors(without_prefix(content["weights"], "vae."), file)
    grid = _config(content, _network_state(content, file), file).image_fmap_size
    if "codebook.weight" in state:
        config = discrete_vae_config(content["vae_params"], file)
        config = replace(config, image_size=grid * 2**config.num_layers)
        return Source("discrete_vae", config, discrete_vae_params(state, file), (file,))
    if any(name.startswith("model.") for name in state):
        state = without_prefix(state, "model.")
        halvings = count(state, "decoder.up.{}.block.0.conv1.weight") - 1
        config = taming.config_from_shapes(state, file, resolution=grid * 2 ** max(0, halvings), is_signed=True)
        return Source("vqgan", config, taming.vqgan_params(state, file), (file,))
    if any(name.startswith("dec.") for name in state):
        parts = {"decoder": without_prefix(state, "dec."), "encoder": without_prefix(state, "enc.")}
        config = openai_vae.openai_vae_config(parts["decoder"], file)
        config = replace(config, image_size=config.image_size // config.grid * grid)
        params = {name: openai_vae.openai_vae_params(part, file) for name, part in parts.items() if part}
        return Source("openai_vae", config, params, (file,))
    return None


def _file(path: Path) -> Path | None:
    if not path.is_dir():
        return path if path.suffix in (".pt", ".pth") else None
    if (path / _FILE).is_file():
        return path / _FILE
    files = sorted(path.glob("*.pt"))
    return files[0] if len(files) == 1 else None


def _content(file: Path) -> dict[str, Any] | None:
    """What `train_dalle.py` saved; None for a file of something else. UserError if it is broken."""
    content = read_torch(file)
    if not isinstance(content, Mapping) or not {"hparams", "vae_params", "weights"} <= content.keys():
        return None
    for name in ("hparams", "weights"):
        if not isinstance(content[name], Mapping) or not all(isinstance(key, str) for key in content[name]):
            raise UserError(f"{file}: {name} is not a dict with names")
    return dict(content)


def _network_state(content: Mapping[str, Any], file: Path) -> dict[str, np.ndarray]:
    """The tensors of the network by their names in the file."""
    weights = {name: value for name, value in content["weights"].items() if not _SKIPPED.fullmatch(name)}
    return only_tensors(weights, file)


def _config(content: Mapping[str, Any], state: Mapping[str, np.ndarray], file: Path) -> DallePytorchConfig:
    """The config that `hparams` and the tensors tell."""
    hparams = content["hparams"]
    sizes = {}
    for name in ("num_text_tokens", "text_seq_len", "depth"):
        value = hparams.get(name)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise UserError(f"{file}: hparams: {name} must be a whole number above 0, not {value!r:.80}")
        sizes[name] = value
    text_rows = sizes["num_text_tokens"] + sizes["text_seq_len"]
    blocks = {match[0]: match for match in map(_BLOCK.fullmatch, state) if match}
    inner = {match[6] for match in blocks.values()}
    wrappers = {
        kind: min((len(match[5]) // len("fn.") for match in blocks.values() if match[6] == end), default=0)
        for kind, end in (("attn", "to_qkv.weight"), ("ff", "net.0.weight"))
    }
    layer_scale = "scale" in inner
    rotary = state.get("transformer.pos_emb")
    grid = _grid(state, rotary, hparams.get("rotary_emb") is True, sizes["text_seq_len"], file)
    has_new_wrappers = wrappers["attn"] > wrappers["ff"]
    version = content.get("version")
    is_fork = version is None and not has_new_wrappers and grid == _FORK_GRID and (rotary is None or rotary.ndim == 4)
    from_weights = {
        "num_image_tokens": tensor(state, "to_logits.1.weight", 2, file).shape[0] - text_rows,
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
    try:
        return DallePytorchConfig.from_dict(dict(hparams) | sizes | from_weights)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _is_conv_causal(version: Any, has_new_wrappers: bool) -> bool:
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    if numbers is None:
        return has_new_wrappers
    return (int(numbers[1]), int(numbers[2])) >= _CAUSAL_CONV_VERSION


def _grid(
    state: Mapping[str, np.ndarray], rotary: np.ndarray | None, is_rotary: bool, text_seq_len: int, file: Path
) -> int:
    """Codes a side, from the table of positions that the file has. is_rotary: which one it should have."""
    if rotary is None:
        if is_rotary and "text_pos_emb.weight" not in state:
            raise UserError(f"{file} lacks the tensor transformer.pos_emb")
        text_rows = tensor(state, "text_pos_emb.weight", 2, file).shape[0]
        if text_rows != text_seq_len + 1:
            raise UserError(f"{file}: text_pos_emb.weight has {text_rows} rows, text_seq_len {text_seq_len} and <bos>")
        rows = next((array for name, array in state.items() if _POSITIONS.fullmatch(name)), None)
        if rows is None or rows.ndim != 4:
            raise UserError(f"{file} lacks the tensor image_pos_emb.weights_0, or it has not four axes")
        return max(rows.shape[1:3])  # (1, side, 1, dim) or (1, 1, side, dim)
    if rotary.ndim not in (3, 4) or any(size != 1 for size in rotary.shape[:-2]):
        raise UserError(f"{file}: transformer.pos_emb has shape {rotary.shape}, a table of angles is needed")
    codes = rotary.shape[-2] - text_seq_len - (rotary.ndim == 3)  # of three axes, it has a row to spare
    side = math.isqrt(max(codes, 0))
    if side < 1 or side**2 != codes:
        raise UserError(
            f"{file}: transformer.pos_emb has {rotary.shape[-2]} rows: no square of codes after {text_seq_len} of text"
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
    layout = tensor(state, first, 3, file)
    if layout.shape[1] > 1 << 12 or (layout != layout[:1]).any():
        raise UserError(f"{file}: {first} is too large, or differs between heads, which is not supported")
    return tuple("".join("1" if block else "0" for block in row) for row in layout[0])


def _layer(match: re.Match) -> int:
    return int(match[1] or match[3])


def _params(state: Mapping[str, np.ndarray], config: DallePytorchConfig) -> dict[str, np.ndarray]:
    """Parameters of `DallePytorch` by path; views, but for the table of angles. A name not known keeps its own."""
    flat: dict[str, np.ndarray] = {}
    for name, array in state.items():
        block, positions = _BLOCK.fullmatch(name), _POSITIONS.fullmatch(name)
        if block:
            flat |= _block_params(block, array, config)
        elif positions:
            axis, others = {"0": ("rows", (0, 2)), "1": ("columns", (0, 1))}[positions[1]]
            flat[f"image_pos_emb_{axis}"] = _squeezed(array, *others)
        elif name in ("to_logits.1.weight", "to_logits.1.bias"):
            matrix = array.T if array.ndim == 2 else array
            leaf = "kernel" if array.ndim == 2 else "bias"
            flat[f"to_logits/text/{leaf}"] = matrix[..., : config.text_rows]
            flat[f"to_logits/image/{leaf}"] = matrix[..., config.text_rows :]
        elif name == "transformer.pos_emb":
            angles = array.reshape(array.shape[-2:])[: config.sequence_length].astype(np.float32)
            flat |= {"transformer/rotary_cos": np.cos(angles), "transformer/rotary_sin": np.sin(angles)}
        elif name in ("text_emb.weight", "image_emb.weight", "text_pos_emb.weight"):
            flat[name.replace(".weight", "/embedding")] = array
        else:
            flat[_HEAD_NORM.get(name, name)] = array
    return flat


def _block_params(match: re.Match, array: np.ndarray, config: DallePytorchConfig) -> dict[str, np.ndarray]:
    """The parameter that a tensor of a layer is: none for those of layers that use an earlier one's."""
    layer, inner = _layer(match), match[6]
    kind = "attn" if (match[2] or match[4]) in ("0", "f") else "ff"
    if inner == "attn_fn.master_layout":
        return {}
    if inner == "scale":
        return {f"transformer/{kind}_wrapping_{layer}/scale": _squeezed(array, 0, 1)}
    module, _, leaf = inner.rpartition(".")
    if module in ("norm", "norm_out"):
        return {f"transformer/{kind}_wrapping_{layer}/{module}/{'scale' if leaf == 'weight' else leaf}": array}
    sources = config.attn_sources if kind == "attn" else config.ff_sources
    if layer < config.depth and sources[layer] != layer:
        return {}
    module = {"to_out.0": "to_out"}.get(module, module.replace(".", "_"))
    leaf = "kernel" if leaf == "weight" else leaf
    return {f"transformer/{kind}_{layer}/{module}/{leaf}": array.T if leaf == "kernel" else array}


def _squeezed(array: np.ndarray, *axes: int) -> np.ndarray:
    """The array without these axes, if they have length 1; as it is otherwise, for the check of shapes to refuse."""
    has_them = array.ndim > max(axes) and all(array.shape[axis] == 1 for axis in axes)
    return array.squeeze(axes) if has_them else array
