"""DALL-E mini's text normaliser: what its captions went through in training, and a prompt before its tokenizer.

After `TextNormalizer` of dalle-mini (https://github.com/borisdayma/dalle-mini), with one difference: it replaces
"<person>" by a random choice of three words, so that a prompt has no fixed tokens; here it is always the
likeliest, "a person".
"""

import html
import math
import re
from collections.abc import Iterable
from pathlib import Path

from dm_generations.text.files import decode, optional_module, read_bytes

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


class TextNormalizer:
    """A text in plain ASCII, lower case, punctuation reduced to commas; it always begins with one space.

    words: the vocabulary for splitting hashtags ("#streetart"), the most frequent word first; None leaves
    hashtags in one piece. The names that emoji get and the repairs of broken encodings are those of the
    installed `emoji` and `ftfy`. Raises UserError if a library is missing.
    """

    def __init__(self, words: Iterable[str] | None = None):
        self._fix_text = optional_module("ftfy").fix_text
        self._demojize = optional_module("emoji").demojize
        self._to_ascii = optional_module("unidecode").unidecode
        self._splitter = None if words is None else WordSplitter(words)

    @classmethod
    def of_folder(cls, folder: Path) -> "TextNormalizer":
        """With the words that lie beside a checkpoint, a word and its count a line, if they do."""
        path = folder / WORDS_FILE
        if not path.is_file():
            return cls()
        lines = decode(read_bytes(path), path).splitlines()
        return cls(line.split()[0] for line in lines if line.strip())

    def __call__(self, text: str) -> str:
        text = html.unescape(html.unescape(self._fix_text(text)))
        text = self._to_ascii(self._demojize(text)).lower()
        for pattern, replacement in BEFORE_HASHTAGS:
            text = re.sub(pattern, replacement, text)
        text = HASHTAG.sub(self._expanded, text)
        for pattern, replacement in AFTER_HASHTAGS:
            text = re.sub(pattern, replacement, text)
        text = text.strip().removesuffix(",").removeprefix(",").strip()
        return f" {text}"

    def _expanded(self, hashtag: re.Match) -> str:
        word = hashtag.group(1)
        return word if self._splitter is None else self._splitter(word)


class WordSplitter:
    """Puts spaces into text without any, where they cost least; a word costs the log of its rank.

    For text in lower-case ASCII, where "_" is a space already. The idea is that of wordninja
    (https://github.com/keredson/wordninja).
    """

    def __init__(self, words: Iterable[str]):
        self._cost = {word: math.log(rank) for rank, word in enumerate(words, start=1)}
        self._lengths = sorted({len(word) for word in self._cost})

    def __call__(self, text: str) -> str:
        return " ".join(word for run in text.split("_") for word in self._split(run))

    def _split(self, text: str) -> list[str]:
        """Words of a run of letters and digits. What no words add up to falls apart into single letters."""
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
