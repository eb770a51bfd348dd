"""minDALL-E's tokenizer against what it recorded, from a folder and from an archive."""

import gzip
import io
import json
import tarfile

import pytest
from helpers import golden
from text_kit import MINDALLE

from dm_generations.errors import UserError
from dm_generations.models.registry import load_tokenizer

NAMES = ("bpe-16k-vocab.json", "bpe-16k-merges.txt")
CASES = sorted(golden("mindalle_kakao").rglob("tokenizer_golden.json"))


def pack(path, members):
    """A .tar.gz of (name, bytes or a changed TarInfo)."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members:
            if isinstance(content, bytes):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                archive.addfile(content)
    return path


@pytest.fixture
def files():
    return [(f"tokenizer/{name}", (MINDALLE / name).read_bytes()) for name in NAMES]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.parent.name)
def test_ids_are_those_of_mindalle(path):
    (vocab,) = path.parent.rglob(NAMES[0])
    tokenizer = load_tokenizer(vocab.parent, "mindalle", 100_000)
    for row in json.loads(path.read_text("utf-8")):
        ids, mask = tokenizer.encode([row["text"]], len(row["ids"]))
        assert ids.tolist() == [row["ids"]] and mask.tolist() == [row["attention_mask"]]


def test_the_unconditional_prompt_is_padding():
    ids, mask = load_tokenizer(MINDALLE, "mindalle", 300).encode([None], 3)
    assert ids.tolist() == [[0, 0, 0]] and not mask.any()


def test_a_vocabulary_without_a_pad_gets_one_at_its_end(tmp_path):
    (tmp_path / NAMES[0]).write_text(json.dumps({"[UNK]": 0, "a": 1, "a</w>": 2}))
    (tmp_path / NAMES[1]).write_text("#version: 0.2\n")
    tokenizer = load_tokenizer(tmp_path, "mindalle", 4)
    assert tokenizer.encode(["A aa b"], 6)[0].tolist() == [[2, 1, 2, 0, 3, 3]]
    with pytest.raises(UserError, match="gives the token id 3, the model has only 3"):
        load_tokenizer(tmp_path, "mindalle", 3).encode([None], 6)


def test_an_archive_is_read_and_nothing_is_left_in_its_folder(files, tmp_path):
    path = pack(tmp_path / "tokenizer.tar.gz", files)
    folder = load_tokenizer(MINDALLE, "mindalle", 300)
    for place in (path, tmp_path):
        ids, _ = load_tokenizer(place, "mindalle", 300).encode(["a painting of a cat"], 12)
        assert ids.tolist() == folder.encode(["a painting of a cat"], 12)[0].tolist()
    assert list(tmp_path.iterdir()) == [path]


def link(name):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return name, info


@pytest.mark.parametrize("member", [("../escape", b"x"), ("/absolute", b"x"), link("tokenizer/extra")])
def test_what_else_an_archive_holds_is_never_written(member, files, tmp_path):
    path = pack(tmp_path / "a.tar.gz", [*files, member])
    assert load_tokenizer(path, "mindalle", 300).encode(["a"], 2)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_place_of_a_file_is_no_file(files, tmp_path):
    path = pack(tmp_path / "a.tar.gz", [files[0], link(NAMES[1])])
    with pytest.raises(UserError, match=NAMES[1]):
        load_tokenizer(path, "mindalle", 300)


def test_archives_with_large_files_are_refused(files, tmp_path):
    path = pack(tmp_path / "a.tar.gz", [(NAMES[0], bytes(65 << 20)), files[1]])
    with pytest.raises(UserError, match=rf"a\.tar\.gz: {NAMES[0]} takes"):
        load_tokenizer(path, "mindalle", 300)


def test_broken_archives_are_refused(files, tmp_path):
    path = pack(tmp_path / "a.tar.gz", files[:1])
    with pytest.raises(UserError, match=r"a\.tar\.gz.*bpe-16k-merges\.txt"):
        load_tokenizer(path, "mindalle", 300)
    whole = path.read_bytes()
    for data in (whole[:200], b"no archive", gzip.compress(b"no archive" * 100)):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.tar\.gz is damaged"):
            load_tokenizer(path, "mindalle", 300)


def test_a_vocabulary_without_the_unknown_token_is_refused(tmp_path):
    (tmp_path / NAMES[0]).write_text('{"a": 0}')
    (tmp_path / NAMES[1]).write_text("")
    with pytest.raises(UserError, match=r"bpe-16k-merges\.txt: line 1 is ''"):
        load_tokenizer(tmp_path, "mindalle", 300)
    (tmp_path / NAMES[1]).write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=r"has no token '\[UNK\]'"):
        load_tokenizer(tmp_path, "mindalle", 300)
