"""Prompts, settings and keys to tokens, on the devices.

n: rows asked for   L: tokens of an image, row-major over its grid
"""

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dm_generations.archive import DTYPES
from dm_generations.archive.records import ClassLabel
from dm_generations.errors import UserError
from dm_generations.models.base import Tokenizer, check_prompt_kinds, check_texts, class_count_of, extra_settings_of
from dm_generations.models.dalle_mini.config import DalleBartConfig
from dm_generations.models.loading import Checkpoint, load_checkpoint
from dm_generations.runtime import compile_cache
from dm_generations.runtime.device import BatchRunner, Work, batch_concurrency, free_bytes_of_each, put_params
from dm_generations.sampling import decode_loop as loop
from dm_generations.sampling.batching import Row, RowInputs, pack_batch, sequence_count, take_until_full
from dm_generations.sampling.methods import DalleMiniSampler, TokenSampler, make_sampler
from dm_generations.sampling.params import SamplingParams, complete_extra_settings
from dm_generations.sampling.prng import WORD

_T = TypeVar("_T")
Prompt = str | ClassLabel
ExtraSettings = Mapping[str, float] | Sequence[Mapping[str, float]]
_TIMED_STEPS = 4
_LOGITS_COPIES = 8  # halves, guided, filtered, noise and a compiler's temporary copies of them


class Samples(NamedTuple):
    """What was sampled for n rows."""

    # (n, L) uint16, each below the codebook size; with dalle-mini's noise int32, and ids that are no tokens among them
    tokens: np.ndarray
    log_probs: np.ndarray  # (n,) float32, of the tokens, summed: natural, guided, before temperature and filters


class Sampling(NamedTuple):
    """Samples that are being generated."""

    samples: Callable[[], Samples]  # waits for them, once


class _Batch(NamedTuple):
    first: int  # number of its first row
    rows: list[Sequence[Row]]  # of each device


class Generator:
    """A text-to-image model on the local devices, and the program that samples batches with it.

    Attributes:
        token_count: L.
        codebook_size: Tokens are below it.
        dtype: Of activations and caches.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        batch_size: int,
        dtype: str = "float32",
        rng: str = "rows",
    ):
        """Put the model on the devices.

        Args:
            checkpoint: A loaded generator.
            tokenizer: For prompts.
            batch_size: Images at a time on each device; those of cond_scale 1 count half. Fewer if memory does not
                hold as many, and halved whenever it turns out not to.
            dtype: "float32", "bfloat16" or "float16"; logits and noise are float32 in any case.
            rng: "rows" is our own noise. "dalle-mini" repeats dalle-mini's `generate`, called with one prompt and the
                row's key, and can sample ids that are no tokens.

        Raises:
            UserError: "dalle-mini" for a model that is not DALL-E mini's kind.
            ValueError: Another dtype, or a batch_size below 1.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r:.100}")
        if batch_size < 1:
            raise ValueError(f"batch_size (={batch_size}) must be at least 1")
        if rng == "dalle-mini" and not isinstance(checkpoint.config, DalleBartConfig):
            raise UserError(
                f"--rng dalle-mini repeats DALL-E mini and mega; {checkpoint.name!r} is another kind of model"
            )
        config, params = checkpoint.config, checkpoint.params
        self.token_count = config.image_length
        self.codebook_size = config.codebook_size
        self.dtype = dtype
        self._extra_settings = extra_settings_of(config)
        self._name = checkpoint.name
        self._tokenizer = tokenizer
        self._devices = jax.local_devices()
        config, params = checkpoint.network_class.prepare_params(config, params, self._devices[0].platform)
        self._model = checkpoint.network_class(config, jnp.dtype(dtype))
        self._sampler = make_sampler(config, self.codebook_size, is_dalle_mini=rng == "dalle-mini")
        self._mesh = Mesh(self._devices, (loop.AXIS,)) if len(self._devices) > 1 else None
        self._shard_batch, self._replicate = (
            None if self._mesh is None else NamedSharding(self._mesh, spec)
            for spec in (PartitionSpec(loop.AXIS), PartitionSpec())
        )
        self._params = put_params(params, self._model.dtype, self._replicate)
        static = self._model, self._sampler, self._mesh
        self._init_cache = functools.partial(loop.init_cache, *static)
        self._decode_steps = functools.partial(loop.decode_steps, *static)
        self._teacher_forced_margins = functools.partial(loop.teacher_forced_margins, *static)
        self.set_batch_size(batch_size)

    @classmethod
    def load(cls, model: str | None = None, batch_size: int = 32, dtype: str = "float32") -> "Generator":
        """Load a generator from a folder, a file or the Hugging Face hub; None is the model that ships.

        Raises:
            UserError: The model is missing or broken.
        """
        compile_cache.enable()
        checkpoint = load_checkpoint(model, "generator")
        return cls(checkpoint, checkpoint.load_tokenizer(), batch_size, dtype=dtype)

    @property
    def batch_size(self) -> int:
        """Images of a batch on each device."""
        return self._runner.size

    @property
    def concurrency(self) -> int:
        """Batches that are sampled at the same time: two on a CPU, if memory holds them."""
        return self._runner.concurrency

    @property
    def capacities(self) -> list[int]:
        """Sequences of each of the batches that are sampled together, which `sample` fills one after the other.

        A row takes one or, if its cond_scale is not 1, two.
        """
        return [2 * self.batch_size] * len(self._devices) * self.concurrency

    @property
    def step_count(self) -> int:
        """Steps of an image, with the model's default settings."""
        is_masked = not isinstance(self._sampler, TokenSampler)
        return int(self._extra_settings["steps"].default) if is_masked else self.token_count

    def set_batch_size(self, wanted: int) -> None:
        """Sample `wanted` images at a time on each device, halved until the free memory holds them."""
        free = free_bytes_of_each(self._devices)
        while wanted > 1 and self.batch_bytes(wanted) > free:
            wanted //= 2
        concurrency = batch_concurrency(self._devices)
        if concurrency * self.batch_bytes(wanted) > free:
            concurrency = 1
        message = (
            "not enough memory to sample one image at a time; close other programs that use the device, or use "
            "--dtype bfloat16"
        )
        self._runner = BatchRunner(wanted, concurrency, message)

    def check_texts(self, texts: Sequence[Prompt | None]) -> None:
        """Warn of texts that the model reads only in part, or not at all; see `models.base.check_texts`."""
        check_texts(texts, self._model.config, self._name, self._tokenizer)

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingParams | Sequence[SamplingParams],
        keys: np.ndarray,
        sc_prompts: Sequence[str | None] | None = None,
        init_tokens: np.ndarray | None = None,
        init_count: np.ndarray | int = 0,
        extra_settings: ExtraSettings | None = None,
    ) -> np.ndarray:
        """Return tokens (n, L) of n rows; see `sample`."""
        rows = prompts, settings, keys, sc_prompts, init_tokens, init_count, extra_settings
        return self.start(*rows).samples().tokens

    def sample(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingParams | Sequence[SamplingParams],
        keys: np.ndarray,
        sc_prompts: Sequence[str | None] | None = None,
        init_tokens: np.ndarray | None = None,
        init_count: np.ndarray | int = 0,
        extra_settings: ExtraSettings | None = None,
        every: int | None = None,
        on_tokens: Callable[[int, int, np.ndarray], None] = lambda first_row, step, tokens: None,
    ) -> Samples:
        """Sample tokens of n rows, with their log-probabilities.

        Args:
            prompts: n texts, or classes of a model that draws these.
            settings: Of each row, or one for all.
            keys: (n, 2) uint32, of `sampling.prng.row_key`.
            sc_prompts: n texts, or None for the model's own empty prompt; None for all.
            init_tokens: (n, L), of which the first `init_count` of each row are copied; the rest is sampled.
            init_count: (n,), or one number for all.
            extra_settings: Of each row, or one for all; see `models.base.extra_settings_of`. What they lack, and None,
                is the model's default.
            every: Steps after which `on_tokens` is called; None for never.
            on_tokens: Called with the number of the first row, how many steps were made, and the tokens so far of the m
                rows that are sampled together: (m, steps), or in masked decoding all (m, L), also those that will be
                sampled again.

        Raises:
            UserError: Settings are out of range, the model gives no logits to sample from, or memory does not hold
                one image.
            ValueError: Arguments do not match each other, or are out of range.
        """
        arguments = prompts, settings, keys, sc_prompts, init_tokens, init_count, extra_settings
        if every is None:
            return self.start(*arguments).samples()
        rows = self._rows(*arguments)

        def sample(batch: _Batch) -> Samples:
            for step, samples in self._stream(batch.rows, every):
                on_tokens(batch.first, step, samples.tokens)
            return samples

        return self._joined(self._in_batches(rows, sample, "sample", in_turn=True))

    def start(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingParams | Sequence[SamplingParams],
        keys: np.ndarray,
        sc_prompts: Sequence[str | None] | None = None,
        init_tokens: np.ndarray | None = None,
        init_count: np.ndarray | int = 0,
        extra_settings: ExtraSettings | None = None,
    ) -> "Sampling":
        """Start sampling; does not wait for the tokens. The arguments and errors are those of `sample`."""
        rows = self._rows(prompts, settings, keys, sc_prompts, init_tokens, init_count, extra_settings)

        def sample(batch: _Batch) -> tuple[loop.DecodeState, list[int]]:
            inputs = self._inputs(batch.rows)
            state = self._init_cache(self._params, inputs)
            return self._advance(inputs, state, 0, self._step_count(batch.rows)), list(map(len, batch.rows))

        batches = self._in_batches(rows, sample, "sample")
        return Sampling(lambda: self._joined(self._samples(state, counts) for state, counts in batches))

    def stream(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingParams | Sequence[SamplingParams],
        keys: np.ndarray,
        every: int,
        sc_prompts: Sequence[str | None] | None = None,
        init_tokens: np.ndarray | None = None,
        init_count: np.ndarray | int = 0,
    ) -> Iterator[np.ndarray]:
        """Return the tokens so far after every `every` steps, as `sample` gives them to `on_tokens`; at last all.

        The arguments are those of `sample`.

        Raises:
            UserError: As `sample`, and for more rows than one batch holds.
            ValueError: As `sample`.
        """
        rows = self._rows(prompts, settings, keys, sc_prompts, init_tokens, init_count)
        batch = self._next_batch(rows, self.batch_size)
        if sum(map(len, batch)) < len(rows):
            raise UserError(f"{len(rows)} images are too many for a batch of {self.batch_size}: sample fewer at a time")
        return (samples.tokens for _, samples in self._stream(batch, every))

    def teacher_forced_margins(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingParams | Sequence[SamplingParams],
        keys: np.ndarray,
        tokens: np.ndarray,
        sc_prompts: Sequence[str | None] | None = None,
        init_count: np.ndarray | int = 0,
        extra_settings: ExtraSettings | None = None,
    ) -> np.ndarray:
        """Return by how much each of `tokens` (n, L) missed being sampled, float32 (n, L); see `sampling.margin`.

        Every step reads these tokens, whatever would have been sampled; of masked decoding see `MaskedSampler`.
        NaN where the model gives no numbers, 0 for the first `init_count` tokens, which were not sampled. Other
        arguments are those of `sample`.

        Raises:
            UserError: As `sample`.
        """
        rows = self._rows(prompts, settings, keys, sc_prompts, tokens, init_count, extra_settings)

        def measure(batch: _Batch) -> np.ndarray:
            inputs = self._inputs(batch.rows)
            state = self._init_cache(self._params, inputs)
            steps = jax.device_put(np.int32(self._step_count(batch.rows)), self._replicate)
            margins = self._teacher_forced_margins(self._params, inputs, state, steps)
            return self._in_use(margins, list(map(len, batch.rows)))

        margins = [np.empty((0, self.token_count), np.float32), *self._in_batches(rows, measure, "margins")]
        is_sampled = np.arange(self.token_count) >= np.reshape(init_count, (-1, 1))
        return np.where(is_sampled, np.concatenate(margins), np.float32(0))

    def measure_seconds(self) -> float:
        """Return how long batches of these `capacities` take, from a few steps of them. Compiles what that needs."""

        def seconds(_: int) -> float:
            encoding, step = self.measure_steps(_TIMED_STEPS)
            return encoding + step * self.step_count

        self.measure_steps(_TIMED_STEPS)  # compiled, and warm
        with ThreadPoolExecutor(self.concurrency) as pool:
            return max(pool.map(seconds, range(self.concurrency)))

    def measure_steps(self, steps: int, cond_scale: float = 3.0) -> tuple[float, float]:
        """Run the first `steps` of a full batch; return the seconds of encoding its prompts, and of a step.

        Every step reads the whole cache, so all take the same time.
        """
        count = sum(self.capacities) // self.concurrency // sequence_count(cond_scale)
        prompt = ClassLabel("", 0) if class_count_of(self._model.config) else ""
        settings = SamplingParams(256, cond_scale=cond_scale)
        rows = self._rows([prompt] * count, settings, np.zeros((count, 2), np.uint32))
        inputs = self._inputs(self._next_batch(rows, self.batch_size))
        started = time.perf_counter()
        state = jax.block_until_ready(self._init_cache(self._params, inputs))
        encoded = time.perf_counter()
        jax.block_until_ready(self._advance(inputs, state, 0, steps))
        return encoded - started, (time.perf_counter() - encoded) / steps

    def batch_bytes(self, batch_size: int) -> int:
        """Estimate the memory on a device of a batch, besides the weights: caches, texts and logits.

        JAX traces the program for it, and reuses that for the first batch.
        """
        length = self._model.config.max_text_length
        inputs = pack_batch([], 2 * batch_size, self._tokenizer, length, self.token_count, len(self._extra_settings))
        init_cache = functools.partial(loop.init_cache, self._model, self._sampler, None)
        state = jax.eval_shape(init_cache, self._params, inputs)
        cached = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        places = 1 if isinstance(self._sampler, TokenSampler) else self.token_count
        return cached + 2 * batch_size * places * self._sampler.columns * 4 * _LOGITS_COPIES

    # Implementation.

    def _rows(
        self, prompts, settings, keys, sc_prompts=None, init_tokens=None, init_count=0, extra_settings=None
    ) -> list[Row]:
        count = len(prompts)
        check_prompt_kinds([prompt for prompt in prompts if prompt is not None], self._model.config, self._name)
        if isinstance(settings, SamplingParams):
            settings = [settings] * count
        if len(settings) != count:
            raise ValueError(f"{len(settings)} settings do not match {count} prompts")
        for params in set(settings):
            params.validate()
        keys = _checked_whole("keys", keys, 0, WORD).astype(np.uint32).reshape(-1, 2)
        if len(keys) != count:
            raise ValueError(f"{len(keys)} keys do not match {count} prompts")
        if sc_prompts is not None and len(sc_prompts) != count:
            raise ValueError(f"{len(sc_prompts)} sc_prompts do not match {count} prompts")
        init_count = _checked_whole("init_count", np.broadcast_to(init_count, count), 0, self.token_count)
        if init_tokens is None:
            if init_count.any():
                raise ValueError("init_count needs init_tokens")
            init_tokens = [None] * count
        else:
            init_tokens = _checked_whole("init_tokens", init_tokens, 0, self._sampler.columns - 1)
            if init_tokens.shape != (count, self.token_count):
                raise ValueError(f"init_tokens are {init_tokens.shape}, not {(count, self.token_count)}")
        sc_prompts = [None] * count if sc_prompts is None else sc_prompts
        if extra_settings is None or isinstance(extra_settings, Mapping):
            extra_settings = [extra_settings or {}] * count
        extra = [tuple(complete_extra_settings(self._extra_settings, each).values()) for each in extra_settings]
        values = zip(prompts, sc_prompts, settings, keys, init_tokens, init_count, extra, strict=True)
        return [Row(*row) for row in values]

    def _in_batches(
        self, rows: list[Row], compute: Callable[[_Batch], _T], program: str, in_turn: bool = False
    ) -> Iterator[_T]:
        """Return what `compute` makes of each batch, in order; see `Work` for the other arguments."""

        def take(first: int, size: int) -> tuple[_Batch, int]:
            batch = self._next_batch(rows[first:], size)
            return _Batch(first, batch), first + sum(map(len, batch))

        return self._runner.run(Work(len(rows), take, compute, in_turn, program))

    def _next_batch(self, rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
        """Return the first rows, as many as a batch of `size` holds, for each device."""
        batch: list[Sequence[Row]] = []
        taken = 0
        for _ in self._devices:
            ahead = rows[taken : taken + 2 * size]
            batch.append(take_until_full(ahead, [sequence_count(row.params.cond_scale) for row in ahead], 2 * size))
            taken += len(batch[-1])
        return batch

    def _inputs(self, batch: list[Sequence[Row]]) -> RowInputs:
        text_length = self._model.config.max_text_length
        sizes = text_length, self.token_count, len(self._extra_settings)
        parts = [pack_batch(rows, 2 * self.batch_size, self._tokenizer, *sizes) for rows in batch]
        inputs = parts[0] if len(parts) == 1 else jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        return jax.device_put(inputs, self._shard_batch)

    def _step_count(self, batch: Sequence[Sequence[Row]]) -> int:
        """Return the steps of a batch: as many as its images have tokens, or in masked decoding the most of a row."""
        if isinstance(self._sampler, TokenSampler):
            return self.token_count
        number = list(self._extra_settings).index("steps")
        return max(int(row.extra[number]) for rows in batch for row in rows)

    def _advance(self, inputs: RowInputs, state: loop.DecodeState, first: int, end: int) -> loop.DecodeState:
        steps = jax.device_put((np.int32(first), np.int32(end)), self._replicate)
        return self._decode_steps(self._params, inputs, state, *steps)

    def _stream(self, batch: list[Sequence[Row]], every: int) -> Iterator[tuple[int, Samples]]:
        """Return steps, and tokens and log-probabilities of m rows, after every `every` steps, and at the end."""
        if every < 1:
            raise ValueError(f"every (={every}) must be at least 1")
        inputs, steps = self._inputs(batch), self._step_count(batch)
        state = self._init_cache(self._params, inputs)
        for first in range(0, steps, every):
            end = min(first + every, steps)
            state = self._advance(inputs, state, first, end)
            samples = self._samples(state, list(map(len, batch)))
            count = end if isinstance(self._sampler, TokenSampler) else self.token_count
            yield end, Samples(samples.tokens[:, :count], samples.log_probs)

    def _samples(self, state: loop.DecodeState, counts: list[int]) -> Samples:
        """Wait for the samples of a batch, so many rows of each device."""
        if not self._in_use(state.last.can_sample, counts).all():
            raise UserError(f"model {self._name!r} gives NaN for some rows: its weights are damaged")
        tokens = self._in_use(state.tokens, counts)
        return Samples(tokens.astype(self._token_dtype), self._in_use(state.last.log_prob, counts))

    def _joined(self, parts: Iterable[Samples]) -> Samples:
        nothing = Samples(np.empty((0, self.token_count), self._token_dtype), np.empty(0, np.float32))
        return Samples(*(np.concatenate(arrays) for arrays in zip(nothing, *parts, strict=True)))

    def _in_use(self, array: jax.Array, counts: list[int]) -> np.ndarray:
        """Return the first `counts` rows of each device, of an array with 2 x batch_size for each."""
        parts = np.split(jax.device_get(array), len(counts))
        return np.concatenate([part[:count] for part, count in zip(parts, counts, strict=True)])

    @property
    def _token_dtype(self) -> type:
        return np.int32 if isinstance(self._sampler, DalleMiniSampler) else np.uint16


def _checked_whole(name: str, values: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    """Return `values` as an array. Raises ValueError for other than whole numbers within these limits."""
    values = np.asarray(values)
    if values.size and not (values.dtype.kind in "iu" and lowest <= values.min() and values.max() <= highest):
        raise ValueError(f"{name} must be whole numbers from {lowest:,} to {highest:,}")
    return values
