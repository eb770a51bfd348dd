"""Models on disk to parameter trees, and back. The format is recognised by what lies in the folder or file.

`load` takes a role: "generator" (text to codes), "codec" (codes to pixels) or "clip". One folder can hold several:
min-dalle's has a generator and its codec. Formats: our own folder (own.py), Flax folders of vqgan-jax and dalle-mini,
min-dalle's PyTorch files, minDALL-E, DALLE-pytorch and its fork, taming-transformers, OpenAI's discrete VAE, CLIP of
transformers. Weights are views of mapped files in the dtype of the file (copies where its byte order is not this
machine's); `placement.placed` puts them on the device.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dm_generations.errors import UserError, one_line
from dm_generations.models.checkpoints import (
    clip_torch,
    dalle_pytorch,
    discrete_vae,
    flax_folder,
    hub,
    min_dalle,
    mindalle,
    openai_vae,
    own,
    taming,
)
from dm_generations.models.checkpoints.mapped import release
from dm_generations.models.checkpoints.own import DTYPE_NAMES, flatten, save, unflatten
from dm_generations.models.checkpoints.source import Source
from dm_generations.models.networks import ROLES, network_class, parameter_shapes

__all__ = ["Checkpoint", "check_names_and_shapes", "find", "flatten", "is_other_embedded", "load", "save", "unflatten"]

EMBEDDED = Path(__file__).resolve().parents[2] / "embedded"
_EMBEDDED_NAMES = {"generator": "dalle_bart", "codec": "vqgan", "clip": "clip"}

# In this order; each reader gives None for what is not of its format.
_READERS = {
    "generator": (own, flax_folder, min_dalle, mindalle, dalle_pytorch),
    "codec": (own, flax_folder, min_dalle, mindalle, dalle_pytorch, discrete_vae, taming, openai_vae),
    "clip": (own, clip_torch),
}
_EXPECTED = {
    "generator": "config.json with flax_model.msgpack or model.safetensors, encoder.pt and decoder.pt, "
    "stage2_last.ckpt, or a dalle.pt",
    "codec": "config.json with flax_model.msgpack or model.safetensors, detoker.pt, a .ckpt with its .yaml, "
    "or encoder.pkl and decoder.pkl",
    "clip": "config.json with model.safetensors or pytorch_model.bin, whole or in pieces",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model as it lies on disk, its names and shapes checked; but for the embedded ones, which a test checks."""

    kind: str  # the network: a key of `networks.NETWORKS`
    config: Any  # the network's config
    params: dict  # nested, names of the network; NumPy arrays in the dtype of the file, mapped, of native byte order
    name: str  # "embedded/vqgan", the folder's or file's name, or the hub's
    sha256: str  # hex, of the weight file; of several files, of their digests in a row
    folder: Path  # where the configs beside the weights lie
    tokenizer: Path | None = None
    text_style: str | None = None


def load(spec: str | os.PathLike | None, role: str) -> Checkpoint:
    """The model for `role` ("generator", "codec", "clip") at `spec`: a folder, a file or a name on the hub.

    None is the embedded one. Raises UserError when there is nothing, nothing of a known format or not for this role,
    and when a tensor is missing, unexpected or of another shape than the config says.
    """
    found = find(spec, role)
    if found is None:
        path = _path_of(spec)
        others = [other for other in ROLES if other != role and _source(path, other) is not None]
        what = f"a {others[0]}, not a {role}" if others else "no model that this program knows"
        raise UserError(f"{path} holds {what}; a {role} is {_EXPECTED[role]}")
    return found


def find(spec: str | os.PathLike | None, role: str) -> Checkpoint | None:
    """As `load`, but None where `spec` exists and holds nothing for this role."""
    if spec is None:
        path, name = EMBEDDED / _EMBEDDED_NAMES[role], _embedded_name(role)
    else:
        path = _path_of(spec)
        name = str(spec) if path != Path(spec) else path.resolve().name
    source = _source(path, role)
    if source is None:
        return None
    if spec is not None:  # the embedded models are this package's own, and tracing a network takes a while
        check_names_and_shapes(_expected_shapes(source, path), source)
    folder = path if path.is_dir() else path.parent
    digest = _digest(source.files)
    params = _native(source.params)
    return Checkpoint(source.kind, source.config, params, name, digest, folder, source.tokenizer, source.text_style)


def is_other_embedded(name: str, sha256: str, role: str) -> bool:
    """Whether a recorded model bears the name of the embedded one for `role`, and had other weights than it has now."""
    return name == _embedded_name(role) and sha256 != _embedded_sha256(role)


def _embedded_name(role: str) -> str:
    return f"embedded/{_EMBEDDED_NAMES[role]}"


@functools.cache
def _embedded_sha256(role: str) -> str:
    return _digest([EMBEDDED / _EMBEDDED_NAMES[role] / own.WEIGHTS_FILE])


def _native(params: dict) -> dict:
    """`params` with copies of the arrays that a machine of the other byte order wrote: nothing behind reads those."""
    tree = {}
    for name, value in params.items():
        if isinstance(value, dict):
            tree[name] = _native(value)
        elif value.dtype.isnative:
            tree[name] = value
        else:
            tree[name] = value.astype(value.dtype.newbyteorder("="))
            release([value])
    return tree


def _path_of(spec: str | os.PathLike) -> Path:
    path = Path(spec)
    if os.path.exists(path):  # unlike Path.exists, False for a name that cannot be
        return path
    if isinstance(spec, str) and hub.is_hub_name(spec):
        return hub.fetched(spec)
    raise UserError(f"{str(spec)!r:.300}: no such model folder or file")


def _source(path: Path, role: str) -> Source | None:
    try:
        for reader in _READERS[role]:
            read = getattr(reader, role)
            source = read(path)
            if source is not None:
                return source
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from error
    except UserError as error:  # configs are checked by the networks, which know of no files
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error
    return None


def _expected_shapes(source: Source, path: Path) -> dict[str, tuple[int, ...]]:
    try:
        shapes = parameter_shapes(source.kind, source.config)
    except (TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"the config of {path} does not describe a {source.kind}: {one_line(error)}") from error
    parts = getattr(network_class(source.kind), "DECODER_PARTS", None)
    if parts is not None and source.params.keys() <= set(parts):  # a file of a decoder alone
        shapes = {name: shape for name, shape in shapes.items() if name.split("/")[0] in parts}
    return shapes


def check_names_and_shapes(expected: dict[str, tuple[int, ...]], source: Source) -> None:
    """Raises UserError naming the first tensors that are misshapen, missing or unexpected, and their file.

    It speaks of names and shapes as the file has them. expected: the shape of each parameter by its path
    """
    found = flatten(source.params)
    shapes = {path: array.shape for path, array in found.items()}
    wanted, there = _in_files(expected, source), _in_files(shapes, source)
    for tensor, shape in wanted.items():  # by the file's names: one of other axes may have become another parameter
        if tensor in there and there[tensor] != shape:
            file, name = tensor
            raise UserError(f"{file}: {name} has shape {there[tensor]}, its config asks for {shape}")
    missing = _in_files({path: expected[path] for path in sorted(expected.keys() - shapes.keys())}, source)
    extra = _in_files({path: shapes[path] for path in sorted(shapes.keys() - expected.keys())}, source)
    for what, tensors in (("lacks", missing), ("has unexpected", extra)):
        if tensors:
            file = next(iter(tensors))[0]
            names = [name for place, name in tensors if place == file]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{file} {what} {', '.join(names[:3])}{more}; its config describes another model")
    for path, array in found.items():
        if array.dtype.name not in DTYPE_NAMES:
            name, known = source.in_file(path, array.shape)[0], ", ".join(DTYPE_NAMES)
            raise UserError(
                f"{source.file_of(path)}: {name} has dtype {array.dtype}, which is none of weights: {known}"
            )


def _in_files(shapes: dict[str, tuple[int, ...]], source: Source) -> dict[tuple[Path, str], tuple[int, ...]]:
    """Shapes by file and by name there, from those of parameters by path."""
    named = ((source.file_of(path), *source.in_file(path, shape)) for path, shape in shapes.items())
    return {(file, name): shape for file, name, shape in named}


def _digest(files: Iterable[Path]) -> str:
    digests = []
    for path in files:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
