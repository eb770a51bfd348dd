"""Token ids as the arrays that a model takes. B: prompts   L: positions"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dm_generations.errors import UserError
from dm_generations.text.files import MAX_ID


def padded_rows(
    ids: Sequence[Sequence[int]], length: int, pad_id: int, vocab_size: int | None, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """input_ids, attention_mask (1 where there are ids, then 0), both int32 (B, L); longer ids lose their tail.

    vocab_size: rows of the model's text table, None leaves ids unchecked. Raises UserError for an id that the
    table lacks, naming the tokenizer's `path`.
    """
    limit = MAX_ID + 1 if vocab_size is None else vocab_size
    highest = max(pad_id, *(max(row[:length], default=0) for row in ids)) if ids else pad_id
    if highest >= limit:
        raise UserError(
            f"{path}: gives the token id {highest:,}, the model has only {limit:,} tokens: "
            "this is not the tokenizer it was trained with"
        )
    input_ids = np.full((len(ids), length), pad_id, np.int32)
    attention_mask = np.zeros((len(ids), length), np.int32)
    for index, row in enumerate(ids):
        row = row[:length]
        input_ids[index, : len(row)] = row
        attention_mask[index, : len(row)] = 1
    return input_ids, attention_mask
