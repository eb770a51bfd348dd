"""DALL-E mini's normalizer against what dalle-mini recorded, and its rules one by one."""

import json

import numpy as np
import pytest
from helpers import golden

from dm_generations.models.dalle_mini.tokenizer import TextNormalizer, WordSplitter
from dm_generations.models.registry import load_tokenizer

CASES = sorted(golden("dalle_bart").rglob("text_golden.json"))


@pytest.fixture(params=CASES, ids=lambda path: path.parent.name)
def case(request):
    return request.param.parent, json.loads(request.param.read_text("utf-8"))


def test_normalized_texts_are_those_of_dalle_mini(case):
    folder, recorded = case
    normalize = TextNormalizer.from_folder(folder)
    assert [normalize(row["text"]) for row in recorded["rows"]] == [row["normalized"] for row in recorded["rows"]]


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_ids_are_those_of_dalle_mini(case, name):
    folder, recorded = case
    texts, length = [row["text"] for row in recorded["rows"]], recorded["max_text_length"]
    plain, _ = load_tokenizer(folder / name, "dalle_bart", 100_000).encode(texts, length)
    np.testing.assert_array_equal(plain, [row["input_ids_without_normalizer"] for row in recorded["rows"]])
    ids, mask = load_tokenizer(folder / name, "dalle_mini", 100_000).encode([*texts, None], length)
    expected = [row["input_ids"] for row in recorded["rows"]]
    expected_mask = [row["attention_mask"] for row in recorded["rows"]]
    np.testing.assert_array_equal(ids, [*expected, recorded["input_ids_uncond"]])
    np.testing.assert_array_equal(mask, [*expected_mask, recorded["attention_mask_uncond"]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", " "),
        ("A<br>B", " a b"),
        ("AT&amp;amp;T", " at & t"),
        ("<PERSON>, and <person> dance", " people dance"),
        ("<person> and I, <person>", " a person and i, a person"),  # dalle-mini rolls dice here
        ("[12] a [3] b [4] ", " a, 3, b"),
        ("2,500,000.5 on 12/05/2021 or 1/2/2022", " 2500000.5 on 12/05/2021 or 1/2, 2022"),
        ("'it's' a dog's", " \" it's \" a dog's"),
        ("well-known -- yes", " well known, yes"),
        ("VIII helloooo!!!!", " viii hello"),
        ("11111", " 11111"),
        (",,a,, ,b,,", " a, b"),
        ("a\\b_c#", " a b c"),
        ("a\0b", " ab"),
    ],
)
def test_rules(text, expected):
    assert TextNormalizer()(text) == expected


def test_hashtags_stay_whole_without_a_word_list():
    assert TextNormalizer()("a #StreetArt piece") == " a streetart piece"


def test_hashtags_are_split_where_it_costs_least():
    split = WordSplitter(["the", "cat", "them", "men", "he"])  # log 1, log 2, ...
    assert split("thecat") == "the cat"
    assert split("themen") == "the men"  # 0 + log 4, against log 3 for "them" and no word for "en"
    assert split("cat2021cat") == "cat 2021 c a t"  # after what is no word nothing is one; numbers stay whole
    assert split("the_cat__he") == "the cat he"
    assert WordSplitter([])("ab") == "a b" and split("") == ""


@pytest.mark.timeout(60)  # quadratic time would be many minutes
@pytest.mark.parametrize("text", ["\t ", '" ', ", ", "[1]", "<person>,and ", "<a", "#cat", "cat"])
def test_time_grows_with_the_length(text):
    TextNormalizer(["cat", "a"])("#" + text * 50_000)
