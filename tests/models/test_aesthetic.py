"""Aesthetic heads of both public kinds, from .pth and .safetensors, against NumPy in float64."""

import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_files import save, tensor

from dm_generations.errors import UserError
from dm_generations.inference.scorer import AestheticScorer
from dm_generations.models.loading import load_checkpoint
from dm_generations.pipelines.convert import convert

WIDTH = 8  # of the tiny CLIP


def state_dict(widths, names, seed=0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    state = {}
    for prefix, before, after in zip(names, widths, widths[1:], strict=False):
        state[f"{prefix}weight"] = random.normal(size=(after, before)).astype(np.float32)
        state[f"{prefix}bias"] = random.normal(size=after).astype(np.float32)
    return state


LINEAR = state_dict((WIDTH, 1), [""])
SEQUENTIAL = state_dict((WIDTH, 16, 8, 4, 4, 1), [f"layers.{number}." for number in (0, 2, 4, 6, 7)])
WITH_RELU = state_dict((WIDTH, 16, 8, 4, 4, 1), [f"layers.{number}." for number in (0, 3, 6, 9, 11)])


def expected(state, vectors) -> np.ndarray:
    x = vectors.astype(np.float64)
    for name in (name for name in state if name.endswith("weight")):
        x = np.maximum(x, 0) if "layers.11.weight" in state and name != "layers.0.weight" else x
        x = x @ state[name].T.astype(np.float64) + state[name.replace("weight", "bias")]
    return x[:, 0]


@pytest.fixture(scope="module")
def clip(models):
    return load_checkpoint(models.clip, "clip")


@pytest.fixture(scope="module")
def vectors():
    vectors = np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("state", [LINEAR, SEQUENTIAL, WITH_RELU], ids=["linear", "sequential", "relu"])
@pytest.mark.parametrize("name", ["head.pth", "head.safetensors"])
def test_scores_are_those_of_the_state_dict(state, name, clip, vectors, tmp_path):
    path = tmp_path / name
    if path.suffix == ".pth":
        save(path, {name: tensor(array) for name, array in state.items()})
    else:
        save_file(state, path)
    head = load_checkpoint(path, "scorer")
    assert head.config.widths[0] == WIDTH
    scorer = AestheticScorer(head, clip)
    np.testing.assert_allclose(scorer.score_features(vectors), expected(state, vectors), rtol=1e-5, atol=1e-5)
    network = head.network_class(head.config)
    np.testing.assert_allclose(
        jax.device_get(network.apply({"params": head.params}, vectors)), expected(state, vectors), rtol=1e-4, atol=1e-4
    )
    assert scorer.model_info.kind == "scorer" and scorer.model_info.config["clip_sha256"] == clip.sha256
    convert(str(path), tmp_path / "own")
    own = load_checkpoint(tmp_path / "own", "scorer")
    np.testing.assert_array_equal(AestheticScorer(own, clip).score_features(vectors), scorer.score_features(vectors))


def test_a_head_of_another_width_is_refused(clip, tmp_path):
    save_file(state_dict((WIDTH + 1, 1), [""]), tmp_path / "head.safetensors")
    with pytest.raises(UserError, match=rf"head.safetensors.* {WIDTH + 1} .* {WIDTH}\b.*--clip"):
        AestheticScorer(load_checkpoint(tmp_path / "head.safetensors", "scorer"), clip)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": LINEAR["weight"]}, "lacks.* bias"),
        ({"bias": LINEAR["bias"]}, "lacks.* weight"),
        (LINEAR | {"weight": np.zeros((2, WIDTH), np.float32)}, "widths"),
        (LINEAR | {"bias": np.zeros(2, np.float32)}, "bias has shape"),
        (LINEAR | {"weight": LINEAR["weight"][0]}, "weight"),
        (LINEAR | {"other": LINEAR["bias"]}, "scorer is"),
        (LINEAR | SEQUENTIAL, "scorer is"),
        (SEQUENTIAL | {"layers.2.weight": np.zeros((8, 15), np.float32)}, re.escape("layers.2.weight")),
        (state_dict((WIDTH, 4, 1), ["layers.0.", "layers.2."]), r"layers \[0, 2\]"),  # with an activation, or without?
        ({"model.visual.weight": LINEAR["weight"]}, "scorer is"),
        ({}, "scorer is"),
    ],
)
def test_files_that_are_not_heads_are_refused(state, message, tmp_path):
    save(tmp_path / "head.pth", {name: tensor(array) for name, array in state.items()})
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(tmp_path / "head.pth", "scorer")
    assert "head.pth" in str(caught.value) and "\n" not in str(caught.value)
