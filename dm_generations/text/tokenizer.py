"""Prompts to token ids, with the `tokenizer.json` of a model folder.

The pipeline inside the file (normaliser, pre-tokenizer, BPE) is run as it is by the `tokenizers` library,
which gives the ids of transformers; the ends, the cut and the padding are ours.

B: prompts   L: positions
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dm_generations.errors import UserError


class PromptTokenizer:
    """Rows `<bos> text <eos> <pad> ...` of a fixed length, for BART's and CLIP's kind of tokenizer alike.

    bos_id, eos_id, pad_id: where None, the file's own: bos and eos are what it puts around an empty text, pad
    is its padding's id, else that of `<pad>`, else eos (as CLIP pads). The ids in a DALL-E mini config.json
    are NOT these: they belong to the picture's tokens.
    vocab_size: rows of the model's embedding table; None leaves ids unchecked.

    A text that spells a special token ("</s>") gives that token if the file lists it as an added token, as in
    transformers. Raises UserError for a file that is missing, broken or lacks the ends.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        vocab_size: int | None = None,
    ):
        self.path = Path(folder) / "tokenizer.json"
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file; a model folder needs its tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises the bare class
            raise UserError(f"{self.path}: not a tokenizer file ({_one_line(error)})") from error
        padding = self._tokenizer.padding or {}
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

        if bos_id is None or eos_id is None:
            ends = self._tokenizer.encode("").ids
            if len(ends) != 2:
                raise UserError(f"{self.path}: puts {len(ends)} tokens around a text, expected a start and an end")
            bos_id = ends[0] if bos_id is None else bos_id
            eos_id = ends[1] if eos_id is None else eos_id
        if pad_id is None:
            pad_id = padding.get("pad_id", self._tokenizer.token_to_id("<pad>"))
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.vocab_size = vocab_size
        if vocab_size is not None and max(self.bos_id, self.eos_id, self.pad_id) >= vocab_size:
            raise UserError(
                f"{self.path}: special ids {self.bos_id}, {self.eos_id}, {self.pad_id} do not fit the model, "
                f"which has {vocab_size} tokens"
            )

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids, attention_mask (1 up to the end token, then 0), both int32 (B, L) with L = length.

        A longer text loses its tail; the end token stays last. Raises UserError for a token that the model's
        table lacks.
        """
        if length < 2:
            raise ValueError(f"length (={length}) must leave room for the start and the end token")
        input_ids = np.full((len(texts), length), self.pad_id, np.int32)
        attention_mask = np.zeros((len(texts), length), np.int32)
        for row, ids in enumerate(self._inner_ids(texts, length)):
            input_ids[row, : len(ids) + 2] = [self.bos_id, *ids, self.eos_id]
            attention_mask[row, : len(ids) + 2] = 1
        if self.vocab_size is not None and input_ids.size and input_ids.max() >= self.vocab_size:
            token = self._tokenizer.id_to_token(int(input_ids.max()))
            raise UserError(
                f"{self.path}: token {token!r} has id {input_ids.max()}, the model has only {self.vocab_size} tokens"
            )
        return input_ids, attention_mask

    def readback(self, text: str, length: int) -> str:
        """The text that the ids of `encode([text], length)` stand for, special tokens skipped.

        CLIP's comes back in lower case, for instance, and cut where `encode` cuts it.
        """
        (ids,) = self._inner_ids([text], length)
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        suffix = getattr(self._tokenizer.model, "end_of_word_suffix", None)
        # CLIP marks where a word ends ("cat</w>"); transformers turns the marks into spaces the same way.
        return text.replace(suffix, " ").strip() if suffix else text

    def _inner_ids(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Ids of each text without start and end token, at most length - 2 of them."""
        encodings = self._tokenizer.encode_batch([well_formed(text) for text in texts], add_special_tokens=False)
        return [encoding.ids[: length - 2] for encoding in encodings]


def well_formed(text: str) -> str:
    """`text` with every lone surrogate replaced by U+FFFD and pairs of them joined; others are unchanged.

    Such strings come from broken archives and argument lists, and have no UTF-8 form to tokenize.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
