"""aMUSEd by the commands: from text to archive to PNG and page, sampled again, and refused where something is wrong."""

import json
import sqlite3

import numpy as np
import pytest
from amused_kit import rewrite_json, small
from PIL import Image

from dm_generations import Generator, cli
from dm_generations.inference.decoder import Decoder
from dm_generations.models.loading import load_checkpoint

WORDS = ["--no-score", "--batch-size", 2, "--cpu-only"]
PROMPT = "a red cat"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small(tmp_path_factory.mktemp("amused") / "model")


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def rows_of(db, columns="quantvec", order="extra_settings, key0"):
    with sqlite3.connect(db) as connection:
        return connection.execute(f"SELECT {columns} FROM images ORDER BY {order}").fetchall()


@pytest.mark.e2e
def test_from_text_to_archive_to_page_and_again(model, tmp_path, capsys):
    db, out = tmp_path / "a.db", tmp_path / "images"
    sweep = ["generate", "--db", db, "--model", model, "--prompts", PROMPT, *WORDS]
    assert run(*sweep, "--n", 2, "--steps", 2, 12) == 0
    assert rows_of(db, "DISTINCT cond_scale, top_k, top_p, temperature, extra_settings") == [
        (10.0, 0, 1.0, 1.0, ""),
        (10.0, 0, 1.0, 1.0, '{"steps":2}'),
    ]
    stored = rows_of(db)
    assert run(*sweep, "--n", 2, "--steps", 12) == 0  # they are there
    assert rows_of(db) == stored

    for flag in ("--regenerate", "--replay"):
        assert run("verify", db, flag, "--model", model, *WORDS[1:]) == 0
    assert run("decode", "--db", db, "--codec", model, "--out-dir", out, "--cpu-only") == 0
    assert (out / "samplebrowser.html").is_file()
    codec = load_checkpoint(model, "codec")
    tokens = np.array([np.frombuffer(blob, "<u2") for (blob,) in stored])
    expected = {image.tobytes() for image in Decoder.from_checkpoint(codec, batch_size=1)(tokens)}
    found = {np.asarray(Image.open(path).convert("RGB")).tobytes() for path in out.rglob("*.png")}
    assert found == expected

    results = Generator.load(model, batch_size=2)(PROMPT, n=2, extra_settings={"steps": [12, 2]})
    assert {image.tokens.tobytes() for image in results} == {blob for (blob,) in stored}

    with sqlite3.connect(db) as connection:
        connection.execute("UPDATE images SET extra_settings = '{\"steps\":3}' WHERE extra_settings != ''")
    connection.close()
    capsys.readouterr()
    for flag in ("--regenerate", "--replay"):
        assert run("verify", db, flag, "--model", model, "--json", *WORDS[1:]) == 1
        problems = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(problems) == 2


@pytest.mark.e2e
def test_progressive_writes_the_image_of_each_step(model, tmp_path):
    words = ["--model", model, "--prompts", PROMPT, *WORDS, "--steps", 5, "--progressive", 2]
    assert run("generate", "--db", tmp_path / "a.db", "--n", 1, *words, "--progressive-dir", tmp_path / "steps") == 0
    files = sorted((tmp_path / "steps").iterdir())
    assert [file.name.split("_")[3] for file in files] == ["0002", "0004", "0005"]
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    ((blob,),) = rows_of(tmp_path / "a.db")
    decoder = Decoder.from_checkpoint(load_checkpoint(model, "codec"), batch_size=1)
    np.testing.assert_array_equal(images[-1], decoder(np.frombuffer(blob, "<u2")[None])[0])
    assert (images[0] != images[-1]).any()


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--steps", 0], "steps"),
        (["--steps", 1000], "steps"),
        (["--mask-temperature", "nan"], "mask_temperature"),
        (["--aesthetic-score", "inf"], "aesthetic_score"),
    ],
)
def test_settings_out_of_range_are_one_line(words, named, model, tmp_path, capsys):
    status = run("generate", "--db", tmp_path / "a.db", "--model", model, "--prompts", PROMPT, "--n", 1, *WORDS, *words)
    errors = capsys.readouterr().err
    assert status == 1
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert named in errors
    assert not (tmp_path / "a.db").exists()


def test_other_models_do_not_have_its_settings(models, tmp_path, capsys):
    words = ["--model", models.dalle_bart, "--codec", models.vqgan, "--prompts", PROMPT, *WORDS]
    assert run("generate", "--db", tmp_path / "a.db", *words, "--steps", 4) == 1
    assert "steps" in capsys.readouterr().err
    assert not (tmp_path / "a.db").exists()


@pytest.mark.e2e
def test_the_codec_of_another_model_is_refused(model, tmp_path, capsys):
    """With fewer tokens than the model samples: no image of such an archive could be decoded."""
    other = small(tmp_path / "other", seed=1)
    config = json.loads((other / "transformer" / "config.json").read_text())
    rewrite_json(other / "vqvae" / "config.json", num_vq_embeddings=config["codebook_size"] - 1)
    words = ["--model", model, "--codec", other, "--prompts", PROMPT, *WORDS]
    assert run("generate", "--db", tmp_path / "a.db", *words) == 1
    error = capsys.readouterr().err
    assert "vqvae" in error
    assert "quantize.embedding.weight" in error
