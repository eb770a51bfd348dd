"""Rows packed into batches for the compiled sampling loop: distinct texts, the sequences that read them, and the rows.

A row needs one sequence of tokens under its prompt, and a second one under its unconditional prompt unless its
cond_scale is 1. Rows are packed into a fixed number of sequences, so that one program serves every mix.

S: sequences of one device's batch   R: rows at most, S   N: texts at most, S in whole batches of TEXT_BATCH
T: text tokens   L: tokens of an image   E: extra settings of the model
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import numpy as np

from dm_generations.archive.records import ClassLabel
from dm_generations.sampling.params import SamplingParams, Unconditional

if TYPE_CHECKING:
    from dm_generations.models.base import Tokenizer

TEXT_BATCH = 8  # texts encoded at a time: a batch has few distinct ones
_INT32_MAX = 2**31 - 1
_T = TypeVar("_T")


class RowInputs(NamedTuple):
    """A batch of one device; of D devices, with D times as many rows of everything. What is not in use is 0."""

    input_ids: jax.Array  # (N, T) int32, the distinct texts
    attention_mask: jax.Array  # (N, T) int32, 1 for text, 0 for padding
    text_count: jax.Array  # (1,) int32, how many of them are in use
    row_count: jax.Array  # (1,) int32
    text_of_sequence: jax.Array  # (S,) int32
    row_of_sequence: jax.Array  # (S,) int32, whose tokens it reads
    cond: jax.Array  # (R,) int32, the sequence under the row's prompt
    uncond: jax.Array  # (R,) int32, the one under its unconditional prompt; `cond` where its scale is 1
    keys: jax.Array  # (R, 2) uint32; or (2,) for one call of dalle-mini's `generate`
    top_k: jax.Array  # (R,) int32
    top_p: jax.Array  # (R,) float32, as the two below
    temperature: jax.Array
    cond_scale: jax.Array
    init_tokens: jax.Array  # (R, L) int32
    init_count: jax.Array  # (R,) int32, how many of them are not sampled
    extra: jax.Array  # (R, E) float32, the model's extra settings in its order


OF_ROWS = RowInputs._fields[RowInputs._fields.index("cond") :]  # with one entry for each row


class Row(NamedTuple):
    """One image to sample."""

    prompt: str | ClassLabel | None
    sc_prompt: str | None
    params: SamplingParams
    key: tuple[int, int]
    init_tokens: np.ndarray | None  # (L,)
    init_count: int
    extra: tuple[float, ...] = ()


def sequence_count(cond_scale: float) -> int:
    """Return how many sequences a row of this cond_scale needs."""
    return 1 if np.float32(cond_scale) == 1 else 2


def take_until_full(rows: Sequence[_T], sequences: Sequence[int], capacity: int) -> Sequence[_T]:
    """Take the first rows until a batch is full.

    Args:
        rows: Any items.
        sequences: How many each of them needs.
        capacity: Sequences of a batch.

    Returns:
        The first rows, at least one.
    """
    used = itertools.accumulate(sequences)
    return rows[: max(1, sum(1 for _ in itertools.takewhile(lambda total: total <= capacity, used)))]


def pack_batch(
    rows: Sequence[Row], capacity: int, tokenizer: "Tokenizer", text_length: int, length: int, extra_count: int = 0
) -> RowInputs:
    """Pack rows into the arrays of one device's batch.

    Args:
        rows: They need at most `capacity` sequences.
        capacity: S.
        tokenizer: For the prompts.
        text_length: T.
        length: L.
        extra_count: E.

    Returns:
        NumPy arrays.
    """
    texts: dict[str | ClassLabel | Unconditional | None, int] = {}
    depends_on_prompt = getattr(tokenizer, "unconditional_by_prompt", False)
    sequences: list[tuple[int, int]] = []  # text, row
    cond, uncond = [], []
    for number, row in enumerate(rows):
        cond.append(len(sequences))
        sequences.append((texts.setdefault(row.prompt, len(texts)), number))
        if sequence_count(row.params.cond_scale) == 2:
            own = Unconditional(str(row.prompt or "")) if depends_on_prompt else None
            sequences.append((texts.setdefault(row.sc_prompt or own, len(texts)), number))
        uncond.append(len(sequences) - 1)
    padding = [None] * (-(-capacity // TEXT_BATCH) * TEXT_BATCH - len(texts))
    init_tokens = np.zeros((capacity, length), np.int32)
    for number, row in enumerate(rows):
        if row.init_tokens is not None:
            init_tokens[number] = row.init_tokens

    def column(values: Sequence | np.ndarray, dtype: type) -> np.ndarray:
        array: np.ndarray = np.asarray(values, dtype)
        return np.concatenate([array, np.zeros((capacity - len(array), *array.shape[1:]), dtype)])

    arrays: list[Any] = [
        *tokenizer.encode([*texts, *padding], text_length),
        np.array([len(texts)], np.int32),
        np.array([len(rows)], np.int32),
        column([text for text, _ in sequences], np.int32),
        column([row for _, row in sequences], np.int32),
        column(cond, np.int32),
        column(uncond, np.int32),
        column(np.array([row.key for row in rows], np.uint32).reshape(-1, 2), np.uint32),
        column([min(int(row.params.top_k), _INT32_MAX) for row in rows], np.int32),
        column([row.params.top_p for row in rows], np.float32),
        column([row.params.temperature for row in rows], np.float32),
        column([row.params.cond_scale for row in rows], np.float32),
        init_tokens,
        column([row.init_count for row in rows], np.int32),
        column(np.array([row.extra for row in rows], np.float32).reshape(len(rows), extra_count), np.float32),
    ]
    return RowInputs(*arrays)
