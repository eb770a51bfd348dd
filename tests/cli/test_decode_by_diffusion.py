"""`decode --decoder`, and `score --decoder`: what is written, what is not, and a decode that is killed."""

import dataclasses
import json
import shutil
import signal

import numpy as np
import pytest
from decode_kit import all_files, read_images
from diffusion_kit import TINY, tiny_decoder
from faults_kit import Command, bytes_under
from PIL import Image
from tiny import CODEBOOK_SIZE, GRID

from dm_generations.archive import Archive, ModelInfo, NewImage
from dm_generations.cli import main
from dm_generations.export.manifest import MANIFEST_START
from dm_generations.models.loading import load_checkpoint
from dm_generations.sampling.params import SamplingParams

pytestmark = pytest.mark.e2e
COUNT = 6
SMALL = dataclasses.replace(TINY, image_size=2, level_channels=(32,), attention_levels=())  # quick to compile


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("decoder"), SMALL)


@pytest.fixture
def db(models, tmp_path):
    tokens = np.random.default_rng(0).integers(CODEBOOK_SIZE, size=(COUNT, GRID**2), dtype=np.uint16)
    with Archive.create(tmp_path / "a.db") as archive, archive.transaction():
        generator_id = archive.model_id(ModelInfo("generator", "tiny", "a" * 64, {}))
        codec_id = archive.model_id(load_checkpoint(models.vqgan, "codec").model_info())
        images = (
            NewImage("a boat", None, SamplingParams(5), 7, key, row.astype("<u2").tobytes(), 1.0, 2.0 + key)
            for key, row in enumerate(tokens)
        )
        archive.add_images(images, generator_id, codec_id, None, 1)
    return tmp_path / "a.db"


@pytest.fixture
def decode(models, db, file):
    def decode(out, *flags, status=0) -> dict[str, np.ndarray]:
        words = ["decode", db, "--codec", models.vqgan, "--decoder", file, "--decoder-steps", "3", "--out-dir", out]
        assert main([*map(str, words), *flags]) == status
        return read_images(out)

    return decode


def manifest_of(out) -> dict:
    text = (out / "manifest.js").read_text()
    return json.loads(text.removeprefix(MANIFEST_START).rstrip(";\n"))


def test_images_say_how_they_were_decoded(decode, file, tmp_path):
    images = decode(tmp_path / "out", "--metadata", "--decoder-n", "2", "--decoder-seed", "5")
    assert len(images) == 2 * COUNT and len({image.tobytes() for image in images.values()}) == 2 * COUNT
    expected = {"name": file.name, "steps": "3", "eta": None, "clip_denoised": False, "seed": 5}
    manifest = manifest_of(tmp_path / "out")
    assert manifest["decoder"].items() >= expected.items()
    assert sorted(manifest["images"]["decoding"]) == [0] * COUNT + [1] * COUNT
    records = [json.loads(Image.open(tmp_path / "out" / path).text["Comment"]) for path in images]
    assert all(record["decoder"].items() >= expected.items() for record in records)
    found = {(record["key1"], record["rank"], record["decoder"]["decoding"]) for record in records}
    assert len(found) == 2 * COUNT and {rank for _, rank, _ in found} == set(range(COUNT))
    # The first decoding of each image is what a decode of one gives, under the same name.
    single = decode(tmp_path / "single", "--decoder-seed", "5")
    assert single.keys() < images.keys()
    for path, image in single.items():
        np.testing.assert_array_equal(images[path], image)


def test_another_decoder_replaces_the_images(decode, models, db, tmp_path):
    out = tmp_path / "out"
    first = decode(out)
    assert decode(out).keys() == first.keys()
    other = decode(out, "--decoder-seed", "1")
    assert other.keys() == first.keys() and all((other[path] != first[path]).any() for path in first)
    assert main(["decode", str(db), "--codec", str(models.vqgan), "--out-dir", str(out)]) == 0
    assert {image.shape for image in read_images(out).values()} == {(8, 8, 3)}  # the codec's own
    back = decode(out)
    for path, image in first.items():
        np.testing.assert_array_equal(back[path], image)


def test_a_killed_decode_goes_on_to_the_same_bytes(decode, models, db, file, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    decode(whole)
    flags = ("--decoder", str(file), "--decoder-steps", "3", "--batch-size", "1")
    command, killed_count = Command(db, models.vqgan), 0
    for part in (0.2, 0.5, 0.8):
        killed = command.signalled(cut, int(part * bytes_under(whole)), signal.SIGKILL, *flags)
        assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr
        killed_count += killed.returncode != 0
    assert killed_count
    decode(cut)
    assert all_files(cut) == all_files(whole)


def test_other_ways_to_write(decode, tmp_path):
    decode(tmp_path / "tar", "--mode", "tar", "--decoder-n", "2")
    (shard,) = (tmp_path / "tar").glob("*.tar")
    shutil.unpack_archive(shard, tmp_path / "unpacked")
    assert len(list((tmp_path / "unpacked").glob("*.json"))) == 2 * COUNT
    decode(
        tmp_path / "gallery",
        "--mode",
        "gallery",
        "--gallery-cols",
        "2",
        "--gallery-rows",
        str(COUNT),
        "--decoder-n",
        "2",
    )
    (gallery,) = read_images(tmp_path / "gallery").values()
    assert gallery.shape[:2] == (SMALL.image_size * COUNT, SMALL.image_size * 2)


@pytest.mark.parametrize(
    "flags",
    [
        ["--decoder-steps", "1"],
        ["--decoder-steps", "ddim600"],
        ["--decoder-steps", "25", "--eta", "0.5"],
        ["--mode", "npy"],
        ["--mode", "gallery", "--seamless"],
        ["--guidance-clip", "x"],
    ],
)
def test_flags_that_cannot_be(decode, tmp_path, flags, capsys):
    decode(tmp_path / "out", *flags, status=1)
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()


def test_flags_that_need_a_decoder(models, db, tmp_path, capsys):
    for flag in (["--decoder-n", "2"], ["--decoder-steps", "25"], ["--clip-denoised"]):
        assert main(["decode", str(db), "--codec", str(models.vqgan), *flag, "--out-dir", str(tmp_path / "out")]) == 1
        assert flag[0] in capsys.readouterr().err


def test_scores_of_its_images_are_another_judges(models, db, file, decode, tmp_path):
    words = ["score", db, "--codec", models.vqgan, "--clip", models.clip]
    assert main(list(map(str, words))) == 0
    for number in (1, 2):
        flags = ["--decoder", file, "--decoder-steps", "3", "--decoding", number]
        assert main(list(map(str, [*words, *flags]))) == 0
    with Archive.open(db) as archive:
        query = "SELECT s.id, count(*) FROM scores JOIN scorers s ON s.id = scorer_id GROUP BY s.id, reads"
        assert {count for _, count in archive.connection.rows(query)} == {COUNT}
        names = {model.name for model in archive.models().values() if model.kind == "clip"}
    assert len(names) == 3
    (judge,) = (name for name in names if name.endswith("decoding 2"))
    decode(tmp_path / "out", "--rank-by", judge, "--n-best", "1")
