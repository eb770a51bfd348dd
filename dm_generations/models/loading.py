"""Loads models: recognises their format, checks names and shapes of their weights, and makes their digest.

The format is recognised by what lies in the folder or file: our own folder (`weights.native`), or one of those that
`registry.KINDS` lists. One folder can hold several models: min-dalle's has a generator and its codec. Weights are views
of mapped files in the dtype of the file; `runtime.device.put_params` puts them on the device.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dm_generations.archive import ModelInfo
from dm_generations.errors import UserError, one_line
from dm_generations.models.base import RawCheckpoint, Tokenizer, prefix_errors
from dm_generations.models.registry import (
    ROLES,
    ModelKind,
    get_kind,
    hub_files,
    kinds_of_role,
    load_tokenizer,
    parameter_shapes,
)
from dm_generations.runtime.device import WEIGHTS_ADVICE, memory_errors
from dm_generations.weights import hub, native
from dm_generations.weights.mmap import release
from dm_generations.weights.native import flatten
from dm_generations.weights.state_dict import Shape

EMBEDDED = Path(__file__).resolve().parents[1] / "embedded"
MAX_CODEBOOK_SIZE = 65536  # tokens are uint16
_EMBEDDED_NAMES = {"generator": "dalle_bart", "codec": "vqgan", "clip": "clip"}
_NATIVE_FILES = "config.json with model.safetensors"
# Archives know these embedded weights by the hash of a file with another order of tensors.
_RECORDED_SHA256 = {
    "5585f9db34d14bded504d2431ab38cd1f21332b9151f10f056012ba1865a53d1": (
        "e6291f4e1ed44ed1e7ab13ab315e36eac1bf968fae9aa32ba1c2da93a2cb91a7"
    ),
    "2867ebc8d20dfadccc23bc7afbff9b0263de1bc24bf6c1ac6aa5954292454605": (
        "dc35e4cae8fce58cd9ad2dfe3ebd6cf1a50b6cbad5493d3ecc3368dc201ad120"
    ),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model as it lies on disk. Names and shapes are checked, except of the embedded models, which a test checks."""

    kind: str  # a name in `registry.KINDS`
    config: Any  # the network's config
    params: dict  # nested, names of the network; NumPy arrays in the dtype of the file, mapped, of native byte order
    name: str  # "embedded/vqgan", the folder's or file's name, or the hub's
    sha256: str  # hex, of the weights, whatever file they lie in: see `native.digest`
    folder: Path  # that of the configs that belong to the weights
    tokenizer: Path | None = None
    text_style: str | None = None
    lineage: dict[str, Any] | None = None  # of a model that `train` made: what it was trained from

    @property
    def role(self) -> str:
        """One of `registry.ROLES`."""
        return get_kind(self.kind).role

    @property
    def network_class(self) -> Any:
        """The class of its network."""
        return get_kind(self.kind).network_class

    def model_info(self, grid: int | None = None) -> ModelInfo:
        """Return what an archive stores about this model.

        Args:
            grid: Of a codec, tokens a side, if it decodes another grid than its own.
        """
        config = json.loads(json.dumps(dataclasses.asdict(self.config)))  # tuples come back as lists
        if self.lineage is not None:
            config[native.LINEAGE] = self.lineage
        if self.role != "codec":
            return ModelInfo(self.role, self.name, self.sha256, config)
        if grid is not None and grid != self.config.grid:
            config["grid"] = grid
        side = grid or self.config.grid
        image_size = self.config.image_size // self.config.grid * side
        shapes = (side, side), self.config.codebook_size, (image_size, image_size)
        return ModelInfo(self.role, self.name, self.sha256, config, *shapes)

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer of its prompts.

        Raises:
            UserError: The tokenizer's files are missing or broken.
        """
        if self.role == "clip":
            return load_tokenizer(self.folder, self.kind, self.config.text_config.vocab_size)
        if self.tokenizer is None:
            raise UserError(f"model {self.name!r} has no tokenizer: give its file or folder with --tokenizer")
        is_fork = self.config.sampling_order == "top_p_first"  # the DALL-3 fork reads prompts in lower case
        return load_tokenizer(self.tokenizer, self.text_style, self.config.text_vocab_size, lower=is_fork)


@dataclasses.dataclass(frozen=True)
class Models:
    """The checkpoints of a run, known to be compatible."""

    generator: Checkpoint
    codec: Checkpoint
    clip: Checkpoint | None  # None: images are not scored
    codec_from: str | None = None  # folder, file or hub name that has the codec; None: it is the embedded one

    @property
    def grid(self) -> int:
        """Tokens a side of the generator's images; the codec can be made for images of another size."""
        return math.isqrt(self.generator.config.image_length)


def load_checkpoint(
    path_or_name: str | os.PathLike | None, role: str, overrides: Mapping[str, Any] = MappingProxyType({})
) -> Checkpoint:
    """Load the model for a role.

    Args:
        path_or_name: A folder, a file or a name on the Hugging Face hub; None is the embedded model.
        role: One of `registry.ROLES`; there is no embedded "decoder" or "scorer".
        overrides: Entries of the config that replace what the files say.

    Raises:
        UserError: There is nothing, nothing of a known format or not for this role, or a tensor is missing,
            unexpected or of another shape than the config says; or an override is not in the config.
    """
    found = find_checkpoint(path_or_name, role, overrides)
    if found is None:
        path = Path(str(path_or_name))
        others = (_read(path, other) for other in ROLES if path.exists() and other != role)
        what = next(
            (_describe(other, role) for other in others if other is not None), "no model that this program knows"
        )
        formats = ", or ".join([_NATIVE_FILES, *(kind.files for kind in kinds_of_role(role) if kind.files)])
        raise UserError(f"{path_or_name} holds {what}; a {role} is {formats}")
    return found


def _describe(raw: RawCheckpoint, role: str) -> str:
    """Say what a checkpoint is that does not serve for this role, and by which tensor that is seen."""
    path, array = next(iter(flatten(raw.params).items()))
    return f"a {get_kind(raw.kind).role}, not a {role} (it has {raw.name_in_file(path, array.shape)[0]})"


@memory_errors(WEIGHTS_ADVICE)
def find_checkpoint(
    path_or_name: str | os.PathLike | None, role: str, overrides: Mapping[str, Any] = MappingProxyType({})
) -> Checkpoint | None:
    """Load as `load_checkpoint` does, but return None for a path that holds nothing for this role."""
    path: Path | None
    if path_or_name is None:
        path, name = EMBEDDED / _EMBEDDED_NAMES[role], _embedded_name(role)
    elif os.path.exists(path_or_name):  # unlike Path.exists, False for a name that cannot be
        path = Path(path_or_name)
        name = path.resolve().name
    elif isinstance(path_or_name, str) and hub.is_hub_name(path_or_name):
        path, name = hub.download(path_or_name, hub_files(role)), path_or_name
    else:
        raise UserError(f"{str(path_or_name)!r:.300}: no such model folder or file")
    raw = None if path is None else _read(path, role)
    if path is None or raw is None:
        return None
    if overrides:
        raw = dataclasses.replace(raw, config=_override(raw, name, overrides))
    if path_or_name is not None:  # the embedded models are this package's own, and tracing a network takes a while
        with prefix_errors(raw.files[0]):
            expected = _expected_shapes(raw, path)
        check_names_and_shapes(expected, raw)
    folder = path if path.is_dir() else path.parent
    params = _to_native_order(raw.params)
    digest = native.digest(params)
    digest = _RECORDED_SHA256.get(digest, digest)
    return Checkpoint(raw.kind, raw.config, params, name, digest, folder, raw.tokenizer, raw.text_style, raw.lineage)


def load_generator(
    model: str | None, tokenizer: Path | None = None, overrides: Mapping[str, Any] = MappingProxyType({})
) -> Checkpoint:
    """Load a text-to-image model.

    Args:
        model: A folder, a file or a hub name; None is the embedded one.
        tokenizer: File or folder to use in place of the model's own tokenizer.
        overrides: Entries of the config that replace what the files say.

    Raises:
        UserError: As `load_checkpoint`, or an override is not in the config.
    """
    checkpoint = load_checkpoint(model, "generator", overrides)
    return checkpoint if tokenizer is None else dataclasses.replace(checkpoint, tokenizer=tokenizer)


def load_models(
    model: str | None,
    codec: str | None,
    clip: str | None,
    is_scored: bool,
    tokenizer: Path | None = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> Models:
    """Load the models of a run from folders, files or the hub.

    Args:
        model: The generator; None is the embedded one.
        codec: The codec; None is the model's own if it lies with the model, else the embedded one.
        clip: The CLIP; None is the embedded one.
        is_scored: Whether to load a CLIP at all.
        tokenizer: See `load_generator`.
        overrides: See `load_generator`.

    Raises:
        UserError: One is missing or broken, or they are not compatible.
    """
    generator = load_generator(model, tokenizer, overrides)
    codec_checkpoint, codec_from = load_codec(generator, model, codec)
    clip_checkpoint = load_checkpoint(clip, "clip") if is_scored else None
    return Models(generator, codec_checkpoint, clip_checkpoint, codec_from)


def load_codec(generator: Checkpoint, model: str | None, codec: str | None) -> tuple[Checkpoint, str | None]:
    """Load the codec of a text-to-image model.

    Args:
        generator: The model.
        model: Where it came from: a folder, a file or a hub name; None for the embedded one.
        codec: The codec; None is the model's own if it lies with the model, else the embedded one.

    Returns:
        The codec, and where it came from.

    Raises:
        UserError: It is missing or broken, or not compatible with the model.
    """
    own_codec = find_checkpoint(model, "codec") if codec is None and model is not None else None
    checkpoint = own_codec or load_checkpoint(codec, "codec")
    _check_compatible(generator, checkpoint)
    return checkpoint, codec if own_codec is None else model


def is_other_embedded(name: str, sha256: str, role: str) -> bool:
    """Whether a recorded model has the name of the embedded one for `role`, but other weights than it has now."""
    return name == _embedded_name(role) and sha256 != _embedded_sha256(role)


def check_names_and_shapes(expected: Mapping[str, Shape], raw: RawCheckpoint) -> None:
    """Check the weights of a model against what its network needs.

    Args:
        expected: The shape of each parameter by its path.
        raw: The model.

    Raises:
        UserError: Tensors are misshapen, missing or unexpected; the first ones are named as their file names them.
    """
    found = flatten(raw.params)
    shapes = {path: array.shape for path, array in found.items()}
    wanted, present = _name_in_files(expected, raw), _name_in_files(shapes, raw)
    for tensor, shape in wanted.items():  # by the file's names: one of other axes may have become another parameter
        if tensor in present and present[tensor] != shape:
            file, name = tensor
            raise UserError(
                f"{file}: {name} has shape {present[tensor]}, its config asks for {shape}; take both from one download"
            )
    missing = _name_in_files({path: expected[path] for path in sorted(expected.keys() - shapes.keys())}, raw)
    extra = _name_in_files({path: shapes[path] for path in sorted(shapes.keys() - expected.keys())}, raw)
    for what, tensors in (("lacks", missing), ("has unexpected", extra)):
        if tensors:
            file = next(iter(tensors))[0]
            names = [name for tensor_file, name in tensors if tensor_file == file]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{file} {what} {', '.join(names[:3])}{more}; its config describes another model")
    for path, array in found.items():
        if array.dtype.name not in native.DTYPE_NAMES:
            name, known = raw.name_in_file(path, array.shape)[0], ", ".join(native.DTYPE_NAMES)
            raise UserError(f"{raw.file_of(path)}: {name} has dtype {array.dtype}, weights must be one of {known}")


def _read(path: Path, role: str) -> RawCheckpoint | None:
    """The model for this role at `path`, None if there is none of a known format."""
    try:
        with prefix_errors(path):  # configs are checked by classes that know of no files
            raw = _read_native(path, role)
            if raw is None and role == "codec":
                raw = _read_native(path / native.CODEC_FOLDER, role)
            readers = [read for kind in kinds_of_role(role) for read in kind.read_functions]
            while raw is None and readers:
                raw = readers.pop(0)(path)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from error
    return raw


def _read_native(folder: Path, role: str) -> RawCheckpoint | None:
    """The model for this role in a folder of our own."""
    values = native.read_config(folder)
    if values is None or values.get("format") != native.FORMAT:
        return None
    kind = next((kind for kind in kinds_of_role(role) if kind.name == values.get("kind")), None)
    return None if kind is None else _read_native_kind(folder, kind, values)


def _read_native_kind(folder: Path, kind: ModelKind, values: dict[str, Any]) -> RawCheckpoint:
    """The model of this kind in a folder of our own, whose config.json holds `values`."""
    weights, params = folder / native.WEIGHTS_FILE, native.read_params(folder)
    with prefix_errors(folder / native.CONFIG_FILE):
        config = kind.config_class.from_dict(values)
    lineage = values.get(native.LINEAGE)
    if not isinstance(lineage, dict | None):
        raise UserError(f"{folder / native.CONFIG_FILE}: {native.LINEAGE} must be a JSON object")
    raw = RawCheckpoint(kind.name, config, params, (weights,), lineage=lineage)
    if kind.role in ("codec", "decoder", "scorer"):
        return raw
    return dataclasses.replace(raw, tokenizer=folder, text_style=values.get("text_style", kind.name))


def _expected_shapes(raw: RawCheckpoint, path: Path) -> dict[str, Shape]:
    """The shapes of the parameters that the network of a model needs."""
    try:
        shapes = parameter_shapes(raw.kind, raw.config)
    except (TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"the config of {path} does not describe a {raw.kind}: {one_line(error)}") from error
    kind = get_kind(raw.kind)
    encoder_parts = kind.network_class.ENCODER_PARTS if kind.role == "codec" else ()
    if raw.params.keys().isdisjoint(encoder_parts):  # a file of a decoder alone
        shapes = {name: shape for name, shape in shapes.items() if name.split("/")[0] not in encoder_parts}
    return shapes


def _name_in_files(shapes: Mapping[str, Shape], raw: RawCheckpoint) -> dict[tuple[Path, str], Shape]:
    """Shapes by file and by name there, from those of parameters by path."""
    named = ((raw.file_of(path), *raw.name_in_file(path, shape)) for path, shape in shapes.items())
    return {(file, name): shape for file, name, shape in named}


def _override(raw: RawCheckpoint, name: str, overrides: Mapping[str, Any]) -> Any:
    """Return the config of a model with other values.

    Raises:
        UserError: It has no such entries, or they are out of range.
    """
    options = {field.name for field in dataclasses.fields(raw.config)}
    if unknown := [option for option in overrides if option not in options]:
        raise UserError(f"model {name!r} is a {raw.kind}, which has no option {', '.join(unknown)}: leave it out")
    return dataclasses.replace(raw.config, **overrides)


def _to_native_order(params: dict) -> dict:
    """Return `params` with copies of the arrays of the other byte order, which no code after this reads."""
    tree: dict = {}
    for name, value in params.items():
        if isinstance(value, dict):
            tree[name] = _to_native_order(value)
        elif value.dtype.isnative:
            tree[name] = value
        else:
            tree[name] = value.astype(value.dtype.newbyteorder("="))
            release([value])
    return tree


def _check_compatible(generator: Checkpoint, codec: Checkpoint) -> None:
    """Raise UserError for a codec that cannot decode the generator's tokens."""
    token_count, codebook_size = generator.config.image_length, generator.config.codebook_size
    grid = math.isqrt(token_count) if generator.config.decodes_own_grid else codec.config.grid
    if grid**2 != token_count:
        raise UserError(
            f"model {generator.name!r} makes {token_count} tokens an image, codec {codec.name!r} takes "
            f"{grid}x{grid}: give the model's own codec with --codec"
        )
    if codec.config.codebook_size < codebook_size:
        raise UserError(
            f"model {generator.name!r} makes tokens below {codebook_size:,}, codec {codec.name!r} has "
            f"{codec.config.codebook_size:,}: give the model's own codec with --codec"
        )
    for each in (generator, codec):
        if each.config.codebook_size > MAX_CODEBOOK_SIZE:
            raise UserError(
                f"{each.role} {each.name!r} has a codebook of {each.config.codebook_size:,}, archives hold "
                f"{MAX_CODEBOOK_SIZE:,}"
            )


def _embedded_name(role: str) -> str:
    return f"embedded/{_EMBEDDED_NAMES[role]}"


@functools.cache
def _embedded_sha256(role: str) -> str:
    return load_checkpoint(None, role).sha256
