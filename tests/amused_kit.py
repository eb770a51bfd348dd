"""Folders of aMUSEd: the golden ones, with random weights where a checkout has only their names and shapes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
from helpers import golden_dirs
from safetensors.numpy import load_file, save_file

CASES = sorted(file.parent for file in golden_dirs("amused")[0].glob("*/golden.npz"))
WEIGHTS = {"transformer": "transformer_shapes.json", "vqvae": "vqvae_shapes.json"}


def has_weights(case: Path) -> bool:
    """Whether a case has all of its weights."""
    return all(any((case / part).glob("*.safetensors")) for part in WEIGHTS)


def complete(case: Path, folder: Path, seed: int = 0) -> Path:
    """Copy a case to `folder`; weights that it lacks become random ones of the names and shapes of the original."""
    shutil.copytree(case, folder)
    rng = np.random.default_rng(seed)
    for part, names in WEIGHTS.items():
        if not any((folder / part).glob("*.safetensors")):
            shapes = json.loads((folder / names).read_text("utf-8"))
            tensors = {name: random_tensor(name, shape, rng) for name, (shape, _) in shapes.items()}
            save_file(tensors, folder / part / "diffusion_pytorch_model.safetensors")
    return folder


def random_tensor(name: str, shape: list[int], rng: np.random.Generator) -> np.ndarray:
    """A tensor of a size that keeps activations near 1."""
    if len(shape) == 1:
        return (rng.standard_normal(shape) * 0.1 + (1 if name.endswith("weight") else 0)).astype(np.float32)
    scale = 1.0 if "embedding" in name else np.prod(shape[1:]) ** -0.5
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def rewrite_json(file: Path, **changes) -> None:
    """Change values of a JSON file; None takes one away."""
    values = json.loads(file.read_text("utf-8")) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def small(folder: Path, seed: int = 0) -> Path:
    """Write a model with one layer and one block of each kind: for tests of what goes around it."""
    complete(CASES[-1], folder, seed)
    rewrite_json(folder / "transformer" / "config.json", num_hidden_layers=1, num_res_blocks=1)
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    is_more = re.compile(r".*(res_blocks|attention_blocks|transformer_layers)\.[1-9].*")
    save_file({name: array for name, array in tensors.items() if not is_more.fullmatch(name)}, file)
    return folder
