"""DalleBart against the outputs of dalle-mini (tests/golden/dalle_bart/README.md), and its cached steps.

Every folder with recorded arrays is a case; among them mini, mega (scanned layers), other (preln, rmsnorm, biases, head
scales, plain FFN), and mega_fp16 (mega's weights in float16).
"""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import first_fast, first_of
from helpers import golden as golden_folder

from dm_generations.errors import UserError
from dm_generations.models.base import default_params_of
from dm_generations.models.dalle_mini.config import DalleBartConfig, config_for_params
from dm_generations.models.dalle_mini.network import DalleBart
from dm_generations.sampling.params import SamplingParams
from dm_generations.weights.flax_msgpack import read_flax_msgpack

GOLDEN = golden_folder("dalle_bart")


def cases_with(array: str) -> list[str]:
    """The variants whose forward.npz has this array."""
    files = sorted(GOLDEN.glob("*/forward.npz"))
    return [file.parent.name for file in files if array in np.load(file).files]


CASES, HALF_CASES = cases_with("logits"), cases_with("logits_dtype32")
SMALL = DalleBartConfig(
    encoder_vocab_size=20,
    image_vocab_size=12,
    image_length=4,
    max_text_length=5,
    d_model=8,
    encoder_layers=1,
    encoder_ffn_dim=8,
    encoder_attention_heads=2,
    decoder_layers=1,
    decoder_ffn_dim=8,
    decoder_attention_heads=2,
    use_scan=False,
)


@dataclasses.dataclass
class Golden:
    config: DalleBartConfig
    params: dict
    arrays: dict[str, np.ndarray]


@functools.cache
def golden(variant: str) -> Golden:
    config = DalleBartConfig.from_dict(json.loads((GOLDEN / variant / "config.json").read_text()))
    weights = GOLDEN / variant / "flax_model.msgpack"
    if weights.is_file():
        params = read_flax_msgpack(weights)
    else:  # the trimmed set has the weights of a case in float32 alone
        whole = next(folder for folder in GOLDEN.glob("*/") if variant.startswith(f"{folder.name}_"))
        wide = read_flax_msgpack(whole / "flax_model.msgpack")
        params = jax.tree.map(lambda leaf: leaf.astype(np.float16), wide)
    with np.load(GOLDEN / variant / "forward.npz") as arrays:
        return Golden(config_for_params(config, params), params, dict(arrays))


def shapes(tree, prefix=""):
    """{"a/b/c": shape} of a nested dict of arrays."""
    if not isinstance(tree, dict):
        return {prefix: tree.shape}
    joined = [shapes(child, f"{prefix}/{name}" if prefix else name) for name, child in tree.items()]
    return {name: shape for part in joined for name, shape in part.items()}


def initial_params(config):
    """The tree that the network creates, as shapes and dtypes."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(DalleBart(config).init, jax.random.key(0), ids, ids, ids)["params"]


def random_params(config):
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: generator.normal(scale=0.5, size=leaf.shape).astype(leaf.dtype), initial_params(config)
    )


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, input_ids, attention_mask, decoder_input_ids):
    """Encoder state and teacher-forced logits."""
    apply = functools.partial(model.apply, {"params": params})
    encoder_state = apply(input_ids, attention_mask, method="encode")
    return encoder_state, apply(decoder_input_ids, encoder_state, attention_mask, method="decode")


def cached_logits(model, params, *inputs):
    """The logits of `forward`, computed a token at a time, with parameters as a CPU takes them."""
    config, params = DalleBart.prepare_params(model.config, params, "cpu")
    return stepped_logits(model.clone(config=config), params, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def stepped_logits(model, params, input_ids, attention_mask, decoder_input_ids):
    apply = functools.partial(model.apply, {"params": params})

    def body(cache, inputs):
        logits, cache = apply(cache, *inputs, method="decode_step")
        return cache, logits

    cache = apply(apply(input_ids, attention_mask, method="encode_prompt"), method="init_cache")
    steps = jnp.arange(decoder_input_ids.shape[1])
    return jax.lax.scan(body, cache, (decoder_input_ids.T, steps))[1].swapaxes(0, 1)


@pytest.mark.parametrize("variant", CASES)
def test_parameters_are_named_and_shaped_as_in_the_checkpoint(variant):
    assert shapes(initial_params(golden(variant).config)) == shapes(golden(variant).params)


@pytest.mark.parametrize("variant", first_fast(reversed(CASES)))
def test_outputs_are_those_of_dalle_mini_and_steps_repeat_them(variant):
    model, params, arrays = DalleBart(golden(variant).config), golden(variant).params, golden(variant).arrays
    for suffix in ("", "_uncond"):
        text = arrays[f"input_ids{suffix}"], arrays[f"attention_mask{suffix}"]
        encoder_state, logits = forward(model, params, *text, arrays["decoder_input_ids"])
        assert logits.dtype == jnp.float32
        # dalle-mini's float32 is within 1e-5 of float64
        np.testing.assert_allclose(encoder_state, arrays[f"encoder_state{suffix}"], atol=1e-4)
        np.testing.assert_allclose(logits, arrays[f"logits{suffix}"], atol=1e-4)
        stepped = cached_logits(model, params, *text, arrays["decoder_input_ids"])
        np.testing.assert_allclose(stepped, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.e2e
@pytest.mark.parametrize("variant", HALF_CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("32", 1e-4), ("16", 0.05)])
def test_float16_weights(variant, dtype, tolerance):
    """0.05: dalle-mini's own float16 is 0.02 from its float32."""
    params, arrays = golden(variant).params, golden(variant).arrays
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float16)}
    model = DalleBart(golden(variant).config, dtype=f"float{dtype}")
    with jax.numpy_dtype_promotion("standard"):
        inputs = [arrays[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")]
        encoder_state, logits = forward(model, params, *inputs)
        expected = arrays[f"logits_dtype{dtype}"]
        assert (encoder_state.dtype, logits.dtype) == (f"float{dtype}", "float32")
        np.testing.assert_allclose(logits, expected, atol=tolerance)
        if dtype == "16":
            stepped = cached_logits(model, params, *inputs)
            np.testing.assert_allclose(stepped, expected, atol=tolerance)


@pytest.mark.parametrize("variant", CASES)
def test_layout_of_the_layers_is_read_from_the_parameters(variant):
    layers = golden(variant).params["model"]["encoder"]["layers"]
    use_scan = not any(re.fullmatch(r"\w+_\d+", name) for name in layers)
    config = dataclasses.replace(golden(variant).config, use_scan=not use_scan)
    assert config_for_params(config, golden(variant).params).use_scan is use_scan


def test_layout_of_something_else_is_refused():
    with pytest.raises(UserError, match="model/encoder/layers is missing"):
        config_for_params(SMALL, {"encoder": {}, "decoder": {}})


def small_inputs():
    text = jnp.array([[3, 4, 5, 0, 0]])
    return text, jnp.array([[1, 1, 1, 0, 0]]), jnp.array([[12, 1, 2, 3]])


@pytest.mark.e2e
def test_padding_is_not_seen():
    text, mask, image = small_inputs()
    params = random_params(SMALL)
    _, logits = forward(DalleBart(SMALL), params, text, mask, image)
    _, other_padding = forward(DalleBart(SMALL), params, text.at[0, 3:].set(7), mask, image)
    np.testing.assert_array_equal(logits, other_padding)
    _, longer_text = forward(DalleBart(SMALL), params, text.at[0, 3].set(7), mask.at[0, 3].set(1), image)
    assert np.abs(logits - longer_text).max() > 1e-4
    _, no_text = forward(DalleBart(SMALL), params, text, jnp.zeros_like(mask), image)
    assert np.isfinite(no_text).all()


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "use_scan"), first_of([("dropout", True), ("attention_dropout", False), ("activation_dropout", False)])
)
def test_each_dropout_acts_in_training(name, use_scan):
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, name: 0.5}
    config = dataclasses.replace(SMALL, use_scan=use_scan, **rates)
    variables = {"params": random_params(config)}

    @jax.jit
    def train(key):
        return DalleBart(config).apply(variables, *small_inputs(), deterministic=False, rngs={"dropout": key})

    first, again, second = (train(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.slow
def test_every_parameter_is_trained():
    model, inputs = DalleBart(SMALL), small_inputs()
    params = {"params": random_params(SMALL)}
    target = jnp.array([[1, 2, 3, 4]])

    @jax.jit
    @jax.grad
    def gradient(params):
        probabilities = jax.nn.log_softmax(model.apply(params, *inputs))
        return -jnp.take_along_axis(probabilities, target[..., None], -1).mean()

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_cogview_and_rmsnorm_have_the_parameters_of_dalle_mini():
    """One norm more after the feed-forward block, none inside; an rmsnorm before a dense layer has none."""
    config = dataclasses.replace(SMALL, ln_positions="cogview", ln_type="rmsnorm")
    names = shapes(initial_params(config))
    prefix = "model/encoder/layers/FlaxBartEncoderLayer_0/"
    norms = {name.removeprefix(prefix) for name in names if name.startswith(prefix) and "Norm" in name}
    assert norms == {"RMSNorm_1/scale", "GLU_0/RMSNorm_1/scale"}
    assert "model/encoder/final_ln/scale" not in names


def test_config_of_the_public_mega():
    """The start token is the codebook's size, not the vocabulary's; unknown keys and null are ignored."""
    config = DalleBartConfig.from_dict(
        {
            "d_model": 2048,
            "decoder_start_token_id": 16384,
            "image_vocab_size": 16415,
            "encoder_attention_heads": 32,
            "tau_init": 0.05,
            "sinkhorn_iters": 1,
            "forced_eos_token_id": None,
            "dropout": 0,
            "use_scan": None,
        }
    )
    assert (config.codebook_size, config.image_vocab_size, config.d_model) == (16384, 16415, 2048)
    assert config == dataclasses.replace(config) and hash(config) == hash(dataclasses.replace(config))
    assert DalleBartConfig.from_dict({"image_vocab_size": 1000}).codebook_size == 1000


def test_a_config_may_say_what_its_model_is_drawn_with():
    values = {"image_length": 64, "top_k": 40, "top_p": 0.9, "temperature": 0.8}
    assert default_params_of(DalleBartConfig.from_dict(values)) is None  # those three alone are dalle-mini's own
    config = DalleBartConfig.from_dict(values | {"cond_scale": 2})
    assert default_params_of(config) == SamplingParams(40, 0.9, 0.8, 2)
    with pytest.raises(UserError, match="cond_scale"):
        DalleBartConfig.from_dict(values | {"cond_scale": -1})


def test_options_of_initial_values_are_no_obstacle():
    assert DalleBartConfig.from_dict({"use_subln_init": True, "init_std": 0.01, "tau_init": 0.2}).init_std == 0.01


def test_tokens_of_the_end_and_of_padding_may_be_the_first():
    config = DalleBartConfig.from_dict({"eos_token_id": 0, "pad_token_id": 0, "top_k": 0})
    assert (config.eos_token_id, config.pad_token_id, config.top_k) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ln_positions", "swinv2"),
        ("ln_positions", "postln"),
        ("ln_positions", ["preln"]),
        ("ln_type", "batchnorm"),
        ("activation_function", "smelu"),
        ("use_cosine_attention", True),
        ("use_alibi", True),
        ("sinkhorn_iters", 3),
        ("tie_word_embeddings", True),
        ("d_model", 1000),
        ("d_model", 0),
        ("encoder_layers", "12"),
        ("decoder_layers", 2.5),
        ("decoder_layers", True),
        ("top_k", -1),
        ("top_p", 1.5),
        ("temperature", 0),
        ("eos_token_id", -1),
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("use_glu", 1),
        ("decoder_start_token_id", 20000),
    ],
)
def test_bad_options_are_errors_that_name_them(name, value):
    with pytest.raises(UserError, match=name) as error:
        DalleBartConfig.from_dict({name: value})
    assert "\n" not in str(error.value)


@pytest.mark.e2e
@pytest.mark.parametrize("variant", first_of(CASES))
def test_bfloat16_stays_near_float32(variant):
    """Within a quarter of the standard deviation: up to 0.17 of it was measured."""
    found = golden(variant)
    inputs = [found.arrays[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")]
    with jax.numpy_dtype_promotion("standard"):
        _, logits = forward(DalleBart(found.config, dtype="bfloat16"), found.params, *inputs)
    expected = found.arrays["logits"]
    np.testing.assert_allclose(logits, expected, atol=0.25 * expected.std())
