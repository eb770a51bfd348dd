"""Draws: the generator's known answers, dalle-mini's own filters, and the rare cases."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, golden
from sampling_kit import (
    FILTER,
    GUMBEL,
    LOG_PROB,
    OFF,
    SAMPLE,
    keep,
    reference_distribution,
    sample_tokens,
    settings_arrays,
)

from dm_generations.sampling import logits as sampling
from dm_generations.sampling.prng import row_key, threefry2x32

# Random123 1.14, tests/kat_vectors, threefry2x32 20 rounds: counter, key, output
KNOWN_ANSWERS = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]
FORMAT_PAGE = ROOT / "schema" / "sampling.md"
RECORDED = sorted(path.parent for path in golden("dalle_bart").glob("**/sample_settings.json"))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_threefry_gives_the_known_answers_of_random123_under_numpy_and_jax(counter, key, expected):
    for array in (np.array, jnp.array):
        words = [array([word], dtype="uint32") for word in (*key, *counter)]
        assert tuple(int(word[0]) for word in threefry2x32(*words)) == expected


def test_row_key_is_threefry_of_the_seed_at_the_index():
    high, low, index = 0x13198A2E, 0x03707344, 0x243F6A88 << 32 | 0x85A308D3
    assert row_key(high << 32 | low, index) == (0xC4923A9C, 0x483DF7A0)
    keys = {row_key(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(1000)}
    assert len(keys) == 3000


def test_the_format_page_shows_the_numbers_this_code_gives():
    page = FORMAT_PAGE.read_text(encoding="utf-8")
    assert f"sampler version {sampling.SAMPLER_VERSION}" in page
    for counter, key, expected in KNOWN_ANSWERS:
        assert " | ".join(f"`{high:08x} {low:08x}`" for high, low in (key, counter, expected)) in page
    rows = re.findall(r"^\| (\d+) \| (\d+) \| `(\w+) (\w+)` \|$", page, re.MULTILINE)
    assert len(rows) >= 4
    for seed, index, key0, key1 in rows:
        assert row_key(int(seed), int(index)) == (int(key0, 16), int(key1, 16))
    rows = re.findall(r"^\| `(\w+) (\w+)` \| (\d+) \| (\d+) \| `(\w+)` \| (\S+) \|$", page, re.MULTILINE)
    assert len(rows) >= 4
    for key0, key1, step, token, bits, noise in rows:
        words = [np.array([int(word)], np.uint32) for word in (int(key0, 16), int(key1, 16), step, token)]
        assert int(threefry2x32(*words)[0][0]) == int(bits, 16)
        row = GUMBEL(jnp.asarray([[words[0][0], words[1][0]]]), jnp.int32(int(step)), codebook_size=16384)
        assert float(row[0, int(token)]) == pytest.approx(float(noise), abs=1e-5)


@pytest.mark.parametrize("bits", [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFF00, 0xFFFFFFFF])
def test_noise_is_finite_and_right_at_the_ends_of_its_range(bits, monkeypatch):
    monkeypatch.setattr(sampling, "threefry2x32", lambda *_: (jnp.full((1, 1), bits, jnp.uint32), None))
    noise = float(sampling.gumbel(jnp.zeros((1, 2), jnp.uint32), jnp.int32(0), 1)[0, 0])
    uniform = min((bits + 0.5) / 2**32, 1 - 2.0**-24)
    assert noise == pytest.approx(-math.log(-math.log1p(-uniform)), rel=3e-6, abs=3e-6)


def test_noise_has_the_moments_of_a_gumbel():
    keys = jnp.asarray([row_key(7, index) for index in range(64)], jnp.uint32)
    noise = np.asarray(GUMBEL(keys, jnp.int32(3), codebook_size=4096), np.float64)
    assert noise.mean() == pytest.approx(0.5772157, abs=5 * 1.2825 / 512)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.03)
    other_step = np.asarray(GUMBEL(keys, jnp.int32(4), codebook_size=4096), np.float64)
    assert abs(np.corrcoef(noise.ravel(), other_step.ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case.name)
def test_filters_give_the_logits_that_dalle_mini_gave(case):
    recorded = np.load(case / "sample.npz")
    settings = json.loads((case / "sample_settings.json").read_text())
    for name, given in settings.items():
        guided, expected = (recorded[f"{name}__steps_{kind}_logits"] for kind in ("guided", "warped"))
        column_count = guided.shape[-1]
        given = {"top_k": 50, **given}  # None means transformers' default of 50, not off
        chosen = {axis: given.get(axis, OFF[axis]) for axis in OFF}
        logits = jnp.asarray(guided.reshape(-1, column_count))
        filtered = FILTER(logits, codebook_size=column_count, **settings_arrays(len(logits), **chosen))
        # one unit in the last place: there a constant temperature was compiled to a multiplication
        expected = expected.reshape(-1, column_count)
        np.testing.assert_allclose(filtered, expected, rtol=1.2e-7, atol=0, err_msg=name)


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case.name)
def test_filtered_logits_and_dalle_minis_noise_give_the_codes_it_drew(case):
    recorded = np.load(case / "sample.npz")
    chosen = json.loads((case / "sample_settings.json").read_text())["full"]
    end_token = json.loads((case / "config.json").read_text())["eos_token_id"]
    guided, noise = recorded["full__steps_guided_logits"], recorded["full__steps_gumbel"]
    logits = jnp.asarray(guided.reshape(-1, guided.shape[-1]))
    arrays = settings_arrays(len(logits), **{axis: chosen[axis] for axis in OFF})
    filtered = FILTER(logits, codebook_size=guided.shape[-1], **arrays)
    sampled = (np.asarray(filtered).reshape(noise.shape) + noise).argmax(axis=-1)
    expected = recorded["full__sequences"][:, 1:]
    is_filled = np.cumsum(expected == end_token, axis=1) > 1  # dalle-mini repeats the end token to the end
    np.testing.assert_array_equal(sampled[~is_filled], expected[~is_filled])
    assert is_filled.mean() < 0.1


def plain_keep_top_k(logits, top_k):
    """`keep_top_k` as sampler version 1 first had it: no shortcuts, one bit a pass."""
    code_count = logits.shape[1]
    count = jnp.where((top_k > 0) & (top_k < code_count), top_k, code_count)[:, None]
    order = sampling.to_sortable(logits)

    def count_of(is_counted):
        return is_counted.sum(axis=1, keepdims=True, dtype=jnp.int32)

    threshold = plain_bisect(order, lambda candidate: count_of(order >= candidate) >= count)
    is_above, is_tied = order > threshold, order == threshold
    tie_rank = jnp.cumsum(is_tied, axis=1, dtype=jnp.int32)
    return is_above | (is_tied & (tie_rank <= count - count_of(is_above)))


def plain_keep_top_p(logits, top_p):
    """`keep_top_p` as sampler version 1 first had it."""
    best = logits.max(axis=1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(best), best, 0.0))
    target = jnp.maximum(top_p[:, None] * weights.sum(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    order = sampling.to_sortable(logits)

    def weigh(is_counted):
        return jnp.where(is_counted, weights, 0.0).sum(axis=1, keepdims=True)

    threshold = plain_bisect(order, lambda candidate: weigh(order >= candidate) >= target)
    is_above, is_tied = order > threshold, order == threshold
    ties_before = (jnp.cumsum(is_tied, axis=1, dtype=jnp.int32) - 1).astype(jnp.float32)
    return is_above | (is_tied & (weigh(is_above) + ties_before * weights < target)) | (top_p >= 1)[:, None]


def plain_bisect(order, is_reached):
    def set_bit(index, threshold):
        candidate = threshold | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        return jnp.where(is_reached(candidate), candidate, threshold)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros((order.shape[0], 1), jnp.uint32))


@jax.jit
def plain_draw(logits, noise, top_k, top_p, temperature):
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    is_greedy = ((temperature == 0) | ~jnp.isfinite(logits.max(axis=1) / temperature))[:, None]
    sampled = logits / jnp.where(is_greedy, 1.0, temperature[:, None])
    sampled = jnp.where(plain_keep_top_k(sampled, top_k), sampled, -jnp.inf)
    sampled = jnp.where(plain_keep_top_p(sampled, top_p), sampled, -jnp.inf) + noise
    return jnp.argmax(jnp.where(is_greedy, logits, sampled), axis=1)


def odd_logits(random, row_count, code_count):
    """Rows of every scale, among them ties, NaN, infinities and rows of one value."""

    def rarely(values):
        return random.random((row_count, code_count)) < random.choice(values, (row_count, 1))

    rows = random.normal(size=(row_count, code_count)) * random.choice([0, 0.01, 0.5, 2, 20, 1e3, 1e37], (row_count, 1))
    rows = np.where(random.random((row_count, 1)) < 0.3, np.round(rows, 1), rows)
    rows = np.where(random.random((row_count, 1)) < 0.1, random.choice([0.0, -0.0, 1e-40, -50, 3e38]), rows)
    for value in (np.nan, -np.inf, np.inf):
        rows = np.where(rarely([0, 0, 0, 0.02, 0.9]), value, rows)
    return jnp.asarray(rows, jnp.float32)


@pytest.mark.e2e
@pytest.mark.parametrize("filters", ["none", "top_k", "top_p", "both"])
def test_shortcuts_change_no_result(filters):
    random = np.random.default_rng(5)
    row_count, code_count = 128, 700
    keep_top_k, keep_top_p, plain_k, plain_p = map(
        jax.jit, (sampling.keep_top_k, sampling.keep_top_p, plain_keep_top_k, plain_keep_top_p)
    )
    for step in range(8):
        logits = odd_logits(random, row_count, code_count)
        numbers = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
        top_k = random.choice([0, 1, 2, 5, 50, 256, 699, 700, 701, 2**31 - 1], row_count)
        top_p = random.choice([0, 1e-40, 1e-3, 0.1, 0.5, 0.9, 0.999999, 1, 2, np.nan, random.random()], row_count)
        temperature = random.choice([0, 1e-40, 0.1, 0.5, 1, 1, 1, 2, 3e38], row_count)
        settings = settings_arrays(
            row_count,
            top_k if filters in ("top_k", "both") else 0,
            top_p if filters in ("top_p", "both") else 1.0,
            temperature if step else 0.0,
        )
        for found, expected in (
            (keep_top_k(numbers, settings["top_k"]), plain_k(numbers, settings["top_k"])),
            (keep_top_p(numbers, settings["top_p"]), plain_p(numbers, settings["top_p"])),
        ):
            np.testing.assert_array_equal(found, expected)
        keys = jnp.asarray(random.integers(0, 2**32, (row_count, 2), dtype=np.uint32))
        noise = GUMBEL(keys, jnp.int32(step), codebook_size=code_count)
        found = SAMPLE(logits, jnp.int32(step), keys, codebook_size=code_count, **settings)
        np.testing.assert_array_equal(found, plain_draw(logits, noise, **settings))


def test_filters_keep_what_a_sort_would_keep_on_random_rows_with_many_ties():
    random = np.random.default_rng(1)
    for row_scale in (0.0, 0.5, 4.0):
        logits = np.round(random.normal(size=(48, 33)) * row_scale, 1).astype(np.float32)
        top_k, top_p = random.integers(0, 36, 48), random.choice([0.1, 0.35, 0.72, 0.9, 1.0], 48)
        temperature = random.choice([0.5, 1.0, 2.0], 48)
        arrays = settings_arrays(48, top_k, top_p, temperature)
        filtered = np.asarray(FILTER(jnp.asarray(logits), codebook_size=33, **arrays))
        for row, k, p, t in zip(range(48), top_k, top_p, temperature, strict=True):
            expected = reference_distribution(logits[row], k, float(np.float32(p)), t) > 0
            differing = np.flatnonzero(np.isfinite(filtered[row]) != expected)
            # float32 sums may put a token whose share ends at top_p exactly on the other side of the edge
            assert len(differing) <= (1 if p < 1 else 0), (row, k, p, t)


def test_ties_keep_exactly_k_lower_codes_first():
    assert keep([1, 5, 3, 3, 3, 0], top_k=3) == [1, 2, 3]
    assert keep([2, 2, 2, 2], top_k=3) == [0, 1, 2]
    assert keep([0.0, -0.0, 0.0, -1], top_k=2) == [0, 1]


def test_top_p_stops_inside_a_tie():
    assert keep([2, 2, 2, 2], top_p=0.4) == [0, 1]
    assert keep([2, 2, 2, 2], top_p=0.5) == [0, 1]
    assert keep([9, 0, 0, 0], top_p=0.9) == [0]


def test_top_k_comes_before_top_p():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert keep(logits, top_p=0.5) == [0, 1]
    assert keep(logits, top_k=2, top_p=0.5) == [0]


def test_top_p_first_weighs_the_logits_before_temperature_and_top_k():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert keep(logits, top_p=0.75, temperature=0.2) == [0]
    assert keep(logits, top_p=0.75, temperature=0.2, order="top_p_first") == [0, 1, 2]
    assert keep(logits, top_p=0.5, top_k=2, order="top_p_first") == [0, 1]
    arrays = settings_arrays(1, top_p=0.75, temperature=0.25)
    rows = jnp.asarray(logits[None], jnp.float32)
    filtered = FILTER(rows, codebook_size=4, order="top_p_first", **arrays)
    np.testing.assert_allclose(filtered[0, :3], 4 * logits[:3], rtol=1e-6)
    keys = np.array([row_key(0, index) for index in range(50)], np.uint32)
    assert set(sample_tokens(logits, keys, temperature=3.0, top_p=0.65, order="top_p_first").tolist()) == {0, 1}
    with pytest.raises(ValueError, match="order is 'top_k_first'"):
        keep(logits, order="top_k_first")


def test_top_k_at_or_above_the_codebook_is_off():
    logits = [3, 1, 2, 0]
    assert keep(logits, top_k=4) == keep(logits, top_k=2**31 - 1) == keep(logits) == [0, 1, 2, 3]


@pytest.mark.parametrize("top_p", [1e-3, 1e-30, 1e-40])
def test_a_tiny_top_p_leaves_the_best_code(top_p):
    assert keep([1, 7, 7, 3], top_p=top_p) == [1]
    assert keep(np.full(100, -50.0), top_p=top_p) == [0]


@pytest.mark.parametrize("temperature", [0.0, 2e-38, 1e-40])
def test_temperature_zero_and_its_neighbours_are_greedy(temperature):
    keys = np.array([row_key(0, index) for index in range(50)], np.uint32)
    assert set(sample_tokens([29.9, 30, 1, 30], keys, temperature=temperature).tolist()) == {1}


def test_a_hot_row_samples_evenly_and_never_overflows():
    keys = np.array([row_key(0, index) for index in range(2000)], np.uint32)
    counts = np.bincount(sample_tokens([5, -5, 0, 9], keys, temperature=3e38), minlength=4)
    assert counts.min() > 400


def test_nan_is_never_drawn_and_infinity_always():
    keys = np.array([row_key(0, index) for index in range(200)], np.uint32)
    assert set(sample_tokens([np.nan, 1, np.nan, 1], keys).tolist()) == {1, 3}
    assert set(sample_tokens([np.nan, 1, np.inf, 1], keys, top_k=2, top_p=0.9).tolist()) == {2}
    assert set(sample_tokens([-np.inf, 1, -np.inf, -np.inf], keys, top_k=3).tolist()) == {1}


def test_a_row_without_numbers_gives_code_0_and_is_not_drawable():
    logits = np.array([[np.nan, np.nan, -np.inf, 4], [np.nan, 0, -np.inf, 4]], np.float32)
    assert sample_tokens(logits, codebook_size=3).tolist() == [0, 1]
    assert np.asarray(sampling.can_sample(jnp.asarray(logits), 3)).tolist() == [False, True]


def test_log_prob_is_the_log_softmax_over_the_real_codes():
    random = np.random.default_rng(4)
    logits = (random.normal(size=(40, 3000)) * random.uniform(0, 60, (40, 1))).astype(np.float32)
    logits[random.random(logits.shape) < 0.01] = np.nan
    logits[random.random(logits.shape) < 0.01] = -np.inf
    logits[:, 2900:] = 1e3  # columns that are not tokens
    tokens = random.integers(0, 2900, 40).astype(np.int32)
    real = np.where(np.isnan(logits), -np.inf, logits)[:, :2900].astype(np.float64)
    real -= real.max(axis=1, keepdims=True)
    exact = real[np.arange(40), tokens] - np.log(np.exp(real).sum(axis=1))
    found = LOG_PROB(jnp.asarray(logits), jnp.asarray(tokens), codebook_size=2900)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-5)


def test_log_prob_of_what_cannot_be_drawn_is_minus_infinity():
    inf, nan = np.inf, np.nan
    rows = [[nan, 0, -inf, 0], [inf, 5, inf, nan], [nan, nan, -inf, -inf], [3, -1e38, -inf, 3e38], [-1, nan, nan, nan]]
    logits = jnp.asarray(rows, jnp.float32)
    found = [LOG_PROB(logits, jnp.full(5, token), codebook_size=4) for token in range(5)]
    half = math.log(0.5)
    expected = [
        [-inf, half, -inf, half],
        [half, -inf, half, -inf],
        [-inf] * 4,
        [-3e38, -inf, -inf, 0],
        [0] + [-inf] * 3,
    ]
    np.testing.assert_allclose(np.transpose(found), np.c_[expected, [-inf] * 5], rtol=1e-6)


def test_only_real_codes_are_drawn_and_counted():
    keys = np.array([row_key(0, index) for index in range(200)], np.uint32)
    logits = [1, 2, 0, 50, 50]
    assert set(sample_tokens(logits, keys, codebook_size=3).tolist()) == {0, 1, 2}
    assert keep(logits, codebook_size=3, top_k=2) == [0, 1]


def test_guidance_of_one_is_exactly_the_conditional_half():
    random = np.random.default_rng(2)
    cond, uncond = (jnp.asarray(random.normal(size=(3, 50)) * 1e3, jnp.float32) for _ in range(2))
    guided = np.asarray(sampling.guide(cond, uncond, jnp.asarray([1, 0, 3], jnp.float32)))
    np.testing.assert_array_equal(guided[0], cond[0])
    np.testing.assert_array_equal(guided[1], uncond[1])
    np.testing.assert_allclose(guided[2], 3 * cond[2] - 2 * uncond[2], rtol=1e-4, atol=1e-3)
    broken = jnp.full_like(uncond, jnp.nan)
    np.testing.assert_array_equal(sampling.guide(cond, broken, jnp.ones(3, jnp.float32)), cond)


def test_a_row_samples_the_same_codes_in_any_company():
    random = np.random.default_rng(3)
    logits = random.normal(size=(8, 40)).astype(np.float32)
    keys = random.integers(0, 2**32, (8, 2), dtype=np.uint32)
    columns = {"top_k": random.integers(0, 40, 8), "top_p": random.uniform(0.3, 1, 8)}
    columns["temperature"] = random.choice([0, 0.7, 3], 8)
    together = sample_tokens(logits, keys, **columns)
    order = random.permutation(8)
    moved = sample_tokens(logits[order], keys[order], **{name: column[order] for name, column in columns.items()})
    np.testing.assert_array_equal(moved, together[order])


def test_no_value_of_a_setting_compiles_again():
    traced = []

    def counted(*args, codebook_size, **arrays):
        traced.append(codebook_size)
        return sampling.sample(*args, codebook_size=codebook_size, **arrays)

    compiled = jax.jit(counted, static_argnames="codebook_size")
    logits, keys = jnp.zeros((2, 9), jnp.float32), jnp.zeros((2, 2), jnp.uint32)
    for step, (k, p, t) in enumerate([(0, 1, 1), (5, 0.5, 0), ([1, 90], [0.1, 1], [2, 0.5])]):
        compiled(logits, jnp.int32(step), keys, codebook_size=9, **settings_arrays(2, k, p, t))
    assert traced == [9]
