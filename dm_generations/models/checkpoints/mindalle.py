"""minDALL-E as Kakao Brain published it: `config.yaml`, `stage1_last.ckpt` (codec), `stage2_last.ckpt` (generator) and
`tokenizer/`, in a folder or in the .tar.gz of the download.

What config.yaml leaves out has the values of the 1.3B model (`dalle/utils/config.py` of kakaobrain/minDALL-E).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError, short_repr
from dm_generations.models.checkpoints.own import unflatten
from dm_generations.models.checkpoints.source import Shape, Source
from dm_generations.models.checkpoints.taming import config_from_yaml_values, read_yaml, vqgan_in_file, vqgan_params
from dm_generations.models.checkpoints.torch_names import count, in_file, numbers_apart, only_tensors
from dm_generations.models.checkpoints.torch_pickle import read_torch
from dm_generations.models.checkpoints.unpacked import is_archive, unpacked

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


def generator(path: Path) -> Source | None:
    """The text model in a folder, in its archive, or in the file `stage2_last.ckpt`; None if it is not there."""
    folder = _folder(path, STAGE2_FILE)
    if folder is None:
        return None
    from dm_generations.models.mindalle import MinDalleConfig

    file = folder / STAGE2_FILE
    stage = _section(_config_values(folder), "stage2", folder)
    if stage.get("type", "transformer1d") != "transformer1d":
        raise UserError(
            f"{folder / CONFIG_FILE}: stage2.type is {short_repr(stage['type'])}, only 'transformer1d' reads text"
        )
    config = MinDalleConfig.from_dict(stage | _section(stage, "hparams", folder))
    state = _state_of(file)
    found = count(state, "blocks.{}.ln1.weight")
    if found != config.n_layers:
        raise UserError(f"{file} has {found} blocks, {folder / CONFIG_FILE} says {config.n_layers}")
    files = (path,) if is_archive(path) else (file,)
    params = _transformer_params(state, file)
    return Source("mindalle", config, params, files, _tokenizer(folder), "mindalle", in_file=_in_file)


def codec(path: Path) -> Source | None:
    """The VQGAN in a folder, in its archive, or in the file `stage1_last.ckpt`; None if it is not there."""
    folder = _folder(path, STAGE1_FILE)
    if folder is None:
        return None
    file = folder / STAGE1_FILE
    stage = _section(_config_values(folder), "stage1", folder)
    sizes = _STAGE1_HPARAMS | _section(stage, "hparams", folder)
    try:
        config = config_from_yaml_values(
            {name: stage.get(name, size) for name, size in _STAGE1_DEFAULTS.items()} | {"hparams": sizes}
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_FILE} does not describe a VQGAN: {error}") from error
    files = (path,) if is_archive(path) else (file,)
    return Source("vqgan", config, vqgan_params(_state_of(file), file), files, in_file=vqgan_in_file)


def _folder(path: Path, weights: str) -> Path | None:
    """Where the file `weights` and the config lie, if `path` is a minDALL-E and has it."""
    if is_archive(path):
        folder = unpacked(path, _ARCHIVED)
    elif path.is_dir():
        folder = path
    else:
        folder = path.parent if path.name == weights else None
    return folder if folder is not None and (folder / weights).is_file() else None


def _config_values(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} lacks {CONFIG_FILE}: put the one that came with the weights there")
    return read_yaml(path)


def _section(values: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """The mapping `values[name]`, empty if it is not given. Raises UserError if it is something else."""
    section = values.get(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{folder / CONFIG_FILE}: {name} must hold names and values, not {short_repr(section)}")
    return section


def _state_of(file: Path) -> dict[str, np.ndarray]:
    content = read_torch(file)
    return only_tensors(content.get("state_dict", content) if isinstance(content, Mapping) else content, file)


def _transformer_params(state: Mapping[str, np.ndarray], path: Path) -> dict:
    """Parameters of `MinDalle` from the original's state dict: nested, views of its arrays."""
    flat = {}
    for name, array in state.items():
        *modules, leaf = re.sub(r"\.(\d+)(?=\.)", r"_\1", name).split(".")
        if leaf == "weight":
            is_table = bool(modules) and re.match(r"(tok|pos)_emb_", modules[-1])
            leaf = "scale" if array.ndim == 1 else "embedding" if is_table else "kernel"
        flat["/".join([*modules, leaf])] = array.T if leaf == "kernel" else array
    return unflatten(flat, path)


def _in_file(path: str, shape: Shape) -> tuple[str, Shape]:
    return in_file(numbers_apart(path), shape)


def _tokenizer(folder: Path) -> Path | None:
    """The folder `tokenizer`, an archive of it, or `folder` where its files lie beside the weights."""
    found = [folder / name for name in (TOKENIZER_FOLDER, *TOKENIZER_ARCHIVES) if (folder / name).exists()]
    if found:
        return found[0]
    return folder if (folder / TOKENIZER_FILES[0]).is_file() else None
