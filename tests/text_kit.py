"""A small tokenizer of every kind, each with ids that can be counted by hand."""

import json
from pathlib import Path

from tokenizers import pre_tokenizers

GOLDEN = Path(__file__).parent / "golden"
BART = next((GOLDEN / "dalle_bart").rglob("tokenizer.json")).parent
MINDALLE = next((GOLDEN / "mindalle_kakao").rglob("bpe-16k-vocab.json")).parent

# Ids: bytes "!" to "~" are 0 to 93, the same at a word's end 256 to 349, then the merges, then start and end.
SIMPLE = '"bpe_simple_vocab_16e6.txt#version: 0.2\nc a\nca t</w>\n'

# Characters ▁ 4, a 5, b 6, c 7; merges ▁a 8, ab 9, ▁ab 10; unknown 1.
YOUTOKENTOME = "4 3\n9601 4\n97 5\n98 6\n99 7\n4 5 8\n5 6 9\n8 6 10\n1 0 2 3\n"

CHINESE = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n中\ncat\n##s\nThe\n"

HUGGING_FACE = json.dumps(
    {
        "version": "1.0",
        "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 4,
            "pad_type_id": 0,
            "pad_token": "<s>",
        },
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 1, "a": 2, "cat": 3, "<s>": 4}, "unk_token": "[UNK]"},
    }
)


def clip_vocab() -> dict[str, int]:
    """Bytes 0 to 255, bytes at a word's end 256 to 511, "ca" 512, "cat</w>" 513, start 514, end 515."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = ["ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate([*characters, *(c + "</w>" for c in characters), *ends])}


def write_tokenizer(kind: str, folder: Path) -> Path:
    """`folder`, with the files of a kind of tokenizer."""
    files = {
        "simple": {"bpe_simple_vocab_16e6.txt": SIMPLE},
        "youtokentome": {"bpe.model": YOUTOKENTOME},
        "chinese": {"vocab.txt": CHINESE},
        "hugging_face": {"cub200.json": HUGGING_FACE},
        "clip": {"vocab.json": json.dumps(clip_vocab()), "merges.txt": "#version: 0.2\nc a\nca t</w>\n"},
    }[kind]
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
    return folder
