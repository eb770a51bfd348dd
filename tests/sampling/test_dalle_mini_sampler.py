"""dalle-mini's noise, and with it the very tokens that its own `generate` drew."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import first_of, golden

from dm_generations.models.dalle_mini.config import DalleBartConfig, config_for_params, unscan
from dm_generations.models.dalle_mini.network import DalleBart
from dm_generations.sampling import decode_loop as loop
from dm_generations.sampling import methods as dalle_mini_rng
from dm_generations.sampling.batching import TEXT_BATCH, RowInputs
from dm_generations.sampling.methods import DalleMiniSampler, call_gumbel, row_gumbel, split
from dm_generations.sampling.prng import prng_key
from dm_generations.weights.flax_msgpack import read_flax_msgpack

CASES = sorted(path.parent for path in golden("dalle_bart").glob("**/sample_settings.json"))
CALL_GUMBEL = jax.jit(call_gumbel, static_argnums=(1, 2))


def read(case):
    """Its config.json, and of each setting its name, values and recorded arrays."""
    with np.load(case / "sample.npz") as file:
        recorded = dict(file)
    settings = json.loads((case / "sample_settings.json").read_text())
    named = [
        (
            name,
            values,
            {key.removeprefix(f"{name}__"): recorded[key] for key in recorded if key.startswith(f"{name}__")},
        )
        for name, values in settings.items()
    ]
    return json.loads((case / "config.json").read_text()), named


def generate(case, keys, indices=None, **values):
    """Sequences (B, L) without the start token, of the golden prompts at `indices`."""
    config_values, _ = read(case)
    params = jax.tree.map(jnp.asarray, read_flax_msgpack(case / "flax_model.msgpack"))
    config, params = unscan(config_for_params(DalleBartConfig.from_dict(config_values), params), params)
    model = DalleBart(config)
    forward = np.load(case / "forward.npz")
    indices = list(range(len(forward["input_ids"])) if indices is None else indices)
    count = len(indices)
    texts = [
        np.concatenate([forward[f"{name}{suffix}"][indices] for suffix in ("", "_uncond")])
        for name in ("input_ids", "attention_mask")
    ]
    slots = -(-2 * count // TEXT_BATCH) * TEXT_BATCH
    texts = [np.pad(array, ((0, slots - 2 * count), (0, 0))) for array in texts]
    ones, numbers = np.ones(count, np.float32), np.arange(count, dtype=np.int32)
    rows = RowInputs(
        *texts,
        text_count=np.array([2 * count], np.int32),
        row_count=np.array([count], np.int32),
        text_of_sequence=np.arange(2 * count, dtype=np.int32),
        row_of_sequence=np.concatenate([numbers, numbers]),
        cond=numbers,
        uncond=count + numbers,
        keys=np.asarray(keys, np.uint32),
        top_k=np.full(count, values.get("top_k", config.top_k), np.int32),
        top_p=ones * values.get("top_p", config.top_p),
        temperature=ones * values.get("temperature", config.temperature),
        cond_scale=ones * values.get("condition_scale", 1),
        init_tokens=np.zeros((count, config.image_length), np.int32),
        init_count=np.zeros(count, np.int32),
        extra=np.zeros((count, 0), np.float32),
    )
    sampler = DalleMiniSampler(config.image_vocab_size + 1, config.eos_token_id, config.pad_token_id)
    fixed = model, sampler, None, params, rows
    state = loop.decode_steps(*fixed, loop.init_cache(*fixed), np.int32(0), np.int32(config.image_length))
    assert state.last.can_sample.all()
    return np.asarray(state.tokens)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_keys_and_noise_are_those_of_dalle_mini(case):
    for name, values, arrays in read(case)[1]:
        key = np.array(prng_key(values["seed"]), np.uint32)
        np.testing.assert_array_equal(key, arrays["prng_key"], err_msg=name)
        state, noise = jnp.asarray(key), []
        for expected in arrays["steps_key"]:
            key, state = split(state)
            np.testing.assert_array_equal(key, expected, err_msg=name)
            noise.append(CALL_GUMBEL(key, *arrays["steps_guided_logits"].shape[::2]))
        if "steps_gumbel" in arrays:
            # of two implementations of the logarithm; the bits of the uniform number are the same
            np.testing.assert_allclose(np.stack(noise, axis=1), arrays["steps_gumbel"], rtol=1e-6, atol=1e-6)


@pytest.mark.e2e
@pytest.mark.parametrize("case", first_of(CASES), ids=lambda case: case.name)
def test_tokens_are_those_that_dalle_mini_drew(case):
    for name, values, arrays in read(case)[1]:
        tokens = generate(case, arrays["prng_key"], **values)
        np.testing.assert_array_equal(tokens, arrays["sequences"][:, 1:], err_msg=name)


def test_golden_cases_hold_an_end_and_ids_above_the_codebook():
    """The rare rules are tested above only if some case needs them."""
    drawn = [(read(case)[0], arrays["sequences"][:, 1:]) for case in CASES for _, _, arrays in read(case)[1]]
    assert any((tokens[:, -1] == config["pad_token_id"]).any() for config, tokens in drawn)
    assert any((tokens > config["eos_token_id"]).any() for config, tokens in drawn)


@pytest.mark.e2e
def test_rows_with_keys_of_their_own_are_calls_with_one_prompt():
    case = CASES[0]
    count = len(np.load(case / "forward.npz")["input_ids"])
    keys = np.array([prng_key(2**32 + seed) for seed in range(count)], np.uint32)
    settings = {"top_k": 20, "top_p": 0.9, "temperature": 1.2, "condition_scale": 3.0}
    together = generate(case, keys, **settings)
    for index, key in enumerate(keys):
        alone = generate(case, key, [index], **settings)
        np.testing.assert_array_equal(together[index], alone[0])
    assert len(np.unique(together, axis=0)) == count


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 65)])
def test_noise_is_that_of_jax_without_partitionable_threefry(rows, columns):
    with jax.threefry_partitionable(False):
        key = jax.random.PRNGKey(1234567890)
        np.testing.assert_array_equal(np.stack(split(key)), jax.random.split(key))
        expected = jax.random.gumbel(key, (rows, columns))
    np.testing.assert_allclose(CALL_GUMBEL(key, rows, columns), expected, rtol=1e-6, atol=1e-6)
    keys = jnp.stack([key, key + 1])
    for key, row in zip(keys, row_gumbel(keys, columns), strict=True):
        np.testing.assert_allclose(row[None], CALL_GUMBEL(key, 1, columns), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32 + 7, 2**63 - 1, -1])
def test_keys_are_those_of_jax_with_32_bit_integers(seed):
    assert prng_key(seed) == tuple(jax.random.PRNGKey(seed).tolist())


@pytest.mark.parametrize(("bits", "noise"), [(0, -4.4699), (2**9 - 1, -4.4699), (2**32 - 1, 15.9424)])
def test_noise_is_finite_at_the_ends_of_its_range(bits, noise, monkeypatch):
    """A uniform number of 0 counts as the smallest normal one."""
    words = jnp.full((1, 1), bits, jnp.uint32)
    monkeypatch.setattr(dalle_mini_rng, "threefry2x32", lambda *_: (words, words))
    assert float(row_gumbel(jnp.zeros((1, 2), jnp.uint32), 1)[0, 0]) == pytest.approx(noise, abs=1e-3)
