"""BART's and CLIP's tokenizers from either kind of file."""

import numpy as np
from text_kit import BART, clip_vocab, write_tokenizer

from dm_generations.text import load_tokenizer
from dm_generations.text.tokenizer import read_pipeline


def test_the_pair_of_files_gives_what_the_tokenizer_json_gives():
    texts = ["a painting", "It’s a café — “déjà vu”", "日本語 🚀", "</s> <mask>x", ""]
    of_json, of_pair = (load_tokenizer(BART / name, "dalle_bart", 420) for name in ("tokenizer.json", "vocab.json"))
    np.testing.assert_array_equal(of_json.encode(texts, 32), of_pair.encode(texts, 32))
    assert of_pair.readback("a café", 32) == "a café"


def test_special_tokens_in_a_text_are_those_tokens_though_the_file_does_not_list_them():
    assert not read_pipeline(BART / "tokenizer.json").get_added_tokens_decoder()
    ids, _ = load_tokenizer(BART, "dalle_bart", 420).encode(["a</s>a <mask><unk>"], 8)
    assert ids.tolist() == [[0, 69, 2, 69, 4, 3, 2, 1]]  # <mask> takes the space before it


def test_clip_from_the_pair_of_files(tmp_path):
    clip = load_tokenizer(write_tokenizer("clip", tmp_path), "clip", len(clip_vocab()))
    ids, mask = clip.encode(["A  CAT's", None], 6)
    assert ids.tolist() == [[514, 320, 513, 6, 82 + 256, 515], [514, 515, 515, 515, 515, 515]]
    assert mask.tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert clip.readback("A  CAT", 6) == "a cat"
    assert clip.encode(["a <|EndOfText|>"], 6)[0].tolist() == [[514, 320, 515, 515, 515, 515]]
