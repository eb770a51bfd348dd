"""`score --vectors`, `score --aesthetic`, `find`, `compare` and `decode --rank-by` as commands, on tiny models."""

import csv
import io
import json

import numpy as np
import pytest
from archive_kit import execute
from PIL import Image
from safetensors.numpy import save_file
from tiny import CLIP_CONFIG, tiny_clip

from dm_generations.archive import Archive, verify
from dm_generations.archive.selection import Selection, compile_selection
from dm_generations.archive.vectors import find_vector_model, read_vectors
from dm_generations.cli import main
from dm_generations.inference.decoder import Decoder
from dm_generations.inference.scorer import Scorer
from dm_generations.models.loading import load_checkpoint

pytestmark = pytest.mark.e2e

WIDTH = CLIP_CONFIG["projection_dim"]


def command(*words) -> int:
    return main(list(map(str, words)))


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    """An archive of 8 images in 2 groups with scores and vectors of the tiny CLIP, scores of a head, and that head."""
    folder = tmp_path_factory.mktemp("find")
    db, head = folder / "a.db", folder / "taste.safetensors"
    save_file({"weight": np.eye(WIDTH, dtype=np.float32)[:1], "bias": np.ones(1, np.float32)}, head)
    flags = ["--codec", models.vqgan, "--clip", models.clip, "--batch-size", 4]
    words = ["--model", models.dalle_bart, "--prompts", "a boat", "a cat", "--n", 4]
    assert command("generate", "--db", db, *flags, *words) == 0
    assert command("score", "--db", db, *flags, "--vectors", "--aesthetic", head) == 0
    return db, head


@pytest.fixture(scope="module")
def vectors(models, made):
    """Vectors of the images, computed anew."""
    codec, clip = load_checkpoint(models.vqgan, "codec"), load_checkpoint(models.clip, "clip")
    with Archive.open(made[0]) as archive:
        tokens = [np.frombuffer(row.quantvec, "<u2") for row in archive.read_rows(range(1, 9))]
    images = Decoder.from_checkpoint(codec, 4).decode(np.stack(tokens).astype(np.uint16))
    return images, Scorer.from_checkpoint(clip, 4).image_features(images)


def test_vectors_and_scores_of_a_head_are_stored(models, made, vectors, capsys):
    db, head = made
    with Archive.open(db) as archive:
        ids, stored = read_vectors(archive, find_vector_model(archive))
        assert list(verify(archive)) == []
        key = archive.groups()[0].key
        by_head = list(archive.image_ids(key, where=compile_selection(archive, Selection(rank_by=head.name))))
    assert list(ids) == list(range(1, 9)) and stored.dtype == np.float16
    np.testing.assert_allclose(stored, vectors[1], atol=2e-3)
    scores = execute(db, "SELECT value FROM scores ORDER BY image_id")
    np.testing.assert_allclose([value for (value,) in scores], vectors[1][:, 0] + 1, atol=1e-5)
    assert by_head == sorted(range(1, 5), key=lambda i: -scores[i - 1][0])
    content = db.read_bytes()
    assert command("score", "--db", db, "--codec", models.vqgan, "--clip", models.clip, "--vectors") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert db.read_bytes() == content


def test_find_like_an_image_and_like_a_text(models, made, vectors, tmp_path, capsys):
    images, features = vectors
    Image.fromarray(images[4]).save(tmp_path / "image.png")
    flags = ["--db", made[0], "--clip", models.clip, "--format", "json"]
    assert command("find", *flags, "--like", tmp_path / "image.png", "--limit", 3) == 0
    found = json.loads(capsys.readouterr().out)
    order = np.argsort(-(features @ features[4]))[:3] + 1
    assert found[0]["id"] == 5 and found[0]["similarity"] == pytest.approx(1, abs=1e-3)
    assert found[0]["prompt"] == "a cat" and [row["id"] for row in found] == list(order)
    assert command("find", *flags, "--like", "a boat") == 0
    found = json.loads(capsys.readouterr().out)
    text = Scorer.from_checkpoint(load_checkpoint(models.clip, "clip")).text_features(["a boat"])[0]
    np.testing.assert_allclose([row["similarity"] for row in found], np.sort(features @ text)[::-1], atol=2e-3)


def test_find_duplicates(made, capsys):
    assert command("find", "--db", made[0], "--duplicates", "--threshold", 0.001, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["set"] for row in rows} >= {"1"} and rows[0]["id"] == "1"
    assert command("find", "--db", made[0], "--duplicates", "--threshold", 1) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1  # the names of the columns


def test_compare_settings_and_other_images(models, made, vectors, tmp_path, capsys):
    db, head = made
    for number, image in enumerate(vectors[0]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    flags = ["--db", db, "--clip", models.clip, "--format", "json"]
    np.save(tmp_path / "vectors.npy", vectors[1].astype(np.float64))
    for other in (tmp_path, db, tmp_path / "vectors.npy"):
        assert command("compare", *flags, "--with", other) == 0
        setting, whole = json.loads(capsys.readouterr().out)
        assert setting["images"] == setting["vectors"] == setting["scored"] == 8
        assert setting["score_low"] < setting["mean_score"] < setting["score_high"]
        assert setting["vendi_low"] < setting["vendi"] < setting["vendi_high"]
        assert whole["cmmd"] == pytest.approx(0, abs=1e-2) and whole["vendi"] is None
    assert command("compare", "--db", db, "--rank-by", head.name, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert float(rows[0]["mean_score"]) == pytest.approx(vectors[1][:, 0].mean() + 1, abs=1e-4)
    assert "cmmd" not in rows[0]
    assert command("compare", "--db", db) == 0
    assert "vendi" in capsys.readouterr().out


def test_decode_ranks_by_another_judge(models, made, vectors, tmp_path):
    images, features = vectors
    flags = ["--db", made[0], "--codec", models.vqgan, "--prompt-ids", 1, "--n-best", 1, "--out-dir", tmp_path / "out"]
    assert command("decode", *flags, "--rank-by", made[1].name) == 0
    (path,) = (tmp_path / "out").rglob("*.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), images[features[:4, 0].argmax()])


def test_a_second_clip_adds_scores_and_vectors(models, made, tmp_path, capsys):
    db, other = tmp_path / "a.db", tiny_clip(tmp_path / "other", seed=1)
    db.write_bytes(made[0].read_bytes())
    columns = "SELECT id, clip_score_input, clip_score_tokenized, clip_id FROM images"
    before = execute(db, columns)
    flags = ["--db", db, "--codec", models.vqgan, "--clip", other, "--batch-size", 4]
    assert command("score", *flags, "--vectors") == 0
    assert execute(db, columns) == before
    (count,) = execute(db, "SELECT count(*) FROM scores JOIN scorers ON scorers.id = scorer_id WHERE reads = 'input'")
    assert count == (8,)
    assert command("find", "--db", db, "--duplicates") == 1  # of which of the two?
    assert "--clip" in capsys.readouterr().err
    assert command("find", "--db", db, "--duplicates", "--clip", other) == 0
    assert command("score", *flags, "--all") == 0
    assert all(new[1] != old[1] for new, old in zip(execute(db, columns), before, strict=True))


def test_what_is_wrong_is_said_in_a_line(models, made, tmp_path, capsys):
    db, head = made
    bare = tmp_path / "bare.db"
    Archive.create(bare).close()
    other, wide = tiny_clip(tmp_path / "other", seed=1), tmp_path / "wide.safetensors"
    save_file({"weight": np.ones((1, WIDTH + 1), np.float32), "bias": np.ones(1, np.float32)}, wide)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    clip = ["--clip", models.clip]
    np.save(tmp_path / "wide.npy", np.ones((2, WIDTH + 1), np.float32))
    np.save(tmp_path / "empty.npy", np.ones((0, WIDTH), np.float32))
    np.save(tmp_path / "nan.npy", np.full((2, WIDTH), np.nan))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "wide.npy").read_bytes()[:100])
    for words, needed in (
        (["find", "--db", bare, "--duplicates"], ["score --vectors"]),
        (["find", "--db", db, "--clip", other, "--like", "a cat"], ["'clip'", "score --vectors"]),
        (["find", "--db", tmp_path / "none.db", "--like", "a cat"], ["none.db"]),
        (["find", "--db", db, *clip, "--like", tmp_path / "broken" / "a.png"], ["a.png"]),
        (["compare", "--db", db, *clip, "--with", tmp_path / "empty"], ["empty"]),
        (["compare", "--db", db, *clip, "--with", tmp_path / "broken"], ["a.png"]),
        (["compare", "--db", db, "--with", bare], ["bare.db", "score --vectors"]),
        (["compare", "--db", db, "--with", tmp_path / "wide.npy"], ["wide.npy", str((2, WIDTH + 1)), str(WIDTH)]),
        (["compare", "--db", db, "--with", tmp_path / "empty.npy"], ["empty.npy", "float32"]),
        (["compare", "--db", db, "--with", tmp_path / "nan.npy"], ["nan.npy", "NaN"]),
        (["compare", "--db", db, "--with", tmp_path / "cut.npy"], ["cut.npy", "NumPy"]),
        (["compare", "--db", db, "--rank-by", "nobody"], ["nobody", head.name, "clip_score_input"]),
        (["decode", "--db", db, "--out-dir", tmp_path / "out", "--rank-by", "nobody"], ["nobody", head.name]),
        (["score", "--db", db, *clip, "--aesthetic", wide], ["wide", str(WIDTH + 1), str(WIDTH), "--clip"]),
        (["score", "--db", db, *clip, "--aesthetic", tmp_path / "none.pth"], ["none.pth"]),
    ):
        assert command(*words) == 1, words
        printed = capsys.readouterr().err
        assert len(printed.splitlines()) == 1 and all(text in printed for text in needed), printed
    assert command("compare", "--db", bare) == 0  # a warning says how to make vectors
    assert "score --vectors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
