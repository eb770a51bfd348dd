"""Checkpoints of discrete VAEs.

DALLE-pytorch's own: `vae.pt` of its trainer, or what a `dalle.pt` holds under `vae.`. OpenAI's: `encoder.pkl` and
`decoder.pkl`, each a pickled module, of which only the tensors are read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.base import RawCheckpoint, prefix_errors
from dm_generations.models.dvae.discrete import DiscreteVAEConfig
from dm_generations.models.dvae.openai import OpenAIVAEConfig
from dm_generations.weights.native import unflatten
from dm_generations.weights.state_dict import (
    Shape,
    check_tensors,
    convolution_kernel,
    count_numbered,
    find_state,
    get_tensor,
    split_list_indices,
    torch_name,
)
from dm_generations.weights.torch_file import read_torch, state_of
from dm_generations.weights.unpickler import Opaque

ENCODER_FILE, DECODER_FILE = "encoder.pkl", "decoder.pkl"


def read_discrete_vae(path: Path) -> RawCheckpoint | None:
    """Read DALLE-pytorch's VAE in a `vae.pt`, the file itself or in its folder; None for anything else."""
    file = path / "vae.pt" if path.is_dir() else path
    if file.suffix != ".pt" or not file.is_file():
        return None
    content = read_torch(file)
    if not isinstance(content, Mapping) or "hparams" not in content or "weights" not in content:
        return None
    state = find_state(content["weights"])
    if not isinstance(state, Mapping) or "codebook.weight" not in state:
        return None
    config = discrete_vae_config(content["hparams"], file)
    params = discrete_vae_params(state, file)
    return RawCheckpoint("discrete_vae", config, params, (file,), name_in_file=discrete_vae_name_in_file)


def discrete_vae_config(values: Any, path: Path) -> DiscreteVAEConfig:
    """Return the config of DALLE-pytorch's VAE.

    Args:
        values: `vae_params` of a `dalle.pt`, or `hparams` of a `vae.pt`.
        path: The file, for messages.

    Raises:
        UserError: The values are not a config.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path} does not say the sizes of its discrete VAE")
    with prefix_errors(path):
        return DiscreteVAEConfig.from_dict(dict(values))


def discrete_vae_params(state: Mapping[str, Any], path: Path) -> dict:
    """Convert the state dict of DALLE-pytorch's VAE.

    Args:
        state: Tensors by name.
        path: The file, for messages.

    Returns:
        Parameters of `DiscreteVAE`: nested, views of the arrays in `state`.

    Raises:
        UserError: A value is not a tensor.
    """
    flat = {}
    for name, array in check_tensors(state, path).items():
        # The layers of encoder and decoder keep their numbers as names; further numbers are joined with "_".
        *modules, leaf = re.sub(r"(?<!^encoder)(?<!^decoder)\.(\d+)(?=\.)", r"_\1", name).split(".")
        if leaf == "weight":
            leaf = "kernel" if array.ndim == 4 else "embedding"
        # The same axes for the transposed convolutions, whose weights have input and output channels swapped: the
        # network asks for their kernels that way.
        flat["/".join([*modules, leaf])] = convolution_kernel(array)
    return unflatten(flat, path)


def discrete_vae_name_in_file(path: str, shape: Shape, prefix: str = "") -> tuple[str, Shape]:
    """Return name and shape in the file of a parameter of `DiscreteVAE`; `prefix` precedes the name."""
    return torch_name(split_list_indices(path), shape, prefix)


def read_openai_vae(path: Path) -> RawCheckpoint | None:
    """Read OpenAI's VAE: a folder with `decoder.pkl`, or that file, and `encoder.pkl` if it is in the same folder.

    Returns:
        None for anything else.
    """
    folder = path if path.is_dir() else path.parent
    if path != folder and path.name not in (ENCODER_FILE, DECODER_FILE):
        return None
    decoder_file, encoder_file = folder / DECODER_FILE, folder / ENCODER_FILE
    if not decoder_file.is_file():
        if encoder_file.is_file() and _read_openai_state(encoder_file) is not None:
            raise UserError(f"{folder} lacks {DECODER_FILE}: {ENCODER_FILE} alone makes no images")
        return None
    decoder = _read_openai_state(decoder_file)
    if decoder is None:
        return None
    files: tuple[Path, ...] = (decoder_file,)
    config = openai_vae_config(decoder, decoder_file)
    params = {"decoder": openai_vae_params(decoder, decoder_file)}
    if encoder_file.is_file():
        encoder = _read_openai_state(encoder_file)
        if encoder is None:
            raise UserError(f"{encoder_file} is not the encoder that belongs to {DECODER_FILE}")
        files = (decoder_file, encoder_file)
        params["encoder"] = openai_vae_params(encoder, encoder_file)
    file_by_prefix = {"": decoder_file, "encoder/": encoder_file}
    return RawCheckpoint(
        "openai_vae", config, params, files, file_by_prefix=file_by_prefix, name_in_file=openai_vae_name_in_file
    )


def openai_vae_config(decoder: Mapping[str, np.ndarray], path: Path, prefix: str = "") -> OpenAIVAEConfig:
    """Return the config that the decoder's tensors tell; the size of the image, which they do not tell, is OpenAI's.

    Args:
        decoder: Tensors by name.
        path: The file, for messages.
        prefix: What precedes the names in the file, for messages.

    Raises:
        UserError: A tensor that tells a size is missing or has other axes than it should.
    """
    n_init, vocab_size = get_tensor(decoder, "blocks.input.w", 4, path, prefix).shape[:2]
    n_hid = get_tensor(decoder, "blocks.output.conv.w", 4, path, prefix).shape[1]
    blocks = count_numbered(decoder, "blocks.group_1.block_{}.res_path.conv_1.w", first=1)
    with prefix_errors(path):
        return OpenAIVAEConfig(n_hid, n_init, max(1, blocks), vocab_size)


def openai_vae_params(state: Mapping[str, Any], path: Path) -> dict:
    """Convert the state dict of OpenAI's encoder or decoder.

    Args:
        state: Tensors by name.
        path: The file, for messages.

    Returns:
        Parameters of `openai.Encoder` or `openai.Decoder`: nested, views of the arrays in `state`.

    Raises:
        UserError: A value is not a tensor.
    """
    flat = {}
    for name, array in check_tensors(state, path).items():
        *modules, leaf = name.removeprefix("blocks.").replace("output.conv.", "output.").split(".")
        modules = [module for module in modules if module != "res_path"]
        flat["/".join([*modules, {"w": "kernel", "b": "bias"}.get(leaf, leaf)])] = convolution_kernel(array)
    return unflatten(flat, path)


def openai_vae_name_in_file(path: str, shape: Shape, decoder: str = "", encoder: str = "") -> tuple[str, Shape]:
    """Return name and shape, in the file, of the parameter of this path.

    Args:
        path: Of the parameter.
        shape: Of the parameter.
        decoder: What precedes the names of the decoder's tensors in the file.
        encoder: What precedes the names of the encoder's tensors in the file.
    """
    part, path = path.split("/", 1)
    path = re.sub(r"(?<=/)(?=conv_\d+/)", "res_path/", path).replace("output/", "output/conv/")
    name, shape = torch_name(f"blocks/{path}", shape, encoder if part == "encoder" else decoder)
    return re.sub(r"\.weight$", ".w", re.sub(r"\.bias$", ".b", name)), shape


def _read_openai_state(file: Path) -> dict[str, np.ndarray] | None:
    """The tensors of a pickled encoder or decoder by name, or of its state dict; None for anything else."""
    content = read_torch(file)
    if not isinstance(content, dict | Opaque):
        return None
    with prefix_errors(file):
        state = find_state(state_of(content))
    return state if "blocks.input.w" in state else None
