"""DALL-E mini's tokenizers: BART's, its text normalizer, and min-dalle's own rules.

The normalizer is what captions went through in training, and a prompt before its tokenizer. After `TextNormalizer` of
dalle-mini (https://github.com/borisdayma/dalle-mini), with one difference: it replaces "<person>" by a random choice
of three words, so that a prompt has no fixed tokens; here it is always the likeliest, "a person".

min-dalle's rules are after `Tokenizer` and `MinDalle` of min-dalle (https://github.com/kuprel/min-dalle). They
differ from BART's: no normalizer; every word begins with a space, the first too; what is not ASCII is dropped; and a
text that is too long loses its end token.
"""

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, pre_tokenizers, processors

from dm_generations.models.tokenization import (
    PromptTokenizer,
    build_bpe,
    decode_utf8,
    encode_texts,
    find_token_id,
    import_optional,
    pad_ids,
    read_bytes,
    read_pipeline,
    read_vocab_and_merges,
    replace_surrogates,
)

START, END, UNKNOWN, MASK = "<s>", "</s>", "<unk>", "<mask>"
BART_SPECIALS = (START, "<pad>", END, UNKNOWN, MASK)
MIN_DALLE_PAD_ID = 1  # a constant there, and masked wherever it occurs
WORDS_FILE = "enwiki-words-frequency.txt"

# Stand-ins for the marks that survive inside numbers, dates and contractions when other punctuation goes. The
# letters are those of dalle-mini: a prompt that spells one of them gets the mark, as there.
DOT, QUOTE, SLASH = "xtokxdotxtokx", "xtokxquotextokx", "xtokxslashxtokx"

BEFORE_HASHTAGS = [
    (r"<person>(?:[,\s]*(?:(?:and)+[,\s]*)?<person>)+", " people "),
    (r"<person>", " a person "),
    (r"\A\s*\[\d+\]", ""),  # Wikipedia's reference marks at either end
    (r"\[\d+\]\s*\Z", ""),
    (r"<[^<]+?>", " "),  # markup
    (r"http\S+", ""),
    (r"(\d),(\d{3})", r"\1\2"),  # 1,000; a second time for 1,000,000, whose matches would overlap
    (r"(\d),(\d{3})", r"\1\2"),
    (r"(\w)\.(\w)", rf"\1{DOT}\2"),
    (r"'(?=(?:[stdm]|ll|re|ve)\b)", QUOTE),
    (r"(\d)/(\d)", rf"\1{SLASH}\2"),
    (r"(\w)-(\w)", r"\1 \2"),
    (r"[%&/$*]", r" \g<0> "),
]
HASHTAG = re.compile(r"#(\w+)")
AFTER_HASHTAGS = [
    (r"[_#\\]", " "),
    (r"['\"`]", ' " '),
    (r"[()[\].,|:;?!=+~\-/{}]", ","),
    (DOT, "."),
    (QUOTE, "'"),
    (SLASH, "/"),
    (r"(\D)\1{3,}", r"\1"),  # four and more; three occur in "VIII"
    (r'(?<!\s)\s*"[\s"]*', ' " '),  # without the look behind, long runs of spaces take quadratic time
    (r"(?<!\s)\s*,[\s,]*", ", "),
    (r"\s+", " "),
]


def load_bart_tokenizer(
    path: Path, vocab_size: int | None, normalize: Callable[[str], str] | None = None
) -> PromptTokenizer:
    """Load DALL-E mini's tokenizer, which is BART's.

    Its special tokens are recognized in a text, whether the file lists them as added tokens or not.

    Args:
        path: A folder with tokenizer.json or vocab.json and merges.txt, or one of these files.
        vocab_size: Rows of the model's text embedding. None leaves ids unchecked.
        normalize: Applied to every text first, but not to the unconditional prompt.

    Raises:
        UserError: A file is missing or broken.
    """
    path, pipeline = read_pipeline(path, _build_bart_pipeline)
    listed = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    missing = [token for token in BART_SPECIALS if token not in listed and pipeline.token_to_id(token) is not None]
    pipeline.add_special_tokens(
        [tokenizers.AddedToken(token, lstrip=token == MASK, normalized=False) for token in missing]
    )
    return PromptTokenizer(path, pipeline=pipeline, normalize=normalize, vocab_size=vocab_size)


def load_normalizing_tokenizer(path: Path, vocab_size: int) -> PromptTokenizer:
    """Load DALL-E mini's tokenizer with its text normalizer before it; see `load_bart_tokenizer`."""
    folder = path if path.is_dir() else path.parent
    return load_bart_tokenizer(path, vocab_size, TextNormalizer.from_folder(folder))


class MinDalleTokenizer:
    """DALL-E mini's vocabulary, used as min-dalle uses it."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Load the tokenizer.

        Args:
            path: The folder of vocab.json and merges.txt, or one of the two.
            vocab_size: Rows of the model's text embedding.

        Raises:
            UserError: A file is missing or broken.
        """
        self.path, vocab, merges = read_vocab_and_merges(path)
        self._start_id, self._end_id, _ = (find_token_id(vocab, token, self.path) for token in (START, END, UNKNOWN))
        self._pipeline = tokenizers.Tokenizer(build_bpe(self.path, vocab, merges, unk_token=UNKNOWN))
        self._pipeline.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(" ", "removed"),
                pre_tokenizers.Metaspace(replacement="Ġ", prepend_scheme="always", split=False),
            ]
        )
        self._demojize: Callable[..., str] = import_optional("emoji").demojize
        self.vocab_size = vocab_size

    def encode(self, texts: Sequence[str | None], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode prompts.

        Args:
            texts: B prompts. None is the unconditional prompt: start and end token.
            length: L, the number of tokens per prompt.

        Returns:
            input_ids and attention_mask (1 where the id is not the padding's), both int32 (B, L).

        Raises:
            UserError: A text has a token that the model lacks.
        """
        inner = encode_texts(self._pipeline, [self._normalize(text or "") for text in texts], self.path)
        ids = [[self._start_id, *row, self._end_id] for row in inner]
        input_ids, _ = pad_ids(ids, length, MIN_DALLE_PAD_ID, self.vocab_size, self.path)
        return input_ids, (input_ids != MIN_DALLE_PAD_ID).astype(np.int32)

    def _normalize(self, text: str) -> str:
        text = self._demojize(replace_surrogates(text), delimiters=("", ""))
        return text.lower().encode("ascii", "ignore").decode()


class TextNormalizer:
    """Puts a text in plain ASCII and lower case, with commas for punctuation; the result begins with one space.

    The names that emoji get and the repairs of broken encodings are those of the installed `emoji` and `ftfy`.
    """

    def __init__(self, words: Iterable[str] | None = None) -> None:
        """Load the libraries.

        Args:
            words: The vocabulary for splitting hashtags ("#streetart"), the most frequent word first. None leaves
                hashtags whole.

        Raises:
            UserError: A library is missing.
        """
        self._fix_text: Callable[[str], str] = import_optional("ftfy").fix_text
        self._demojize: Callable[[str], str] = import_optional("emoji").demojize
        self._to_ascii: Callable[[str], str] = import_optional("unidecode").unidecode
        self._splitter = None if words is None else WordSplitter(words)

    @classmethod
    def from_folder(cls, folder: Path) -> "TextNormalizer":
        """Load the normalizer of a checkpoint, with the words in its folder (a word and its count a line) if any."""
        path = folder / WORDS_FILE
        if not path.is_file():
            return cls()
        lines = decode_utf8(read_bytes(path), path).splitlines()
        return cls(line.split()[0] for line in lines if line.strip())

    def __call__(self, text: str) -> str:
        """Normalize a text."""
        text = html.unescape(html.unescape(self._fix_text(text)))
        text = self._to_ascii(self._demojize(text)).lower()
        for pattern, replacement in BEFORE_HASHTAGS:
            text = re.sub(pattern, replacement, text)
        text = HASHTAG.sub(self._split_hashtag, text)
        for pattern, replacement in AFTER_HASHTAGS:
            text = re.sub(pattern, replacement, text)
        text = text.strip().removesuffix(",").removeprefix(",").strip()
        return f" {text}"

    def _split_hashtag(self, hashtag: re.Match[str]) -> str:
        word = hashtag.group(1)
        return word if self._splitter is None else self._splitter(word)


class WordSplitter:
    """Puts spaces into a text without any, where they cost least; a word costs the log of its rank.

    For lower-case ASCII, where "_" is a space already. The idea is that of wordninja
    (https://github.com/keredson/wordninja).
    """

    def __init__(self, words: Iterable[str]) -> None:
        """Take the words, the most frequent first."""
        self._cost = {word: math.log(rank) for rank, word in enumerate(words, start=1)}
        self._lengths = sorted({len(word) for word in self._cost})

    def __call__(self, text: str) -> str:
        """Split a text into words, with a space between them."""
        return " ".join(word for run in text.split("_") for word in self._split(run))

    def _split(self, text: str) -> list[str]:
        """Split a run of letters and digits into words. What no words add up to becomes single letters."""
        costs, lengths = [0.0], [0]  # of the cheapest split of the first n letters, and of its last word
        for end in range(1, len(text) + 1):
            ways = [
                (costs[end - length] + self._cost.get(text[end - length : end], math.inf), length)
                for length in self._lengths
                if length <= end
            ]
            cost, length = min([*ways, (math.inf, 1)])
            costs.append(cost)
            lengths.append(length)

        words: list[str] = []  # from the last to the first
        end = len(text)
        while end > 0:
            word = text[end - lengths[end] : end]
            if words and word[-1].isdigit() and words[-1][0].isdigit():
                words[-1] = word + words[-1]  # numbers stay whole
            else:
                words.append(word)
            end -= lengths[end]
        return words[::-1]


def _build_bart_pipeline(path: Path) -> tokenizers.Tokenizer:
    """Build what transformers makes of vocab.json and merges.txt (`convert_slow_tokenizer`)."""
    path, vocab, merges = read_vocab_and_merges(path)
    start_id, end_id = (find_token_id(vocab, token, path) for token in (START, END))
    pipeline = tokenizers.Tokenizer(build_bpe(path, vocab, merges))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    pipeline.post_processor = processors.RobertaProcessing((END, end_id), (START, start_id), add_prefix_space=False)
    return pipeline
