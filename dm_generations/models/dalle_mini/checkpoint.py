"""Checkpoints of DALL-E mini and mega: the Flax folder of dalle-mini, and min-dalle's PyTorch files.

A Flax folder has `config.json` and `flax_model.msgpack`, with names as our network has them.

min-dalle's `encoder.pt` and `decoder.pt` hold nothing but tensors: the same weights under other names, one set a layer,
and in float16. Sizes come from the shapes; the number of heads and the start token, which shapes do not tell, from a
JSON file in the same folder if there is one (`config.json` of DALL-E mini, or the arguments of min-dalle's classes in
`constructor_args.json`), else from what every published one has.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.base import RawCheckpoint, prefix_errors
from dm_generations.models.dalle_mini.config import DalleBartConfig, config_for_params
from dm_generations.weights.flax_msgpack import read_flax_msgpack
from dm_generations.weights.native import FORMAT, read_config, read_json_object, unflatten
from dm_generations.weights.state_dict import Shape, check_tensors, find_state, get_tensor, torch_name
from dm_generations.weights.torch_file import read_torch

FLAX_FILE = "flax_model.msgpack"
HEAD_WIDTH = 64  # of mini and mega
# What DALL-E mini starts from. min-dalle took image_vocab_count at first and 16,383 in its last version, which sample
# other images from the same weights.
TOKEN_COUNT = START_TOKEN = 16384
SIDE_FILES = ("config.json", "constructor_args.json")

_LAYER = re.compile(r"layers\.(\d{1,9})\.")
_MODULES = {
    "self_attn": "FlaxBartAttention_0",
    "encoder_attn": "FlaxBartAttention_1",
    "pre_self_attn_layer_norm": "LayerNorm_0",
    "self_attn_layer_norm": "LayerNorm_1",
    "pre_encoder_attn_layer_norm": "LayerNorm_2",
    "encoder_attn_layer_norm": "LayerNorm_3",
    "glu": "GLU_0",
}
_GLU_MODULES = {
    "ln0": "LayerNorm_0",
    "fc0": "Dense_0",
    "fc1": "Dense_1",
    "ln1": "LayerNorm_1",
    "fc2": "Dense_2",
}


def read_flax(path: Path) -> RawCheckpoint | None:
    """Read the Flax folder of a DALL-E mini or mega; None for anything else."""
    values = read_config(path)
    if values is None or values.get("model_type") != "dallebart" or values.get("format") == FORMAT:
        return None
    weights = path / FLAX_FILE
    if not weights.is_file():
        raise UserError(f"{path} lacks its weights: {FLAX_FILE}")
    params = read_flax_msgpack(weights)
    config = config_for_params(DalleBartConfig.from_dict(values), params)
    style = "dalle_mini" if config.normalize_text else "dalle_bart"
    return RawCheckpoint("dalle_bart", config, params, (weights,), path, style)


def read_min_dalle(path: Path) -> RawCheckpoint | None:
    """Read the DALL-E of a folder with `encoder.pt` and `decoder.pt`, or of one of these files.

    Names that end in `_mini`, as on the hub, are those of the smaller of two models in a folder.

    Returns:
        None for anything else.
    """
    found = _find_files(path)
    if found is None:
        return None
    folder, suffix = found
    files = folder / f"encoder{suffix}.pt", folder / f"decoder{suffix}.pt"
    if not all(file.is_file() for file in files):
        return None
    contents = [find_state(read_torch(file)) for file in files]
    if not all(isinstance(state, Mapping) and "embed_tokens.weight" in state for state in contents):
        return None
    encoder, decoder = (check_tensors(state, file) for state, file in zip(contents, files, strict=True))
    config = min_dalle_config(encoder, decoder, files, _read_side_values(folder))
    model = {
        "encoder": _stack_params(encoder, "FlaxBartEncoderLayer", files[0]),
        "decoder": _stack_params(decoder, "FlaxBartDecoderLayer", files[1]),
    }
    head = {"kernel": get_tensor(decoder, "lm_head.weight", 2, files[1]).T}
    return RawCheckpoint(
        "dalle_bart",
        config,
        {"model": model, "lm_head": head},
        files,
        _find_tokenizer(folder, suffix),
        "min_dalle",
        {"": files[1], "model/encoder/": files[0]},
        _name_in_file,
    )


def min_dalle_config(
    encoder: Mapping[str, np.ndarray],
    decoder: Mapping[str, np.ndarray],
    files: tuple[Path, Path],
    side_values: Mapping[str, Any],
) -> DalleBartConfig:
    """Return the config that the tensors tell.

    Args:
        encoder: State dict of `encoder.pt`.
        decoder: State dict of `decoder.pt`.
        files: These two, for messages.
        side_values: What a JSON file says, under the names of DALL-E mini or of min-dalle.

    Raises:
        UserError: A tensor that tells a size is missing or has other axes than it should.
    """
    text_vocab_size, width = get_tensor(encoder, "embed_tokens.weight", 2, files[0]).shape
    image_vocab_size = get_tensor(decoder, "embed_tokens.weight", 2, files[1]).shape[0] - 1
    values: dict[str, Any] = {
        "encoder_vocab_size": text_vocab_size,
        "image_vocab_size": image_vocab_size,
        "image_length": get_tensor(decoder, "embed_positions.weight", 2, files[1]).shape[0],
        "max_text_length": get_tensor(encoder, "embed_positions.weight", 2, files[0]).shape[0],
        "d_model": width,
        "use_scan": False,
        "force_ln_scale": "final_ln.weight" in decoder,  # saved again after loading: with the scales, all 1
        "decoder_start_token_id": min(START_TOKEN, image_vocab_size),
    }
    for part, state, file in (("encoder", encoder, files[0]), ("decoder", decoder, files[1])):
        layers = {match[1] for match in map(_LAYER.match, state) if match}
        values[f"{part}_layers"] = max(1, len(layers))  # none of them may lack any tensor
        values[f"{part}_ffn_dim"] = get_tensor(state, "layers.0.glu.fc0.weight", 2, file).shape[0]
        values[f"{part}_attention_heads"] = max(1, width // HEAD_WIDTH)
    for name, name_in_min_dalle in (
        ("encoder_attention_heads", "attention_head_count"),
        ("decoder_attention_heads", "attention_head_count"),
        ("decoder_start_token_id", "bos_token"),
    ):
        values[name] = side_values.get(name, side_values.get(name_in_min_dalle, values[name]))
    # min-dalle samples from the first 16,384 ids, whichever of the tokens above it starts with.
    if image_vocab_size >= TOKEN_COUNT:
        values["image_code_count"] = TOKEN_COUNT
    with prefix_errors(files[1]):
        return DalleBartConfig.from_dict(values)


def _find_files(path: Path) -> tuple[Path, str] | None:
    """The folder of a model, and what the names of its files end in; None for a file of another name."""
    if not path.is_dir():
        match = re.fullmatch(r"(?:encoder|decoder)(.*)\.pt", path.name)
        return (path.parent, match[1]) if match else None
    is_mini_alone = not (path / "encoder.pt").is_file() and (path / "encoder_mini.pt").is_file()
    return path, "_mini" if is_mini_alone else ""


def _find_tokenizer(folder: Path, suffix: str) -> Path | None:
    own = folder / f"vocab{suffix}.json"
    if suffix and own.is_file():
        return own
    return folder if (folder / "vocab.json").is_file() else None


def _read_side_values(folder: Path) -> dict[str, Any]:
    """What the first of SIDE_FILES says, nothing if there is none. Raises UserError if it is not a JSON object."""
    file = next((folder / name for name in SIDE_FILES if (folder / name).is_file()), None)
    return {} if file is None else read_json_object(file)


def _stack_params(state: Mapping[str, np.ndarray], layer: str, path: Path) -> dict:
    """Parameters of encoder or decoder, nested: views of the arrays in `state`. `layer` is the name of the layers."""
    flat = {}
    for name, array in state.items():
        *modules, leaf = name.split(".")
        if name == "lm_head.weight" and layer == "FlaxBartDecoderLayer":
            continue  # belongs to no stack
        modules = [(_MODULES | _GLU_MODULES).get(module, module) for module in modules]
        if modules[:1] == ["layers"] and len(modules) > 1:
            modules[1] = f"{layer}_{modules[1]}"
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "embedding" if modules[-1].startswith("embed_") else "kernel"
        flat["/".join([*modules, leaf])] = array.T if leaf == "kernel" else array
    return unflatten(flat, path)


def _name_in_file(path: str, shape: Shape) -> tuple[str, Shape]:
    *modules, leaf = re.sub(r"^model/(encoder|decoder)/|(?<=/)FlaxBart(En|De)coderLayer_(?=\d+/)", "", path).split("/")
    theirs = {ours: name for name, ours in (_GLU_MODULES if "GLU_0" in modules else _MODULES).items()}
    modules = ["glu" if module == "GLU_0" else theirs.get(module, module) for module in modules]
    return torch_name("/".join([*modules, leaf]), shape)
