"""Images in tar shards and in one zip: what they hold, when they appear, and how a run goes on."""

import errno
import io
import json
import os
import tarfile
import zipfile

import numpy as np
import pytest
from decode_kit import all_files, change, random_tokens, read_images, write_archive_2022
from PIL import Image
from tiny import CODEBOOK_SIZE, GRID, tiny_vqgan

from dm_generations.cli import main
from dm_generations.export import writers as writers_module
from dm_generations.export.journal import JOURNAL
from dm_generations.inference.decoder import Decoder

TOKENS = random_tokens(10, GRID**2, CODEBOOK_SIZE)
PROMPTS = ("a boat", "кот")  # ten images each


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return tiny_vqgan(tmp_path_factory.mktemp("models") / "vqgan")


@pytest.fixture
def archive(tmp_path):
    return write_archive_2022(tmp_path / "archive.db", TOKENS, PROMPTS)


@pytest.fixture
def decode(codec, archive, tmp_path, capfd):
    """Runs the command on twenty images, into `out`; returns its exit status and what it printed on stderr."""

    def run(*flags, out=tmp_path / "out", size=8):
        sized = ["--shard-size", str(size)] if "tar" in flags else []
        command = ["decode", "--db", str(archive), "--codec", str(codec), "--batch-size", "3", "--out-dir", str(out)]
        return main([*command, *flags, *sized]), capfd.readouterr().err

    return run


def shards_in(folder) -> list[str]:
    """Names of the files, and nothing is hidden."""
    return sorted(os.listdir(folder))


def samples(path) -> dict[str, dict[str, bytes]]:
    """The samples of a shard as WebDataset groups them: neighbours whose names agree up to the first dot."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for info in tar:
            key, extension = info.name.split(".", 1)
            assert key not in found or key == list(found)[-1], "members of a sample follow each other"
            found.setdefault(key, {})[extension] = tar.extractfile(info).read()
    return found


def test_a_tar_holds_samples_of_image_row_and_prompt(decode, tmp_path):
    assert decode("--mode", "images", out=tmp_path / "images") == (0, "")
    assert decode("--mode", "tar") == (0, "")
    names = shards_in(tmp_path / "out")
    prefix = names[0].removesuffix("-000000.tar")
    assert names == [f"{prefix}-{number:06d}.tar" for number in range(3)] and prefix.startswith("pictures-")
    per_shard = [samples(tmp_path / "out" / name) for name in names]
    assert [len(found) for found in per_shard] == [8, 8, 4]
    together = {key: sample for found in per_shard for key, sample in found.items()}
    assert list(together) == [f"{number:09d}" for number in range(1, 21)]
    alone = list(read_images(tmp_path / "images").values())
    for position, sample in enumerate(together.values()):
        assert sample.keys() == {"png", "json", "txt"}
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), alone[position])
        row = json.loads(sample["json"])
        prompt_id, rank = position // 10 + 1, position % 10
        assert (row["prompt"], sample["txt"].decode()) == (PROMPTS[prompt_id - 1],) * 2
        assert (row["id"], row["prompt_id"], row["rank"], row["key1"]) == (position + 1, prompt_id, rank, rank)
        assert row["tokens"] == TOKENS[rank].tolist() and row["clip_score_input"] == 30.0 - rank


def test_a_zip_is_the_tree_that_images_writes(decode, tmp_path):
    assert decode("--mode", "images", "--metadata", out=tmp_path / "images") == (0, "")
    assert decode("--mode", "zip", "--metadata") == (0, "")
    (name,) = shards_in(tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out" / name) as found:
        assert found.testzip() is None
        assert {info.compress_type for info in found.infolist()} == {zipfile.ZIP_STORED}
        members = {info.filename: found.read(info) for info in found.infolist()}
    images = all_files(tmp_path / "images")
    assert images.pop(JOURNAL) and members == images


@pytest.mark.parametrize("mode", ["tar", "zip"])
def test_the_format_is_that_of_the_members(decode, tmp_path, mode):
    assert decode("--mode", mode, "--format", "jpeg") == (0, "")
    path = tmp_path / "out" / shards_in(tmp_path / "out")[0]
    with tarfile.open(path) if mode == "tar" else zipfile.ZipFile(path) as found:
        members = found.getnames() if mode == "tar" else found.namelist()
    assert sum(name.endswith(".jpg") for name in members) == (8 if mode == "tar" else 20)
    assert not any(name.endswith(".png") for name in members)


@pytest.mark.e2e
def test_names_are_those_of_earlier_versions(decode, tmp_path):
    """Recorded from version 0.1.0: with other names, finished shards would be decoded again."""
    assert decode("--mode", "zip") == (0, "")
    assert decode("--mode", "tar") == (0, "")
    tars = [f"pictures-5d057ef0-{number:06d}.tar" for number in range(3)]
    assert shards_in(tmp_path / "out") == [*tars, "pictures-d1ff6587.zip"]


@pytest.mark.parametrize("mode", ["tar", "zip"])
def test_a_finished_run_is_not_done_again(decode, tmp_path, mode):
    assert decode("--mode", mode) == (0, "")
    before = all_files(tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert decode("--mode", mode, "--codec", str(tmp_path / "nowhere")) == (0, "")
    assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert decode("--mode", mode, "--overwrite") == (0, "")
    assert all_files(tmp_path / "out") == before


def test_a_run_goes_on_by_whole_shards(decode, tmp_path, monkeypatch):
    assert decode("--mode", "tar") == (0, "")
    before = all_files(tmp_path / "out")
    names = shards_in(tmp_path / "out")
    (tmp_path / "out" / names[1]).unlink()
    (tmp_path / "out" / names[2]).write_bytes(b"")  # what a power cut may leave
    started, start = [], Decoder.start
    monkeypatch.setattr(
        Decoder, "start", lambda codec, tokens, keys: started.append(len(tokens)) or start(codec, tokens, keys)
    )
    assert decode("--mode", "tar") == (0, "")
    assert sum(started) == 12 and all_files(tmp_path / "out") == before


@pytest.mark.e2e
def test_another_selection_or_archive_goes_beside(decode, archive, tmp_path):
    """And does not pass for what is there."""
    first_names = set()
    for flags in ([], ["--n-best", "4"], ["--format", "webp"], ["--prompt-ids", "2"]):
        assert decode("--mode", "tar", *flags) == (0, "")
        names = set(shards_in(tmp_path / "out"))
        assert names > first_names
        first_names = names
    change(archive, "UPDATE images SET clip_score_input = -clip_score_input WHERE prompt_id = 2")
    assert decode("--mode", "tar") == (0, "")
    assert len(set(shards_in(tmp_path / "out")) - first_names) == 3


@pytest.mark.parametrize("mode", ["tar", "zip"])
def test_what_lacks_an_image_does_not_pass_for_finished(decode, archive, tmp_path, mode):
    change(archive, "UPDATE images SET quantvec = ? WHERE id = 5", b"\0" * 4)
    for _ in range(2):
        status, errors = decode("--mode", mode)
        assert status == 1 and "image 5 was not decoded" in errors and errors.count("\n") == 1
        assert [name for name in shards_in(tmp_path / "out") if "-incomplete" in name] == [
            name for name in shards_in(tmp_path / "out") if name.endswith(f"-incomplete.{mode}")
        ]
        assert len(shards_in(tmp_path / "out")) == (3 if mode == "tar" else 1)
    blob = TOKENS[4].astype("<u2").tobytes()
    change(archive, "UPDATE images SET quantvec = ? WHERE id = 5", blob)
    assert decode("--mode", mode) == (0, "")
    assert not any("incomplete" in name for name in shards_in(tmp_path / "out"))
    assert len(shards_in(tmp_path / "out")) == (3 if mode == "tar" else 1)


def test_a_shard_without_any_good_image_is_not_written(decode, archive, tmp_path):
    change(archive, "UPDATE images SET quantvec_md5 = '0' WHERE id <= 8")
    status, errors = decode("--mode", "tar")
    assert status == 1 and errors.count("was not decoded") == 8
    assert [name.rsplit("-", 1)[1] for name in shards_in(tmp_path / "out")] == ["000001.tar", "000002.tar"]


def test_a_shard_that_cannot_be_written_is_named_and_the_rest_done(decode, tmp_path):
    assert decode("--mode", "tar") == (0, "")
    names = shards_in(tmp_path / "out")
    (tmp_path / "out" / names[0]).unlink()
    (tmp_path / "out" / names[0]).mkdir()
    (tmp_path / "out" / names[2]).unlink()
    status, errors = decode("--mode", "tar")
    assert status == 1 and f"{names[0]} was not written: Is a directory" in errors and errors.count("\n") == 1
    assert shards_in(tmp_path / "out") == names


@pytest.mark.parametrize("mode", ["tar", "zip"])
def test_a_full_disk_leaves_whole_shards_only(decode, tmp_path, monkeypatch, mode):
    class FullAfterNine(writers_module.CONTAINERS[mode]):
        count = 0

        def add(self, name, content):
            FullAfterNine.count += name.endswith(".png")
            if FullAfterNine.count > 9:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().add(name, content)

    monkeypatch.setitem(writers_module.CONTAINERS, mode, FullAfterNine)
    status, errors = decode("--mode", mode)
    assert status == 1 and "No space left on device" in errors and errors.count("\n") == 1
    assert [name[-10:] for name in shards_in(tmp_path / "out")] == (["000000.tar"] if mode == "tar" else [])
    monkeypatch.undo()
    assert decode("--mode", mode) == (0, "")
    assert len(shards_in(tmp_path / "out")) == (3 if mode == "tar" else 1)


@pytest.mark.parametrize("mode", ["tar", "zip"])
def test_a_run_that_is_interrupted_leaves_no_shard_half_done(decode, tmp_path, monkeypatch, mode):
    count, add = [0], writers_module.CONTAINERS[mode].add

    def add_until_interrupted(container, name, content):
        count[0] += 1
        if count[0] > 30:
            raise KeyboardInterrupt
        add(container, name, content)

    if mode == "zip":
        count[0] = 20
    monkeypatch.setattr(writers_module.CONTAINERS[mode], "add", add_until_interrupted)
    try:
        status, _ = decode("--mode", mode)
        assert status != 0
    except KeyboardInterrupt:
        pass
    assert [name[-10:] for name in shards_in(tmp_path / "out")] == (["000000.tar"] if mode == "tar" else [])
