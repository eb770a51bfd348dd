"""`Generator` and `Scorer` of the Python API: the same images and rows as the command `generate`."""

import contextlib
import sqlite3

import numpy as np
import pytest
from PIL import Image
from tiny import GRID, IMAGE_SIZE

from dm_generations import Archive, Generator, SamplingParams, Scorer
from dm_generations.archive import verify
from dm_generations.cli import main
from dm_generations.errors import UserError
from dm_generations.sampling.prng import row_key

COLUMNS = (
    "prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, key0, key1, quantvec_md5, "
    "clip_score_input, clip_score_tokenized, log_prob, dtype, sampler_version, generator_id IS NULL, clip_id IS NULL"
)


@pytest.fixture(scope="module")
def generator(models):
    return Generator.load(models.dalle_bart, batch_size=4, codec=models.vqgan)


@pytest.fixture(scope="module")
def scorer(models):
    return Scorer.load(models.clip, batch_size=4)


def rows(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return sorted(connection.execute(f"SELECT {COLUMNS} FROM images"))


def command(models, db, *words):
    paths = ["--model", models.dalle_bart, "--codec", models.vqgan, "--clip", models.clip, "--batch-size", 4]
    assert main(list(map(str, ["generate", "--db", db, *paths, *words]))) == 0


@pytest.mark.e2e
def test_it_draws_and_saves_what_the_command_does(models, generator, scorer, tmp_path):
    words = ["--prompts", "a boat", "a cat", "--n", 3, "--seed", 7, "--top-k", 5, "--cond-scale", 1, 3]
    command(models, tmp_path / "command.db", *words)
    done = []
    results = generator(
        ["a boat", "a cat"],
        n=3,
        seed=7,
        top_k=5,
        cond_scale=[1, 3],
        scorer=scorer,
        on_progress=lambda *at: done.append(at),
    )
    assert len(results) == results.save(tmp_path / "python.db") == 12
    expected, found = rows(tmp_path / "command.db"), rows(tmp_path / "python.db")
    assert [row[:9] for row in found] == [row[:9] for row in expected]
    assert [row[12:] for row in found] == [row[12:] for row in expected]
    np.testing.assert_allclose(*[np.array([row[9:12] for row in each], float) for each in (found, expected)], rtol=1e-5)
    with Archive.open(tmp_path / "python.db") as archive:
        assert list(verify(archive)) == []
        assert len(archive.models()) == 3
    assert (done[0], done[-1]) == ((0, 12), (12, 12))
    assert results.save(tmp_path / "command.db") == 0  # they are there already


@pytest.mark.e2e
def test_defaults_are_those_of_the_command(models, generator, tmp_path):
    command(models, tmp_path / "command.db", "--prompts", "a boat", "--n", 1)
    generator("a boat").save(tmp_path / "python.db")
    assert [row[:9] for row in rows(tmp_path / "command.db")] == [row[:9] for row in rows(tmp_path / "python.db")]


@pytest.mark.e2e
def test_a_single_prompt_is_one_prompt(generator):
    results = generator("a boat", n=2, sc_prompts="blurry", temperature=np.float32(0.5))
    assert [image.prompt for image in results] == ["a boat", "a boat"]
    assert {image.sc_prompt for image in results} == {"blurry"} and results[0].settings.temperature == 0.5
    assert [image.key for image in results] == [row_key(0, 0), row_key(0, 1)]
    assert results.tokens.shape == (2, GRID**2) and results.tokens.dtype == np.uint16
    assert results[0].id is None and results[0].scores == {}


def test_results_are_the_tokens_of_generate_with_keys(generator):
    results = generator("a boat", n=2, cond_scale=3, keys=[(1, 2), (3, 4)])
    expected = generator.generate(["a boat"] * 2, SamplingParams(256, cond_scale=3.0), np.array([(1, 2), (3, 4)]))
    np.testing.assert_array_equal(results.tokens, expected)


def test_results_hold_images(generator):
    results = generator("a boat", n=3, cond_scale=[1, 3])
    images = results.images()
    assert [image.size for image in images] == [(IMAGE_SIZE, IMAGE_SIZE)] * 6
    np.testing.assert_array_equal(np.array([np.asarray(image) for image in images]), generator.decoder(results.tokens))
    np.testing.assert_array_equal(np.asarray(results[4].image()), np.asarray(images[4]))
    assert isinstance(results[1:3], type(results)) and len(results[1:3]) == 2
    page = results._repr_html_()
    assert page.count("<img") == 6 and page.count("c=1.0") == page.count("c=3.0") == 3
    assert "a boat" in repr(results) and "6" in repr(results)


def test_hostile_prompts_are_shown_as_text(generator):
    page = generator(["<script>alert(1)</script>", "'\"><b>"], n=1)._repr_html_()
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page
    assert "\x1b" not in repr(generator("\x1b[31m")[0])


@pytest.mark.e2e
def test_the_best_are_those_with_the_highest_scores(generator, scorer):
    results = generator("a boat", n=5, scorer=scorer)
    scores = [image.scores["clip_score_input"] for image in results]
    best = results.best(2)
    assert [image.scores["clip_score_input"] for image in best] == sorted(scores, reverse=True)[:2]
    np.testing.assert_allclose(scorer(results.images(), "a boat"), scores, rtol=1e-4)
    assert len(generator("a boat", n=2).best(9)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ""}, "prompt"),
        ({"prompts": []}, "prompt"),
        ({"n": 0}, "n "),
        ({"seed": -1}, "seed"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": [1, 0]}, "top_p"),
        ({"cond_scale": []}, "cond_scale"),
        ({"temperature": float("nan")}, "temperature"),
        ({"keys": []}, "key"),
    ],
)
def test_wrong_values_are_named(generator, arguments, message):
    with pytest.raises(UserError, match=message):
        generator(**{"prompts": "a boat", **arguments})


def test_results_are_saved_into_an_open_archive(generator, tmp_path):
    results = generator("a boat", n=2)
    with Archive.create(tmp_path / "a.db") as archive:
        assert (results.save(archive), results[:1].save(archive)) == (2, 0)
        np.testing.assert_array_equal(archive.images()[0].tokens, results[0].tokens)
    with Archive.open(tmp_path / "a.db") as archive, pytest.raises(UserError, match="reading"):
        results.save(archive)
    with pytest.raises(UserError, match="missing"):
        results.save(tmp_path / "missing" / "a.db")


def test_a_model_without_its_codec_says_so(models):
    generator = Generator.load(models.dalle_bart, batch_size=2)  # its tokens need none
    with pytest.raises(UserError, match="codec"):
        generator("a boat")


@pytest.mark.e2e
def test_images_of_any_size_are_scored_and_mistakes_named(scorer):
    images = [Image.new(mode, (9, 7)) for mode in ("RGB", "RGBA", "L")]
    assert scorer(images, "a boat").shape == (3,) and scorer([], []).shape == (0,)
    np.testing.assert_array_equal(scorer(images, "a boat"), scorer(images, ["a boat"] * 3))
    with pytest.raises(UserError, match="sizes"):
        scorer([*images, Image.new("RGB", (3, 3))], "a boat")
    with pytest.raises(UserError, match="3"):
        scorer(images, ["a boat"])


def test_reprs_name_the_models(generator, scorer, models):
    assert models.dalle_bart.name in repr(generator) and models.clip.name in repr(scorer)
    assert models.vqgan.name in repr(generator.decoder)
