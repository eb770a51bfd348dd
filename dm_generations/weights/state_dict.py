"""PyTorch state dicts: tensors looked up, renamed and laid out as Flax has them."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError

Shape = tuple[int, ...]
NameInFile = Callable[[str, Shape], tuple[str, Shape]]  # path and shape of a parameter to its name and shape there

# Under what training saves the weights: Lightning and others, DeepSpeed, and last moving averages of them.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "params", "ema_state_dict", "ema")
_AVERAGES = "model_ema."


# What torch.compile and FSDP put into names.
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")


def get_tensor(state: Mapping[str, Any], name: str, ndim: int, path: Path, prefix: str = "") -> np.ndarray:
    """Look up a tensor.

    Args:
        state: A state dict.
        name: Of the tensor in `state`.
        ndim: The number of axes that it must have, none of them empty.
        path: The file, for messages.
        prefix: What precedes `name` in the file, for messages.

    Raises:
        UserError: There is no such tensor.
    """
    found = state.get(name)
    if found is None:
        raise UserError(f"{path} lacks the tensor {prefix}{name}")
    if not isinstance(found, np.ndarray) or found.ndim != ndim or 0 in found.shape:
        what = f"has shape {found.shape}" if isinstance(found, np.ndarray) else "is not a tensor"
        raise UserError(f"{path}: {prefix}{name} {what}, a tensor of {ndim} axes is needed")
    return found


def count_numbered(state: Mapping[str, Any], template: str, first: int = 0) -> int:
    """Count how many of `template.format(first)`, `template.format(first + 1)`, ... there are until one is missing."""
    number = first
    while template.format(number) in state:
        number += 1
    return number - first


def refuse_stubs(state: Mapping[str, Any], path: Path) -> None:
    """Refuse what a process of sharded training saves in place of weights that others hold.

    Raises:
        UserError: A weight has the shape (0,) or (1,).
    """
    for name, value in state.items():
        if str(name).endswith("weight") and getattr(value, "shape", None) in ((0,), (1,)):
            raise UserError(
                f"{path}: {name} has shape {value.shape}, a stub of sharded training (DeepSpeed, FSDP): gather the "
                "weights into one file first, with DeepSpeed's zero_to_fp32.py or FSDP's full state dict"
            )


class TensorNames:
    """Names of tensors in a file, and the paths of their parameters.

    Attributes:
        pairs: Of a name and a path, each with placeholders like `{i}`, which stand for the same letters and digits.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Take the pairs, of which the first that fits counts."""
        self.pairs = [(_compiled(name), _compiled(path), name, path) for name, path in pairs]

    def path_of(self, name: str) -> str | None:
        """Return the path of a name; None for one that has none."""
        found = ((path, match) for pattern, _, _, path in self.pairs if (match := pattern.fullmatch(name)))
        return next((path.format(**match.groupdict()) for path, match in found), None)

    def name_of(self, path: str) -> str | None:
        """Return the name of a path; None for one that has none."""
        found = ((name, match) for _, pattern, name, _ in self.pairs if (match := pattern.fullmatch(path)))
        return next((name.format(**match.groupdict()) for name, match in found), None)

    def rename(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the tensors that have a path by it, as Flax lays them out."""
        paths = ((self.path_of(name), array) for name, array in state.items())
        return {path: array.T if path.endswith("/kernel") else array for path, array in paths if path}

    def name_in_file(self, path: str, shape: Shape) -> tuple[str, Shape]:
        """Return name and shape in the file of a parameter; see `torch_name`."""
        name, shape = torch_name(path, shape)
        return self.name_of(path) or name, shape


def _compiled(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", re.escape(template)))


def check_tensors(state: Any, path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Return `state` as a dict of tensors by name.

    Args:
        state: What the file holds.
        path: The file, for messages.
        prefix: What precedes the names in the file, for messages.

    Raises:
        UserError: It holds anything else.
    """
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds no dict of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise UserError(f"{path}: {prefix + str(name)!r:.200} is not a tensor")
    return dict(state)


def find_state(content: Any) -> Any:
    """Return the state dict in what training saved, without its wrappers.

    Optimizers, counts of epochs and moving averages that lie next to the weights are left behind. Names lose what
    `torch.compile`, FSDP and DistributedDataParallel put in them.

    Args:
        content: What a file holds, of any type.

    Returns:
        The dict, or `content` if it is not one.
    """
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return _unwrap(content)
        content = inner
    return content


def _unwrap(state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return a state dict without the names of wrappers, and without `module.` before all of its names."""
    if not state or not all(isinstance(name, str) for name in state):
        return state
    unwrapped = {_WRAPPERS.sub("", name): value for name, value in state.items()}
    while all(name.startswith("module.") for name in unwrapped):
        unwrapped = strip_prefix(unwrapped, "module.")
    return unwrapped if len(unwrapped) == len(state) else state


def choose_averages(
    state: Mapping[str, Any], path: Path, name_in_file: NameInFile
) -> tuple[dict[str, Any], NameInFile]:
    """Replace weights by the moving averages that lie next to them, as `LitEma` of latent-diffusion stores them.

    The average of `encoder.conv_in.weight` is `model_ema.encoderconv_inweight`. Losses have none.

    Args:
        state: A state dict.
        path: The file, for messages.
        name_in_file: Path and shape of a parameter to name and shape of the weight.

    Returns:
        The averages under the names of the weights, and `name_in_file` for them; the arguments if there are none.

    Raises:
        UserError: Some weights have an average and others not.
    """
    averages = strip_prefix(state, _AVERAGES)
    if not averages:
        return dict(state), name_in_file

    def name_of_average(parameter: str, shape: Shape) -> tuple[str, Shape]:
        name, shape = name_in_file(parameter, shape)
        return _AVERAGES + name.replace(".", ""), shape

    chosen = {}
    for name in map(str, state):
        if name.startswith((_AVERAGES, "loss.")):
            continue
        chosen[name] = averages.get(name.replace(".", ""))
        if chosen[name] is None:
            average = _AVERAGES + name.replace(".", "")
            raise UserError(f"{path} lacks {average}, the moving average of {name}: download the file again")
    return chosen, name_of_average


def strip_prefix(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries whose names begin with `prefix`, without it."""
    return {str(name).removeprefix(prefix): value for name, value in state.items() if str(name).startswith(prefix)}


def same_name(path: str, shape: Shape) -> tuple[str, Shape]:
    """Return name and shape, in the file, of a parameter that the file calls by its path."""
    return path, shape


def torch_name(path: str, shape: Shape, prefix: str = "") -> tuple[str, Shape]:
    """Return name and shape, in a PyTorch file, of the parameter of this path.

    It is for names whose parts readers join with "/" and leave as they are; what else a reader changes, it must undo
    before.

    Args:
        path: Of the parameter, "a/b/kernel".
        shape: Of the parameter.
        prefix: What precedes the name in the file.
    """
    *modules, leaf = path.split("/")
    if leaf == "kernel":
        shape = (*shape[:-3:-1], *shape[:-2])  # (H, W, in, out) as (out, in, H, W), (in, out) as (out, in)
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return prefix + ".".join([*modules, leaf]), shape


def split_list_indices(path: str) -> str:
    """Turn a path in which list indices are joined to names, "blocks_0/mlp_2", into "blocks/0/mlp/2"."""
    return re.sub(r"_(\d+)(?=/)", r"/\1", path)


def join_list_indices(name: str) -> str:
    """Join list indices of a PyTorch name to names: "blocks.0.mlp.2.weight" becomes "blocks_0.mlp_2.weight"."""
    return re.sub(r"\.(\d+)(?=\.)", r"_\1", name)


def convolution_kernel(weight: np.ndarray) -> np.ndarray:
    """Return a view of a convolution's weight (out, in, H, W) as (H, W, in, out); other tensors as they are."""
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight
