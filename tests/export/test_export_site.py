"""`export-site`: a folder for a static host, whole at any moment, and one page for several archives."""

import json

import numpy as np
import pytest
from decode_kit import change, random_tokens, write_archive_2022
from PIL import Image
from tiny import CODEBOOK_SIZE, GRID

from dm_generations.cli import main
from dm_generations.export.manifest import MANIFEST_START
from dm_generations.inference.decoder import Decoder

pytestmark = pytest.mark.e2e


@pytest.fixture
def export(tmp_path, models):
    def export(*words: object, status: int = 0):
        command = ["export-site", *words, "--out-dir", tmp_path / "site", "--codec", models.vqgan]
        assert main(list(map(str, command))) == status
        return tmp_path / "site"

    return export


@pytest.fixture
def archive(tmp_path):
    tokens = random_tokens(4, GRID**2, CODEBOOK_SIZE)
    return write_archive_2022(tmp_path / "a.db", tokens[:3], ("a boat", "../<b>"))


def read_manifest(site) -> dict:
    text = (site / "manifest.js").read_text(encoding="ascii")
    return json.loads(text.removeprefix(MANIFEST_START).removesuffix(";\n"))


def image_files(site) -> dict[str, list]:
    """Images and thumbnails by the names of their folders."""
    return {folder.name: sorted(folder.glob("*.webp")) for folder in site.rglob("*") if folder.is_dir()}


def test_a_site_has_page_manifest_images_and_thumbnails(export, archive, models):
    site = export(archive)
    manifest = read_manifest(site)
    assert (site / "index.html").is_file() and manifest["archives"] == ["a.db"]
    images = sorted(site.glob("*/*.webp"))
    assert len(images) == 6
    shown = np.stack([Image.open(image) for image in images[:3]])
    expected = Decoder.load(models.vqgan)(random_tokens(4, GRID**2, CODEBOOK_SIZE)[:3])
    np.testing.assert_array_equal(shown, expected)
    for image in images:
        with Image.open(image.parent / "thumbs" / image.name) as thumbnail:
            assert thumbnail.width == manifest["thumbnails"]["side"] == shown.shape[1] // 2


def test_a_stopped_run_continues(export, archive, capsys):
    site = export(archive)
    kept, gone, bare = sorted(site.glob("*/*.webp"))[:3]
    before = kept.stat().st_mtime_ns
    (site / "manifest.js").unlink()
    gone.unlink()
    (bare.parent / "thumbs" / bare.name).unlink()
    export(archive)
    assert "2 files written" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before and gone.is_file() and (bare.parent / "thumbs" / bare.name).is_file()
    assert len(read_manifest(site)["images"]["name"]) == 6


def test_a_rank_that_went_to_another_image_is_exported_anew(export, archive):
    site = export(archive)
    (first, *_), thumbnails = sorted(site.glob("0001*/*.webp")), image_files(site)["thumbs"]
    before = first.read_bytes(), (first.parent / "thumbs" / first.name).read_bytes()
    change(archive, "UPDATE images SET clip_score_input = 99 WHERE id = 3")
    export(archive)
    after = first.read_bytes(), (first.parent / "thumbs" / first.name).read_bytes()
    assert after[0] != before[0] and after[1] != before[1] and image_files(site)["thumbs"] == thumbnails


def test_selected_images_in_a_lossy_format(export, archive):
    site = export(archive, "--prompt-ids", 1, "--n-best", 2)
    (first, *_) = sorted(site.glob("*/*.webp"))
    lossless = first.read_bytes()
    export(archive, "--prompt-ids", 1, "--n-best", 2, "--quality", 50)
    assert first.read_bytes() == lossless  # what is there stays
    export(archive, "--prompt-ids", 1, "--n-best", 2, "--quality", 50, "--overwrite")
    assert first.read_bytes() != lossless
    assert len(sorted(site.glob("*/*.webp"))) == 2 and read_manifest(site)["prompts"] == [[1, "a boat"]]


def test_several_archives_have_one_page(export, archive, tmp_path):
    tokens = random_tokens(4, GRID**2, CODEBOOK_SIZE)
    other = write_archive_2022(tmp_path / "b.db", tokens[2:], ("a car", "a boat"))
    change(other, "UPDATE images SET time_end = 86401.0")
    site = export("--db", archive, "--db", other)
    manifest, own = read_manifest(site), [read_manifest(folder) for folder in sorted(site.glob("[12]_?"))]
    assert manifest["archives"] == ["a.db", "b.db"]
    assert [text for _, text in manifest["prompts"]] == ["a boat", "../<b>", "a car"]
    groups, images = manifest["groups"], manifest["images"]
    assert groups["archive"] == [0, 0, 1, 1] and groups["prompt"] == [0, 1, 2, 0] and groups["count"] == [3, 3, 2, 2]
    assert images["md5"] == own[0]["images"]["md5"] + own[1]["images"]["md5"]
    seconds = [images["time"]["start"] + second for second in images["time"]["seconds"]]
    assert seconds == [1] * 6 + [86401] * 4
    keys = [manifest["seeds"][position] for position in images["seed"]]
    assert keys == [[0, rank] for count in groups["count"] for rank in range(count)]
    first = 0
    for prefix, suffix, count in zip(groups["prefix"], groups["suffix"], groups["count"], strict=True):
        for name in images["name"][first : first + count]:
            assert (site / f"{prefix}{name}{suffix}").is_file()
        first += count
    assert manifest["thumbnails"] == own[0]["thumbnails"]


def test_bad_input_writes_nothing(export, archive, tmp_path, capsys):
    (tmp_path / "bad.db").write_bytes(b"not an archive")
    for words in (
        [tmp_path / "missing.db"],
        [archive, tmp_path / "bad.db"],
        [archive, archive],
        [archive, "--db", archive],
    ):
        site = export(*words, status=1)
        assert not site.exists() and len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "site").write_text("a file")
    export(archive, status=1)
    assert (tmp_path / "site").read_text() == "a file"


def test_a_bad_row_is_reported_and_left_out(export, archive):
    change(archive, "UPDATE images SET quantvec = x'00' WHERE id = 1")
    site = export(archive, status=1)
    assert len(sorted(site.glob("*/*.webp"))) == 5 and len(read_manifest(site)["images"]["name"]) == 5
