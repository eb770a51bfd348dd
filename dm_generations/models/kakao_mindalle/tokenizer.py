"""minDALL-E's tokenizer: byte pairs of characters, where the end of a word is part of its last token.

Rules after `build_tokenizer` of minDALL-E (https://github.com/kakaobrain/minDALL-E), which is the library's
CharBPETokenizer in lower case. It puts no tokens around a text, and its padding is attended to.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from dm_generations.models.tokenization import (
    MAX_BYTES,
    build_bpe,
    decode_utf8,
    encode_texts,
    find_token_id,
    pad_ids,
    parse_merges,
    parse_vocab,
    read_bytes,
    replace_surrogates,
)
from dm_generations.weights.tar import extract

VOCAB_NAME, MERGES_NAME = "bpe-16k-vocab.json", "bpe-16k-merges.txt"
PAD, UNKNOWN = "[PAD]", "[UNK]"


class KakaoTokenizer:
    """minDALL-E's tokenizer."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Load the tokenizer.

        Args:
            path: The tokenizer's folder, the folder that holds it, one of its files, or a .tar.gz of it.
            vocab_size: Rows of the model's text embedding.

        Raises:
            UserError: A file is missing or broken.
        """
        self.path = _find_folder(path)
        vocab_path, merges_path = self.path / VOCAB_NAME, self.path / MERGES_NAME
        vocab = parse_vocab(read_bytes(vocab_path), vocab_path)
        merges = parse_merges(decode_utf8(read_bytes(merges_path), merges_path), merges_path, vocab)
        find_token_id(vocab, UNKNOWN, vocab_path)
        self._pipeline = tokenizers.Tokenizer(
            build_bpe(self.path, vocab, merges, unk_token=UNKNOWN, end_of_word_suffix="</w>")
        )
        self._pipeline.normalizer = normalizers.Sequence(
            [normalizers.BertNormalizer(lowercase=False), normalizers.Lowercase()]  # this order keeps the accents
        )
        self._pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._pipeline.add_special_tokens([UNKNOWN, PAD])  # a vocabulary without [PAD] gets one at its end
        self._pad_id = self._pipeline.get_vocab()[PAD]
        self.vocab_size = vocab_size

    def encode(self, texts: Sequence[str | None], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode prompts.

        Args:
            texts: B prompts. None, like the empty text, is padding alone.
            length: L, the number of tokens per prompt.

        Returns:
            input_ids and attention_mask (1 where there is text, then 0), both int32 (B, L).

        Raises:
            UserError: A text has a token that the model lacks.
        """
        ids = encode_texts(self._pipeline, [replace_surrogates(text or "") for text in texts], self.path)
        return pad_ids(ids, length, self._pad_id, self.vocab_size, self.path)


def _find_folder(path: Path) -> Path:
    """Return the folder of the two files, which may have to be extracted first."""
    if path.name in (VOCAB_NAME, MERGES_NAME):
        return path.parent
    places = (path, path / "tokenizer", path / "tokenizer.tar.gz", path / "tokenizer.tgz")
    found = next((place for place in places if place.is_file() or (place / VOCAB_NAME).is_file()), path)
    if not found.is_file():
        return found
    return extract(found, {name: name for name in (VOCAB_NAME, MERGES_NAME)}, MAX_BYTES)
