"""BART's tokenizer from either kind of file, and min-dalle's rules against what min-dalle recorded."""

import json
import shutil

import numpy as np
import pytest
from helpers import golden
from text_kit import BART

from dm_generations.models.registry import load_tokenizer
from dm_generations.models.tokenization import read_tokenizer_json

CASES = sorted(golden("dalle_bart").rglob("text_golden.json"))


def test_vocab_and_merges_give_what_tokenizer_json_gives():
    texts = ["a painting", "It\N{RIGHT SINGLE QUOTATION MARK}s a café — “déjà vu”", "日本語 🚀", "</s> <mask>x", ""]
    from_json, from_vocab = (
        load_tokenizer(BART / name, "dalle_bart", 420) for name in ("tokenizer.json", "vocab.json")
    )
    np.testing.assert_array_equal(from_json.encode(texts, 32), from_vocab.encode(texts, 32))
    assert from_vocab.round_trip("a café", 32) == "a café"


def test_special_tokens_in_a_text_are_recognized_though_the_file_does_not_list_them():
    assert not read_tokenizer_json(BART / "tokenizer.json").get_added_tokens_decoder()
    ids, _ = load_tokenizer(BART, "dalle_bart", 420).encode(["a</s>a <mask><unk>"], 8)
    assert ids.tolist() == [[0, 69, 2, 69, 4, 3, 2, 1]]  # <mask> takes the space before it


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.parent.name)
def test_ids_are_those_of_min_dalle(path):
    tokenizer = load_tokenizer(path.parent, "min_dalle", 100_000)
    for row in json.loads(path.read_text("utf-8"))["rows"]:
        expected = row["min_dalle_ids"]
        ids, mask = tokenizer.encode([row["text"]], len(expected) + 3)
        assert ids.tolist() == [[*expected, 1, 1, 1]]
        assert mask.tolist() == [[1] * len(expected) + [0] * 3]
        short = tokenizer.encode([row["text"]], 4)[0][0]  # a long prompt loses its end token
        np.testing.assert_array_equal(short, [*expected, 1, 1][:4])


def test_the_unconditional_prompt_is_start_and_end():
    ids, mask = load_tokenizer(BART, "min_dalle", 420).encode([None, ""], 4)
    assert ids.tolist() == [[0, 2, 1, 1]] * 2 and mask.tolist() == [[1, 1, 0, 0]] * 2


def test_every_word_begins_with_a_space_and_only_spaces_separate_words():
    tokenizer = load_tokenizer(BART, "min_dalle", 420)
    a, letter_a, unknown = 261, 69, 3
    ids = tokenizer.encode(["A  a\na é"], 7)[0].tolist()
    assert ids == [[0, a, a, unknown, letter_a, 2, 1]]  # "é" is not ASCII


def test_files_of_the_small_model_have_an_ending(tmp_path):
    shutil.copyfile(BART / "vocab.json", tmp_path / "vocab_mini.json")
    shutil.copyfile(BART / "merges.txt", tmp_path / "merges_mini.txt")
    for name in ("vocab_mini.json", "merges_mini.txt"):
        tokenizer = load_tokenizer(tmp_path / name, "min_dalle", 420)
        assert tokenizer.encode(["a"], 4)[0].tolist() == [[0, 261, 2, 1]]
