"""Janus's prompts: a conversation of which the answer is an image, as ids with padding first."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.tokenization import (
    encode_texts,
    pad_ids,
    read_tokenizer_json,
    replace_surrogates,
    wrap_library_errors,
)
from dm_generations.sampling.params import Unconditional

PAD, IMAGE = "<｜▁pad▁｜>", "<begin_of_image>"  # noqa: RUF001
USER, ASSISTANT = "<|User|>", "<|Assistant|>"  # tokens of Janus-Pro; the first Janus has the words alone


class JanusTokenizer:
    """Puts a prompt into the conversation, and that into ids.

    The unconditional prompt has padding, which is read, in place of all ids but the first and the last.
    """

    unconditional_by_prompt = True

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Load the tokenizer.

        Args:
            path: A tokenizer.json, or its folder.
            vocab_size: Rows of the model's text embedding.

        Raises:
            UserError: The file is missing or broken, or lacks a token.
        """
        self.path = path / "tokenizer.json" if path.is_dir() else path
        self._pipeline = read_tokenizer_json(self.path)
        self._pipeline.no_padding()
        self._pipeline.no_truncation()
        self.vocab_size = vocab_size
        with wrap_library_errors(self.path, "cannot tokenize"):
            start = self._pipeline.encode("").ids
        pad = self._pipeline.token_to_id(PAD)
        if len(start) != 1 or pad is None or self._pipeline.token_to_id(IMAGE) is None:
            raise UserError(f"{self.path}: has no start token, {PAD} or {IMAGE}, not the tokenizer of Janus")
        self._start, self._pad_id = start, pad
        is_pro = self._pipeline.token_to_id(USER) is not None
        user, assistant = (USER, ASSISTANT) if is_pro else (USER.strip("<|>"), ASSISTANT.strip("<|>"))
        self._before, self._after = f"{user}: ", f"\n\n{assistant}:{IMAGE}"

    def encode(self, texts: Sequence[str | Unconditional | None], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode prompts. One that is too long loses its end, but not what is put after it.

        Args:
            texts: B prompts; `Unconditional` of one, or None for that of the empty prompt.
            length: T.

        Returns:
            input_ids, and attention_mask (0, then 1 for the prompt), both int32 (B, T).

        Raises:
            UserError: A text has a token that the model lacks.
        """
        prompts = [text.prompt if isinstance(text, Unconditional) else text or "" for text in texts]
        whole = [self._before + replace_surrogates(prompt).strip() + self._after for prompt in prompts]
        *ids, after = encode_texts(self._pipeline, [*whole, self._after], self.path)
        rows = []
        for text, inner in zip(texts, ids, strict=True):
            row = [*self._start, *inner]
            if len(row) > length:
                row = row[: length - len(after)] + after
            if text is None or isinstance(text, Unconditional):
                row[1:-1] = [self._pad_id] * (len(row) - 2)
            rows.append(row)
        input_ids, attention_mask = pad_ids(rows, length, self._pad_id, self.vocab_size, self.path)
        shifts = length - attention_mask.sum(axis=1)
        rolled = [
            np.stack([np.roll(row, shift) for row, shift in zip(array, shifts, strict=True)]) if len(array) else array
            for array in (input_ids, attention_mask)
        ]
        return rolled[0], rolled[1]
