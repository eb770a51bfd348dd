"""min-dalle's text to tokens: DALL-E mini's vocabulary without its normaliser.

Rules after `TextTokenizer` and `MinDalle` of min-dalle (https://github.com/kuprel/min-dalle). They differ from
BART's: every word begins with a space, the first too; what is not ASCII is dropped; and a text that is too long
loses its end token.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dm_generations.text.bpe import merge, rules_of
from dm_generations.text.byte_level import vocab_and_merges
from dm_generations.text.files import optional_module, special_id
from dm_generations.text.rows import padded_rows
from dm_generations.text.tokenizer import well_formed

SPACE = "Ġ"  # the byte-level piece for " "
PAD_ID = 1  # a constant there, and masked wherever it occurs


class MinDalleTokenizer:
    """path: the folder of vocab.json and merges.txt, or one of the two. vocab_size: rows of the model's text table.

    Raises UserError for files that are missing or broken, and for ids that the model lacks.
    """

    def __init__(self, path: Path, vocab_size: int):
        self.path, self._vocab, merges = vocab_and_merges(path)
        self._rules = rules_of(merges)
        self._start, self._end, self._unknown = (
            special_id(self._vocab, piece, self.path) for piece in ("<s>", "</s>", "<unk>")
        )
        self._demojize = optional_module("emoji").demojize
        self.vocab_size = vocab_size

    def encode(self, texts: Sequence[str | None], length: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids, attention_mask (1 where the id is not that of a pad), both int32 (B, L) with L = length.

        None is the unconditional prompt: start and end token.
        """
        ids = [[self._start, *self._inner_ids(text or "", length), self._end] for text in texts]
        input_ids, _ = padded_rows(ids, length, PAD_ID, self.vocab_size, self.path)
        return input_ids, (input_ids != PAD_ID).astype(np.int32)

    def _inner_ids(self, text: str, limit: int) -> list[int]:
        text = self._demojize(well_formed(text), delimiters=("", ""))
        text = text.lower().encode("ascii", "ignore").decode()
        ids: list[int] = []
        for word in text.split(" "):
            if word and len(ids) < limit:
                ids += [self._vocab.get(piece, self._unknown) for piece in merge([SPACE, *word], self._rules)]
        return ids
