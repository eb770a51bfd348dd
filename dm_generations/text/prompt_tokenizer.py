"""Prompts to token ids with a pipeline of the `tokenizers` library, for BART's and CLIP's kind of model.

The library runs the pipeline (normalizer, pre-tokenizer, model) as it is and gives the ids of transformers. The
start and end token, the cut and the padding are done here.

B: prompts   L: tokens per prompt
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from dm_generations.errors import UserError
from dm_generations.text.tokenizer_files import MAX_ID, read_tokenizer_json, wrap_library_errors


class PromptTokenizer:
    """Gives `<bos> text <eos> <pad> ...` of a fixed length, for BART's and CLIP's tokenizers.

    bos and eos are what the file puts around an empty text. pad is its padding's id, else that of `<pad>`, else eos
    (as CLIP pads). The ids in a DALL-E mini config.json are NOT these: they belong to the image tokens. A text that
    spells a special token ("</s>") gives that token if the file lists it as an added token, as in transformers.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        pipeline: tokenizers.Tokenizer | None = None,
        normalize: Callable[[str], str] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Set up a tokenizer.

        Args:
            folder: Has the tokenizer.json. With `pipeline`, the file or folder that it was made from.
            pipeline: A ready tokenizer of the library. Its padding and truncation are switched off.
            normalize: Applied to every text first, but not to the unconditional prompt (None).
            vocab_size: Rows of the model's text embedding. None leaves ids unchecked.

        Raises:
            UserError: The file is missing or broken, or has no start and end token.
        """
        self.path = Path(folder)
        if pipeline is None:
            self.path = self.path / "tokenizer.json"
            pipeline = read_tokenizer_json(self.path)
        self._pipeline = pipeline
        self._normalize = normalize
        padding = pipeline.padding or {}
        pipeline.no_padding()
        pipeline.no_truncation()

        with wrap_library_errors(self.path, "cannot tokenize"):
            ends = pipeline.encode("").ids
        if len(ends) != 2:
            raise UserError(f"{self.path}: puts {len(ends)} tokens around a text, expected a start and an end")
        self.bos_id: int = ends[0]
        self.eos_id: int = ends[1]
        pad_id: int | None = padding.get("pad_id", pipeline.token_to_id("<pad>"))
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.vocab_size = vocab_size
        if vocab_size is not None and max(self.bos_id, self.eos_id, self.pad_id) >= vocab_size:
            raise UserError(
                f"{self.path}: special ids {self.bos_id}, {self.eos_id}, {self.pad_id} do not fit the model, "
                f"which has {vocab_size} tokens"
            )

    def encode(self, texts: Sequence[str | None], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode prompts. A longer text loses its tail; the end token stays last.

        Args:
            texts: B prompts. None is the model's own unconditional prompt: the empty text, not normalized.
            length: L, at least 2.

        Returns:
            input_ids and attention_mask (1 up to the end token, then 0), both int32 (B, L).

        Raises:
            UserError: A text has a token that the model lacks.
            ValueError: The length leaves no room for the start and the end token.
        """
        if length < 2:
            raise ValueError(f"length (={length}) must leave room for the start and the end token")
        ids = [[self.bos_id, *inner, self.eos_id] for inner in self._encode_inner(texts, length)]
        return pad_ids(ids, length, self.pad_id, self.vocab_size, self.path)

    def round_trip(self, text: str, length: int) -> str:
        """Encode a text and decode its ids, without special tokens.

        CLIP's text comes back in lower case, for instance, and cut where `encode` cuts it.
        """
        (ids,) = self._encode_inner([text], length)
        with wrap_library_errors(self.path, "cannot turn tokens into text"):
            decoded: str = self._pipeline.decode(ids, skip_special_tokens=True)
        suffix: str | None = getattr(self._pipeline.model, "end_of_word_suffix", None)
        # CLIP marks where a word ends ("cat</w>"); transformers turns the marks into spaces the same way.
        return decoded.replace(suffix, " ").strip() if suffix else decoded

    def _encode_inner(self, texts: Sequence[str | None], length: int) -> list[list[int]]:
        """Encode each text without start and end token, as at most length - 2 ids."""
        normalize = self._normalize or (lambda text: text)
        normalized = ["" if text is None else normalize(replace_surrogates(text)) for text in texts]
        return [ids[: length - 2] for ids in encode_texts(self._pipeline, normalized, self.path)]


def encode_texts(
    pipeline: tokenizers.Tokenizer, texts: Sequence[str] | Sequence[list[str]], path: Path, *, is_split: bool = False
) -> list[list[int]]:
    """Encode texts without putting special tokens around them.

    Args:
        pipeline: A tokenizer of the library.
        texts: Texts without lone surrogates. With `is_split`, the words of each.
        path: The tokenizer's file, for the error.
        is_split: The texts are split into words already.

    Raises:
        UserError: The tokenizer's file cannot serve.
    """
    with wrap_library_errors(path, "cannot tokenize"):
        encodings = pipeline.encode_batch(list(texts), is_pretokenized=is_split, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def pad_ids(
    ids: Sequence[Sequence[int]], length: int, pad_id: int, vocab_size: int | None, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Cut and pad token ids to one length.

    Args:
        ids: The ids of B prompts.
        length: L, the number of tokens per prompt.
        pad_id: The id that fills up shorter prompts.
        vocab_size: Rows of the model's text embedding. None leaves ids unchecked.
        path: The tokenizer's file, for the error.

    Returns:
        input_ids and attention_mask (1 where there are ids, then 0), both int32 (B, L).

    Raises:
        UserError: An id is not below vocab_size.
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


def replace_surrogates(text: str) -> str:
    """Replace every lone surrogate with U+FFFD and join pairs of them; other characters stay.

    Such strings come from broken archives and argument lists, and have no UTF-8 form to tokenize.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
