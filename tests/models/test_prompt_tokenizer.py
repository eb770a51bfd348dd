"""BART's kind against saved ids of transformers, CLIP's kind against a small file built here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from text_kit import BART, clip_vocab
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dm_generations.errors import UserError
from dm_generations.models.tokenization import PromptTokenizer, replace_surrogates

ROWS = json.loads((BART / "text_golden.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def bart():
    return PromptTokenizer(BART)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tokenizer.json of the shape of openai/clip-vit-base-patch32's, with two merges."""
    ids = clip_vocab()
    bos, eos = ids["<|startoftext|>"], ids["<|endoftext|>"]
    tokenizer = Tokenizer(
        models.BPE(ids, [("c", "a"), ("ca", "t</w>")], end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", eos), ("<|startoftext|>", bos), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    tokenizer.enable_truncation(3)  # files saved by transformers may carry either; both must be ignored
    tokenizer.enable_padding(length=5, pad_id=eos, pad_token="<|endoftext|>")
    folder = tmp_path_factory.mktemp("clip")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    return PromptTokenizer(clip_folder)


def test_bart_ids_are_those_of_transformers(bart):
    ids, mask = bart.encode([row["text"] for row in ROWS["rows"]], ROWS["max_text_length"])
    assert ids.dtype == mask.dtype == np.int32
    np.testing.assert_array_equal(ids, [row["input_ids_without_normalizer"] for row in ROWS["rows"]])
    np.testing.assert_array_equal(mask.sum(1), [list(row).index(2) + 1 for row in ids])  # up to </s>


def test_normalized_bart_ids_are_those_of_transformers(bart):
    ids, mask = bart.encode([row["normalized"] for row in ROWS["rows"]], ROWS["max_text_length"])
    np.testing.assert_array_equal(ids, [row["input_ids"] for row in ROWS["rows"]])
    np.testing.assert_array_equal(mask, [row["attention_mask"] for row in ROWS["rows"]])


def test_empty_prompt_is_the_unconditional_one(bart):
    ids, mask = bart.encode([""], ROWS["max_text_length"])
    assert ids.tolist() == [ROWS["input_ids_uncond"]] and mask.tolist() == [ROWS["attention_mask_uncond"]]


def test_bart_round_trip_gives_what_was_typed(bart):
    assert bart.round_trip("The Eiffel Tower — déjà vu", 64) == "The Eiffel Tower — déjà vu"


def test_clip_ids(clip):
    eos = clip.eos_id
    assert (clip.bos_id, clip.pad_id) == (eos - 1, eos)
    cat = clip.encode(["cat"], 3)[0][0, 1]
    ids, mask = clip.encode(["A  CAT", "cat cat cat cat cat"], 5)
    assert ids[0].tolist() == [eos - 1, clip.encode(["a"], 3)[0][0, 1], cat, eos, eos]
    assert ids[1].tolist() == [eos - 1, cat, cat, cat, eos]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_clip_round_trip_is_in_lower_case_without_special_tokens(clip):
    assert clip.round_trip("A  CAT,\nmoon", 77) == "a cat , moon"
    assert clip.round_trip("cat<|endoftext|> cat", 77) == "cat cat"
    assert clip.round_trip("cat cat cat cat", 5) == "cat cat cat"
    assert clip.round_trip("", 77) == ""


@pytest.mark.parametrize("kind", ["bart", "clip"])
@pytest.mark.parametrize(
    "text",
    ["a\0b", "\0", "x" * 10_000, "a cat " * 2_000, "\ud83d", "a\udfffb", "🚀👩‍🚀 \u202e", "../..", "  "],
)
def test_hostile_prompts_give_whole_rows(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    (ids,), (mask,) = tokenizer.encode([text], 16)
    end = mask.sum() - 1
    assert ids[0] == tokenizer.bos_id and ids[end] == tokenizer.eos_id
    assert (ids[end + 1 :] == tokenizer.pad_id).all() and (mask == (np.arange(16) <= end)).all()
    tokenizer.round_trip(text, 16)


def test_lone_surrogates_become_replacement_characters(bart):
    assert replace_surrogates("a\ud83db") == "a\ufffdb"
    assert replace_surrogates("\ud83d\ude80 é\0") == "🚀 é\0"
    np.testing.assert_array_equal(bart.encode(["a\ud83db"], 16)[0], bart.encode(["a\ufffdb"], 16)[0])


def test_rows_do_not_depend_on_the_batch(bart):
    texts = [row["text"] for row in ROWS["rows"]]
    together = bart.encode(texts, 16)[0]
    np.testing.assert_array_equal(together, np.concatenate([bart.encode([text], 16)[0] for text in texts]))
    assert bart.encode([], 16)[0].shape == (0, 16)


def test_ids_beyond_the_model_are_refused(bart):
    small = PromptTokenizer(BART, vocab_size=300)
    assert small.encode(["!"], 4)[0].tolist() == [[0, 5, 2, 1]]
    with pytest.raises(UserError, match="the model has only 300 tokens"):
        small.encode([ROWS["rows"][0]["text"]], 16)
    with pytest.raises(UserError, match="special ids"):
        PromptTokenizer(BART, vocab_size=2)


def test_files_that_cannot_serve_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        PromptTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer file"):
        PromptTokenizer(tmp_path)
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="puts 0 tokens around a text"):
        PromptTokenizer(tmp_path)


def test_a_length_without_room_for_the_ends_is_an_error(bart):
    with pytest.raises(ValueError, match="length"):
        bart.encode(["a"], 1)


def test_jax_is_not_imported():
    code = "import sys, dm_generations.models.tokenization; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
