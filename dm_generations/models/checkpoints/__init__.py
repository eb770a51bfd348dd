"""Model folders to parameter trees, and back: the format is recognised by what lies in the folder.

Our own folder is `config.json` (with `"format": "dm-generations"` and the kind of network) and `model.safetensors`,
whose tensors are named by their path in the parameter tree, `decoder/conv_in/kernel`. Flax folders of vqgan-jax and
dalle-mini (`flax_model.msgpack`) and CLIP folders of transformers (`model.safetensors`) load as they are.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from dm_generations.errors import UserError
from dm_generations.files import write_atomic
from dm_generations.models.checkpoints import clip_torch, flax_msgpack

FORMAT = "dm-generations"
EMBEDDED = Path(__file__).resolve().parents[2] / "embedded"
WEIGHT_FILES = ("model.safetensors", "flax_model.msgpack")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model as it lies on disk."""

    kind: str  # "vqgan", "dalle_bart" or "clip"
    config: Any  # VQGANConfig, DalleBartConfig or CLIPConfig
    params: dict  # nested, Flax names; float32 NumPy arrays
    name: str  # "embedded/vqgan", or the folder's name
    sha256: str  # hex, of the weight file
    folder: Path


def flatten(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """{"a": {"b": x}} to {"a/b": x}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: dict[str, np.ndarray]) -> dict:
    """{"a/b": x} to {"a": {"b": x}}."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def load(spec: str | os.PathLike | None, kind: str) -> Checkpoint:
    """The `kind` of model ("vqgan", "dalle_bart", "clip") in the folder `spec`; None is the embedded one.

    Raises UserError when the folder lacks a file, holds another kind of model, or when a tensor is missing,
    unexpected or of another shape than the config says.
    """
    folder = EMBEDDED / kind if spec is None else Path(spec)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    config_file = folder / "config.json"
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if not config_file.is_file():
        raise UserError(f"{folder} lacks config.json, so it is not a model folder")
    if weights is None:
        raise UserError(f"{folder} lacks its weights: {' or '.join(WEIGHT_FILES)}")
    try:
        values = json.loads(config_file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{config_file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{config_file} must hold a JSON object")
    found = _kind(values)
    if found != kind:
        raise UserError(f"{folder} holds a {found or 'model of an unknown kind'}; a {kind} is needed here")
    params = _read_weights(weights, is_torch=kind == "clip" and values.get("format") != FORMAT)
    try:
        config, shapes = _NETWORKS[kind](values, params)
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"{config_file} does not describe a {kind}: {error}") from error
    check_names_and_shapes(shapes, params, weights)
    name = f"embedded/{kind}" if spec is None else folder.resolve().name
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Checkpoint(kind, config, params, name, digest, folder)


def check_names_and_shapes(expected: dict[str, tuple], params: dict, path: Path) -> None:
    """Raises UserError naming the first tensors that are missing, unexpected or misshapen."""
    found = flatten(params)
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    for what, names in (("lacks", missing), ("has unexpected", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{path} {what} {', '.join(names[:3])}{more}; its config.json describes another model")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(f"{path}: {name} has shape {found[name].shape}, its config.json asks for {shape}")


def _kind(values: dict) -> str | None:
    if values.get("format") == FORMAT:
        kind = values.get("kind")
        return kind if kind in _NETWORKS else None
    if "n_embed" in values and "ch_mult" in values:
        return "vqgan"
    return {"dallebart": "dalle_bart", "clip": "clip"}.get(values.get("model_type"))


def _read_weights(path: Path, is_torch: bool) -> dict:
    if path.name == "flax_model.msgpack":
        tree = flax_msgpack.read_flax_msgpack(path)
        return unflatten({name: np.asarray(value, np.float32) for name, value in flatten(tree).items()})
    try:
        flat = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    flat = {name: value.astype(np.float32) for name, value in flat.items()}
    return clip_torch.flax_from_torch(flat) if is_torch else unflatten(flat)


def _vqgan(values: dict, params: dict) -> tuple[Any, dict]:
    from dm_generations.models.vqgan import VQGAN, VQGANConfig

    config = VQGANConfig.from_dict(values)
    return config, _shapes(VQGAN(config), ((1, config.resolution, config.resolution, 3), "float32"))


def _dalle_bart(values: dict, params: dict) -> tuple[Any, dict]:
    from dm_generations.models.dalle_bart import DalleBart, DalleBartConfig, config_for_params

    config = config_for_params(DalleBartConfig.from_dict(values), params)
    text = ((1, config.max_text_length), "int32")
    return config, _shapes(DalleBart(config), text, text, ((1, config.image_length), "int32"))


def _clip(values: dict, params: dict) -> tuple[Any, dict]:
    from dm_generations.models.clip import CLIP, CLIPConfig

    config = CLIPConfig.from_dict(values)
    size = config.vision_config.image_size
    text = ((1, config.text_config.max_position_embeddings), "int32")
    return config, _shapes(CLIP(config), ((1, size, size, 3), "float32"), text, text)


_NETWORKS = {"vqgan": _vqgan, "dalle_bart": _dalle_bart, "clip": _clip}


def _shapes(model: Any, *inputs: tuple[tuple, str]) -> dict[str, tuple]:
    """The shape of each parameter that the network asks for, by path; nothing is computed."""
    import jax

    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs]
    tree = jax.eval_shape(model.init, jax.random.key(0), *arrays)["params"]
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def save(folder: Path, kind: str, config: dict, params: dict, dtype: np.dtype | type = np.float32) -> None:
    """Write our own folder: `config.json` and `model.safetensors` with floating tensors as `dtype`.

    `config` is plain JSON data of the network's config; `params` a nested dict of arrays. Each file lands by rename.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {path: np.asarray(value, dtype, order="C") for path, value in sorted(flatten(params).items())}
    text = json.dumps({"format": FORMAT, "kind": kind} | config, indent=2) + "\n"
    for name, data in (
        ("model.safetensors", safetensors.numpy.save(tensors)),
        ("config.json", text.encode()),
    ):
        write_atomic(folder / name, data)
