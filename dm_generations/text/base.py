"""What every tokenizer of a text-to-image model does."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Turns prompts into token ids of a fixed length."""

    def encode(self, texts: Sequence[str | None], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode prompts as a text-to-image model reads them.

        Args:
            texts: B prompts. None is the model's own unconditional prompt.
            length: L, the number of tokens per prompt. Longer prompts are cut, shorter ones padded.

        Returns:
            input_ids and attention_mask, both int32 (B, L).

        Raises:
            UserError: A prompt has a token that the model lacks.
        """
