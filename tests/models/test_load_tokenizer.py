"""What holds for every kind of tokenizer: the interface, hostile prompts, and files that are damaged or not theirs."""

import base64
import json
import shutil

import numpy as np
import pytest
from text_kit import BART, MINDALLE, write_tokenizer

from dm_generations.errors import UserError
from dm_generations.models.registry import load_tokenizer

KINDS = ["dalle_bart", "dalle_mini", "min_dalle", "mindalle", "clip"]
KINDS += ["simple", "youtokentome", "chinese", "hugging_face"]  # DALLE-pytorch's


@pytest.fixture(params=KINDS)
def any_tokenizer(request, tmp_path):
    kind = request.param
    if kind in ("dalle_bart", "dalle_mini", "min_dalle"):
        return load_tokenizer(BART, kind, 420)
    if kind == "mindalle":
        return load_tokenizer(MINDALLE, kind, 300)
    return load_tokenizer(write_tokenizer(kind, tmp_path), "clip" if kind == "clip" else "dalle_pytorch", 600)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a\0b",
        "\0",
        "\ud83d",
        "a\udfffb",
        "x" * 10_000,
        "a cat " * 1_700,
        "🚀👩‍🚀 \u202e",
        "../..",
        "&#0;",
        "\t " * 5_000,
    ],
)
def test_hostile_prompts_give_whole_rows(any_tokenizer, text):
    ids, mask = any_tokenizer.encode([text, None], 16)
    assert ids.shape == mask.shape == (2, 16) and ids.dtype == mask.dtype == np.int32
    assert ids.min() >= 0 and ids.max() < any_tokenizer.vocab_size and set(np.unique(mask)) <= {0, 1}


def test_rows_do_not_depend_on_the_batch(any_tokenizer):
    texts = ["a cat", None, "two cats, 中 déjà", "", "cat " * 20]
    together = np.stack(any_tokenizer.encode(texts, 8))
    alone = [np.stack(any_tokenizer.encode([text], 8)) for text in texts]
    np.testing.assert_array_equal(together, np.concatenate(alone, axis=1))
    assert any_tokenizer.encode([], 8)[0].shape == (0, 8)


def test_longer_rows_begin_like_shorter_ones(any_tokenizer):
    long, short = (any_tokenizer.encode(["cat, cat and cat " * 9], length)[0][0] for length in (40, 12))
    np.testing.assert_array_equal(long[:11], short[:11])  # some keep the last place for the end token


def test_a_token_that_the_model_lacks_names_the_tokenizer():
    tokenizer = load_tokenizer(BART, "min_dalle", 90)
    with pytest.raises(UserError, match=r"vocab\.json: gives the token id \d+, the model has only 90 tokens"):
        tokenizer.encode(["a painting"], 16)


def test_a_path_that_is_not_there():
    with pytest.raises(UserError, match="no such file or folder"):
        load_tokenizer("nowhere", "clip", 10)
    with pytest.raises(ValueError, match="style"):
        load_tokenizer(BART, "bart", 10)


@pytest.mark.parametrize("library", ["ftfy", "emoji", "unidecode"])
def test_a_missing_library_is_named(library, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(UserError, match=rf"needs the library {library}: pip install 'dm-generations\[checkpoints\]'"):
        load_tokenizer(BART, "dalle_mini", 420)


def _json(change):
    """A file's bytes with its JSON changed in place."""

    def damaged(data):
        document = json.loads(data)
        change(document)
        return json.dumps(document).encode()

    return damaged


DAMAGE = [
    ("vocab.json", lambda data: data[:-20], "broken JSON"),
    ("vocab.json", lambda data: b"[" * 100_000, "broken JSON"),
    ("vocab.json", lambda data: b"[1, 2]", "not a vocabulary"),
    ("vocab.json", lambda data: b"\xff" + data, "not UTF-8"),
    ("vocab.json", _json(lambda vocab: vocab.update(a="7")), "expected a whole number"),
    ("vocab.json", _json(lambda vocab: vocab.update(a=2**40)), "expected a whole number"),
    ("vocab.json", _json(lambda vocab: vocab.update(a=True)), "expected a whole number"),
    ("vocab.json", _json(lambda vocab: vocab.update({"\ud800": 7})), "not valid Unicode"),
    ("vocab.json", _json(lambda vocab: vocab.pop("</s>")), "has no token '</s>'"),
    ("vocab.json", _json(lambda vocab: vocab.pop("he")), "names the token 'he', which the vocabulary lacks"),
    ("merges.txt", lambda data: data + b"q zzz\n", "names the token 'zzz', which the vocabulary lacks"),
    ("merges.txt", lambda data: data + b"one\n", "line 161 is 'one', expected two tokens"),
    ("merges.txt", None, "no such file"),
]


@pytest.mark.parametrize("style", ["dalle_bart", "min_dalle"])
@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_damaged_pairs_name_the_file(style, name, damage, message, tmp_path):
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(BART / file, tmp_path / file)
    if damage is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path, style, 420)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert name in str(caught.value) or "merges.txt" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model", {"type": "WordLevel", "unk_token": "?", "vocab": {"a": 0}}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}),  # the library panics
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Removed", "invert": False}),
    ],
)
@pytest.mark.parametrize("style", ["dalle_bart", "clip", "dalle_pytorch"])
def test_pipelines_that_break_the_library_are_errors(style, part, value, tmp_path):
    document = json.loads((BART / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**document, part: value}))
    with pytest.raises(UserError, match=r"tokenizer\.json: (not a|cannot) token"):
        load_tokenizer(tmp_path, style, 420).encode(["a" * 40 + "b"], 16)


def test_no_memory_is_taken_because_a_file_asks_for_it(tmp_path):
    document = json.loads((BART / "tokenizer.json").read_text("utf-8"))
    padding = {"strategy": {"Fixed": 10**15}, "direction": "Right", "pad_to_multiple_of": None}
    document["padding"] = {**padding, "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    for style in ("dalle_bart", "clip", "dalle_pytorch"):
        assert load_tokenizer(tmp_path, style, 420).encode(["a"], 16)[0].shape == (1, 16)


def test_merges_skipped_at_random_in_training_are_not_skipped_here(tmp_path):
    document = json.loads((BART / "tokenizer.json").read_text("utf-8"))
    document["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    texts = ["painting of the mountains"]
    for style in ("dalle_bart", "dalle_pytorch"):
        expected, _ = load_tokenizer(BART / "tokenizer.json", style, 420).encode(texts, 16)
        np.testing.assert_array_equal(load_tokenizer(tmp_path, style, 420).encode(texts, 16)[0], expected)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
CHARSMAP = base64.b64encode(bytes(4) + b"a" * 2000 + b"\0").decode()
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 40,
    "pair": [],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0] * 40, "tokens": ["<s>"] * 40}, "<pad>": {"ids": 5}},
}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}),  # a map of 4 GiB
        ("normalizer", {"type": "Sequence", "normalizers": [REPLACE] * 30}),
        ("normalizer", {**REPLACE, "pattern": {"Regex": ""}, "content": "a" * 100_000}),
        ("decoder", {"type": "Sequence", "decoders": [REPLACE] * 30}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 40}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "NFKC"}] * 1000}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 999}, REPLACE]}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 40}),
        ("post_processor", {"type": "Sequence", "processors": [TEMPLATE]}),
    ],
)
@pytest.mark.parametrize("style", ["dalle_bart", "clip", "dalle_pytorch"])
def test_pipelines_that_would_end_the_process_are_refused(style, part, value, tmp_path):
    document = json.loads((BART / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**document, part: value}))
    with pytest.raises(UserError, match=r"tokenizer\.json: ") as caught:
        load_tokenizer(tmp_path, style, 420)
    assert "\n" not in str(caught.value)


def test_of_a_key_that_comes_twice_the_last_counts(tmp_path):
    text = (BART / "tokenizer.json").read_text("utf-8").strip()
    charsmap = '"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}'
    (tmp_path / "tokenizer.json").write_text("{" + charsmap + ", " + text[1:])
    assert load_tokenizer(tmp_path, "dalle_bart", 420).encode(["a"], 16)[0].shape == (1, 16)


def test_files_far_too_large_are_not_read(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)  # sparse
    with pytest.raises(UserError, match="more than 64 MiB"):
        load_tokenizer(tmp_path, "min_dalle", 420)
    with pytest.raises(UserError, match="more than 64 MiB"):
        load_tokenizer(tmp_path / "vocab.json", "dalle_pytorch", 420)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json, nor vocab\.json"):
        load_tokenizer(tmp_path, "dalle_mini", 10)
    with pytest.raises(UserError, match=r"bpe-16k-vocab\.json: no such file"):
        load_tokenizer(tmp_path, "mindalle", 10)
    with pytest.raises(UserError, match="found none"):
        load_tokenizer(tmp_path, "dalle_pytorch", 10)
    assert load_tokenizer(MINDALLE.parent, "mindalle", 300).path == MINDALLE
