"""Files of aesthetic heads: the state dict of one `Linear`, or of a `Sequential` named `layers`.

The tensors are `weight` (1, P) and `bias` (1,), or `layers.0.weight`, `layers.0.bias`, `layers.2.weight`, ... Numbers
that are left out belong to layers without weights. A file does not say which, so only those of known heads are read.
Dense weights are (out, in), those of Flax (in, out).
"""

import re
from pathlib import Path

import numpy as np

from dm_generations.errors import UserError, short_repr
from dm_generations.models.aesthetic.network import AestheticConfig
from dm_generations.models.base import RawCheckpoint
from dm_generations.weights.native import read_safetensors
from dm_generations.weights.state_dict import Shape, check_tensors, get_tensor, torch_name
from dm_generations.weights.torch_file import read_torch, state_of

MAX_BYTES = 1 << 28  # heads have a few MB at most; other models in such files are not read for nothing
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
# Whether there are ReLUs between dense layers of these numbers: of LAION's head, and of improved-aesthetic-predictor,
# which has dropout between the first four, and in one kind of file ReLUs as well.
_HAS_RELU = {(0,): False, (0, 2, 4, 6, 7): False, (0, 3, 6, 9, 11): True}
_TENSOR = re.compile(r"(?:layers\.(?P<number>\d{1,4})\.)?(?:weight|bias)")


def read_head(path: Path) -> RawCheckpoint | None:
    """Read a file of a head; None for anything else."""
    if path.suffix not in (*_TORCH_SUFFIXES, ".safetensors") or not path.is_file() or path.stat().st_size > MAX_BYTES:
        return None
    state = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if path.suffix in _TORCH_SUFFIXES and not isinstance(state, dict):
        state = state_of(state)
    matches = [_TENSOR.fullmatch(name) if isinstance(name, str) else None for name in state]
    found = [match for match in matches if match is not None]
    if not found or len(found) < len(matches) or len({match["number"] is None for match in found}) > 1:
        return None
    state = check_tensors(state, path)
    numbers = sorted({int(match["number"] or 0) for match in found})
    if (has_relu := _HAS_RELU.get(tuple(numbers))) is None:
        raise UserError(f"{path} has dense layers {short_repr(numbers)}, which are those of no head that is known")
    prefixes = [f"layers.{number}." if found[0]["number"] else "" for number in numbers]
    params: dict[str, dict[str, np.ndarray]] = {}
    widths: list[int] = []
    for layer, prefix in enumerate(prefixes):
        weight = get_tensor(state, f"{prefix}weight", 2, path)
        params[f"layers_{layer}"] = {"kernel": weight.T, "bias": get_tensor(state, f"{prefix}bias", 1, path)}
        widths += [weight.shape[1], weight.shape[0]] if not widths else [weight.shape[0]]

    def name_in_file(parameter: str, shape: Shape) -> tuple[str, Shape]:
        module, _, leaf = parameter.partition("/")
        return torch_name(leaf, shape, prefixes[int(module.removeprefix("layers_"))])

    return RawCheckpoint(
        "aesthetic", AestheticConfig(tuple(widths), has_relu), params, (path,), name_in_file=name_in_file
    )
