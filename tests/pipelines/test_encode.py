"""Own images with captions, from folders, lists, tar and Parquet files, become tokens in an archive, once each."""

import contextlib
import io
import json
import os
import sqlite3
import tarfile

import numpy as np
import pytest
from helpers import time_limit
from PIL import Image
from ray_kit import PickledPool
from tiny import IMAGE_SIZE, tiny_vqgan

from dm_generations.archive import Archive, verify
from dm_generations.cli import main
from dm_generations.errors import UserError
from dm_generations.inference.encoder import Encoder
from dm_generations.models.loading import load_checkpoint
from dm_generations.pipelines.encode import Columns, encode_images

CAPTIONS = [f"image {number}" for number in range(5)]


def pixels_of(number):
    return np.random.default_rng(number).integers(256, size=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)


def png_of(number):
    file = io.BytesIO()
    Image.fromarray(pixels_of(number)).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def codec(models):
    return load_checkpoint(models.vqgan, "codec")


@pytest.fixture(scope="module")
def expected(codec):
    return dict(zip(CAPTIONS, Encoder(codec).encode(np.stack([pixels_of(n) for n in range(5)])), strict=True))


def write_folder(folder):
    (folder / "more").mkdir(parents=True)
    for number, caption in enumerate(CAPTIONS):
        path = folder / ("more" if number % 2 else ".") / f"{number}.png"
        path.write_bytes(png_of(number))
        path.with_suffix(".txt").write_text(f"{caption}\n")
    return folder


def write_json_lines(folder):
    write_folder(folder)
    lines = [{"file_name": f"{'more/' * (n % 2)}{n}.png", "text": caption} for n, caption in enumerate(CAPTIONS)]
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "list.jsonl"


def write_csv(folder):
    write_folder(folder)
    lines = [f"{'more/' * (n % 2)}{n}.png,{caption}" for n, caption in enumerate(CAPTIONS)]
    (folder / "list.csv").write_text("\n".join(["path,caption", *lines]))
    return folder / "list.csv"


def write_tar(folder):
    folder.mkdir()
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number, caption in enumerate(CAPTIONS):
            ending, text = ("json", json.dumps({"caption": caption})) if number % 2 else ("txt", caption)
            for name, content in ((f"{number}.png", png_of(number)), (f"{number}.{ending}", text.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder / "shard.tar"


def write_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir()
    images = [{"bytes": png_of(number), "path": None} for number in range(5)]
    parquet.write_table(pyarrow.table({"image": images, "text": CAPTIONS}), folder / "data.parquet")
    return folder / "data.parquet"


def tokens_by_prompt(db):
    with Archive.open(db) as archive:
        assert not list(verify(archive))
        prompts = archive.prompts()
        rows = [row for group in archive.groups() for row in archive.rows(group.key)]
        return {prompts[row.prompt_id]: np.frombuffer(row.quantvec, "<u2") for row in rows}


@pytest.mark.parametrize("write", [write_folder, write_json_lines, write_csv, write_tar, write_parquet])
def test_every_source_gives_the_tokens_of_its_images(write, codec, expected, tmp_path):
    source, db = write(tmp_path / "source"), tmp_path / "a.db"
    report = encode_images(source, db, codec, 2, Columns())
    assert (report.added_count, report.existing_count, report.problems) == (5, 0, [])
    found = tokens_by_prompt(db)
    assert found.keys() == expected.keys()
    for caption, tokens in expected.items():
        np.testing.assert_array_equal(found[caption], tokens)


def test_what_is_there_is_not_encoded_again(codec, tmp_path, monkeypatch):
    source, db = write_folder(tmp_path / "source"), tmp_path / "a.db"
    (source / "4.png").rename(tmp_path / "4.png")
    assert encode_images(source, db, codec, 2, Columns()).added_count == 4
    (tmp_path / "4.png").rename(source / "4.png")
    encoded = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, pixels: (encoded.append(pixels), encode(self, pixels))[1])
    report = encode_images(source, db, codec, 2, Columns())
    assert (report.added_count, report.existing_count, len(encoded)) == (1, 4, 1)


def test_a_pool_encodes_as_one_process_does(codec, tmp_path):
    source, found = write_folder(tmp_path / "source"), []
    (source / "0.png").write_bytes(b"no image")
    (source / "2.txt").unlink()
    (source / "copy.png").write_bytes(png_of(4))
    (source / "copy.txt").write_text(CAPTIONS[4])
    for name, pool in (("alone.db", None), ("pool.db", PickledPool())):
        report = encode_images(source, tmp_path / name, codec, 2, Columns(), pool)
        assert (report.added_count, report.existing_count, len(report.problems)) == (3, 1, 2)
        again = encode_images(source, tmp_path / name, codec, 2, Columns(), pool)
        assert (again.added_count, again.existing_count) == (0, 4)
        assert sorted(again.problems) == sorted(report.problems)
        with contextlib.closing(sqlite3.connect(tmp_path / name)) as connection:
            columns = "desc, key0, key1, quantvec, codec_id"
            query = f"SELECT {columns} FROM images JOIN prompts ON prompts.id = prompt_id ORDER BY images.id"
            found.append((report.problems, connection.execute(query).fetchall()))
    assert found[1] == found[0]


def test_images_that_cannot_be_used_are_named_and_the_rest_is_stored(codec, tmp_path, models, capsys):
    source, db = write_folder(tmp_path / "source"), tmp_path / "a.db"
    (source / "0.png").write_bytes(b"no image")
    (source / "2.txt").unlink()
    (source / "4.txt").write_bytes(b"\xff\xfe\xff")
    assert main(["encode", str(source), "--db", str(db), "--codec", str(models.vqgan), "--batch-size", "2"]) == 1
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 3 and all(f"{number}.png" in errors for number in (0, 2, 4))
    assert tokens_by_prompt(db).keys() == {CAPTIONS[1], CAPTIONS[3]}


def test_a_list_does_not_lead_out_of_its_folder(codec, tmp_path):
    (tmp_path / "secret.png").write_bytes(png_of(0))
    source = write_csv(tmp_path / "source")
    source.write_text("path,caption\n../secret.png,a secret")
    with pytest.raises(UserError, match="secret"):
        encode_images(source, tmp_path / "a.db", codec, 2, Columns())


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
def test_links_of_captions_and_pipes_are_not_read(codec, tmp_path):
    source, db = write_folder(tmp_path / "source"), tmp_path / "a.db"
    (tmp_path / "secret.txt").write_text("a secret")
    (source / "0.txt").unlink()
    (source / "0.txt").symlink_to(tmp_path / "secret.txt")
    for name in ("2.png", "4.txt"):
        (source / name).unlink()
        os.mkfifo(source / name)
    with time_limit(20):
        report = encode_images(source, db, codec, 2, Columns())
    assert [f"{number}.png" in line for number, line in zip((0, 2, 4), report.problems, strict=True)] == [True] * 3
    assert tokens_by_prompt(db).keys() == {CAPTIONS[1], CAPTIONS[3]}


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_a_folder_of_links_to_images_with_their_captions_is_read(codec, expected, tmp_path):
    source = write_folder(tmp_path / "source")
    (tmp_path / "chosen").mkdir()
    for name in ("0.png", "0.txt"):
        (tmp_path / "chosen" / name).symlink_to(source / name)
    assert encode_images(tmp_path / "chosen", tmp_path / "a.db", codec, 2, Columns()).added_count == 1
    np.testing.assert_array_equal(tokens_by_prompt(tmp_path / "a.db")[CAPTIONS[0]], expected[CAPTIONS[0]])


@pytest.mark.parametrize(
    "caption", ["\ud800", "a\0b", "x" * 200_000, "", None], ids=["surrogate", "NUL", "long", "empty", "none"]
)
def test_a_caption_that_cannot_be_stored_costs_its_own_image(caption, codec, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = write_tar(tmp_path / "source") if caption == "\ud800" else tmp_path / "data.parquet"
    if source.suffix == ".tar":
        content = json.dumps({"caption": caption}).encode()
        with tarfile.open(source, "w") as tar:
            for name, data in (("0.png", png_of(0)), ("0.json", content), ("1.png", png_of(1)), ("1.txt", b"one")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    else:
        table = pyarrow.table({"image": [png_of(0), png_of(1)], "text": [caption, "one"]})
        parquet.write_table(table, source)
    report = encode_images(source, tmp_path / "a.db", codec, 2, Columns())
    assert (report.added_count, len(report.problems)) == (1, 1)
    assert tokens_by_prompt(tmp_path / "a.db").keys() == {"one"}


@pytest.mark.parametrize("content", ["[" * 10**5, "[" * (3 << 20), '{"file_name": "a\\u0000", "text": "x"}', '"x"'])
def test_lines_of_a_list_that_are_none_are_one_line(content, codec, tmp_path):
    (tmp_path / "list.jsonl").write_text(content)
    with pytest.raises(UserError, match="list"):
        encode_images(tmp_path / "list.jsonl", tmp_path / "a.db", codec, 2, Columns())


def test_a_long_header_in_a_tar_is_one_line(codec, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("0.png")
        member.pax_headers = {"comment": "x" * (2 << 20)}
        tar.addfile(member)
    with pytest.raises(UserError, match=r"a\.tar"):
        encode_images(tmp_path / "a.tar", tmp_path / "a.db", codec, 2, Columns())


@pytest.mark.parametrize("columns", [Columns(), Columns("picture", "caption")])
def test_columns_that_are_missing_are_named(columns, codec, tmp_path):
    source = write_csv(tmp_path / "source")
    source.write_text("a,b\nc,d")
    with pytest.raises(UserError, match=columns.image or "path"):
        encode_images(source, tmp_path / "a.db", codec, 2, columns)
    assert not (tmp_path / "a.db").exists()


def test_an_archive_of_another_codec_is_refused(codec, tmp_path):
    source, db = write_folder(tmp_path / "source"), tmp_path / "a.db"
    encode_images(source, db, codec, 2, Columns())
    other = load_checkpoint(tiny_vqgan(tmp_path / "other", seed=1), "codec")
    with pytest.raises(UserError, match="other"):
        encode_images(source, db, other, 2, Columns())


@pytest.mark.parametrize("name", ["none", "file.doc", "broken.tar", "broken.parquet", "broken.jsonl"])
def test_a_source_that_is_none_is_one_line(name, codec, tmp_path, models, capsys):
    if name != "none":
        (tmp_path / name).write_bytes(b"\x00 no such thing")
    words = ["encode", str(tmp_path / name), "--db", str(tmp_path / "a.db"), "--codec", str(models.vqgan)]
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
    assert not (tmp_path / "a.db").exists()
