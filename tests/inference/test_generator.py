"""The compiled loop: against the same model run without a cache, and batch-invariant."""

import functools
import math
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, first_of
from tiny import CODEBOOK_SIZE, tiny_dalle_bart

from dm_generations.errors import UserError
from dm_generations.inference.generator import Generator
from dm_generations.models.dalle_mini.network import DalleBart
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.tokenization import PromptTokenizer
from dm_generations.sampling import decode_loop
from dm_generations.sampling import logits as sampling
from dm_generations.sampling.batching import pack_batch
from dm_generations.sampling.methods import GumbelSampler
from dm_generations.sampling.params import SamplingParams
from dm_generations.sampling.prng import row_key

BATCH_SIZE = 6
PROMPTS = ["a boat", "a cat", "", "a prompt that is cut, being longer than the model reads", "boat", "a boat"]
SC_PROMPTS = [None, "blurry", None, "a cat", "", "blurry"]
SETTINGS = [
    SamplingParams(0, 1.0, 1.0, 1.0),
    SamplingParams(5, 0.9, 0.7, 3.0),
    SamplingParams(2**31 - 1, 0.5, 3.0, 10.0),
    SamplingParams(1, 1.0, 1.0, 2.0),
    SamplingParams(3, 0.2, 0.0, 0.0),
    SamplingParams(8, 1.0, 1.5, 1.0),
]
KEYS = np.array([row_key(3, index) for index in range(6)], np.uint32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    # Vocabulary rows beyond the tokens, as in DALL-E mega: they must never be sampled.
    folder = tmp_path_factory.mktemp("model")
    return load_checkpoint(tiny_dalle_bart(folder, image_vocab_size=CODEBOOK_SIZE + 7), "generator")


@pytest.fixture(scope="module")
def generator(checkpoint):
    return Generator(checkpoint, PromptTokenizer(checkpoint.folder), BATCH_SIZE)


@pytest.fixture(scope="module")
def tokens(generator):
    return generator.generate(PROMPTS, SETTINGS, KEYS, SC_PROMPTS)


def rows(indices) -> tuple:
    """Arguments of `generate` for these of the rows above."""
    return (
        [PROMPTS[i] for i in indices],
        [SETTINGS[i] for i in indices],
        KEYS[indices],
        [SC_PROMPTS[i] for i in indices],
    )


def test_tokens_are_below_the_codebook_size(tokens, checkpoint):
    assert tokens.shape == (6, checkpoint.config.image_length) and tokens.dtype == np.uint16
    assert tokens.max() < CODEBOOK_SIZE and len(np.unique(tokens)) > 10


@pytest.fixture(scope="module")
def guided(tokens, checkpoint):
    """Guided logits (6, 16, V) of the images, by the model run without a cache, each half apart."""
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
    cond_scale = jnp.asarray([params.cond_scale for params in SETTINGS], jnp.float32)
    steps = [sampling.guide(halves[0][:, i], halves[1][:, i], cond_scale) for i in range(config.image_length)]
    return np.stack(steps, axis=1)


def test_each_code_is_the_winner_under_the_model_run_without_a_cache(tokens, guided):
    arrays = {
        "top_k": jnp.asarray([params.top_k for params in SETTINGS], jnp.int32),
        "top_p": jnp.asarray([params.top_p for params in SETTINGS], jnp.float32),
        "temperature": jnp.asarray([params.temperature for params in SETTINGS], jnp.float32),
    }
    sample = jax.jit(sampling.sample, static_argnames="codebook_size")
    for step in range(tokens.shape[1]):
        expected = sample(guided[:, step], jnp.int32(step), jnp.asarray(KEYS), codebook_size=CODEBOOK_SIZE, **arrays)
        np.testing.assert_array_equal(tokens[:, step], expected, err_msg=f"step {step}")


def test_log_probs_are_those_of_the_guided_distribution_over_all_codes(generator, tokens, guided):
    logits = guided[:, :, :CODEBOOK_SIZE].astype(np.float64)
    expected = log_softmax(logits)
    expected = np.take_along_axis(expected, tokens[:, :, None].astype(np.int64), axis=2).sum(axis=(1, 2))
    samples = generator.sample(*rows(list(range(6))))
    np.testing.assert_allclose(samples.log_probs, expected, rtol=1e-5)
    assert samples.log_probs.dtype == np.float32 and (samples.log_probs < 0).all()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("indices", [[4], [5, 4, 3, 2, 1, 0], [1, 1, 1], [0, 2, 4, 0, 2, 4, 1, 3, 5, 0, 0]])
def test_sampling_is_batch_invariant(generator, tokens, indices):
    np.testing.assert_array_equal(generator.generate(*rows(indices)), tokens[indices])


@pytest.mark.e2e
def test_one_program_serves_every_prompt_setting_and_number_of_rows(checkpoint, monkeypatch):
    """Traces are counted: one program, which samples the rows one half after the other."""
    traced, guide = [], sampling.guide

    def counted(*logits_and_scale):
        traced.append(logits_and_scale[0].shape)
        return guide(*logits_and_scale)

    monkeypatch.setattr(sampling, "guide", counted)
    for _ in range(2):  # a second generator of this configuration shares the program too
        generator = Generator(checkpoint, PromptTokenizer(checkpoint.folder), 5)
        for indices in ([0, 1, 2, 3], [4], [5, 1], [0, 1, 2, 3, 4, 5], [0, 0, 0, 5, 5, 5, 0, 0, 0, 0]):
            assert len(generator.generate(*rows(indices))) == len(indices)
    columns = checkpoint.config.image_vocab_size + 1
    assert traced == [(5, columns)]


def replace_decode_steps(monkeypatch, make_replacement) -> None:
    """Let the next generators call what `make_replacement` returns for `decode_loop.decode_steps`."""
    monkeypatch.setattr(decode_loop, "decode_steps", make_replacement(decode_loop.decode_steps))


def row_inputs(arguments):
    """The argument of `decode_steps` after model, sampler, mesh and parameters."""
    return arguments[4]


def test_images_of_scale_1_take_one_sequence_each(checkpoint, tokens, monkeypatch):
    """Twelve of them, or six others, fill a batch of six: the unconditional half is computed where it is needed."""
    batches = []

    def counted(decode_steps):
        def run(*arguments):
            batches.append(int(row_inputs(arguments).row_count[0]))
            return decode_steps(*arguments)

        return run

    replace_decode_steps(monkeypatch, counted)
    generator = Generator(checkpoint, PromptTokenizer(checkpoint.folder), BATCH_SIZE)
    unguided = [0, 5] * 6
    np.testing.assert_array_equal(generator.generate(*rows(unguided)), tokens[unguided])
    assert batches == [12]
    mixed = [1, 0, 2, 3, 0, 4, 1, 2, 0, 0]
    np.testing.assert_array_equal(generator.generate(*rows(mixed)), tokens[mixed])
    assert sorted(batches[1:]) == [3, 7]  # at the same time


@pytest.mark.e2e
@pytest.mark.parametrize("batch_size", first_of([1, 7, 2, 16], count=2))
def test_a_row_gives_the_same_tokens_in_batches_of_another_size(checkpoint, tokens, batch_size):
    """Of this model; sums of longer rows may be rounded in another order."""
    generator = Generator(checkpoint, PromptTokenizer(checkpoint.folder), batch_size)
    np.testing.assert_array_equal(generator.generate(*rows(list(range(6)))), tokens)


def test_given_codes_are_kept_and_the_rest_is_drawn_after_them(generator, tokens):
    initial = (tokens[::-1] + 1) % CODEBOOK_SIZE
    counts = np.array([0, 1, 5, 15, 16, 3])
    samples = generator.sample(*rows(list(range(6))), initial, counts)
    for row, count in enumerate(counts):
        np.testing.assert_array_equal(samples.tokens[row, :count], initial[row, :count])
    np.testing.assert_array_equal(samples.tokens[0], tokens[0])
    assert (samples.tokens[1:4, 5:] != tokens[1:4, 5:]).any()
    assert samples.log_probs[4] == 0  # nothing was sampled
    own = generator.generate(*rows(list(range(6))), tokens, counts)
    np.testing.assert_array_equal(own, tokens)  # a row goes on from its own tokens as before


def test_a_stream_ends_with_what_a_batch_gives(generator, tokens):
    prompts, settings, keys, sc_prompts = rows([3, 0, 2])
    parts = list(generator.stream(prompts, settings, keys, 5, sc_prompts))
    assert [part.shape for part in parts] == [(3, 5), (3, 10), (3, 15), (3, 16)]
    for part in parts:
        np.testing.assert_array_equal(part, tokens[[3, 0, 2], : part.shape[1]])
    with pytest.raises(UserError, match=r"13 .* too many for a batch of 6"):
        next(generator.stream(*rows([0] * 13)[:3], 5))


def test_settings_can_be_the_same_for_all_rows(generator):
    settings = SamplingParams(top_k=5, top_p=0.9, temperature=0.7, cond_scale=3.0)
    expected = generator.generate(["a boat", "a cat"], [settings, settings], KEYS[:2])
    np.testing.assert_array_equal(generator.generate(["a boat", "a cat"], settings, KEYS[:2]), expected)


@pytest.mark.e2e
def test_a_batch_that_does_not_fit_is_halved(checkpoint, tokens, monkeypatch):
    limit, sizes = [6], []

    def small(decode_steps):
        def run(*arguments):
            sizes.append(len(row_inputs(arguments).top_k))
            if sizes[-1] > limit[0]:
                raise_out_of_memory()
            return decode_steps(*arguments)

        return run

    replace_decode_steps(monkeypatch, small)
    generator = Generator(checkpoint, PromptTokenizer(checkpoint.folder), 6)
    np.testing.assert_array_equal(generator.generate(*rows(list(range(6)))), tokens)
    assert sizes == [12, 6, 6] and generator.batch_size == 3
    limit[0] = 0
    with pytest.raises(UserError, match="not enough memory"):
        generator.generate(*rows([0]))


def raise_out_of_memory():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def test_batches_are_as_large_as_memory_allows(checkpoint, monkeypatch):
    tokenizer = PromptTokenizer(checkpoint.folder)
    generator = Generator(checkpoint, tokenizer, 4)
    assert generator.concurrency == 2 and generator.capacities == [8, 8]
    needed = generator.batch_bytes(4)
    monkeypatch.setattr("dm_generations.runtime.device.free_bytes", lambda device: needed)
    generator = Generator(checkpoint, tokenizer, 16)
    assert generator.batch_size == 4 and generator.concurrency == 1 and generator.capacities == [8]


def make_small_generator(checkpoint) -> Generator:
    """Batches of two, with its program compiled: from now on it samples two of them at a time."""
    generator = Generator(checkpoint, PromptTokenizer(checkpoint.folder), 2)
    generator.generate(*rows([0]))
    return generator


@pytest.mark.e2e
def test_two_batches_are_sampled_at_the_same_time(checkpoint, tokens, monkeypatch):
    meeting, is_compiled = threading.Barrier(2), threading.Event()

    def met(decode_steps):
        def run(*arguments):
            if is_compiled.is_set():
                meeting.wait(60)  # BrokenBarrierError for one that is alone
            return decode_steps(*arguments)

        return run

    replace_decode_steps(monkeypatch, met)
    small_generator = make_small_generator(checkpoint)
    is_compiled.set()
    indices = [0, 1, 2, 3, 4, 5, 3]  # four batches
    samples = small_generator.sample(*rows(indices))
    np.testing.assert_array_equal(samples.tokens, tokens[indices])


@pytest.mark.e2e
def test_two_batches_that_memory_does_not_hold_are_sampled_in_turn(checkpoint, tokens, monkeypatch):
    def small(decode_steps):
        def run(*arguments):
            if threading.current_thread() is not threading.main_thread():
                raise_out_of_memory()
            return decode_steps(*arguments)

        return run

    replace_decode_steps(monkeypatch, small)
    small_generator = make_small_generator(checkpoint)
    np.testing.assert_array_equal(small_generator.generate(*rows(list(range(6)))), tokens)
    assert small_generator.concurrency == 1 and small_generator.batch_size == 2


def test_an_error_in_one_of_two_concurrent_batches_is_raised(checkpoint, monkeypatch):
    def broken(decode_steps):
        def run(*arguments):
            if threading.current_thread() is not threading.main_thread():
                raise OSError("broken")
            return decode_steps(*arguments)

        return run

    replace_decode_steps(monkeypatch, broken)
    small_generator = make_small_generator(checkpoint)
    with pytest.raises(OSError, match="broken"):
        small_generator.generate(*rows(list(range(6))))


@pytest.mark.e2e
def test_margins_of_concurrent_batches_are_those_of_one(checkpoint, generator, tokens):
    small_generator = make_small_generator(checkpoint)
    arguments = rows(list(range(6)))
    for _ in range(2):  # the program is compiled by the first
        margins = small_generator.teacher_forced_margins(*arguments[:3], tokens, arguments[3])
        np.testing.assert_allclose(
            margins, generator.teacher_forced_margins(*arguments[:3], tokens, arguments[3]), atol=1e-5
        )


@pytest.mark.e2e
def test_four_devices_sample_what_one_samples(checkpoint, tokens, tmp_path):
    """Four devices, in a process of its own: the host's CPU divided."""
    np.save(tmp_path / "expected.npy", tokens)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable,
        str(ROOT / "tests/programs/sample_on_four_devices.py"),
        str(checkpoint.folder),
        str(tmp_path / "expected.npy"),
    ]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    subprocess.run(command, env=environment, check=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": [SamplingParams()]}, "1 settings do not match 2 prompts"),
        ({"keys": KEYS[:1]}, "1 keys do not match 2 prompts"),
        ({"keys": [[-1, 0], [1, 2]]}, "keys must be whole numbers from 0 to 4,294,967,295"),
        ({"keys": np.array([[2**32, 0], [1, 2]])}, "keys must be whole numbers"),
        ({"keys": np.full((2, 2), 0.5)}, "keys must be whole numbers"),
        ({"sc_prompts": ["blurry"]}, "1 sc_prompts do not match 2 prompts"),
        ({"init_count": 1}, "init_count needs init_tokens"),
        ({"init_tokens": np.zeros((2, 16), int), "init_count": 17}, "init_count must be whole numbers from 0 to 16"),
        ({"init_tokens": np.zeros((2, 16), int), "init_count": -1}, "init_count must be"),
        ({"init_tokens": np.zeros((2, 15), int), "init_count": 3}, r"init_tokens are \(2, 15\), not \(2, 16\)"),
        ({"init_tokens": np.full((2, 16), CODEBOOK_SIZE), "init_count": 3}, "init_tokens must be whole numbers from 0"),
        ({"init_tokens": np.full((2, 16), -1), "init_count": 3}, "init_tokens must be"),
        ({"every": 0}, r"every \(=0\) must be at least 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(generator, changes, message):
    arguments = {"prompts": ["a boat", "a cat"], "settings": SamplingParams(), "keys": KEYS[:2]}
    with pytest.raises(ValueError, match=message):
        generator.sample(**arguments | changes)


def test_settings_out_of_range_are_refused(generator):
    with pytest.raises(UserError, match=r"temperature .*nan"):
        generator.sample(["a boat", "a cat"], [SamplingParams(), SamplingParams(temperature=float("nan"))], KEYS[:2])


def test_settings_at_the_ends_of_their_ranges_can_be_sampled(generator):
    settings = [SamplingParams(2**31 - 1, 1e-30, 3e38, 0.0), SamplingParams(0, 1.0, 0.0, 3e38)]
    assert generator.generate(["a boat", "a cat"], settings, KEYS[:2].astype(np.int64)).max() < CODEBOOK_SIZE


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"batch_size": 2, "dtype": "float64"}])
def test_a_generator_of_a_size_or_dtype_that_is_none_is_refused(checkpoint, arguments):
    with pytest.raises(ValueError, match=r"batch_size|dtype"):
        Generator(checkpoint, PromptTokenizer(checkpoint.folder), **arguments)


def test_no_rows_give_no_tokens(generator):
    assert generator.generate(*rows([])).shape == (0, 16)


@pytest.mark.e2e
def test_caches_are_updated_in_place(checkpoint):
    """A step that copied them would need as much memory again."""
    config, params = DalleBart.prepare_params(checkpoint.config, checkpoint.params, "cpu")
    static = DalleBart(config), GumbelSampler(CODEBOOK_SIZE, config.sampling_order), None
    tokenizer = PromptTokenizer(checkpoint.folder)
    inputs = pack_batch([], 64, tokenizer, config.max_text_length, config.image_length)
    state = jax.eval_shape(functools.partial(decode_loop.init_cache, *static), params, inputs)
    steps = np.int32(0), np.int32(config.image_length)
    memory = decode_loop.decode_steps.lower(*static, params, inputs, state, *steps).compile().memory_analysis()
    cached = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache.layers)]
    assert memory.alias_size_in_bytes > sum(cached)
    assert memory.temp_size_in_bytes < max(cached)


def test_the_loop_copies_nothing_to_the_device_behind_our_back(generator, tokens):
    with jax.transfer_guard("disallow"):
        np.testing.assert_array_equal(generator.generate(*rows([2])), tokens[[2]])


def test_prompts_that_the_model_reads_in_part_or_not_at_all_are_named(generator, checkpoint, caplog):
    generator.check_texts(["a boat", "", None])
    assert caplog.messages == []
    length = checkpoint.config.max_text_length
    generator.check_texts(["a boat", "a" * (length - 2), "b" * (length - 1), "c" * 1000, "\u043a"])
    cut, unread = caplog.messages
    assert cut.startswith("2 prompts") and str(length) in cut and "bbb" in cut
    assert unread.startswith("1 prompt ") and "\u043a" in unread
