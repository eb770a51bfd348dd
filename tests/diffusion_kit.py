"""A diffusion decoder with random weights, in files as guided-diffusion's trainers write them."""

import functools
import json
import re
from pathlib import Path

import numpy as np
from codec_kit import random_params
from torch_files import Call, Global, Storage, Tensor, save, tensor

from dm_generations.models.diffusion_decoder.network import DiffusionDecoderConfig

# Of the tiny codec's 4x4 tokens, with vectors of 4 numbers.
TINY = DiffusionDecoderConfig(
    image_size=4,
    num_channels=32,
    level_channels=(32, 32),
    attention_levels=(1,),
    num_res_blocks=1,
    emb_input_dims=4,
    emb_output_dims=32,
    num_head_channels=16,
)
OPTIONS = ("image_size", "num_heads", "num_head_channels", "use_new_attention_order", "noise_schedule")


def torch_state(config: DiffusionDecoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under the names and in the layouts of the original."""
    return dict(_torch_state(config, seed))


@functools.cache
def _torch_state(config: DiffusionDecoderConfig, seed: int) -> dict[str, np.ndarray]:
    state = {}
    for path, array in random_params("diffusion_decoder", config, seed).items():
        name = re.sub(r"_(?=\d)", ".", path).replace("/", ".")
        name = re.sub(r"\.(kernel|scale)$", ".weight", name)
        state[name] = array.T if array.ndim < 4 else array.transpose(3, 2, 0, 1)
    return state


def two_storages(state: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Tensors as the fp16 trainer saves them: views of two storages, one of all vectors and one of all others."""
    tensors = {}
    for names in ([n for n in state if state[n].ndim < 2], [n for n in state if state[n].ndim >= 2]):
        storage = Storage(np.concatenate([state[name].reshape(-1) for name in names]))
        offset = 0
        for name in names:
            shape = state[name].shape
            strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
            tensors[name] = Tensor(storage, offset, shape, strides)
            offset += state[name].size
    return {name: tensors[name] for name in state}


def parameters(state: dict[str, np.ndarray]) -> dict[str, Call]:
    """Tensors as the fp32 trainer saves them."""
    hooks = Call(Global("collections", "OrderedDict"))
    rebuild = Global("torch._utils", "_rebuild_parameter")
    return {name: Call(rebuild, (tensor(array), True, hooks)) for name, array in state.items()}


def tiny_decoder(folder: Path, config: DiffusionDecoderConfig = TINY, seed: int = 0) -> Path:
    """A file of a decoder, with the JSON that says what its tensors do not; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({name: getattr(config, name) for name in OPTIONS}))
    return save(folder / "model-latest.pt", two_storages(torch_state(config, seed)))
