"""The sampling loop of every text-to-image model, compiled whole: a batch of rows from its prompts to its tokens.

A step samples a token of each row, or in masked decoding all that are masked; the sampler knows.

Rows do not read each other, and a batch always has the same shape. So sampling is batch-invariant: with one batch size,
on one kind of device, a row gives the same tokens alone, at any position and among any other rows.

S, R, N, T, L: as in `batching`   V: columns of the logits
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dm_generations.runtime.device import matmul_precision
from dm_generations.sampling import logits as sampling
from dm_generations.sampling.batching import OF_ROWS, TEXT_BATCH, RowInputs
from dm_generations.sampling.methods import Replayed, ReplayingSampler, RowState, Sampler

_T = TypeVar("_T")
AXIS = "rows"  # of a mesh of devices, each of which has a batch of its own


class DecodeState(NamedTuple):
    """A batch between two steps."""

    cache: Any  # of the model, S sequences
    tokens: jax.Array  # (R, L) int32, those sampled so far
    last: RowState


# The model is static, so generators of one configuration share their compiled programs.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def init_cache(model: nn.Module, sampler: Sampler, mesh: Mesh | None, params: dict, rows: RowInputs) -> DecodeState:
    """Return the state before the first token.

    Args:
        model: A text-to-image model.
        sampler: How tokens are sampled.
        mesh: Of devices, each with rows of its own; None for one device.
        params: Of the model.
        rows: The batch.
    """

    def on_one_device(params, rows):
        inputs: tuple[Any, ...] = (_encode_prompts(model, params, rows),)
        if rows.extra.shape[1]:  # a model without extra settings takes none
            inputs += (rows.extra[rows.row_of_sequence],)
        return DecodeState(
            model.apply({"params": params}, *inputs, method="init_cache"),
            jnp.zeros((len(rows.top_k), model.config.image_length), jnp.int32),
            sampler.init_rows(rows, model.config.start_token),
        )

    return _on_each_device(model, on_one_device, mesh, (False, True))(params, rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def decode_steps(
    model: nn.Module,
    sampler: Sampler,
    mesh: Mesh | None,
    params: dict,
    rows: RowInputs,
    state: DecodeState,
    first: jax.Array,
    end: jax.Array,
) -> DecodeState:
    """Return the state after the steps from `first` to `end` - 1, each () int32.

    `state` is donated: its memory is used again. Other arguments are those of `init_cache`.
    """

    def on_one_device(params, rows, state, first, end):
        def one_step(step, state):
            logits, cache = _logits(model, params, rows, state.cache, state.last.token, step)

            def advance(rows, last):
                return sampler.advance(_guided(model, rows, logits, step), step, rows, last)

            last = _for_rows_in_use(advance, rows, state.last)
            return DecodeState(cache, sampler.place(state.tokens, step, last), last)

        return jax.lax.fori_loop(first, end, one_step, state)

    divided = (False, True, True, False, False)
    return _on_each_device(model, on_one_device, mesh, divided)(params, rows, state, first, end)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def teacher_forced_margins(
    model: nn.Module,
    sampler: ReplayingSampler,
    mesh: Mesh | None,
    params: dict,
    rows: RowInputs,
    state: DecodeState,
    end: jax.Array,
) -> jax.Array:
    """Return by how much each of `rows.init_tokens` missed being sampled, (R, L) float32: `sampling.margin`.

    Every step reads those tokens, whatever would have been sampled. NaN where the model gives no numbers; what initial
    tokens have means nothing.

    Args:
        model: A text-to-image model; this and the other arguments are those of `init_cache`.
        sampler: How tokens are sampled.
        mesh: Of devices, or None.
        params: Of the model.
        rows: The batch.
        state: As `init_cache` returns it.
        end: () int32, the number of steps.
    """

    def on_one_device(params, rows, state, end):
        def one_step(step, carry):
            cache, last = carry
            logits, cache = _logits(model, params, rows, cache, last.token, step)

            def measure(rows, last):
                return sampler.measure(_guided(model, rows, logits, step), step, rows, last)

            return cache, _for_rows_in_use(measure, rows, last)

        first = Replayed(state.last.token, jnp.full(rows.init_tokens.shape, jnp.inf))
        return jax.lax.fori_loop(0, end, one_step, (state.cache, first))[1].margins

    return _on_each_device(model, on_one_device, mesh, (False, True, True, False))(params, rows, state, end)


def _encode_prompts(model: nn.Module, params: dict, rows: RowInputs) -> Any:
    """Return what the model reads of each sequence's prompt; each distinct prompt is computed once."""

    @jax.jit  # traced once for its shapes and the loop
    def encode(params, input_ids, attention_mask):
        return model.apply({"params": params}, input_ids, attention_mask, method="encode_prompt")

    def store(index, texts):
        start = index * TEXT_BATCH
        batch = (jax.lax.dynamic_slice_in_dim(array, start, TEXT_BATCH) for array in rows[:2])
        return jax.tree.map(
            lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new, start, axis=0),
            texts,
            encode(params, *batch),
        )

    one = jax.eval_shape(encode, params, *(array[:TEXT_BATCH] for array in rows[:2]))
    texts = jax.tree.map(lambda array: jnp.zeros((len(rows.input_ids), *array.shape[1:]), array.dtype), one)
    texts = jax.lax.fori_loop(0, -(-rows.text_count[0] // TEXT_BATCH), store, texts)
    return jax.tree.map(lambda array: array[rows.text_of_sequence], texts)


def _logits(model: nn.Module, params: dict, rows: RowInputs, cache: Any, token: jax.Array, step: jax.Array):
    """Return logits (S, V) float32 of a step, and the cache for the next; of masked decoding (S, L, V).

    Both sequences of a row read its token (R,), or its tokens (R, L).
    """
    return model.apply({"params": params}, cache, token[rows.row_of_sequence], step, method="decode_step")


def _guided(model: nn.Module, rows: RowInputs, logits: jax.Array, step: jax.Array) -> jax.Array:
    """Return guided logits (R, V) of the sequences' (S, V), or (R, L, V) of (S, L, V)."""
    cond, uncond = logits[rows.cond], logits[rows.uncond]
    scale = rows.cond_scale.reshape(-1, *[1] * (logits.ndim - 2))
    guided = sampling.guide(cond, uncond, scale)
    if getattr(model.config, "guides_first_code_alone", False):
        guided = jnp.where(((step > 0) & (rows.cond_scale != 1))[:, None], uncond, guided)
    if "cfg_interval" in (names := list(getattr(model.config, "extra_settings", ()))):
        interval = rows.extra[:, names.index("cfg_interval")]
        guided = jnp.where(((interval >= 0) & (step > interval + 1))[:, None], cond, guided)
    return guided


def _for_rows_in_use(advance: Callable[[RowInputs, _T], _T], rows: RowInputs, last: _T) -> _T:
    """Advance one half of the rows after the other; the upper one only if it is in use, that is, if not all are guided.

    A loop and not a condition, in which a CPU computes on one core; and `advance` is compiled once.
    """
    half, rest = divmod(len(rows.top_k), 2)
    if rest or rows.keys.ndim == 1:
        return advance(rows, last)

    def advance_half(number, last):
        start = number * half

        def part(tree):
            return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, half), tree)

        of_rows = {name: part(getattr(rows, name)) for name in OF_ROWS}
        advanced = advance(rows._replace(**of_rows), part(last))
        return jax.tree.map(
            lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new, start, axis=0), last, advanced
        )

    return jax.lax.fori_loop(0, jnp.where(rows.row_count[0] > half, 2, 1), advance_half, last)


def _on_each_device(model: nn.Module, function: Callable, mesh: Mesh | None, is_divided: tuple[bool, ...]) -> Callable:
    """Run `function` of the model on every device of the mesh, each with its part of the arguments that are divided."""

    def precise(*arguments):
        with matmul_precision(model.dtype):
            return function(*arguments)

    if mesh is None:
        return precise
    specs = tuple(PartitionSpec(AXIS) if divided else PartitionSpec() for divided in is_divided)
    return jax.shard_map(precise, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False)
