"""The sampling loop of every text model, compiled whole: a batch of rows from its texts to its codes.

Rows do not read each other, and a batch always has the same shape: with one batch size, on one kind of device, a row
gives the same codes alone, at any position and in any company.

S, R, N, T, L: as in `row_inputs`   V: columns of the logits
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dm_generations import sampling
from dm_generations.generate.row_inputs import OF_ROWS, TEXT_BATCH, RowInputs
from dm_generations.runtime.params import matmul_precision

AXIS = "rows"  # of a mesh of devices, each of which has a batch of its own


class RowState(NamedTuple):
    """What a step makes of each row."""

    token: jax.Array  # (R,) int32, which the next step reads
    log_prob: jax.Array  # (R,) float32, summed over the codes drawn so far
    is_drawable: jax.Array  # (R,) bool, whether every step had a code to draw
    noise: Any  # what the rule of drawing remembers


class DrawState(NamedTuple):
    """A batch between two codes."""

    cache: Any  # of the model, S sequences
    tokens: jax.Array  # (R, L) int32, those drawn so far
    last: RowState


class Drawing(Protocol):
    """How logits become a code. Hashable: a program is compiled for each."""

    columns: int  # of the logits, among which is drawn

    def begin(self, rows: RowInputs) -> Any:
        """What it remembers before the first step: arrays of R rows."""

    def draw(self, guided: jax.Array, step: jax.Array, rows: RowInputs, noise: Any) -> tuple[jax.Array, jax.Array, Any]:
        """Codes (R,) int32 of guided logits (R, V) float32, whether there was one to draw, (R,) bool, and `noise` for
        the next step.
        """


@dataclass(frozen=True)
class RowDrawing:
    """The noise of this program, a function of the row's key, the step and the code: see `sampling`."""

    columns: int
    order: str

    def begin(self, rows: RowInputs) -> tuple[()]:
        return ()

    def draw(self, guided, step, rows, noise):
        token = sampling.sample(guided, step, *settings_of(rows), self.columns, self.order)
        return token, sampling.is_drawable(guided, self.columns), noise


def settings_of(rows: RowInputs) -> tuple[jax.Array, ...]:
    """What `sampling` takes of each row."""
    return rows.keys, rows.top_k, rows.top_p, rows.temperature


# The model is static, so generators of one configuration share their compiled programs.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def begin(model: nn.Module, drawing: Drawing, mesh: Mesh | None, params: dict, rows: RowInputs) -> DrawState:
    """The state before the first code. mesh: of devices, each with rows of its own; None for one device."""

    def here(params, rows):
        count = len(rows.top_k)
        return DrawState(
            model.apply({"params": params}, _texts(model, params, rows), method="init_cache"),
            jnp.zeros((count, model.config.image_length), jnp.int32),
            RowState(
                jnp.full(count, model.config.start_token, jnp.int32),
                jnp.zeros(count, jnp.float32),
                jnp.ones(count, bool),
                drawing.begin(rows),
            ),
        )

    return _on_each_device(model, here, mesh, (False, True))(params, rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def advance(
    model: nn.Module,
    drawing: Drawing,
    mesh: Mesh | None,
    params: dict,
    rows: RowInputs,
    state: DrawState,
    first: jax.Array,
    end: jax.Array,
) -> DrawState:
    """The state after the steps from `first` to `end` - 1, () int32. `state` is given up: its memory is used again."""

    def here(params, rows, state, first, end):
        def one(step, state):
            logits, cache = _logits(model, params, rows, state.cache, state.last.token, step)

            def draw(rows, last):
                guided = _guided(model, rows, logits, step)
                token, is_drawable, noise = drawing.draw(guided, step, rows, last.noise)
                is_kept = step < rows.init_count
                token = jnp.where(is_kept, rows.init_tokens[:, step], token)
                log_prob = sampling.log_prob(guided, token, drawing.columns)
                return RowState(
                    token,
                    last.log_prob + jnp.where(is_kept, 0.0, log_prob),
                    last.is_drawable & (is_drawable | is_kept),
                    noise,
                )

            last = _for_rows_in_use(draw, rows, state.last)
            return DrawState(cache, state.tokens.at[:, step].set(last.token), last)

        return jax.lax.fori_loop(first, end, one, state)

    return _on_each_device(model, here, mesh, (False, True, True, False, False))(params, rows, state, first, end)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def replay(
    model: nn.Module, drawing: RowDrawing, mesh: Mesh | None, params: dict, rows: RowInputs, state: DrawState
) -> jax.Array:
    """By how much each of `rows.init_tokens` missed being drawn, (R, L) float32: `sampling.margin`.

    Every step reads those codes, whatever would have been drawn. NaN where the model gives no numbers.
    state: as `begin` gives it
    """

    def here(params, rows, state):
        def one(carry, step_and_codes):
            cache, token = carry
            step, codes = step_and_codes
            logits, cache = _logits(model, params, rows, cache, token, step)
            guided = _guided(model, rows, logits, step)
            margin = sampling.margin(guided, codes, step, *settings_of(rows), drawing.columns, drawing.order)
            return (cache, codes), jnp.where(sampling.is_drawable(guided, drawing.columns), margin, jnp.nan)

        steps = jnp.arange(model.config.image_length, dtype=jnp.int32)
        _, margins = jax.lax.scan(one, (state.cache, state.last.token), (steps, rows.init_tokens.T))
        return margins.T

    return _on_each_device(model, here, mesh, (False, True, True))(params, rows, state)


def _texts(model: nn.Module, params: dict, rows: RowInputs) -> Any:
    """What the model reads of each sequence's text, each distinct text computed once."""

    def read(start):
        batch = (jax.lax.dynamic_slice_in_dim(array, start, TEXT_BATCH) for array in rows[:2])
        return model.apply({"params": params}, *batch, method="encode_prompt")

    def store(index, texts):
        start = index * TEXT_BATCH
        return jax.tree.map(
            lambda all, batch: jax.lax.dynamic_update_slice_in_dim(all, batch, start, axis=0), texts, read(start)
        )

    one = jax.eval_shape(read, jnp.int32(0))
    texts = jax.tree.map(lambda array: jnp.zeros((len(rows.input_ids), *array.shape[1:]), array.dtype), one)
    texts = jax.lax.fori_loop(0, -(-rows.text_count[0] // TEXT_BATCH), store, texts)
    return jax.tree.map(lambda array: array[rows.text_of_sequence], texts)


def _logits(model: nn.Module, params: dict, rows: RowInputs, cache: Any, token: jax.Array, step: jax.Array):
    """Logits (S, V) float32 of a step, and the cache for the next. Both sequences of a row read its code (R,)."""
    return model.apply({"params": params}, cache, token[rows.row_of_sequence], step, method="decode_step")


def _guided(model: nn.Module, rows: RowInputs, logits: jax.Array, step: jax.Array) -> jax.Array:
    """Guided logits (R, V) of the sequences' (S, V)."""
    cond, uncond = logits[rows.cond], logits[rows.uncond]
    guided = sampling.guide(cond, uncond, rows.cond_scale)
    if getattr(model.config, "guides_first_code_alone", False):
        guided = jnp.where(((step > 0) & (rows.cond_scale != 1))[:, None], uncond, guided)
    return guided


def _for_rows_in_use(draw: Callable[[RowInputs, RowState], RowState], rows: RowInputs, last: RowState) -> RowState:
    """`draw`, one half of the rows after the other; the upper one only if it is in use, that is, if not all are guided.

    A loop and no condition, within which a CPU computes on one core; and `draw` is compiled once.
    """
    half, rest = divmod(len(rows.top_k), 2)
    if rest or rows.keys.ndim == 1:
        return draw(rows, last)

    def draw_half(number, last):
        start = number * half

        def part(tree):
            return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, half), tree)

        of_rows = {name: part(getattr(rows, name)) for name in OF_ROWS}
        drawn = draw(rows._replace(**of_rows), part(last))
        return jax.tree.map(lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new, start, axis=0), last, drawn)

    return jax.lax.fori_loop(0, jnp.where(rows.row_count[0] > half, 2, 1), draw_half, last)


def _on_each_device(model: nn.Module, function: Callable, mesh: Mesh | None, is_divided: tuple[bool, ...]) -> Callable:
    """`function` of the model on every device of the mesh, each with its part of the arguments that are divided."""

    def precise(*arguments):
        with matmul_precision(model.dtype):
            return function(*arguments)

    if mesh is None:
        return precise
    specs = tuple(PartitionSpec(AXIS) if divided else PartitionSpec() for divided in is_divided)
    return jax.shard_map(precise, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False)
