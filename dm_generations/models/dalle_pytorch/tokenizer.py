r"""DALLE-pytorch's tokenizers: which one a model was trained with is not in its file, only what it reads.

    simple          OpenAI's byte pairs: bpe_simple_vocab_16e6.txt, or the .txt.gz of CLIP (the default there)
    Hugging Face    a tokenizer.json, whatever its name
    YouTokenToMe    a .model of numbers
    Chinese         the vocab.txt of bert-base-chinese

Rules after `tokenizer.py` of DALLE-pytorch (https://github.com/lucidrains/DALLE-pytorch). All pad with 0, which
the model reads as padding wherever it occurs, and put no tokens around a text. A text that is too long is cut
(`truncate_text=True` there).
"""

import functools
import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from dm_generations.errors import UserError
from dm_generations.models.tokenization import (
    MAX_BYTES,
    MAX_ID,
    build_bpe,
    decode_utf8,
    encode_texts,
    find_token_id,
    import_optional,
    pad_ids,
    parse_json,
    parse_merges,
    read_bytes,
    read_maybe_gzipped,
    read_tokenizer_json,
    replace_surrogates,
)
from dm_generations.weights.mmap import is_apple_double

PAD_ID = 0
ENDINGS = (".json", ".model", ".bpe", ".yttm", ".txt", ".txt.gz")  # of files that may be tokenizers
MERGES_NAME = "merges.txt"  # headed like OpenAI's file, but of no use without its vocab.json

SIMPLE_MERGES = 49_152 - 256 - 2  # OpenAI's file lists far more than its vocabulary takes
SIMPLE_ENDS = ("<|startoftext|>", "<|endoftext|>")
# U+0345 is a mark whose upper case is a letter: `regex`, when it ignores case, takes it for neither and drops it.
SIMPLE_WORDS = r"(?i:<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{0345}]+"

YTTM_SPACE = "▁"
YTTM_SPACES = f"[ \\t\\n\\v\\f\\r{YTTM_SPACE}]+"
YTTM_UNKNOWN = ""  # no character and no merge spells it
YTTM_NUMBER = re.compile(rb"-?[0-9]{1,10}")

Encode = Callable[[Sequence[str]], list[list[int]]]


class DallePytorchTokenizer:
    """A tokenizer of any kind that DALLE-pytorch knows, found by what is in its file."""

    def __init__(self, path: Path, vocab_size: int, *, lower: bool = False) -> None:
        """Load the tokenizer.

        Args:
            path: Its file, or the folder with its file.
            vocab_size: The model's `num_text_tokens`.
            lower: Put texts in lower case first, as the DALL-3 fork does.

        Raises:
            UserError: The file is missing, broken or of no known kind.
        """
        self.path = _find_file(path) if path.is_dir() else path
        read = _find_reader(self.path)
        if read is None:
            raise UserError(
                f"{self.path}: not a tokenizer that DALLE-pytorch knows (OpenAI's BPE text, a Hugging Face JSON, "
                "a YouTokenToMe model or a BERT vocab.txt)"
            )
        self._encode = read(self.path)
        self._lower = lower
        self.vocab_size = vocab_size

    def encode(self, texts: Sequence[str | None], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode prompts.

        Args:
            texts: B prompts. None, like the empty text, is padding alone.
            length: L, the number of tokens per prompt.

        Returns:
            input_ids and attention_mask (1 where the id is not 0), both int32 (B, L).

        Raises:
            UserError: A text has a token that the model lacks.
        """
        clean = [replace_surrogates(text or "") for text in texts]
        ids = self._encode([text.lower() for text in clean] if self._lower else clean)
        input_ids, _ = pad_ids(ids, length, PAD_ID, self.vocab_size, self.path)
        return input_ids, (input_ids != PAD_ID).astype(np.int32)


def _read_simple(path: Path) -> Encode:
    """Read CLIP's first tokenizer: repaired text in lower case, split into words, bytes merged within each."""
    fix_text: Callable[[str], str] = import_optional("ftfy").fix_text
    lines = decode_utf8(read_maybe_gzipped(path), path).rstrip("\n").split("\n")[: 1 + SIMPLE_MERGES]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [token + "</w>" for token in tokens]
    tokens += [line.replace(" ", "") for line in lines[1:]] + list(SIMPLE_ENDS)
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = parse_merges("\n".join(lines), path, vocab)
    pipeline = tokenizers.Tokenizer(build_bpe(path, vocab, merges, end_of_word_suffix="</w>"))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.add_special_tokens(list(SIMPLE_ENDS))
    # Not a part of the pipeline: there, special tokens would be found before a text is split into words.
    splitter = pre_tokenizers.Split(Regex(SIMPLE_WORDS), "removed", invert=True)

    def split(text: str) -> list[str]:
        text = html.unescape(html.unescape(fix_text(text))).lower()
        return [word for word, _ in splitter.pre_tokenize_str(text)]

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return encode_texts(pipeline, [split(text) for text in texts], path, is_split=True)

    return encode


def _read_hugging_face(path: Path) -> Encode:
    """Read a tokenizer.json, without what it puts around a text, its padding and its truncation."""
    pipeline = read_tokenizer_json(path)
    pipeline.no_padding()
    pipeline.no_truncation()
    return functools.partial(_encode_with, pipeline, path)


def _read_chinese(path: Path) -> Encode:
    """Read BERT's word pieces, without lowering case, as for bert-base-chinese; a token's id is its line, from 0."""
    tokens = decode_utf8(read_bytes(path), path).removesuffix("\n").split("\n")
    vocab = {token: index for index, token in enumerate(tokens)}
    find_token_id(vocab, "[UNK]", path)
    pipeline = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    pipeline.normalizer = normalizers.BertNormalizer(lowercase=False)
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]
    pipeline.add_special_tokens([token for token in specials if token in vocab])
    return functools.partial(_encode_with, pipeline, path)


def _read_youtokentome(path: Path) -> Encode:
    """Read a model of YouTokenToMe: byte pairs of characters with "▁" before every word.

    File and rules after YouTokenToMe (https://github.com/VKCOM/YouTokenToMe). The file, all decimal numbers:

        <characters> <merges>
        <code point> <id>               a line a character
        <left id> <right id> <id>       a line a merge, the first to be applied first
        <unknown> <pad> <bos> <eos>     -1 for one that there is not
    """
    characters, merge_ids, unknown_id = _parse_youtokentome(path)
    token_from_id: dict[int, str] = {}
    vocab: dict[str, int] = {}
    size = 0
    merges = []

    def add(token: str, index: int) -> None:
        nonlocal size
        size += len(token)
        if not 0 <= index <= MAX_ID or index in token_from_id or token in vocab:
            raise UserError(f"{path}: gives {ascii(token)[:40]} the id {index}, out of range or given twice")
        if size > MAX_BYTES:  # a few lines can spell a token of any length
            raise UserError(f"{path}: its tokens have more than {MAX_BYTES >> 20} million characters")
        token_from_id[index] = token
        vocab[token] = index

    for point, index in characters:
        if not 0 <= point <= 0x10FFFF:
            raise UserError(f"{path}: lists the character {point}, not a Unicode code point")
        add(chr(point), index)
    if YTTM_SPACE not in vocab:
        raise UserError(f"{path}: has no {YTTM_SPACE!r}, which begins every word of a YouTokenToMe model")
    for number, (left, right, joined) in enumerate(merge_ids, start=1):
        if left not in token_from_id or right not in token_from_id:
            raise UserError(f"{path}: merge {number} joins {left} and {right} to {joined}, ids it does not know")
        merges.append((token_from_id[left], token_from_id[right]))
        add("".join(merges[-1]), joined)
    if unknown_id == -1:
        raise UserError(f"{path}: has no id for unknown characters")
    add(YTTM_UNKNOWN, unknown_id)

    # A run of unknown characters is one token (fuse_unk).
    pipeline = tokenizers.Tokenizer(build_bpe(path, vocab, merges, unk_token=YTTM_UNKNOWN, fuse_unk=True))
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(YTTM_SPACES), "removed"),
            pre_tokenizers.Metaspace(replacement=YTTM_SPACE, prepend_scheme="always", split=False),
        ]
    )
    return functools.partial(_encode_with, pipeline, path)


def _parse_youtokentome(path: Path) -> tuple[list[list[int]], list[list[int]], int]:
    """Parse a model of YouTokenToMe: its characters, its merges, and the id for unknown characters."""
    head, _, body = read_bytes(path).partition(b"\n")
    counts = head.split()
    if len(counts) != 2 or not all(count.isdigit() and len(count) <= 8 for count in counts):
        raise UserError(f"{path}: not a YouTokenToMe model, its first line must be two counts")
    character_count, merge_count = map(int, counts)
    expected = 2 * character_count + 3 * merge_count + 4
    if len(body) < 2 * expected - 1:  # before the body is split
        raise UserError(f"{path}: cut off, it promises {character_count:,} characters and {merge_count:,} merges")
    words = body.split(None, expected)
    if len(words) != expected or not all(YTTM_NUMBER.fullmatch(word) for word in words):
        raise UserError(
            f"{path}: damaged, its first line promises {character_count:,} characters and {merge_count:,} merges"
        )
    numbers = np.array(words, np.int64)
    characters, merges, specials = np.split(numbers, [2 * character_count, 2 * character_count + 3 * merge_count])
    return characters.reshape(-1, 2).tolist(), merges.reshape(-1, 3).tolist(), int(specials[0])


def _encode_with(pipeline: tokenizers.Tokenizer, path: Path, texts: Sequence[str]) -> list[list[int]]:
    return encode_texts(pipeline, texts, path)


def _find_file(folder: Path) -> Path:
    """Find the one file of a folder that is a tokenizer.

    Raises:
        UserError: There is none, or there are several.
    """
    try:
        files = sorted(
            path
            for path in folder.iterdir()
            if path.name.endswith(ENDINGS) and path.is_file() and not is_apple_double(path)
        )
        files = [path for path in files if path.stat().st_size <= MAX_BYTES and path.name != MERGES_NAME]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    found = {path: read for path in files if (read := _find_reader(path)) is not None}
    chinese = [path for path, read in found.items() if read is _read_chinese]
    paths = chinese or list(found)  # a BERT folder has its tokenizer.json too, which puts tokens around a text
    if len(paths) != 1:
        names = ", ".join(path.name for path in paths) or "none"
        raise UserError(f"{folder}: needs one tokenizer for the prompts, found {names}; give the file itself")
    return paths[0]


def _find_reader(path: Path) -> Callable[[Path], Encode] | None:
    """Find the function that reads this file, None if it is of no known kind."""
    data = read_maybe_gzipped(path)
    head = data[:4096]
    first_line, _, rest = head.partition(b"\n")
    if b"#version" in first_line:
        return _read_simple
    if data.lstrip()[:1] == b"{":
        document = parse_json(data, path)
        has_model = isinstance(document, dict) and isinstance(document.get("model"), dict)
        return _read_hugging_face if has_model and "vocab" in document["model"] else None
    if re.fullmatch(rb"\d+ \d+\s*", first_line) and re.match(rb"\d+ \d+\s", rest):
        return _read_youtokentome
    if b"\n[UNK]" in b"\n" + head.replace(b"\r", b""):
        return _read_chinese
    return None
