"""Masked parallel decoding in the generator: a row depends on its key and settings, and on nothing else."""

import dataclasses

import jax
import numpy as np
import pytest
from amused_kit import small

from dm_generations.errors import UserError
from dm_generations.inference.generator import Generator
from dm_generations.models.loading import load_checkpoint
from dm_generations.sampling.params import SamplingParams
from dm_generations.sampling.prng import row_key

PROMPTS = ["a red cat", "two dogs", "a red cat", "a house"]
SETTINGS = [SamplingParams(cond_scale=scale, top_k=top_k) for scale, top_k in ((3.0, 0), (1.0, 5), (8.0, 0), (1.0, 0))]
EXTRA = [{"steps": 3}, {}, {"steps": 1}, {"steps": 5, "mask_temperature": 0.5, "aesthetic_score": 4.0}]
KEYS = np.array([row_key(7, index) for index in range(4)], np.uint32)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load_checkpoint(small(tmp_path_factory.mktemp("amused") / "model"), "generator")


@pytest.fixture(scope="module")
def generator(checkpoint):
    return Generator(checkpoint, checkpoint.load_tokenizer(), batch_size=2)


@pytest.fixture(scope="module")
def together(generator):
    return generator.sample(PROMPTS, SETTINGS, KEYS, extra_settings=EXTRA)


def test_a_row_is_the_same_alone_and_in_any_order(generator, together):
    """Rows of other steps, scales and settings share its batch, which takes as many steps as the longest of them."""
    for row in range(4):
        alone = generator.sample([PROMPTS[row]], SETTINGS[row], KEYS[row : row + 1], extra_settings=EXTRA[row])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], rtol=1e-5)
    backwards = generator.sample(PROMPTS[::-1], SETTINGS[::-1], KEYS[::-1], extra_settings=EXTRA[::-1])
    np.testing.assert_array_equal(backwards.tokens[::-1], together.tokens)


def test_images_are_whole_and_differ(generator, together):
    assert together.tokens.shape == (4, generator.token_count)
    assert together.tokens.max() < generator.codebook_size
    assert len(np.unique(together.tokens, axis=0)) == 4
    assert np.isfinite(together.log_probs).all()
    assert (together.log_probs < 0).all()


@pytest.mark.parametrize(
    "changed", [{"steps": 4}, {"mask_temperature": 9.0}, {"aesthetic_score": 9.0}, {"crop_left": 5}]
)
def test_every_setting_counts(changed, generator):
    base, other = (
        generator.generate(PROMPTS[:1], SETTINGS[0], KEYS[:1], extra_settings={"steps": 6} | extra)
        for extra in ({}, changed)
    )
    assert (base != other).any()


def test_initial_tokens_stay(generator):
    init = np.tile(np.arange(generator.token_count) % generator.codebook_size, (2, 1))
    counts = np.array([0, generator.token_count - 3])
    tokens = generator.generate(PROMPTS[:2], SETTINGS[:2], KEYS[:2], init_tokens=init, init_count=counts)
    np.testing.assert_array_equal(tokens[1, : counts[1]], init[1, : counts[1]])
    alone = generator.generate(PROMPTS[:1], SETTINGS[:1], KEYS[:1])
    np.testing.assert_array_equal(tokens[0], alone[0])


def test_one_step_takes_the_likeliest_tokens_where_the_temperature_is_0(generator):
    greedy = SamplingParams(temperature=0.0)
    tokens = [
        generator.generate(PROMPTS[:1], greedy, KEYS[row : row + 1], extra_settings={"steps": 1}) for row in (0, 1)
    ]
    np.testing.assert_array_equal(*tokens)


@pytest.mark.parametrize(
    "extra",
    [
        {"steps": 0},
        {"steps": 257},
        {"steps": 2.5},
        {"steps": True},
        {"steps": "3"},
        {"mask_temperature": -1.0},
        {"no": 1},
    ],
)
def test_settings_out_of_range_are_named(extra, generator):
    with pytest.raises(UserError, match=next(iter(extra))):
        generator.generate(PROMPTS[:1], SETTINGS[0], KEYS[:1], extra_settings=extra)


def test_a_replay_of_its_own_tokens_misses_nothing(generator, together):
    margins = generator.teacher_forced_margins(PROMPTS, SETTINGS, KEYS, together.tokens, extra_settings=EXTRA)
    assert margins.shape == together.tokens.shape
    np.testing.assert_allclose(margins, 0, atol=1e-3)


@pytest.mark.parametrize("extra", [{}, {"steps": 1}, {"steps": 40, "mask_temperature": 0.0}])
def test_a_replay_finds_tokens_that_were_not_sampled(extra, generator):
    settings, init = SamplingParams(cond_scale=3.0), np.zeros((1, generator.token_count), np.uint16)
    rows = PROMPTS[:1], settings, KEYS[:1]
    tokens = generator.generate(*rows, init_tokens=init, init_count=2, extra_settings=extra)
    others = {"init_count": 2, "extra_settings": extra}
    np.testing.assert_allclose(generator.teacher_forced_margins(*rows, tokens, **others), 0, atol=1e-3)
    assert generator.teacher_forced_margins(*rows[:2], KEYS[1:2], tokens, **others).max() > 0.5  # another row's noise
    for place in (0, 2, generator.token_count - 1):
        changed = tokens.copy()
        changed[0, place] = (changed[0, place] + 1) % generator.codebook_size
        margins = generator.teacher_forced_margins(*rows, changed, **others)
        assert (margins[0, place] > 0.01) == (place >= 2)  # the first two were given


def test_a_replay_forgives_what_was_almost_a_tie(checkpoint, generator):
    """As if the rows were from other hardware, which rounds otherwise: some tokens and choices are others there."""
    random = np.random.default_rng(0)

    def shake(array):
        return array * (1 + 1e-3 * random.standard_normal(array.shape)).astype(np.float32)

    other = dataclasses.replace(checkpoint, params=jax.tree.map(shake, checkpoint.params))
    other = Generator(other, checkpoint.load_tokenizer(), batch_size=2)
    keys = np.array([row_key(7, index) for index in range(16)], np.uint32)
    rows, extra = (PROMPTS * 4, SETTINGS * 4, keys), EXTRA * 4
    tokens = generator.generate(*rows, extra_settings=extra)
    differs = (other.generate(*rows, extra_settings=extra) != tokens).any(axis=1)
    assert differs.any()
    margins = other.teacher_forced_margins(*rows, tokens, extra_settings=extra).max(axis=1)
    assert np.median(margins[differs]) < 0.1


def test_unfinished_images_have_all_tokens_so_far(generator):
    seen = []
    rows = PROMPTS[:2], SETTINGS[1], KEYS[:2]
    samples = generator.sample(*rows, extra_settings={"steps": 7}, every=3, on_tokens=lambda *each: seen.append(each))
    assert [(first, step) for first, step, _ in seen] == [(0, 3), (0, 6), (0, 7)]
    for _, _, tokens in seen:
        assert tokens.shape == samples.tokens.shape
        assert tokens.max() < generator.codebook_size
    same = [(tokens == samples.tokens).mean() for _, _, tokens in seen]
    assert same == sorted(same)
    assert same[0] < same[-1] == 1
