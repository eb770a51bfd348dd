"""min-dalle's PyTorch files of DALL-E mini and mega: `encoder.pt` and `decoder.pt`, and the VQGAN in `detoker.pt`.

The files say nothing but their tensors. They have the weights of DALL-E mini under other names, one set a layer, and
in float16. Sizes come from the shapes; the number of heads and the start token, which shapes do not tell, from a
JSON file beside them if there is one (`config.json` of DALL-E mini, or the arguments of min-dalle's classes in
`constructor_args.json`), else from what every published one has.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.checkpoints.own import read_json_object, unflatten
from dm_generations.models.checkpoints.source import Shape, Source
from dm_generations.models.checkpoints.taming import config_from_shapes, vqgan_in_file, vqgan_params
from dm_generations.models.checkpoints.torch_names import in_file, only_tensors, tensor
from dm_generations.models.checkpoints.torch_pickle import read_torch
from dm_generations.models.dalle_bart_config import DalleBartConfig

HEAD_WIDTH = 64  # of mini and mega
# What DALL-E mini starts from. min-dalle took image_vocab_count at first and 16,383 in its last version, which draw
# other pictures from the same weights.
CODE_COUNT = START_TOKEN = 16384
SIDE_FILES = ("config.json", "constructor_args.json")
DETOKER_FILE = "detoker.pt"
DETOKER_EPSILON = 1e-5  # PyTorch's default, where the original network has 1e-6

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


def generator(path: Path) -> Source | None:
    """The DALL-E of a folder with `encoder.pt` and `decoder.pt`, or of one of these files; names that end in `_mini`,
    as on the hub, name the smaller of two in a folder. None for anything else.
    """
    place = _place(path)
    if place is None:
        return None
    folder, suffix = place
    files = tuple(folder / f"{part}{suffix}.pt" for part in ("encoder", "decoder"))
    if not all(file.is_file() for file in files):
        return None
    encoder, decoder = (read_torch(file) for file in files)
    if not all(isinstance(state, Mapping) and "embed_tokens.weight" in state for state in (encoder, decoder)):
        return None
    config = dalle_bart_config(encoder, decoder, files, _side_values(folder))
    model = {
        "encoder": _stack_params(encoder, "FlaxBartEncoderLayer", files[0]),
        "decoder": _stack_params(decoder, "FlaxBartDecoderLayer", files[1]),
    }
    head = {"kernel": tensor(decoder, "lm_head.weight", 2, files[1]).T}
    params, places = {"model": model, "lm_head": head}, {"": files[1], "model/encoder/": files[0]}
    return Source("dalle_bart", config, params, files, _tokenizer(folder, suffix), "min_dalle", places, _in_file)


def codec(path: Path) -> Source | None:
    """The VQGAN of a folder with `detoker.pt`, or in such a file of any name; None for anything else."""
    file = path / DETOKER_FILE if path.is_dir() else path
    if file.suffix != ".pt" or not file.is_file():
        return None
    state = read_torch(file)
    if not isinstance(state, Mapping) or "embedding.weight" not in state or "post_quant_conv.weight" not in state:
        return None
    tensor(state, "embedding.weight", 2, file)
    state = {re.sub(r"^embedding\.", "quantize.embedding.", str(name)): value for name, value in state.items()}
    config = config_from_shapes(state, file, group_norm_eps=DETOKER_EPSILON)
    return Source("vqgan", config, vqgan_params(state, file), (file,), in_file=_detoker_in_file)


def dalle_bart_config(
    encoder: Mapping[str, np.ndarray],
    decoder: Mapping[str, np.ndarray],
    files: tuple[Path, Path],
    side_values: Mapping[str, Any],
) -> DalleBartConfig:
    """The config that the two state dicts tell, and `side_values` under the names of DALL-E mini or of min-dalle.

    Raises UserError if a tensor that tells a size is missing or has other axes than it should.
    """
    text_vocab_size, width = tensor(encoder, "embed_tokens.weight", 2, files[0]).shape
    image_vocab_size = tensor(decoder, "embed_tokens.weight", 2, files[1]).shape[0] - 1
    values = {
        "encoder_vocab_size": text_vocab_size,
        "image_vocab_size": image_vocab_size,
        "image_length": tensor(decoder, "embed_positions.weight", 2, files[1]).shape[0],
        "max_text_length": tensor(encoder, "embed_positions.weight", 2, files[0]).shape[0],
        "d_model": width,
        "use_scan": False,
        "force_ln_scale": "final_ln.weight" in decoder,  # saved again after loading: with the scales, all 1
        "decoder_start_token_id": min(START_TOKEN, image_vocab_size),
    }
    for part, state, file in (("encoder", encoder, files[0]), ("decoder", decoder, files[1])):
        layers = {match[1] for match in map(_LAYER.match, map(str, state)) if match}
        values[f"{part}_layers"] = max(1, len(layers))  # none of them may lack any tensor
        values[f"{part}_ffn_dim"] = tensor(state, "layers.0.glu.fc0.weight", 2, file).shape[0]
        values[f"{part}_attention_heads"] = max(1, width // HEAD_WIDTH)
    for name, name_in_min_dalle in (
        ("encoder_attention_heads", "attention_head_count"),
        ("decoder_attention_heads", "attention_head_count"),
        ("decoder_start_token_id", "bos_token"),
    ):
        values[name] = side_values.get(name, side_values.get(name_in_min_dalle, values[name]))
    # min-dalle draws among the first 16,384 ids, from whichever of the tokens above it starts.
    if image_vocab_size >= CODE_COUNT:
        values["image_code_count"] = CODE_COUNT
    try:
        return DalleBartConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{files[1]}: {error}") from error


def _place(path: Path) -> tuple[Path, str] | None:
    """The folder of a model, and what the names of its files end in; None for a file of another name."""
    if not path.is_dir():
        match = re.fullmatch(r"(?:encoder|decoder)(.*)\.pt", path.name)
        return (path.parent, match[1]) if match else None
    is_mini_alone = not (path / "encoder.pt").is_file() and (path / "encoder_mini.pt").is_file()
    return path, "_mini" if is_mini_alone else ""


def _tokenizer(folder: Path, suffix: str) -> Path | None:
    own = folder / f"vocab{suffix}.json"
    if suffix and own.is_file():
        return own
    return folder if (folder / "vocab.json").is_file() else None


def _side_values(folder: Path) -> dict[str, Any]:
    """What the first of SIDE_FILES says; nothing if there is none. Raises UserError for one that is no JSON object."""
    file = next((folder / name for name in SIDE_FILES if (folder / name).is_file()), None)
    return {} if file is None else read_json_object(file)


def _stack_params(state: Mapping[str, Any], layer: str, path: Path) -> dict:
    """Parameters of encoder or decoder, nested; `layer` is the name of their layers. Views of the arrays in `state`."""
    flat = {}
    for name, array in only_tensors(state, path).items():
        *modules, leaf = name.split(".")
        if name == "lm_head.weight" and layer == "FlaxBartDecoderLayer":
            continue  # which `generator` places
        modules = [(_MODULES | _GLU_MODULES).get(module, module) for module in modules]
        if modules[:1] == ["layers"] and len(modules) > 1:
            modules[1] = f"{layer}_{modules[1]}"
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "embedding" if modules[-1].startswith("embed_") else "kernel"
        flat["/".join([*modules, leaf])] = array.T if leaf == "kernel" else array
    return unflatten(flat, path)


def _in_file(path: str, shape: Shape) -> tuple[str, Shape]:
    *modules, leaf = re.sub(r"^model/(encoder|decoder)/|(?<=/)FlaxBart(En|De)coderLayer_(?=\d+/)", "", path).split("/")
    theirs = {ours: name for name, ours in (_GLU_MODULES if "GLU_0" in modules else _MODULES).items()}
    modules = ["glu" if module == "GLU_0" else theirs.get(module, module) for module in modules]
    return in_file("/".join([*modules, leaf]), shape)


def _detoker_in_file(path: str, shape: Shape) -> tuple[str, Shape]:
    return vqgan_in_file(path.removeprefix("quantize/"), shape)
