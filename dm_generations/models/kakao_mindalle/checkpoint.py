"""Checkpoints of minDALL-E, as Kakao Brain published it.

In a folder or in the .tar.gz of the download: `config.yaml`, `stage1_last.ckpt` (codec), `stage2_last.ckpt` (generator)
and `tokenizer/`. What config.yaml leaves out has the values of the 1.3B model (`dalle/utils/config.py` of
kakaobrain/minDALL-E).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError, short_repr
from dm_generations.models.base import RawCheckpoint, prefix_errors
from dm_generations.models.kakao_mindalle.network import KakaoMinDalleConfig
from dm_generations.models.vqgan.checkpoint import config_from_yaml_values, read_yaml, vqgan_name_in_file, vqgan_params
from dm_generations.weights.native import unflatten
from dm_generations.weights.state_dict import (
    Shape,
    check_tensors,
    count_numbered,
    find_state,
    join_list_indices,
    split_list_indices,
    torch_name,
)
from dm_generations.weights.tar import extract, is_archive
from dm_generations.weights.torch_file import read_torch

CONFIG_FILE, STAGE1_FILE, STAGE2_FILE = "config.yaml", "stage1_last.ckpt", "stage2_last.ckpt"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = ("bpe-16k-vocab.json", "bpe-16k-merges.txt")
TOKENIZER_ARCHIVES = ("tokenizer.tar.gz", "tokenizer.tgz")

_ARCHIVED = {name: name for name in (CONFIG_FILE, STAGE1_FILE, STAGE2_FILE)} | {
    name: f"{TOKENIZER_FOLDER}/{name}" for name in TOKENIZER_FILES
}
_STAGE1_DEFAULTS = {"embed_dim": 256, "n_embed": 16384}
_STAGE1_HPARAMS = {
    "z_channels": 256,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
}


def read_generator(path: Path) -> RawCheckpoint | None:
    """Read the text model in a folder, in its archive, or in `stage2_last.ckpt`; None if it is not there."""
    folder = _find_folder(path, STAGE2_FILE)
    if folder is None:
        return None
    file = folder / STAGE2_FILE
    stage = _section(_read_config_values(folder), "stage2", folder)
    if stage.get("type", "transformer1d") != "transformer1d":
        raise UserError(
            f"{folder / CONFIG_FILE}: stage2.type is {short_repr(stage['type'])}, only 'transformer1d' reads text"
        )
    with prefix_errors(folder / CONFIG_FILE):
        config = KakaoMinDalleConfig.from_dict(stage | _section(stage, "hparams", folder))
    state = _read_state(file)
    found = count_numbered(state, "blocks.{}.ln1.weight")
    if found != config.n_layers:
        raise UserError(f"{file} has {found} blocks, {folder / CONFIG_FILE} says {config.n_layers}")
    files = (path,) if is_archive(path) else (file,)
    params = _transformer_params(state, file)
    tokenizer = _find_tokenizer(folder)
    return RawCheckpoint("mindalle", config, params, files, tokenizer, "mindalle", name_in_file=_name_in_file)


def read_codec(path: Path) -> RawCheckpoint | None:
    """Read the VQGAN in a folder, in its archive, or in `stage1_last.ckpt`; None if it is not there."""
    folder = _find_folder(path, STAGE1_FILE)
    if folder is None:
        return None
    file = folder / STAGE1_FILE
    stage = _section(_read_config_values(folder), "stage1", folder)
    sizes = _STAGE1_HPARAMS | _section(stage, "hparams", folder)
    with prefix_errors(folder / CONFIG_FILE):
        config = config_from_yaml_values(
            {name: stage.get(name, size) for name, size in _STAGE1_DEFAULTS.items()} | {"hparams": sizes}
        )
    files = (path,) if is_archive(path) else (file,)
    params = vqgan_params(_read_state(file), file)
    return RawCheckpoint("vqgan", config, params, files, name_in_file=vqgan_name_in_file)


def _find_folder(path: Path, weights: str) -> Path | None:
    """The folder of the file `weights` and the config, if `path` is a minDALL-E that has it."""
    if is_archive(path):
        folder = extract(path, _ARCHIVED)
    elif path.is_dir():
        folder = path
    elif path.name == weights:
        folder = path.parent
    else:
        return None
    return folder if (folder / weights).is_file() else None


def _read_config_values(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} lacks {CONFIG_FILE}: put the one that came with the weights there")
    return read_yaml(path)


def _section(values: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """The mapping `values[name]`, empty if there is none. Raises UserError if it is something else."""
    section = values.get(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{folder / CONFIG_FILE}: {name} must hold names and values, not {short_repr(section)}")
    return section


def _read_state(file: Path) -> dict[str, np.ndarray]:
    return check_tensors(find_state(read_torch(file)), file)


def _transformer_params(state: Mapping[str, np.ndarray], path: Path) -> dict:
    """Parameters of `KakaoMinDalle` from the original's state dict: nested, views of its arrays."""
    flat = {}
    for name, array in state.items():
        *modules, leaf = join_list_indices(name).split(".")
        if leaf == "weight":
            is_table = bool(modules) and re.match(r"(tok|pos)_emb_", modules[-1])
            leaf = "scale" if array.ndim == 1 else "embedding" if is_table else "kernel"
        flat["/".join([*modules, leaf])] = array.T if leaf == "kernel" else array
    return unflatten(flat, path)


def _name_in_file(path: str, shape: Shape) -> tuple[str, Shape]:
    return torch_name(split_list_indices(path), shape)


def _find_tokenizer(folder: Path) -> Path | None:
    """The folder `tokenizer`, an archive of it, or `folder` if it holds the tokenizer's files itself."""
    found = [folder / name for name in (TOKENIZER_FOLDER, *TOKENIZER_ARCHIVES) if (folder / name).exists()]
    if found:
        return found[0]
    return folder if (folder / TOKENIZER_FILES[0]).is_file() else None
