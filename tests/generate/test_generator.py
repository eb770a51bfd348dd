"""The compiled loop: against the same model run without a cache, and a row in any company."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CODEBOOK_SIZE, tiny_dalle_bart

from dm_generations import sampling
from dm_generations.generate.generator import Generator, RowSettings
from dm_generations.models import checkpoints
from dm_generations.models.dalle_bart import DalleBart
from dm_generations.text import PromptTokenizer
from dm_generations.threefry import row_key

BATCH_SIZE = 6
PROMPTS = ["a boat", "a cat", "", "a prompt that is cut, being longer than the model reads", "boat", "a boat"]
SC_PROMPTS = [None, "blurry", None, "a cat", "", "blurry"]
SETTINGS = RowSettings(
    top_k=np.array([0, 5, 2**40, 1, 3, 8]),
    top_p=np.array([1.0, 0.9, 0.5, 1.0, 0.2, 1.0]),
    temperature=np.array([1.0, 0.7, 3.0, 1.0, 0.0, 1.5]),
    cond_scale=np.array([1.0, 3.0, 10.0, 2.0, 0.0, 1.0]),
)
KEYS = np.array([row_key(3, index) for index in range(6)], np.uint32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    # Vocabulary rows beyond the codes, as in DALL-E mega: they must never be drawn.
    folder = tmp_path_factory.mktemp("model")
    return checkpoints.load(tiny_dalle_bart(folder, image_vocab_size=CODEBOOK_SIZE + 7), "generator")


@pytest.fixture(scope="module")
def generator(checkpoint):
    return Generator(checkpoint, PromptTokenizer(checkpoint.folder), BATCH_SIZE)


@pytest.fixture(scope="module")
def tokens(generator):
    return generator.generate(PROMPTS, SC_PROMPTS, SETTINGS, KEYS)


def rows(indices) -> tuple:
    """Arguments of `generate` for these of the rows above."""
    settings = RowSettings(*(getattr(SETTINGS, f.name)[indices] for f in dataclasses.fields(SETTINGS)))
    return [PROMPTS[i] for i in indices], [SC_PROMPTS[i] for i in indices], settings, KEYS[indices]


def test_tokens_are_codes(tokens, checkpoint):
    assert tokens.shape == (6, checkpoint.config.image_length) and tokens.dtype == np.uint16
    assert tokens.max() < CODEBOOK_SIZE and len(np.unique(tokens)) > 10


def test_each_code_is_the_winner_under_the_model_run_without_a_cache(tokens, checkpoint):
    """Teacher-forced logits of the whole picture, each half apart, then guidance, filters and noise again."""
    config, params = checkpoint.config, checkpoint.params
    text_length = config.max_text_length
    tokenizer = PromptTokenizer(checkpoint.folder)
    start = np.full((6, 1), config.decoder_start_token_id, np.int32)
    decoder_input_ids = np.concatenate([start, tokens[:, :-1].astype(np.int32)], axis=1)
    teacher_forced = jax.jit(DalleBart(config).apply)
    halves = [
        teacher_forced({"params": params}, *tokenizer.encode(texts, text_length), decoder_input_ids)
        for texts in (PROMPTS, [text or "" for text in SC_PROMPTS])
    ]
    arrays = {
        "top_k": jnp.asarray(np.minimum(SETTINGS.top_k, 1000), jnp.int32),
        "top_p": jnp.asarray(SETTINGS.top_p, jnp.float32),
        "temperature": jnp.asarray(SETTINGS.temperature, jnp.float32),
    }
    sample = jax.jit(sampling.sample, static_argnames="codebook_size")
    cond_scale = jnp.asarray(SETTINGS.cond_scale, jnp.float32)
    for step in range(config.image_length):
        guided = sampling.guide(halves[0][:, step], halves[1][:, step], cond_scale)
        expected = sample(guided, jnp.int32(step), jnp.asarray(KEYS), codebook_size=CODEBOOK_SIZE, **arrays)
        np.testing.assert_array_equal(tokens[:, step], expected, err_msg=f"step {step}")


@pytest.mark.parametrize("indices", [[4], [5, 4, 3, 2, 1, 0], [1, 1, 1], [0, 2, 4, 0, 2, 4, 1, 3, 5, 0, 0]])
def test_a_row_gives_the_same_tokens_alone_and_in_any_company(generator, tokens, indices):
    np.testing.assert_array_equal(generator.generate(*rows(indices)), tokens[indices])


def test_one_program_serves_every_prompt_setting_and_number_of_rows(checkpoint, monkeypatch):
    traced, guide = [], sampling.guide

    def counted(*logits_and_scale):
        traced.append(logits_and_scale[0].shape)
        return guide(*logits_and_scale)

    monkeypatch.setattr(sampling, "guide", counted)
    for _ in range(2):  # a second generator of this configuration shares the program too
        generator = Generator(checkpoint, PromptTokenizer(checkpoint.folder), 4)
        for indices in ([0, 1, 2, 3], [4], [5, 1], [0, 1, 2, 3, 4, 5]):
            assert len(generator.generate(*rows(indices))) == len(indices)
    assert traced == [(4, checkpoint.config.image_vocab_size + 1)]


def test_no_rows_give_no_tokens(generator):
    assert generator.generate(*rows([])).shape == (0, 16)


def test_the_loop_copies_nothing_to_the_device_behind_our_back(generator, tokens):
    with jax.transfer_guard("disallow"):
        np.testing.assert_array_equal(generator.generate(*rows([2])), tokens[[2]])
