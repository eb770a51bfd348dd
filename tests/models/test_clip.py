"""CLIP against the outputs of transformers 4.57.6 (tests/golden/clip/README.md)."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden as golden_folder

from dm_generations.errors import UserError
from dm_generations.models.clip.checkpoint import flax_from_torch
from dm_generations.models.clip.network import ACTIVATIONS, CLIP, CLIPConfig
from dm_generations.models.clip.preprocessing import Preprocessing, resize_and_crop
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.registry import parameter_shapes
from dm_generations.weights.native import flatten

CASES = sorted(file.parent for file in golden_folder("clip").rglob("golden.npz"))
PROCESSORS = sorted(golden_folder("clip").rglob("processor_golden.npz"))
ATOL = 1e-4  # the README's: attention variants of the original differ by 5e-6 on logits


@functools.cache
def recorded(folder: Path) -> tuple[CLIPConfig, dict, dict[str, np.ndarray]]:
    """Config, parameters and the original's arrays of a case."""
    checkpoint = load_checkpoint(folder / "model", "clip")
    with np.load(folder / "golden.npz") as arrays:
        return checkpoint.config, checkpoint.params, dict(arrays)


every_case = pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)


@pytest.fixture
def config():
    return recorded(CASES[0])[0]


@pytest.fixture
def params():
    return recorded(CASES[0])[1]


@pytest.fixture(scope="module", params=PROCESSORS, ids=lambda file: file.parent.name)
def processor(request):
    with np.load(request.param) as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(autouse=True)
def strict_jax():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def apply(config, params, method, *arrays, dtype=jnp.float32):
    model = CLIP(config, dtype)
    return np.asarray(jax.jit(lambda p, *a: model.apply({"params": p}, *a, method=method))(params, *arrays))


def text_config(config, **changes):
    return dataclasses.replace(config, text_config=dataclasses.replace(config.text_config, **changes))


@every_case
def test_parameters_are_those_of_the_original(folder):
    config, params, _ = recorded(folder)
    assert {name: array.shape for name, array in flatten(params).items()} == parameter_shapes("clip", config)
    width = config.vision_config.hidden_size
    assert params["vision_model"]["encoder"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"].shape == (width, width)


@every_case
def test_features_and_logits_match(folder):
    config, params, golden = recorded(folder)
    pixels = golden["pixel_values"].transpose(0, 2, 3, 1)
    text = golden["input_ids"], golden["attention_mask"]
    image_features = apply(config, params, "get_image_features", pixels)
    text_features = apply(config, params, "get_text_features", *text)
    logits = apply(config, params, "logits_per_image", pixels, *text)
    np.testing.assert_allclose(image_features, golden["image_features_unnormalised"], atol=ATOL, rtol=0)
    np.testing.assert_allclose(text_features, golden["text_features_unnormalised"], atol=ATOL, rtol=0)
    np.testing.assert_allclose(logits, golden["logits_per_image"], atol=ATOL, rtol=0)


@pytest.mark.e2e
@every_case
def test_bfloat16_stays_near_float32(folder):
    config, params, golden = recorded(folder)
    pixels = golden["pixel_values"].transpose(0, 2, 3, 1)
    with jax.numpy_dtype_promotion("standard"):  # flax's norms mix float32 and bfloat16
        features = apply(config, params, "get_image_features", pixels, dtype=jnp.bfloat16)
    assert features.dtype == jnp.bfloat16
    expected = golden["image_features_unnormalised"]
    assert np.abs(features.astype(np.float32) - expected).max() < 0.05 * np.abs(expected).max()


def test_text_is_read_at_the_first_end_token(config, params):
    end = config.text_config.eos_token_id
    ids = np.array([[4, 5, end, 9, end, end], [4, 5, end, 1, 2, 3]], np.int32)
    features = apply(config, params, "get_text_features", ids, np.ones_like(ids))
    np.testing.assert_allclose(features[0], features[1], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "position"),
    [
        ({"eos_token_id": 2}, 2),  # transformers' rule for OpenAI's configs: the highest id
        ({"eos_token_id": 2, "pool_at_highest_id": False}, 4),
        ({"eos_token_id": 5}, 1),
        ({"eos_token_id": 41, "pool_at_highest_id": True}, 2),
        ({"eos_token_id": 33}, 0),  # absent
    ],
)
def test_text_is_read_where_the_config_says(config, params, changes, position):
    ids = np.array([[0, 5, 40, 7, 2, 1]], np.int32)
    # Later positions cannot be seen, so cutting the text after the pooled one and ending there is the same.
    expected_config = text_config(config, eos_token_id=int(ids[0, position]), pool_at_highest_id=False)
    found = apply(text_config(config, **changes), params, "get_text_features", ids, np.ones_like(ids))
    cut = ids[:, : position + 1]
    expected = apply(expected_config, params, "get_text_features", cut, np.ones_like(cut))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_masked_positions_are_not_seen(config, params):
    ids = np.array([[4, 5, 9, config.text_config.eos_token_id]], np.int32)
    mask = np.array([[1, 0, 1, 1]], np.int32)
    features = [apply(config, params, "get_text_features", x, mask) for x in (ids, np.where(mask == 0, 11, ids))]
    np.testing.assert_array_equal(*features)


def test_activation_follows_the_config():
    config, params, golden = recorded(CASES[0])
    gelu = dataclasses.replace(config, vision_config=dataclasses.replace(config.vision_config, hidden_act="gelu"))
    features = apply(gelu, params, "get_image_features", golden["pixel_values"].transpose(0, 2, 3, 1))
    difference = np.abs(features - golden["image_features_unnormalised"]).max()
    assert 1e-3 < difference < 0.5  # another function, but a near one


def test_every_activation_is_a_function_of_its_own_name():
    """Values at 1 and -2, from transformers' `ACT2FN` by their formulas in float64."""
    x = np.array([1.0, -2.0])
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    exact = np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in x])
    expected = {
        "quick_gelu": x / (1 + np.exp(-1.702 * x)),
        "gelu": exact,
        "gelu_new": tanh,
        "gelu_fast": tanh,
        "gelu_pytorch_tanh": tanh,
        "relu": np.maximum(x, 0),
        "silu": x / (1 + np.exp(-x)),
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(ACTIVATIONS[name](x.astype(np.float32)), values, rtol=1e-5, err_msg=name)


def test_config_defaults_are_those_of_vit_b_32():
    config = CLIPConfig.from_dict({"model_type": "clip", "text_config": {"unknown": 1}, "vision_config": None})
    assert (config.projection_dim, config.text_config.vocab_size, config.vision_config.patch_size) == (
        512,
        49408,
        32,
    )
    assert config.vision_config.hidden_size == 768 and not config.text_config.pools_at_highest_id


def test_config_survives_json_and_is_hashable(config):
    assert CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    changed = text_config(config, pool_at_highest_id=False)
    assert CLIPConfig.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
    assert len({config, changed, CLIPConfig.from_dict(config.to_dict())}) == 2


def test_older_config_key_wins():
    config = CLIPConfig.from_dict({"text_config": {"hidden_size": 64}, "text_config_dict": {"hidden_size": 1024}})
    assert config.text_config.hidden_size == 1024


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_config": [1]}, "text_config must be an object"),
        ({"text_config": {"hidden_size": 100}}, "hidden_size 100 .*num_attention_heads 8"),
        ({"text_config": {"hidden_size": "512"}}, "text config: hidden_size must be"),
        ({"vision_config": {"num_hidden_layers": 0}}, "vision config: num_hidden_layers must be"),
        ({"vision_config": {"num_channels": 1}}, "num_channels must be"),
        ({"vision_config": {"hidden_act": ["relu"]}}, "hidden_act"),
        ({"text_config": {"eos_token_id": None}}, "eos_token_id"),
        ({"text_config": {"pool_at_highest_id": 1}}, "pool_at_highest_id"),
        ({"projection_dim": True}, "projection_dim"),
        ({"logit_scale_init_value": "x"}, "logit_scale_init_value"),
    ],
)
def test_impossible_config_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        CLIPConfig.from_dict(values)


@pytest.mark.e2e
def test_resize_is_the_processors(processor):
    size = processor["resized_cropped_uint8"].shape[0]
    square = resize_and_crop(processor["image_uint8"][None], size)
    wide = resize_and_crop(processor["nonsquare_uint8"][None], size)
    tall = resize_and_crop(processor["nonsquare_uint8"][None].swapaxes(1, 2), size)
    np.testing.assert_array_equal(square[0], processor["resized_cropped_uint8"])
    np.testing.assert_array_equal(wide[0], processor["nonsquare_resized_cropped_uint8"])
    # Pillow rounds between its two passes, rows first, so turning the image moves values by up to 2.
    np.testing.assert_allclose(tall.swapaxes(1, 2).astype(int), wide.astype(int), atol=2)


def test_preprocess_is_the_processors(processor):
    size = processor["resized_cropped_uint8"].shape[0]
    middle = slice(size // 2 - 16, size // 2 + 16)
    pixels = Preprocessing(size).apply(processor["image_uint8"][None])
    assert pixels.shape == (1, size, size, 3) and pixels.dtype == np.float32
    pixels = pixels[0].transpose(2, 0, 1)
    np.testing.assert_allclose(pixels[:, ::2, ::2], processor["pixel_values_f32"], atol=1e-5)
    np.testing.assert_allclose(pixels[:, middle, middle], processor["pixel_values_crop32"], atol=1e-5)


def test_images_of_the_right_size_are_not_resized():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    pixels = Preprocessing(8, mean=(0, 0, 0), std=(1, 1, 1)).apply(images)
    np.testing.assert_allclose(pixels * 255, images, atol=1e-4)
    assert Preprocessing(4).apply(images[:0]).shape == (0, 4, 4, 3)


def test_torch_names_become_flax_names():
    tree = flax_from_torch(
        {
            "logit_scale": np.float32(1),
            "text_model.embeddings.position_ids": np.arange(3),
            "vision_model.embeddings.class_embedding": np.zeros(4),
            "vision_model.embeddings.patch_embedding.weight": np.zeros((4, 3, 2, 2)),
            "vision_model.pre_layrnorm.weight": np.zeros(4),
            "text_projection.weight": np.zeros((5, 4)),
            "text_model.embeddings.token_embedding.weight": np.zeros((7, 4)),
            "other.position_ids": np.zeros(1),  # not one that is known: kept, so that the strict check names it
        }
    )
    assert jax.tree.map(np.shape, tree) == {
        "logit_scale": (),
        "vision_model": {
            "embeddings": {"class_embedding": (4,), "patch_embedding": {"kernel": (2, 2, 3, 4)}},
            "pre_layrnorm": {"scale": (4,)},
        },
        "text_projection": {"kernel": (4, 5)},
        "text_model": {"embeddings": {"token_embedding": {"embedding": (7, 4)}}},
        "other": {"position_ids": (1,)},
    }


@pytest.mark.parametrize("names", [("a.b", "a.b.c"), ("a.b.c", "a.b"), ("a.weight", "a.scale")])
def test_torch_names_that_collide_are_refused(names):
    with pytest.raises(UserError, match="CLIP checkpoint"):
        flax_from_torch({name: np.zeros(1) for name in names})
