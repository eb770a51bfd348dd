"""What LlamaGen reads in place of prompts: the number of a class, or the ids of a caption that was cleaned.

The cleaning is that of DeepFloyd's IF and of PixArt, which the captions went through twice before training. It needs
ftfy and beautifulsoup4.
"""

import html
import re
import urllib.parse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dm_generations.archive.records import ClassLabel
from dm_generations.errors import UserError
from dm_generations.models.tokenization import (
    encode_texts,
    import_optional,
    pad_ids,
    read_tokenizer_json,
    replace_surrogates,
)
from dm_generations.sampling.params import Unconditional

PAD_ID, END = 0, "</s>"
MAX_CAPTION = 4096  # characters that are read: far more than 120 tokens, and some steps take quadratic time

_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_DASHES = "".join(
    (
        "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a",
        "\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d",
    )
)
_MARKS = "#®•©™&@·º½¾¿¡§~"

_BEFORE_MARKUP = [
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:{_DOMAINS})[\w/-]*\b/?(?!@))", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:{_DOMAINS})[\w/-]*\b/?(?!@))", ""),
]
_AFTER_MARKUP = [
    (r"@\w+\b", ""),
    *((f"[{first}-{last}]+", "") for first, last in ("\u31c0\u31ef", "\u31f0\u31ff", "\u3200\u32ff", "\u3300\u33ff")),
    *((f"[{first}-{last}]+", "") for first, last in ("\u3400\u4dbf", "\u4dc0\u4dff", "\u4e00\u9fff")),
    (f"[{_DASHES}]+", "-"),
    ("[`\u00b4«»“”¨]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (rf"[{_MARKS}\)\(\]\[\}}\{{\|\\/\*]+", " "),
    (r"\s+\.\s+", " "),
]
_AFTER_FTFY = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
]
_AT_ENDS = [
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:\-\+]$", ""),
    (r"^\.\S+$", ""),
]


def _substitute(text: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


class CaptionCleaner:
    """Cleans captions."""

    def __init__(self) -> None:
        """Import what cleaning needs.

        Raises:
            UserError: It is not installed.
        """
        self._fix_text: Callable[[str], str] = import_optional("ftfy").fix_text
        self._bs4 = import_optional("bs4")

    def __call__(self, text: str) -> str:
        """Clean a caption twice, as the model's captions were."""
        return self.once(self.once(text[:MAX_CAPTION]))

    def once(self, text: str) -> str:
        """Clean a caption once."""
        text = _substitute(urllib.parse.unquote_plus(text).strip().lower(), _BEFORE_MARKUP)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._bs4.MarkupResemblesLocatorWarning)
            text = self._bs4.BeautifulSoup(text, features="html.parser").text
        text = _substitute(text, _AFTER_MARKUP)
        if len(re.findall("[-_]", text)) > 3:
            text = re.sub("[-_]", " ", text)
        text = html.unescape(html.unescape(self._fix_text(text))).strip()
        return _substitute(_substitute(text, _AFTER_FTFY), _AT_ENDS).strip()


class CaptionTokenizer:
    """Cleans captions and turns them into T5's ids."""

    unconditional_by_prompt = True

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Load the tokenizer.

        Args:
            path: A tokenizer.json of T5, or its folder.
            vocab_size: Rows of T5's embedding.

        Raises:
            UserError: The file is missing or broken, or a library is not installed.
        """
        self.path = path / "tokenizer.json" if path.is_dir() else path
        self._pipeline = read_tokenizer_json(self.path)
        self._pipeline.no_padding()
        self._pipeline.no_truncation()
        self.vocab_size = vocab_size
        self._clean = CaptionCleaner()
        end = self._pipeline.token_to_id(END)
        if end is None:
            raise UserError(f"{self.path}: has no token {END!r}, not the tokenizer of T5")
        self._end_id = end

    def encode(
        self, texts: Sequence[str | ClassLabel | Unconditional | None], length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode captions. A longer one loses its tail; the end token stays last.

        Args:
            texts: B captions; `Unconditional` of one, or None for that of the empty caption, gives ids of -1.
            length: T.

        Returns:
            input_ids and attention_mask (1 up to the end token, then 0), both int32 (B, T).

        Raises:
            UserError: A text has a token that the model lacks.
        """
        is_uncond = np.array([text is None or isinstance(text, Unconditional) for text in texts], bool)
        captions = [text.prompt if isinstance(text, Unconditional) else str(text or "") for text in texts]
        cleaned = [self._clean(replace_surrogates(caption)) for caption in captions]
        ids = [[*inner[: length - 1], self._end_id] for inner in encode_texts(self._pipeline, cleaned, self.path)]
        input_ids, attention_mask = pad_ids(ids, length, PAD_ID, self.vocab_size, self.path)
        return np.where(is_uncond[:, None], np.int32(-1), input_ids), attention_mask


class ClassTokenizer:
    """Turns classes into the rows of a table, of which the last is the unconditional one."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Take the size of the table; there is no file to read.

        Args:
            path: Not read.
            vocab_size: Rows of the table, one more than there are classes.
        """
        self.vocab_size = vocab_size

    def encode(
        self, texts: Sequence[str | ClassLabel | Unconditional | None], length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode classes.

        Args:
            texts: B classes; None is the unconditional one.
            length: 1.

        Returns:
            input_ids and attention_mask, both int32 (B, 1).
        """
        labels = [text.label if isinstance(text, ClassLabel) else self.vocab_size - 1 for text in texts]
        ids = np.repeat(np.array(labels, np.int32).reshape(-1, 1), length, axis=1)
        return ids, np.ones_like(ids)
