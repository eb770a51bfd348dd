"""Decodes of bad rows, with a wrong codec, into folders that are in the way, and of hostile prompts."""

import errno
import io
import os
import re
import sys

import pytest
from decode_kit import all_files, change, random_tokens, read_images, write_archive_2022
from faults_kit import error_line
from tiny import CODEBOOK_SIZE, GRID, IMAGE_SIZE, tiny_vqgan

from dm_generations.archive import Archive, ModelInfo, NewImage
from dm_generations.archive.records import count_tokens
from dm_generations.export.journal import JOURNAL, Journal
from dm_generations.sampling.params import SamplingParams

pytestmark = pytest.mark.e2e

TOKENS = random_tokens(6, GRID**2, CODEBOOK_SIZE)


BAD_BLOBS = {
    "short": (b"\0" * 30, "30 bytes, not 32"),
    "odd": (b"\0" * 33, "33 bytes, not 32"),
    "empty": (b"", "0 bytes"),
    "text": ("0" * 32, "0 bytes"),  # not a blob: the archive gives none
    "outside": (CODEBOOK_SIZE.to_bytes(2, "little") * 16, "it holds token 32, the codebook ends at 31"),
}


@pytest.mark.parametrize("kind", BAD_BLOBS)
def test_a_bad_row_is_named_and_the_rest_decoded(decode, archive, tmp_path, kind):
    blob, reason = BAD_BLOBS[kind]
    change(archive, "UPDATE images SET quantvec = ?, quantvec_md5 = NULL WHERE id = 2", blob)
    status, errors = decode()
    assert status == 1
    assert "error: image 2 was not decoded" in errors and reason in errors and errors.count("\n") == 1
    ranks = [name.split("_")[-2] for name in read_images(tmp_path / "out")]
    assert ranks == ["00", "02", "03", "04", "05"]


def test_an_md5_that_differs_is_a_bad_row(decode, archive):
    change(archive, "UPDATE images SET quantvec_md5 = ? WHERE id = 5", "0" * 32)
    status, errors = decode()
    assert status == 1 and "image 5 was not decoded: its tokens do not match their MD5" in errors


def test_a_gallery_that_lacks_an_image_does_not_pass_for_finished(decode, archive, tmp_path):
    flags = ("--mode", "gallery", "--gallery-cols", "2", "--gallery-rows", "2")
    tokens = TOKENS[1].astype("<u2").tobytes()
    change(archive, "UPDATE images SET quantvec = x'00' WHERE id = 2")
    for _ in range(2):
        status, errors = decode(*flags)
        assert status == 1 and "image 2" in errors
        found = {path.split(",c=10.0")[1]: pixels for path, pixels in read_images(tmp_path / "out").items()}
        assert found.keys() == {",incomplete_None.png", ",page=2_None.png"}
        cells = found[",incomplete_None.png"].reshape(2, IMAGE_SIZE, 2, IMAGE_SIZE, 3).swapaxes(1, 2)
        assert [bool(cell.any()) for cell in cells.reshape(4, -1)] == [True, False, True, True]

    change(archive, "UPDATE images SET quantvec = ? WHERE id = 2", tokens)
    assert decode(*flags)[0] == 0
    names = {path.split(",c=10.0")[1] for path in read_images(tmp_path / "out")}
    assert names == {"_None.png", ",page=2_None.png"}


@pytest.mark.parametrize(
    ("change_of_codec", "message"),
    [
        ({"resolution": IMAGE_SIZE * 2}, "takes 8x8 tokens below 32, but .* holds 4x4 tokens; .*--codec"),
        ({"n_embed": 8}, "takes 4x4 tokens below 8, but .* holds tokens up to"),
    ],
)
def test_a_codec_that_does_not_fit_2022_rows(decode, tmp_path, change_of_codec, message):
    status, errors = decode(codec=tiny_vqgan(tmp_path / "other", **change_of_codec))
    assert status == 1
    assert_one_error(errors, message)
    assert not (tmp_path / "out").exists()


def test_rows_without_tokens_do_not_make_a_codec_unfit(decode, archive):
    change(archive, "UPDATE images SET quantvec = NULL")
    status, errors = decode()
    assert status == 1
    assert [line.split(" was not decoded: ")[0] for line in errors.splitlines()] == [
        f"error: image {number}" for number in range(1, 7)
    ]


def test_one_bad_row_does_not_make_a_codec_unfit(decode, archive):
    change(archive, "UPDATE images SET quantvec = x'0000' WHERE id = 1")
    status, errors = decode()
    assert status == 1 and "image 1 was not decoded" in errors


@pytest.fixture
def recorded(tmp_path):
    """A function that makes an archive whose rows say which codec they are for."""

    def make(**codec_fields):
        path = tmp_path / "recorded.db"
        fields = {"token_shape": (GRID, GRID), "codebook_size": CODEBOOK_SIZE, "image_shape": (IMAGE_SIZE, IMAGE_SIZE)}
        fields |= codec_fields
        images = [
            NewImage("a boat", None, SamplingParams(), 0, rank, row.astype("<u2").tobytes(), 0.0, 1.0)
            for rank, row in enumerate(TOKENS)
        ]
        if (token_count := count_tokens(fields["token_shape"])) != GRID**2:
            images = [NewImage("a boat", None, SamplingParams(), 0, 0, bytes(2 * token_count), 0.0, 1.0)]
        with Archive.create(path) as archive, archive.transaction():
            generator, clip = (archive.model_id(ModelInfo(kind, kind, "a" * 64, {})) for kind in ("generator", "clip"))
            codec_id = archive.model_id(ModelInfo("codec", "sea", "b" * 64, {}, **fields))
            archive.add_images(images, generator, codec_id, clip, sampler_version=1)
        return path

    return make


@pytest.mark.parametrize(
    ("fields", "theirs"),
    [
        ({"token_shape": (16, 16)}, "16x16 tokens below 32 of 'sea'"),
        ({"codebook_size": 64}, "4x4 tokens below 64 of 'sea'"),
    ],
)
def test_a_codec_that_does_not_fit_the_recorded_one(decode, recorded, tmp_path, fields, theirs):
    status, errors = decode(db=recorded(**fields))
    assert status == 1
    assert_one_error(errors, f"takes 4x4 tokens below 32, but .* holds {theirs}")
    assert not (tmp_path / "out").exists()


def test_other_weights_of_the_same_shape_are_a_warning(decode, recorded, tmp_path):
    status, errors = decode(db=recorded())
    assert status == 0 and errors.startswith("warning: codec 'vqgan' has other weights than 'sea'")
    assert len(read_images(tmp_path / "out")) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "empty"), (b"not a database" * 99, "not an SQLite database")],
)
def test_an_archive_that_is_none(decode, tmp_path, content, message):
    path = tmp_path / "other.db"
    if content is not None:
        path.write_bytes(content)
    status, errors = decode(db=path)
    assert status == 1
    assert_one_error(errors, message)


def test_an_archive_without_images(decode, archive):
    change(archive, "DELETE FROM images")
    status, errors = decode()
    assert status == 1
    assert_one_error(errors, "holds no images")


def test_a_codec_folder_that_is_not_there(decode, tmp_path):
    status, errors = decode(codec=tmp_path / "nowhere")
    assert status == 1
    assert_one_error(errors, "nowhere")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file(decode, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        status, errors = decode(out=out)
        assert status == 1
        assert_one_error(errors, "--out-dir")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
@pytest.mark.parametrize("mode", ["images", "gallery", "npy"])
def test_a_prompt_folder_that_is_a_link_is_refused(decode, tmp_path, mode):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0001_a boat").symlink_to(tmp_path / "elsewhere")
    status, errors = decode("--mode", mode)
    assert status == 1
    assert_one_error(errors, "0001_a boat is a symbolic link")
    assert not any((tmp_path / "elsewhere").iterdir()) and len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes")
@pytest.mark.parametrize("mode", ["images", "npy"])
def test_a_pipe_at_the_place_of_a_file_is_replaced(decode, tmp_path, mode):
    assert decode("--mode", mode) == (0, "")
    extension = ".npy" if mode == "npy" else ".png"
    path = next((tmp_path / "out").rglob(f"*{extension}"))
    path.unlink()
    os.mkfifo(path)
    assert decode("--mode", mode) == (0, "")
    assert path.is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
@pytest.mark.parametrize("mode", ["images", "npy"])
def test_a_link_at_the_place_of_a_file_is_replaced(decode, tmp_path, mode):
    assert decode("--mode", mode) == (0, "")
    path = next(path for path in (tmp_path / "out").rglob("*.*") if path.suffix in (".png", ".npy"))
    path.unlink()
    (tmp_path / "mine").write_text("mine")
    path.symlink_to(tmp_path / "mine")
    assert decode("--mode", mode, "--overwrite") == (0, "")
    assert path.is_file() and not path.is_symlink()
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_a_journal_that_is_a_link_is_refused(decode, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL).symlink_to(tmp_path / "mine")
    status, errors = decode()
    assert status == 1
    assert_one_error(errors, JOURNAL)
    assert (tmp_path / "mine").read_text() == "mine" and len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize("is_new", [False, True])
def test_a_second_decode_into_a_folder_is_refused(decode, tmp_path, is_new):
    if not is_new:
        assert decode("--n-best", "1") == (0, "")
    (tmp_path / "out").mkdir(exist_ok=True)
    before = set(all_files(tmp_path / "out")) | {JOURNAL}
    with Journal(tmp_path / "out") as first:
        first.open(create=True)
        status, errors = decode()
    assert status == 1
    assert_one_error(errors, "another decode writes into .*out")
    assert set(all_files(tmp_path / "out")) == before
    assert decode() == (0, "") and len(read_images(tmp_path / "out")) == 6


def test_a_gallery_too_large_to_hold(decode, tmp_path):
    status, errors = decode("--mode", "gallery", "--gallery-cols", "100000", "--gallery-rows", "100000")
    assert status == 1
    assert_one_error(errors, "800,000 x 800,000 pixels")
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_written_is_named_and_the_rest_done(decode, tmp_path):
    blocked = tmp_path / "out" / "0001_a boat" / "0001_k=50,p=1.0,t=1.0,c=10.0_03_None.png"
    blocked.mkdir(parents=True)
    status, errors = decode()
    assert status == 1
    assert_one_error(errors, "_03_None.png was not written: Is a directory")
    blocked.rmdir()
    assert len(read_images(tmp_path / "out")) == 5
    assert "_03_" not in (tmp_path / "out" / "manifest.js").read_text()
    assert decode()[0] == 0 and len(read_images(tmp_path / "out")) == 6


def test_hostile_prompts_stay_in_the_folder(decode, codec, tmp_path):
    prompts = ("../../x", "..", "/etc/passwd", "a\0b", "\U0001f951" * 10_000, "</script>", "con", "x\n" * 9)
    db = write_archive_2022(tmp_path / "hostile.db", TOKENS[:1], prompts)
    before = set(tmp_path.iterdir())
    assert decode(db=db)[0] == 0
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out"}
    found = read_images(tmp_path / "out")
    assert len(found) == len(prompts) and all(path.count("/") == 1 for path in found)


@pytest.mark.parametrize("size", ["1000000000000", "1" + "0" * 24])
def test_a_batch_size_beyond_all_memory_takes_what_there_is(decode, tmp_path, size):
    assert decode("--batch-size", size) == (0, "")
    assert len(read_images(tmp_path / "out")) == 6


def test_a_folder_whose_name_the_terminal_cannot_show(command, archive, tmp_path, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    assert command.run(tmp_path / "\u043a\u043e\u0442", "--db", str(archive)) == 0
    sys.stdout.flush()
    assert b"6 files written to " in printed.getvalue() and b"\\u043a\\u043e\\u0442" in printed.getvalue()


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_errors_that_nobody_can_read_cost_no_image(command, archive, tmp_path, monkeypatch):
    change(archive, "UPDATE images SET quantvec = x'00' WHERE id = 1")
    monkeypatch.setattr(sys, "stderr", FullDisk())
    assert command.run(tmp_path / "out", "--db", str(archive)) == 1
    assert len(read_images(tmp_path / "out")) == 5


def test_overwrite_decodes_again(decode, tmp_path):
    assert decode()[0] == 0
    (tmp_path / "out" / "0001_a boat" / "0001_k=50,p=1.0,t=1.0,c=10.0_00_None.png").write_bytes(b"old")
    before = all_files(tmp_path / "out")
    assert decode()[0] == 0 and all_files(tmp_path / "out") == before
    assert decode("--overwrite")[0] == 0
    assert len(read_images(tmp_path / "out")) == 6


def assert_one_error(errors: str, pattern: str):
    assert re.search(pattern, error_line(errors)), errors
