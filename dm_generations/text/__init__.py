"""From prompts to token ids. Never imports JAX."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from dm_generations.errors import UserError
from dm_generations.text.byte_level import bart_tokenizer, clip_tokenizer
from dm_generations.text.dalle_pytorch import DallePytorchTokenizer
from dm_generations.text.min_dalle import MinDalleTokenizer
from dm_generations.text.mindalle import MinDalleETokenizer
from dm_generations.text.normalizer import TextNormalizer
from dm_generations.text.tokenizer import PromptTokenizer as PromptTokenizer


class TextTokenizer(Protocol):
    """What every tokenizer here does. None is the model's own unconditional prompt."""

    def encode(self, texts: Sequence[str | None], length: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids, attention_mask, both int32 (prompts, length)."""


def load_tokenizer(path: str | Path, style: str, vocab_size: int, *, lower: bool = False) -> TextTokenizer:
    """The tokenizer at `path` (a folder, or one of its files), used as a kind of model was trained with it.

    style: "dalle_bart" (BART's), "dalle_mini" (the same after DALL-E mini's normaliser), "min_dalle",
    "mindalle" (minDALL-E), "dalle_pytorch" or "clip". vocab_size: rows of the model's text table.
    lower: for "dalle_pytorch", prompts in lower case, as the DALL-3 fork has them.

    Raises UserError for files that are missing, broken, not of this style, or that need a library which is not
    installed; `encode` raises it for a token that the model lacks.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; the prompts need the model's tokenizer")
    match style:
        case "dalle_bart":
            return bart_tokenizer(path, vocab_size)
        case "dalle_mini":
            folder = path if path.is_dir() else path.parent
            return bart_tokenizer(path, vocab_size, TextNormalizer.of_folder(folder))
        case "min_dalle":
            return MinDalleTokenizer(path, vocab_size)
        case "mindalle":
            return MinDalleETokenizer(path, vocab_size)
        case "dalle_pytorch":
            return DallePytorchTokenizer(path, vocab_size, lower=lower)
        case "clip":
            return clip_tokenizer(path, vocab_size)
    raise ValueError(f"unknown style {style!r}")
