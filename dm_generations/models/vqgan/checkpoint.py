"""Checkpoints of VQGANs.

- vqgan-jax: a Flax folder, `config.json` and `flax_model.msgpack`, with names as our network has them.
- min-dalle: `detoker.pt`, a PyTorch file that holds nothing but tensors.
- taming-transformers: a Lightning `.ckpt` of `VQModel` or `GumbelVQ`, and the `.yaml` with its sizes. The network is
  that of vqgan-jax with pixels in [-1, 1]. Names are the same except that `down.0.block.1` is `down_0/block_1` here,
  and that weights have PyTorch's names and layouts. Losses are skipped. Chameleon's `vqgan.ckpt` is such a file.
- IBQ (SEED-Voken): the same, with a `.yaml` of Lightning's command line (`model.class_path`, `model.init_args`). Its
  moving averages are used, as its own evaluation does.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dm_generations.errors import UserError, one_line, short_repr
from dm_generations.models.base import RawCheckpoint, prefix_errors
from dm_generations.models.vqgan.network import VQGANConfig
from dm_generations.weights.flax_msgpack import read_flax_msgpack
from dm_generations.weights.mmap import is_apple_double, refuse_lfs_pointer
from dm_generations.weights.native import CONFIG_FILE, FORMAT, read_config, unflatten
from dm_generations.weights.state_dict import (
    NameInFile,
    Shape,
    check_tensors,
    choose_averages,
    convolution_kernel,
    count_numbered,
    find_state,
    get_tensor,
    join_list_indices,
    split_list_indices,
    torch_name,
)
from dm_generations.weights.torch_file import read_torch

FLAX_FILE = "flax_model.msgpack"
DETOKER_FILE = "detoker.pt"
DETOKER_EPSILON = 1e-5  # PyTorch's default, where the original network has 1e-6
YAML_SUFFIXES = (".yaml", ".yml")
# A config is some hundred bytes. A megabyte of a number to base 60 (1:59:...), or of keys of one hash, takes minutes.
_YAML_BYTES = 1 << 16

# What training saved in addition: losses with their networks, moving averages of the codebook, label colours.
_SKIPPED = re.compile(r"loss\..*|model_ema\..*|quantize\.embedding\.(cluster_size|embed_avg)|colorize")
_EMBEDDINGS = ("embedding", "embed")

# Of `Encoder` and `Decoder` of the family: the default of the only size that has one, and sizes without one.
_DEFAULT_CH_MULT = (1, 2, 4, 8)
_REQUIRED = ("ch", "num_res_blocks", "attn_resolutions", "resolution", "z_channels")
_OURS = {"num_groups", "group_norm_eps", "is_signed", "is_gumbel", "is_dot_product", "conv_in_ch"}
_OURS |= {"has_mid_attention", "is_normalized", "rounds_pixels"}  # fields that no file of the family has
_UNSUPPORTED = ("double_z", "give_pre_end")  # they change the network, and no published VQGAN has them on


def read_flax(path: Path) -> RawCheckpoint | None:
    """Read the folder of a VQGAN of vqgan-jax; None for anything else."""
    values = read_config(path)
    if values is None or "n_embed" not in values or "ch_mult" not in values or values.get("format") == FORMAT:
        return None
    for name in _UNSUPPORTED:
        if values.get(name):
            raise UserError(f"{path / CONFIG_FILE}: {name} is {values[name]!r:.80}, which is not supported")
    weights = path / FLAX_FILE
    if not weights.is_file():
        raise UserError(f"{path} lacks its weights: {FLAX_FILE}")
    with prefix_errors(path / CONFIG_FILE):
        config = VQGANConfig.from_dict(values)
    return RawCheckpoint("vqgan", config, read_flax_msgpack(weights), (weights,))


def read_detoker(path: Path) -> RawCheckpoint | None:
    """Read min-dalle's VQGAN: a folder with `detoker.pt`, or such a file of any name; None for anything else."""
    file = path / DETOKER_FILE if path.is_dir() else path
    if file.suffix != ".pt" or not file.is_file():
        return None
    state = find_state(read_torch(file))
    if not isinstance(state, Mapping) or "embedding.weight" not in state or "post_quant_conv.weight" not in state:
        return None
    get_tensor(state, "embedding.weight", 2, file)
    state = {re.sub(r"^embedding\.", "quantize.embedding.", str(name)): value for name, value in state.items()}
    config = config_from_shapes(state, file, group_norm_eps=DETOKER_EPSILON)
    return RawCheckpoint("vqgan", config, vqgan_params(state, file), (file,), name_in_file=_detoker_name_in_file)


def read_taming(path: Path) -> RawCheckpoint | None:
    """Read a VQGAN of taming-transformers, or of its descendants with the same names (Chameleon's, IBQ's).

    Args:
        path: A `.ckpt` with its `.yaml` in the same folder, or a folder of the two, which may be in its subfolders
            `checkpoints` and `configs`.

    Returns:
        None if there is no such pair.
    """
    found = read_lightning(path, _is_vqgan)
    if found is None:
        return None
    file, state, yaml, class_name, values = found
    name_in_file: NameInFile = vqgan_name_in_file
    if class_name is not None and values.get("use_ema"):  # of Lightning's command line, not of taming's own
        state, name_in_file = choose_averages(state, file, vqgan_name_in_file)
    with prefix_errors(yaml):
        for name in ("l2_normalize", "cosine_similarity"):
            if values.get(name):
                raise UserError(f"VQGAN config: {name} {short_repr(values[name])} is not supported, only false")
        is_gumbel = "quantize.embed.weight" in state
        config = config_from_yaml_values(values, is_gumbel=is_gumbel, is_dot_product=class_name == "IBQ")
    return RawCheckpoint("vqgan", config, vqgan_params(state, file), (file,), name_in_file=name_in_file)


class LightningCheckpoint(NamedTuple):
    """What a `.ckpt` and its `.yaml` hold."""

    file: Path
    state: dict[str, Any]
    yaml: Path
    class_name: str | None  # of the model, as Lightning's command line writes it; None where the YAML is taming's own
    values: dict[str, Any]  # the arguments of this class, `ddconfig` among them


def read_lightning(path: Path, is_state: Callable[[Mapping[str, Any]], bool]) -> LightningCheckpoint | None:
    """Read a `.ckpt` with the `.yaml` of its sizes.

    Args:
        path: As `read_taming` takes it.
        is_state: Whether a state dict is of the kind that is wanted.

    Returns:
        None if there is no such pair.
    """
    found = _find_checkpoint_files(path)
    if not found:
        return None
    yamls = _find_yaml_files(path)
    configs: dict[Path, tuple[str | None, dict]] = {}
    errors = []
    for file in yamls:
        try:
            values = _read_vqgan_values(file)
        except UserError as error:  # it counts if no other file is the config
            errors.append(error)
        else:
            configs |= {} if values is None else {file: values}
    if not configs and errors:
        raise errors[0]
    if not configs and (yamls or path.is_dir()):
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:3])
        raise UserError(f"{path} holds several checkpoints ({names}): name the file")
    state = find_state(read_torch(found[0]))
    if not isinstance(state, Mapping) or not is_state(state):
        return None
    if not configs:
        raise UserError(f"{path} lacks its .yaml: put the one it came with into its folder")
    yaml = _choose_config(found[0], list(configs))
    return LightningCheckpoint(found[0], dict(state), yaml, *configs[yaml])


def config_from_yaml_values(
    values: Mapping[str, Any], is_gumbel: bool = False, is_dot_product: bool = False
) -> VQGANConfig:
    """Return the config that a YAML file of the family holds.

    Args:
        values: `embed_dim`, `n_embed` and either `ddconfig` or `hparams`: what taming has under `model.params` and
            minDALL-E under `stage1`.
        is_gumbel: Whether it is a `GumbelVQ`.
        is_dot_product: Whether it is an `IBQ`.

    Raises:
        UserError: A value is bad, or an option changes images or tokens and is not supported.
    """
    sizes = values.get("ddconfig", values.get("hparams"))
    if not isinstance(sizes, Mapping):
        raise UserError("VQGAN config: ddconfig is missing")
    sizes = {"ch_mult": _DEFAULT_CH_MULT} | {name: value for name, value in sizes.items() if name not in _OURS}
    sizes |= {name: values[name] for name in ("embed_dim", "n_embed") if name in values}
    for name in (*_REQUIRED, "embed_dim", "n_embed"):
        if name not in sizes:
            raise UserError(f"VQGAN config: {name} is missing")
    for name in _UNSUPPORTED:
        if sizes.get(name):
            raise UserError(f"VQGAN config: {name} {short_repr(sizes[name])} is not supported, only false")
    if values.get("remap") is not None:
        raise UserError(
            "VQGAN config: remap is not supported: tokens that are numbers in a list of the codebook's rows"
        )
    return VQGANConfig.from_dict(sizes | {"is_signed": True, "is_gumbel": is_gumbel, "is_dot_product": is_dot_product})


def config_from_shapes(
    state: Mapping[str, np.ndarray], path: Path, resolution: int = 256, prefix: str = "", **options: Any
) -> VQGANConfig:
    """Return the config of a VQGAN whose file holds nothing but its tensors, with or without the encoder's.

    Args:
        state: Tensors by taming's names.
        path: The file, for messages.
        resolution: Pixels a side, which shapes cannot tell.
        prefix: What precedes the names in the file, for messages.
        **options: Further fields of VQGANConfig.

    Raises:
        UserError: A tensor that tells a size is missing or has other axes than it should.
    """
    get = functools.partial(get_tensor, state, path=path, prefix=prefix)
    is_gumbel = "quantize.embed.weight" in state
    codebook = get("quantize.embed.weight" if is_gumbel else "quantize.embedding.weight", 2)
    after_quantisation = get("post_quant_conv.weight", 4)
    level = "decoder.up.{}.block.0.conv1.weight"
    widths = [get(level.format(i), 4).shape[0] for i in range(max(1, count_numbered(state, level)))]
    width = math.gcd(*widths)
    if "encoder.conv_in.weight" in state:
        width = get("encoder.conv_in.weight", 4).shape[0]
    if any(features % width for features in widths):
        raise UserError(f"{path}: levels of {widths} channels are not multiples of encoder.conv_in's {width}")
    with_attention = [i for i in range(len(widths)) if f"decoder.up.{i}.attn.0.q.weight" in state]
    upsampled = [i for i in range(len(widths)) if f"decoder.up.{i}.upsample.conv.weight" in state]
    with prefix_errors(path):
        return VQGANConfig(
            ch=width,
            ch_mult=tuple(features // width for features in widths),
            num_res_blocks=max(1, count_numbered(state, "decoder.up.0.block.{}.conv1.weight") - 1),
            attn_resolutions=tuple(resolution // 2**i for i in with_attention),
            resolution=resolution,
            z_channels=after_quantisation.shape[0],
            n_embed=codebook.shape[0],
            embed_dim=codebook.shape[1],
            out_ch=get("decoder.conv_out.weight", 4).shape[0],
            resamp_with_conv=bool(upsampled) or len(widths) == 1,
            is_gumbel=is_gumbel,
            **options,
        )


def vqgan_params(state: Mapping[str, Any], path: Path) -> dict:
    """Convert a state dict of taming's names.

    Args:
        state: Tensors by name.
        path: The file, for messages.

    Returns:
        Parameters of `VQGAN`: nested, views of the arrays in `state`.

    Raises:
        UserError: A value is not a tensor.
    """
    own = {name: value for name, value in state.items() if not _SKIPPED.fullmatch(str(name))}
    flat = {}
    for name, array in check_tensors(own, path).items():
        *modules, leaf = join_list_indices(name).split(".")
        if leaf == "weight":
            if array.ndim == 2 and modules and modules[-1] in _EMBEDDINGS:
                leaf = "embedding"
            else:
                leaf = "scale" if array.ndim == 1 else "kernel"
        flat["/".join([*modules, leaf])] = convolution_kernel(array)
    return unflatten(flat, path)


def vqgan_name_in_file(path: str, shape: Shape, prefix: str = "") -> tuple[str, Shape]:
    """Return name and shape in taming's file of a parameter of `VQGAN`; `prefix` precedes the name."""
    return torch_name(re.sub(r"/mid/(block|attn)/", r"/mid/\1_", split_list_indices(path)), shape, prefix)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of plain values.

    Raises:
        UserError: It is not a mapping of such values, or PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise UserError(f"reading {path} needs PyYAML: pip install 'dm-generations[checkpoints]'") from error

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of aliases of aliases stand for any number of values
                raise UserError(f"{path} has an alias (*name), which is not supported: write the value itself")
            return super().compose_node(parent, index)

    try:
        with open(path, "rb") as file:
            content = file.read(_YAML_BYTES + 1)
        refuse_lfs_pointer(path, content)
        if len(content) > _YAML_BYTES:
            raise UserError(f"{path} is too long for a config: over {_YAML_BYTES:,} bytes")
        values = yaml.load(content, Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    # Besides its own errors, the parser lets those of Python's numbers, dates and stack out.
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a YAML mapping")
    return values


def _detoker_name_in_file(path: str, shape: Shape) -> tuple[str, Shape]:
    return vqgan_name_in_file(path.removeprefix("quantize/"), shape)


def _read_vqgan_values(file: Path) -> tuple[str | None, dict] | None:
    """The class and the arguments of the first-stage model in a YAML file; None for one of something else."""
    model = read_yaml(file).get("model")
    if not isinstance(model, dict):
        return None
    class_path = model.get("class_path")
    class_name = class_path.rsplit(".", 1)[-1] if isinstance(class_path, str) else None
    values = model.get("params" if class_name is None else "init_args")
    return (class_name, values) if isinstance(values, dict) and "ddconfig" in values else None


def _is_vqgan(state: Mapping[str, Any]) -> bool:
    tops = {name.split(".")[0] for name in state if isinstance(name, str)}
    return "decoder" in tops and not {"quantize", "post_quant_conv"}.isdisjoint(tops)


def _find_checkpoint_files(path: Path) -> list[Path]:
    """The `.ckpt` that `path` is, or those in it: `last.ckpt` alone if training wrote several."""
    if not path.is_dir():
        return [path] if path.suffix == ".ckpt" else []
    files = _list_files(path, (".ckpt",)) or _list_files(path / "checkpoints", (".ckpt",))
    return [file for file in files if file.name == "last.ckpt"] or files


def _find_yaml_files(path: Path) -> list[Path]:
    folder = path if path.is_dir() else path.parent
    nearby = (folder, folder / "configs", *([folder.parent / "configs"] if folder.name == "checkpoints" else []))
    return next((files for place in nearby if (files := _list_files(place, YAML_SUFFIXES))), [])


def _list_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix in suffixes and not is_apple_double(file))


def _choose_config(checkpoint: Path, configs: list[Path]) -> Path:
    """The config of `checkpoint`: the only one, else the one whose name begins most like it."""

    def likeness(config: Path) -> int:
        pairs = zip(checkpoint.name, config.name, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    best = [config for config in configs if likeness(config) == max(map(likeness, configs))]
    if len(best) > 1:
        names = ", ".join(config.name for config in best[:3])
        raise UserError(f"{checkpoint} could belong to several configs ({names}): leave one in its folder")
    return best[0]
