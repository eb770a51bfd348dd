"""A text model on the devices: prompts, settings and keys of rows to their codes.

n: rows asked for   L: codes of a picture, row-major over its grid
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dm_generations import compile_cache
from dm_generations.archive import DTYPES
from dm_generations.beside import Beside, count_at_once
from dm_generations.decode.memory import free_bytes_of_each, is_out_of_memory
from dm_generations.errors import UserError
from dm_generations.generate import loop, sweep
from dm_generations.generate.dalle_mini import DalleMiniDrawing
from dm_generations.generate.row_inputs import Row, RowInputs, laid_out, sequence_count, take_fitting
from dm_generations.models.dalle_mini.config import DalleBartConfig
from dm_generations.models.loading import Checkpoint, load_checkpoint
from dm_generations.programs import Kept, remembered
from dm_generations.runtime.params import put_params
from dm_generations.text import TextTokenizer, load_tokenizer
from dm_generations.threefry import WORD

_T = TypeVar("_T")
_TIMED_STEPS = 4
_LOGITS_COPIES = 8  # halves, guided, filtered, noise and what a compiler keeps of them


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """Sampling settings of n rows: (n,) each, or one number for all. Named as the archive's columns."""

    top_k: np.ndarray | int = sweep.DEFAULT_TOP_K  # 0: all codes
    top_p: np.ndarray | float = sweep.DEFAULT_TOP_P  # 1: all codes
    temperature: np.ndarray | float = sweep.DEFAULT_TEMPERATURE  # 0: always the best code
    cond_scale: np.ndarray | float = sweep.DEFAULT_COND_SCALE  # 1: no super conditioning


class Drawn(NamedTuple):
    """What n rows became."""

    # (n, L) uint16, each below the codebook size; with dalle-mini's noise int32, and ids that are no codes among them
    tokens: np.ndarray
    log_probs: np.ndarray  # (n,) float32, of the codes drawn, summed: natural, guided, before temperature and filters


class Generator:
    """A text model on the local devices, and the program that draws batches with it.

    batch_size: pictures at a time on each device; those of cond_scale 1 count half. Fewer if memory does not hold as
    many, and halved whenever it turns out not to. `at_once` batches are drawn beside each other: two on a CPU, if
    memory holds them.
    dtype: of activations and caches, "float32", "bfloat16" or "float16"; logits and noise are float32 in any case.
    rng: "rows" is our own noise; "dalle-mini" repeats dalle-mini's `generate`, called with one prompt and the row's
    key, and can draw ids that are no codes. Raises UserError for a model that is not DALL-E mini's kind.
    Raises ValueError for another dtype, and a batch_size below 1.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: TextTokenizer,
        batch_size: int,
        dtype: str = "float32",
        rng: str = "rows",
    ):
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
        self._name = checkpoint.name
        self._tokenizer = tokenizer
        config, params = checkpoint.network_class.prepare_params(config, params)
        self._model = checkpoint.network_class(config, jnp.dtype(dtype))
        if rng == "dalle-mini":
            columns = config.image_vocab_size + 1
            self._drawing = DalleMiniDrawing(columns, config.eos_token_id, config.pad_token_id)
        else:
            self._drawing = loop.RowDrawing(self.codebook_size, config.sampling_order)
        self._devices = jax.local_devices()
        self._mesh = Mesh(self._devices, (loop.AXIS,)) if len(self._devices) > 1 else None
        self._divided, self._everywhere = (
            None if self._mesh is None else NamedSharding(self._mesh, spec)
            for spec in (PartitionSpec(loop.AXIS), PartitionSpec())
        )
        self._params = put_params(params, self._model.dtype, self._everywhere)
        self._begin_program, self._advance_program, self._replay_program = (
            Kept(function, self._model, self._drawing, self._mesh)
            for function in (loop.begin, loop.advance, loop.replay)
        )
        self._compiled: set[tuple[str, int]] = set()  # programs and sizes of batches
        self.set_batch_size(batch_size)

    @classmethod
    def load(
        cls, model: str | None = None, batch_size: int = sweep.DEFAULT_BATCH_SIZE, dtype: str = "float32"
    ) -> "Generator":
        """The generator of a folder, a file or a hub name; None is the model that ships. Raises UserError."""
        compile_cache.enable()
        checkpoint = load_checkpoint(model, "generator")
        return cls(checkpoint, tokenizer_of(checkpoint), batch_size, dtype=dtype)

    @property
    def capacities(self) -> list[int]:
        """Sequences of each of the batches that are drawn together, which `draw` fills one after the other.

        A row takes one or, if its cond_scale is not 1, two.
        """
        return [2 * self.batch_size] * len(self._devices) * self.at_once

    def set_batch_size(self, wanted: int) -> None:
        """So many pictures at a time on each device, or as many halvings of it as the memory that is free asks for."""
        free = free_bytes_of_each(self._devices)
        while wanted > 1 and self.batch_bytes(wanted) > free:
            wanted //= 2
        self.batch_size = wanted
        self.at_once = count_at_once(self._devices)
        if self.at_once * self.batch_bytes(wanted) > free:
            self.at_once = 1

    def check_texts(self, texts: Sequence[str | None]) -> None:
        """Raises UserError for a text with a token that the model lacks, as one of a wrong tokenizer has."""
        self._tokenizer.encode(texts, self._model.config.max_text_length)

    def generate(
        self,
        prompts: Sequence[str],
        settings: RowSettings,
        keys: np.ndarray,
        sc_prompts: Sequence[str | None] | None = None,
        init_tokens: np.ndarray | None = None,
        init_count: np.ndarray | int = 0,
    ) -> np.ndarray:
        """Tokens (n, L) of n rows; see `draw`."""
        return self.draw(prompts, settings, keys, sc_prompts, init_tokens, init_count).tokens

    def draw(
        self,
        prompts: Sequence[str],
        settings: RowSettings,
        keys: np.ndarray,
        sc_prompts: Sequence[str | None] | None = None,
        init_tokens: np.ndarray | None = None,
        init_count: np.ndarray | int = 0,
        every: int | None = None,
        on_codes: Callable[[int, np.ndarray], None] = lambda first_row, tokens: None,
    ) -> Drawn:
        """Tokens of n rows and their log-probabilities.

        prompts: n texts   keys: (n, 2) uint32, `threefry.row_key` makes them   sc_prompts: n texts or None, which is
        the model's own empty prompt; None for all   init_tokens: (n, L), of which each row keeps the first
        `init_count` (n,) and draws the rest   every: steps after which `on_codes` hears of the codes so far, as the
        number of the first row and (m, count) of the rows that are drawn together; None for never
        Raises UserError if the model gives no logits to draw from, or memory does not hold one picture; ValueError for
        arguments that do not match each other, or are out of range.
        """
        if every is not None:
            _check_every(every)
        rows = self._rows(prompts, settings, keys, sc_prompts, init_tokens, init_count)

        def draw(batch: list[Sequence[Row]], first_row: int) -> Drawn:
            for drawn in self._stream(batch, every or self.token_count):
                if every:
                    on_codes(first_row, drawn.tokens)
            return drawn

        nothing = Drawn(np.empty((0, self.token_count), self._token_dtype), np.empty(0, np.float32))
        parts = [nothing, *self._in_batches(rows, draw, in_turn=every is not None)]
        return Drawn(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def stream(
        self,
        prompts: Sequence[str],
        settings: RowSettings,
        keys: np.ndarray,
        every: int,
        sc_prompts: Sequence[str | None] | None = None,
        init_tokens: np.ndarray | None = None,
        init_count: np.ndarray | int = 0,
    ) -> Iterator[np.ndarray]:
        """The first codes (n, count) after every `every` steps, at last all (n, L); the arguments are those of `draw`.

        Raises UserError, besides what `draw` raises, for more rows than one batch holds.
        """
        _check_every(every)
        rows = self._rows(prompts, settings, keys, sc_prompts, init_tokens, init_count)
        batch = self._next_batch(rows)
        if sum(map(len, batch)) < len(rows):
            raise UserError(f"{len(rows)} pictures are too many for a batch of {self.batch_size}: draw fewer at a time")
        return (drawn.tokens for drawn in self._stream(batch, every))

    def replay(
        self,
        prompts: Sequence[str],
        settings: RowSettings,
        keys: np.ndarray,
        tokens: np.ndarray,
        sc_prompts: Sequence[str | None] | None = None,
        init_count: np.ndarray | int = 0,
    ) -> np.ndarray:
        """By how much each of `tokens` (n, L) missed being drawn, float32 (n, L); see `sampling.margin`.

        Every step reads the codes given, whatever would have been drawn. NaN where the model gives no numbers, 0 for
        the first `init_count` codes, which were not drawn.
        """
        rows = self._rows(prompts, settings, keys, sc_prompts, tokens, self.token_count)

        def replay(batch: list[Sequence[Row]], first_row: int) -> np.ndarray:
            inputs = self._inputs(batch)
            state = self._begin(inputs)
            return self._in_use(self._replay_program(self._params, inputs, state), batch)

        margins = [np.empty((0, self.token_count), np.float32), *self._in_batches(rows, replay)]
        is_drawn = np.arange(self.token_count) >= np.reshape(init_count, (-1, 1))
        return np.where(is_drawn, np.concatenate(margins), np.float32(0))

    def seconds_together(self) -> float:
        """How long batches of these `capacities` take, from a few steps of them; compiles what that needs."""
        count = self.batch_size * len(self._devices)
        rows = self._rows([""] * count, RowSettings(), np.zeros((count, 2), np.uint32), None, None, 0)
        inputs = self._inputs(self._next_batch(rows))

        def seconds() -> float:
            started = time.perf_counter()
            state = jax.block_until_ready(self._begin(inputs))
            began = time.perf_counter()
            jax.block_until_ready(self._advance(inputs, state, 0, _TIMED_STEPS))
            step = (time.perf_counter() - began) / _TIMED_STEPS  # each reads the whole cache: as long as the next
            return began - started + step * self.token_count

        seconds()  # compiled, and warm
        timed = [Beside(seconds) for _ in range(self.at_once)]
        return max(beside.result() for beside in timed)

    def batch_bytes(self, batch_size: int) -> int:
        """Memory of a device that a batch takes besides the weights: caches, texts and logits. An estimate."""
        begin = functools.partial(loop.begin, self._model, self._drawing, None)

        def state_bytes() -> int:
            inputs = laid_out([], 2 * batch_size, self._tokenizer, self._model.config.max_text_length, self.token_count)
            state = jax.eval_shape(begin, self._params, inputs)
            return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

        cached = remembered(state_bytes, "bytes of a batch", self._model, self._drawing, batch_size)
        return cached + 2 * batch_size * self._drawing.columns * 4 * _LOGITS_COPIES

    # Underneath

    def _rows(self, prompts, settings, keys, sc_prompts, init_tokens, init_count) -> list[Row]:
        count = len(prompts)
        columns = _checked_settings(settings, count)
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
            init_tokens = _checked_whole("init_tokens", init_tokens, 0, self._drawing.columns - 1)
            if init_tokens.shape != (count, self.token_count):
                raise ValueError(f"init_tokens are {init_tokens.shape}, not {(count, self.token_count)}")
        return [
            Row(*values)
            for values in zip(
                prompts,
                [None] * count if sc_prompts is None else sc_prompts,
                *columns,
                keys,
                init_tokens,
                init_count,
                strict=True,
            )
        ]

    def _in_batches(
        self, rows: list[Row], work: Callable[[list[Sequence[Row]], int], _T], in_turn: bool = False
    ) -> Iterator[_T]:
        """What `work` makes of each batch, and the number of its first row, in order; see `_next_batch`.

        in_turn: never of two batches beside each other. Nor are those before a program is compiled.
        """
        first = 0
        while first < len(rows):
            program = work.__name__, self.batch_size
            is_one = in_turn or program not in self._compiled
            running, ahead = [], first
            while ahead < len(rows) and len(running) < (1 if is_one else self.at_once):
                batch = self._next_batch(rows[ahead:])
                running.append((batch, functools.partial(work, batch, ahead)))
                ahead += sum(map(len, batch))
            if len(running) > 1:
                running = [(batch, Beside(compute).result) for batch, compute in running]
            waiting = iter(running)
            try:
                for batch, result in waiting:
                    yield result()
                    first += sum(map(len, batch))
                self._compiled.add(program)
            except jax.errors.JaxRuntimeError as error:
                for _, result in waiting:  # else what is tried again would share the memory with it
                    with contextlib.suppress(jax.errors.JaxRuntimeError):
                        result()
                self._shrink(error, len(running))

    def _next_batch(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """The first rows, as many as fit, for each device."""
        batch, taken = [], 0
        for _ in self._devices:
            ahead = rows[taken : taken + 2 * self.batch_size]
            batch.append(take_fitting(ahead, [sequence_count(row.cond_scale) for row in ahead], 2 * self.batch_size))
            taken += len(batch[-1])
        return batch

    def _inputs(self, batch: list[Sequence[Row]]) -> RowInputs:
        text_length = self._model.config.max_text_length
        parts = [laid_out(rows, 2 * self.batch_size, self._tokenizer, text_length, self.token_count) for rows in batch]
        inputs = parts[0] if len(parts) == 1 else jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        return jax.device_put(inputs, self._divided)

    def _begin(self, inputs: RowInputs) -> loop.DrawState:
        return self._begin_program(self._params, inputs)

    def _advance(self, inputs: RowInputs, state: loop.DrawState, first: int, end: int) -> loop.DrawState:
        steps = jax.device_put((np.int32(first), np.int32(end)), self._everywhere)
        return self._advance_program(self._params, inputs, state, *steps)

    def _stream(self, batch: list[Sequence[Row]], every: int) -> Iterator[Drawn]:
        """Tokens (m, count) and log-probabilities of a batch's m rows after every `every` steps, and at the end."""
        inputs = self._inputs(batch)
        state = self._begin(inputs)
        for first in range(0, self.token_count, every):
            end = min(first + every, self.token_count)
            state = self._advance(inputs, state, first, end)
            if not self._in_use(state.last.is_drawable, batch).all():
                raise UserError(f"model {self._name!r} gives no numbers for some rows: its weights are damaged")
            tokens = self._in_use(state.tokens, batch)[:, :end].astype(self._token_dtype)
            yield Drawn(tokens, self._in_use(state.last.log_prob, batch))

    def _in_use(self, array: jax.Array, batch: list[Sequence[Row]]) -> np.ndarray:
        """The rows of a batch, of an array with 2 x batch_size for each device."""
        parts = np.split(jax.device_get(array), len(batch))
        return np.concatenate([part[: len(rows)] for part, rows in zip(parts, batch, strict=True)])

    @property
    def _token_dtype(self) -> type:
        return np.int32 if isinstance(self._drawing, DalleMiniDrawing) else np.uint16

    def _shrink(self, error: jax.errors.JaxRuntimeError, batch_count: int) -> None:
        """After so many batches at a time did not fit into the memory of a device; raises any other error again."""
        if not is_out_of_memory(error):
            raise error
        if batch_count > 1:
            self.at_once = 1
            return
        if self.batch_size == 1:
            raise UserError(
                "not enough memory to draw one picture at a time; end what else uses the device, or give "
                "--dtype bfloat16"
            ) from error
        self.batch_size //= 2


def _check_every(every: int) -> None:
    if every < 1:
        raise ValueError(f"every (={every}) must be at least 1")


def _checked_settings(settings: RowSettings, count: int) -> list[np.ndarray]:
    """The columns of `settings`, (count,) each. Raises ValueError for one that no picture can be drawn with."""
    columns = {}
    for field in dataclasses.fields(settings):
        columns[field.name] = np.broadcast_to(getattr(settings, field.name), count)
    allowed = {
        "top_k": (columns["top_k"] >= 0, "0 or more"),
        "top_p": (columns["top_p"] >= 0, "0 or more"),
        "temperature": ((columns["temperature"] >= 0) & (columns["temperature"] < np.inf), "0 or more, and finite"),
        "cond_scale": (np.isfinite(columns["cond_scale"]), "finite"),
    }
    for name, (is_allowed, what) in allowed.items():
        if not is_allowed.all():  # NaN is never
            raise ValueError(f"{name} must be {what}, not {columns[name][~is_allowed][0]}")
    return list(columns.values())


def _checked_whole(name: str, values: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    """`values` as an array. Raises ValueError for other than whole numbers within these limits."""
    values = np.asarray(values)
    if values.size and not (values.dtype.kind in "iu" and lowest <= values.min() and values.max() <= highest):
        raise ValueError(f"{name} must be whole numbers from {lowest:,} to {highest:,}")
    return values


def tokenizer_of(generator: Checkpoint) -> TextTokenizer:
    """What makes ids of the prompts of a loaded generator. Raises UserError if its files are missing or broken."""
    if generator.tokenizer is None:
        raise UserError(
            f"model {generator.name!r} has no tokenizer beside it: give its file or folder with --tokenizer"
        )
    config = generator.config
    is_fork = config.sampling_order == "top_p_first"  # its program draws from prompts in lower case
    return load_tokenizer(generator.tokenizer, generator.text_style, config.text_vocab_size, lower=is_fork)
