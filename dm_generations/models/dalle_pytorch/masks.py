"""Which positions attend to which, for each attention type of DALLE-pytorch. Imports no JAX.

S: positions: <bos>, text, image tokens (row-major over the grid) except the last

Full sequences and cached steps use the same mask (the row of the step's position), so they agree by construction.
"""

import functools

import numpy as np

from dm_generations.models.dalle_pytorch.config import SPARSE_BLOCK, DallePytorchConfig

_CONV_KERNEL = 5


@functools.lru_cache(maxsize=16)
def visible(config: DallePytorchConfig, attn_type: str) -> np.ndarray:
    """The mask of an attention type: (S, S) bool, true if the query (row) sees the key (column); read-only."""
    position = np.arange(config.sequence_length, dtype=np.int32)
    query, key = position[:, None], position[None, :]
    mask = key <= query
    if attn_type == "sparse":
        assert config.sparse_layout is not None  # the config checks that
        layout = np.array([[block == "1" for block in row] for row in config.sparse_layout])
        mask = mask & layout[query // SPARSE_BLOCK, key // SPARSE_BLOCK]
    elif attn_type != "full":
        text_length = config.text_seq_len + 1  # <bos> belongs to the text, which every later position sees
        query_row, query_column = np.divmod(query - text_length, config.image_fmap_size)
        key_row, key_column = np.divmod(key - text_length, config.image_fmap_size)
        rows_up, columns_left = query_row - key_row, query_column - key_column
        near = _is_near(config, attn_type, rows_up, columns_left)
        mask = mask & ((key < text_length) | near)
    mask.flags.writeable = False
    return mask


def _is_near(config: DallePytorchConfig, attn_type: str, rows_up: np.ndarray, columns_left: np.ndarray) -> np.ndarray:
    """Whether a token is in reach of another one, by their distances; later tokens are hidden elsewhere."""
    if attn_type == "axial_row":
        return rows_up == 0
    if attn_type == "axial_col":
        return columns_left == 0
    first = 0 if config.conv_like == "causal" else -(_CONV_KERNEL // 2)
    last = first + _CONV_KERNEL - 1
    return (rows_up >= first) & (rows_up <= last) & (columns_left >= first) & (columns_left <= last)
