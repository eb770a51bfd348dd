"""Checkpoints of LlamaGen, recognised by the names of their tensors: the codec, and the models of classes and captions.

A file is what LlamaGen's programs save, or a bare state dict. Of a folder the files of the published names are read:
`vq_ds*.pt`, `c2i_*.pt` and `t2i_*.pt`. No file has its configuration; what shapes do not tell has the values that
LlamaGen's programs have by default: images of 256 px, or what the name of the file says (`c2i_B_384.pt`), at 16 px a
token. A model of captions needs T5's encoder, the folder of google/flan-t5-xl next to its file.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.base import RawCheckpoint, prefix_errors
from dm_generations.models.clip.checkpoint import find_weight_files, read_tensors
from dm_generations.models.llamagen.network import LlamaGenConfig
from dm_generations.models.llamagen.t5 import T5Config
from dm_generations.models.vqgan.checkpoint import config_from_shapes, vqgan_name_in_file, vqgan_params
from dm_generations.weights.native import CONFIG_FILE, read_config, read_safetensors, unflatten
from dm_generations.weights.state_dict import (
    Shape,
    TensorNames,
    check_tensors,
    count_numbered,
    find_state,
    get_tensor,
    refuse_stubs,
)
from dm_generations.weights.torch_file import read_torch

_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_GPT_TENSOR = "tok_embeddings.weight"
_VQ_TENSOR = "decoder.conv_blocks.0.res.0.conv1.weight"
_CLASSES, _CAPTION = "cls_embedding.embedding_table.weight", "cls_embedding.cap_proj.fc1.weight"
_UNCOND = "cls_embedding.uncond_embedding"
_PIXELS_A_TOKEN, _PIXELS = 16, 256
_T5_ADVICE = "put the folder of google/flan-t5-xl next to it (config.json, its weights and tokenizer.json)"

_BLOCK, _BLOCK_PATH = "layers.{i}.", "transformer/layers_{i}/"
_GPT_NAMES = [
    (_CLASSES, "classes/embedding"),
    ("cls_embedding.cap_proj.{fc}.weight", "captions/{fc}/kernel"),
    (_UNCOND, "captions/uncond_embedding"),
    (_GPT_TENSOR, "tokens/embedding"),
    (_BLOCK + "attention.wqkv.weight", _BLOCK_PATH + "attn/qkv/kernel"),
    (_BLOCK + "attention.wo.weight", _BLOCK_PATH + "attn/out/kernel"),
    (_BLOCK + "feed_forward.w1.weight", _BLOCK_PATH + "mlp/gate/kernel"),
    (_BLOCK + "feed_forward.w3.weight", _BLOCK_PATH + "mlp/up/kernel"),
    (_BLOCK + "feed_forward.w2.weight", _BLOCK_PATH + "mlp/down/kernel"),
    (_BLOCK + "attention_norm.weight", _BLOCK_PATH + "attn_norm/scale"),
    (_BLOCK + "ffn_norm.weight", _BLOCK_PATH + "mlp_norm/scale"),
    ("norm.weight", "transformer/norm/scale"),
    ("output.weight", "output/kernel"),
]
_T5_BLOCK = "encoder.block.{i}.layer."
_T5_NAMES = [
    ("shared.weight", "t5/shared/embedding"),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "t5/relative_attention_bias/embedding"),
    (_T5_BLOCK + "0.layer_norm.weight", "t5/block_{i}/attn_norm/scale"),
    (_T5_BLOCK + "1.layer_norm.weight", "t5/block_{i}/mlp_norm/scale"),
    *((_T5_BLOCK + f"0.SelfAttention.{name}.weight", f"t5/block_{{i}}/{name}/kernel") for name in "qkvo"),
    *(
        (_T5_BLOCK + f"1.DenseReluDense.{name}.weight", f"t5/block_{{i}}/{name}/kernel")
        for name in ("wi_0", "wi_1", "wo")
    ),
    ("encoder.final_layer_norm.weight", "t5/norm/scale"),
]
_NAMES = TensorNames([*_GPT_NAMES, *_T5_NAMES])
# The codec's names are taming's, but for these; its decoder counts levels from the lowest resolution.
_VQ_NAMES = (
    (r"(encoder|decoder)\.conv_blocks\.(\d+)\.res\.", r"\1.level.\2.block."),
    (r"(encoder|decoder)\.conv_blocks\.(\d+)\.", r"\1.level.\2."),
    (r"\.mid\.([02])\.", lambda match: f".mid.block_{int(match[1]) // 2 + 1}."),
    (r"\.mid\.1\.", ".mid.attn_1."),
)


def read_codec(path: Path) -> RawCheckpoint | None:
    """Read the codec of a file, or of `vq_ds*.pt` in a folder; None for anything else."""
    found = _find_state(path, ("vq_*",), _VQ_TENSOR)
    if found is None:
        return None
    file, state = found
    return codec_of_state(taming_names(state), file, vq_name_in_file, rounds_pixels=True)


def codec_of_state(
    state: Mapping[str, np.ndarray],
    file: Path,
    name_in_file: Callable[[str, Shape, int], tuple[str, Shape]],
    grid: int = 0,
    prefix: str = "",
    rounds_pixels: bool = False,
) -> RawCheckpoint:
    """Return the codec of LlamaGen or Janus.

    Args:
        state: Tensors by taming's names.
        file: The file.
        name_in_file: Turns a parameter's path and shape and the number of levels into name and shape in the file.
        grid: Tokens a side; 0 for images of 256 px.
        prefix: What precedes the names in the file.
        rounds_pixels: See `VQGANConfig`.
    """
    levels = count_numbered(state, "decoder.up.{}.block.0.conv1.weight")
    resolution = grid * 2 ** (levels - 1) or _PIXELS
    config = config_from_shapes(
        state, file, resolution, prefix, is_signed=True, is_normalized=True, rounds_pixels=rounds_pixels
    )

    def named(path: str, shape: Shape) -> tuple[str, Shape]:
        name, shape = name_in_file(path, shape, levels)
        return prefix + name, shape

    return RawCheckpoint("vqgan", config, vqgan_params(state, file), (file,), name_in_file=named)


def taming_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the codec's tensors by the names of taming-transformers."""
    levels = count_numbered(state, "decoder.conv_blocks.{}.res.0.conv1.weight")
    renamed = {}
    for name, array in state.items():
        if name == "quantize.codebook_used":  # counts of training
            continue
        for pattern, replacement in _VQ_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name_levels(name, levels)] = array
    return renamed


def name_levels(name: str, levels: int) -> str:
    """Turn "encoder.level.i" into "encoder.down.i", "decoder.level.i" into "decoder.up." of the reverse number."""
    name = name.replace("encoder.level.", "encoder.down.")
    return re.sub(r"decoder\.level\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", name)


def vq_name_in_file(path: str, shape: Shape, levels: int) -> tuple[str, Shape]:
    """Return name and shape in LlamaGen's file of a parameter of the codec with so many levels."""
    name, shape = vqgan_name_in_file(path, shape)
    name = re.sub(r"decoder\.up\.(\d+)", lambda match: f"decoder.conv_blocks.{levels - 1 - int(match[1])}", name)
    name = re.sub(r"encoder\.down\.", "encoder.conv_blocks.", name)
    name = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
    name = name.replace(".mid.block_1.", ".mid.0.").replace(".mid.attn_1.", ".mid.1.")
    return name.replace(".mid.block_2.", ".mid.2."), shape


def read_generator(path: Path) -> RawCheckpoint | None:
    """Read the model of a file, or of `c2i_*.pt` or `t2i_*.pt` in a folder; None for anything else."""
    found = _find_state(path, ("c2i_*", "t2i_*"), _GPT_TENSOR)
    if found is None:
        return None
    file, state = found
    refuse_stubs(state, file)
    params = TensorNames(_GPT_NAMES).rename(state)
    if _CAPTION not in state:
        config = _config(state, file, num_classes=get_tensor(state, _CLASSES, 2, file).shape[0] - 1)
        return RawCheckpoint(
            *("llamagen", config, unflatten(params, file), (file,), file.parent, "llamagen_class"),
            name_in_file=_NAMES.name_in_file,
        )
    width, uncond = get_tensor(state, _CAPTION, 2, file).shape[1], get_tensor(state, _UNCOND, 2, file)
    folder = _find_t5(file)
    t5, file_by_prefix = _read_t5(folder, width, file)
    with prefix_errors(folder / CONFIG_FILE):
        t5_config = T5Config.from_dict(read_config(folder) or {})
    config = _config(state, file, num_classes=0, cls_token_num=len(uncond), t5=t5_config)
    files = (file, *dict.fromkeys(file_by_prefix.values()))
    return RawCheckpoint(
        *("llamagen", config, unflatten(params | t5, file), files, folder, "llamagen_caption"),
        file_by_prefix={"": file, "t5/": folder} | file_by_prefix,
        name_in_file=_NAMES.name_in_file,
    )


def _config(state: Mapping[str, np.ndarray], file: Path, **options: Any) -> LlamaGenConfig:
    """The config that shapes and the name of the file tell."""
    vocab_size, dim = get_tensor(state, _GPT_TENSOR, 2, file).shape
    rows = get_tensor(state, "layers.0.attention.wqkv.weight", 2, file).shape[0]
    size = re.search(r"_(\d{3,4})(?=[_.]|$)", file.stem)
    if rows <= dim or (rows - dim) % 2:
        raise UserError(f"{file}: layers.0.attention.wqkv.weight has {rows} rows, {dim} and two equal parts are needed")
    with prefix_errors(file):
        return LlamaGenConfig(
            dim=dim,
            n_layer=max(1, count_numbered(state, "layers.{}.attention.wqkv.weight")),
            kv_dim=(rows - dim) // 2,
            hidden_dim=get_tensor(state, "layers.0.feed_forward.w1.weight", 2, file).shape[0],
            vocab_size=vocab_size,
            block_size=((int(size[1]) if size else _PIXELS) // _PIXELS_A_TOKEN) ** 2,
            **options,
        )


def _find_state(path: Path, names: tuple[str, ...], tensor: str) -> tuple[Path, dict[str, np.ndarray]] | None:
    """The file at `path`, or the one of these names in it, and its tensors, if `tensor` is among them."""
    files = [path] if not path.is_dir() else sorted(file for name in names for file in path.glob(name))
    found = []
    for file in files:
        if file.suffix in _SUFFIXES and file.is_file():
            content = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
            state = find_state(content)
            if isinstance(state, Mapping) and tensor in state:
                found.append((file, state))
    if len(found) > 1:
        listed = ", ".join(file.name for file, _ in found[:3])
        raise UserError(f"{path} holds several models ({listed}): name the file")
    return None if not found else (found[0][0], check_tensors(found[0][1], found[0][0]))


def _find_t5(file: Path) -> Path:
    """The folder of T5's encoder, next to the file of a model of captions."""
    for folder in sorted(folder for folder in file.parent.iterdir() if folder.is_dir()):
        values = read_config(folder)
        if values is not None and values.get("model_type") == "t5":
            return folder
    raise UserError(f"{file} reads captions ({_CAPTION}) through T5, which is not in {file.parent}: {_T5_ADVICE}")


def _read_t5(folder: Path, width: int, gpt: Path) -> tuple[dict[str, np.ndarray], dict[str, Path]]:
    """Parameters of T5's encoder, and the file of each."""
    files = find_weight_files(folder)
    if not files:
        raise UserError(f"{folder} lacks T5's weights: download them again")
    params: dict[str, np.ndarray] = {}
    file_by_prefix: dict[str, Path] = {}
    for file in files:
        found = TensorNames(_T5_NAMES).rename(read_tensors(file))
        params |= found
        file_by_prefix |= dict.fromkeys(found, file)
    table = params.get("t5/shared/embedding")
    if table is not None and table.shape[-1] != width:
        raise UserError(
            f"{file_by_prefix['t5/shared/embedding']}: shared.weight is {table.shape[-1]} wide, {_CAPTION} of {gpt} "
            f"reads {width}: this is another size of T5; {_T5_ADVICE}"
        )
    return params, file_by_prefix
