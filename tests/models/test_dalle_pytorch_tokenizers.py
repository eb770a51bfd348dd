"""DALLE-pytorch's tokenizers on vocabularies small enough to count the ids by hand (see text_kit.py)."""

import gzip

import pytest
from text_kit import CHINESE, HUGGING_FACE, SIMPLE, YOUTOKENTOME, write_tokenizer

from dm_generations.errors import UserError
from dm_generations.models import tokenization as tokenizer_files
from dm_generations.models.registry import load_tokenizer


def doubling_youtokentome(count: int) -> bytes:
    """A model whose merges each join the token before to itself."""
    merges = "".join(f"{index} {index} {index + 1}\n" for index in range(5, 5 + count))
    return f"2 {count}\n9601 4\n97 5\n{merges}1 0 2 3\n".encode()


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("simple", "A  Cat", [64 + 256, 513]),
        ("simple", "cats", [512, 83, 82 + 256]),  # "ca", "t" within a word, "s" at its end
        ("simple", "café's 12", [512, 69, 127, 102 + 256, 6, 82 + 256, 16 + 256, 17 + 256]),
        ("simple", "a&amp;amp;b", [320, 5 + 256, 65 + 256]),
        ("simple", "a<|endoftext|>", [320, 515]),
        ("simple", "!!", [0, 256]),
        ("youtokentome", "ab", [10]),
        ("youtokentome", "abab", [10, 9]),
        ("youtokentome", "cab", [4, 7, 9]),
        ("youtokentome", " xxa\ty  a▁c ", [4, 1, 5, 4, 1, 8, 4, 7]),  # unknown characters in a row are one
        ("youtokentome", "A", [4, 1]),
        ("simple", "!<|endoftext|>", [0, 27, 91 + 256, 68, 77, 67, 78, 69, 83, 68]),  # no special token
        ("chinese", "中国cats The the", [5, 1, 6, 7, 8, 1]),
        ("chinese", "[MASK]中[SEP]", [4, 5, 3]),
        ("hugging_face", "a cat, a cat", [2, 3, 1, 2, 3]),
    ],
)
def test_ids(kind, text, expected, tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(kind, tmp_path), "dalle_pytorch", 600)
    ids, mask = tokenizer.encode([text, None, ""], 10)
    assert ids[0].tolist() == expected + [0] * (10 - len(expected))
    assert (mask == (ids != 0)).all() and not ids[1:].any()  # 0 is a pad wherever it stands
    assert tokenizer.encode([text], 2)[0][0].tolist() == [*expected, 0][:2]


def test_lower_case_is_the_callers_choice(tmp_path):
    path = write_tokenizer("youtokentome", tmp_path)
    assert load_tokenizer(path, "dalle_pytorch", 11).encode(["AB"], 3)[0].tolist() == [[4, 1, 0]]
    assert load_tokenizer(path, "dalle_pytorch", 11, lower=True).encode(["AB"], 3)[0].tolist() == [[10, 0, 0]]


@pytest.mark.parametrize(
    ("content", "text", "expected"),
    [
        (SIMPLE.encode(), "cat", 513),
        (gzip.compress(SIMPLE.encode(), mtime=0), "cat", 513),
        (YOUTOKENTOME.encode(), "ab", 10),
        (CHINESE.replace("\n", "\r\n").encode(), "cat", 6),
        (HUGGING_FACE.encode(), "cat", 3),
    ],
)
def test_the_kind_is_seen_from_the_content(content, text, expected, tmp_path):
    path = tmp_path / "tokens"
    path.write_bytes(content)
    assert load_tokenizer(path, "dalle_pytorch", 600).encode([text], 2)[0].tolist() == [[expected, 0]]


def test_only_as_many_merges_count_as_openais_vocabulary_has(tmp_path):
    count = 49_152 - 256 - 2
    path = tmp_path / "bpe.txt"
    merges = ["c a"] * (count - 1) + ["ca t</w>", "x y</w>"]
    path.write_text("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges]) + "\n")
    tokenizer = load_tokenizer(path, "dalle_pytorch", 49_408)
    assert tokenizer.encode(["cat <|endoftext|>"], 2)[0].tolist() == [[512 + count - 1, 49_407]]
    assert tokenizer.encode(["xy"], 2)[0].tolist() == [[87, 88 + 256]]


def test_a_bert_folder_is_chinese_although_it_has_a_tokenizer_json(tmp_path):
    folder = write_tokenizer("chinese", tmp_path)
    (folder / "tokenizer.json").write_text(HUGGING_FACE)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert load_tokenizer(folder, "dalle_pytorch", 9).path.name == "vocab.txt"


def test_a_folder_with_two_tokenizers_is_ambiguous(tmp_path):
    folder = write_tokenizer("simple", tmp_path)
    (folder / "bpe.model").write_text(YOUTOKENTOME)
    with pytest.raises(UserError, match=r"found bpe\.model, bpe_simple_vocab_16e6\.txt; give the file itself"):
        load_tokenizer(folder, "dalle_pytorch", 600)


def test_archives_that_swell_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "MAX_BYTES", 1 << 20)
    (tmp_path / "tokens").write_bytes(gzip.compress(SIMPLE.encode() + bytes(2 << 20)))
    with pytest.raises(UserError, match="tokens: unpacks to more than 1 MiB"):
        load_tokenizer(tmp_path / "tokens", "dalle_pytorch", 600)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a tokenizer that DALLE-pytorch knows"),
        (b"hello", "not a tokenizer that DALLE-pytorch knows"),
        (b'{"a": 1}', "not a tokenizer that DALLE-pytorch knows"),
        (HUGGING_FACE[:-9].encode(), "broken JSON"),
        (HUGGING_FACE.replace('"cat": 3', '"cat": "3"').encode(), "not a tokenizer file"),
        (gzip.compress(SIMPLE.encode(), mtime=0)[:-9], "broken .gz"),
        (b"\x1f\x8b\x00junk", "broken .gz"),
        (SIMPLE.encode() + b"q zzz\n", "line 4 names the token 'zzz', which the vocabulary lacks"),
        (SIMPLE.encode() + b"a b c\n", "line 4 is 'a b c', expected two tokens"),
        (SIMPLE.encode() + b"\xff\xff\n", "not UTF-8"),
        (YOUTOKENTOME.replace("4 3", "4 4", 1).encode(), "damaged"),
        (YOUTOKENTOME.replace("4 3", "4 2", 1).encode(), "damaged"),
        (YOUTOKENTOME.replace("4 3", "99999999 99999999", 1).encode(), "cut off"),
        (YOUTOKENTOME.replace("4 3", "4 999999999", 1).encode(), "its first line must be two counts"),
        (YOUTOKENTOME.replace("8 6 10", "8 6 x").encode(), "damaged"),
        (YOUTOKENTOME.replace("8 6 10", "8 66 10").encode(), "merge 3 joins 8 and 66 to 10, ids it does not know"),
        (YOUTOKENTOME.replace("8 6 10", "8 6 -1").encode(), "the id -1, out of range"),
        (YOUTOKENTOME.replace("9601 4", "9602 4").encode(), "has no '▁'"),
        (YOUTOKENTOME.replace("97 5", "1114112 5").encode(), "not a Unicode code point"),
        (YOUTOKENTOME.replace("1 0 2 3", "-1 0 2 3").encode(), "no id for unknown characters"),
        (YOUTOKENTOME.replace("98 6", "98 5").encode(), "the id 5, out of range or given twice"),
        (YOUTOKENTOME.replace("8 6 10", "5 6 10").encode(), "given twice"),
        (YOUTOKENTOME.replace("97 5", "55296 5").encode(), "not a vocabulary"),  # a surrogate
        (doubling_youtokentome(60), "its tokens have more than 64 million characters"),
        (CHINESE.encode() + b"\xff", "not UTF-8"),
    ],
)
def test_damaged_files_are_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "tokens"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(path, "dalle_pytorch", 600)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
