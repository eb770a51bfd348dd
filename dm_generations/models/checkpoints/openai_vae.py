"""OpenAI's discrete VAE: `encoder.pkl` and `decoder.pkl`, each a pickled module, of which only the tensors are read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.checkpoints.inert_pickle import Opaque
from dm_generations.models.checkpoints.own import unflatten
from dm_generations.models.checkpoints.source import Shape, Source
from dm_generations.models.checkpoints.torch_names import convolution_kernel, count, in_file, only_tensors, tensor
from dm_generations.models.checkpoints.torch_pickle import read_torch, state_of
from dm_generations.models.openai_vae import OpenAIVAEConfig

ENCODER_FILE, DECODER_FILE = "encoder.pkl", "decoder.pkl"


def codec(path: Path) -> Source | None:
    """The VAE of a folder with `decoder.pkl`, or of that file; `encoder.pkl` is read where it lies beside it."""
    folder = path if path.is_dir() else path.parent
    if path != folder and path.name not in (ENCODER_FILE, DECODER_FILE):
        return None
    decoder_file, encoder_file = folder / DECODER_FILE, folder / ENCODER_FILE
    if not decoder_file.is_file():
        if encoder_file.is_file() and _state(encoder_file) is not None:
            raise UserError(f"{folder} lacks {DECODER_FILE}: {ENCODER_FILE} alone makes no pictures")
        return None
    decoder = _state(decoder_file)
    if decoder is None:
        return None
    files, encoder = (decoder_file,), None
    if encoder_file.is_file():
        files, encoder = (decoder_file, encoder_file), _state(encoder_file)
        if encoder is None:
            raise UserError(f"{encoder_file} is not the encoder that belongs to {DECODER_FILE}")
    config = openai_vae_config(decoder, decoder_file)
    params = {"decoder": openai_vae_params(decoder, decoder_file)}
    if encoder is not None:
        params["encoder"] = openai_vae_params(encoder, encoder_file)
    places = {"": decoder_file, "encoder/": encoder_file}
    return Source("openai_vae", config, params, files, places=places, in_file=openai_vae_in_file)


def openai_vae_config(decoder: Mapping[str, np.ndarray], path: Path, prefix: str = "") -> OpenAIVAEConfig:
    """The config that the decoder's tensors tell; the picture's size, which they do not, is that of OpenAI's.

    prefix: what stands before the names in the file, for messages
    """
    n_init, vocab_size = tensor(decoder, "blocks.input.w", 4, path, prefix).shape[:2]
    n_hid = tensor(decoder, "blocks.output.conv.w", 4, path, prefix).shape[1]
    blocks = count(decoder, "blocks.group_1.block_{}.res_path.conv_1.w", first=1)
    try:
        return OpenAIVAEConfig(n_hid, n_init, max(1, blocks), vocab_size)
    except ValueError as error:
        raise UserError(f"{path} is no decoder of OpenAI's discrete VAE: {error}") from error


def openai_vae_params(state: Mapping[str, Any], path: Path) -> dict:
    """Parameters of `Encoder` or `Decoder` from the state dict of OpenAI's: nested, views of the arrays in `state`."""
    flat = {}
    for name, array in only_tensors(state, path).items():
        *modules, leaf = name.removeprefix("blocks.").replace("output.conv.", "output.").split(".")
        modules = [module for module in modules if module != "res_path"]
        flat["/".join([*modules, {"w": "kernel", "b": "bias"}.get(leaf, leaf)])] = convolution_kernel(array)
    return unflatten(flat, path)


def openai_vae_in_file(path: str, shape: Shape, decoder: str = "", encoder: str = "") -> tuple[str, Shape]:
    """What the file calls the parameter of this path, and the shape that it has there.

    decoder, encoder: what the names of these two begin with
    """
    part, path = path.split("/", 1)
    path = re.sub(r"(?<=/)(?=conv_\d+/)", "res_path/", path).replace("output/", "output/conv/")
    name, shape = in_file(f"blocks/{path}", shape, encoder if part == "encoder" else decoder)
    return re.sub(r"\.weight$", ".w", re.sub(r"\.bias$", ".b", name)), shape


def _state(file: Path) -> dict[str, np.ndarray] | None:
    """The tensors of a pickled encoder or decoder by name, or of its state dict; None for anything else."""
    content = read_torch(file)
    if not isinstance(content, dict | Opaque):
        return None
    try:
        state = state_of(content)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return state if "blocks.input.w" in state else None
