"""The weights of DALLE-pytorch's own discrete VAE: `vae.pt` of its trainer, or what a `dalle.pt` holds under `vae.`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dm_generations.errors import UserError
from dm_generations.models.checkpoints.own import unflatten
from dm_generations.models.checkpoints.source import Shape, Source
from dm_generations.models.checkpoints.torch_names import convolution_kernel, in_file, numbers_apart, only_tensors
from dm_generations.models.checkpoints.torch_pickle import read_torch
from dm_generations.models.discrete_vae import DiscreteVAEConfig


def codec(path: Path) -> Source | None:
    """The VAE in a `vae.pt`, the file itself or in its folder; None for anything else."""
    file = path / "vae.pt" if path.is_dir() else path
    if file.suffix != ".pt" or not file.is_file():
        return None
    content = read_torch(file)
    if not isinstance(content, Mapping) or "hparams" not in content or "weights" not in content:
        return None
    state = content["weights"]
    if not isinstance(state, Mapping) or "codebook.weight" not in state:
        return None
    config = discrete_vae_config(content["hparams"], file)
    return Source("discrete_vae", config, discrete_vae_params(state, file), (file,), in_file=discrete_vae_in_file)


def discrete_vae_config(values: Any, path: Path) -> DiscreteVAEConfig:
    """The config in the `vae_params` of a `dalle.pt` or the `hparams` of a `vae.pt`; UserError if it is none."""
    if not isinstance(values, Mapping):
        raise UserError(f"{path} does not say the sizes of its discrete VAE")
    try:
        return DiscreteVAEConfig.from_dict(dict(values))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a discrete VAE: {error}") from error


def discrete_vae_in_file(path: str, shape: Shape, prefix: str = "") -> tuple[str, Shape]:
    """What the file calls the parameter of this path of `DiscreteVAE`, after `prefix`, and the shape it has there."""
    return in_file(numbers_apart(path), shape, prefix)


def discrete_vae_params(state: Mapping[str, Any], path: Path) -> dict:
    """Parameters of `DiscreteVAE` from its state dict: nested, views of the arrays in `state`.

    path: the file, for messages. Raises UserError for what is no tensor.
    """
    flat = {}
    for name, array in only_tensors(state, path).items():
        # The layers of encoder and decoder keep their numbers as names; further numbers are joined on with "_".
        *modules, leaf = re.sub(r"(?<!^encoder)(?<!^decoder)\.(\d+)(?=\.)", r"_\1", name).split(".")
        if leaf == "weight":
            leaf = "kernel" if array.ndim == 4 else "embedding"
        # The same axes for the transposed convolutions, whose weights have input and output channels swapped: the
        # network asks for their kernels that way.
        flat["/".join([*modules, leaf])] = convolution_kernel(array)
    return unflatten(flat, path)
