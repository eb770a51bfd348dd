"""Which images are learnt from, how they are split and weighed, and in which order batches have them."""

import contextlib
import shutil
import sqlite3

import numpy as np
import pytest
from training_kit import PROMPTS, write_archive

from dm_generations.archive import Archive, Selection
from dm_generations.archive.ratings import Rating, add_ratings
from dm_generations.errors import UserError
from dm_generations.models.loading import load_checkpoint
from dm_generations.training.data import Examples, choose_rows


@pytest.fixture(scope="module")
def codec(models):
    return load_checkpoint(models.vqgan, "codec")


@pytest.fixture(scope="module")
def archive(models, tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("data") / "a.db", models)


def open_examples(codec, *paths, **filters):
    return Examples(paths, Selection.of(**filters), codec, codec.config.grid**2)


def test_each_epoch_has_every_row_once():
    rows = np.concatenate([choose_rows(7, step, 6, 10) for step in range(5)])
    for epoch in rows.reshape(3, 10):
        assert sorted(epoch) == list(range(10))
    assert (rows[:10] != rows[10:20]).any()
    assert (choose_rows(8, 0, 6, 10) != rows[:6]).any()


def test_tokens_are_those_of_the_archive_in_any_order(codec, archive):
    with open_examples(codec, archive) as examples, Archive.open(archive) as opened:
        numbers = [40, 3, 3, 17]
        texts, tokens = examples.read(numbers)
        prompts = opened.prompts()
        for number, text, row in zip(numbers, texts, tokens, strict=True):
            (image,) = opened.read_rows([int(examples.rows["id"][number])])
            assert prompts[image.prompt_id] == text
            np.testing.assert_array_equal(row, np.frombuffer(image.quantvec, "<u2"))


@pytest.mark.parametrize(
    "statement",
    [
        *("prompt_id = 'a'", "prompt_id = 1e300", "prompt_id = 99", "prompt_id = x'00'", "codec_id = 'a'"),
        *("clip_score_input = 'a'", "clip_score_input = 9e999", "clip_score_input = x'00'", "codec_id = 99"),
        *("quantvec = 'a'", "quantvec = zeroblob(9)", "quantvec = NULL", "quantvec_md5 = 7", "key0 = 'a'"),
        *("prompt_id = NULL", "generator_id = 'a'", "sc_prompt_id = 'a'", "top_k = 'a'"),
    ],
)
def test_values_that_an_archive_may_not_have(statement, codec, archive, tmp_path):
    path = shutil.copy(archive, tmp_path / "a.db")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        with contextlib.suppress(sqlite3.IntegrityError):
            connection.execute(f"UPDATE images SET {statement} WHERE id % 7 = 1")
    with contextlib.suppress(UserError), open_examples(codec, path, best=2) as examples:
        examples.weights("score")
        examples.pairs(np.arange(len(examples.rows)), "score", 0.0)
        examples.read(np.arange(len(examples.rows)))


def test_the_best_of_a_prompt_are_chosen_over_all_its_settings_and_archives(codec, models, archive, tmp_path):
    other = write_archive(tmp_path / "b.db", models, seed=1)
    with open_examples(codec, archive, other) as every, open_examples(codec, archive, other, best=3) as best:
        for text in PROMPTS:
            scores = every.rows["score"][every.rows["prompt"] == every.texts.index(text)]
            chosen = best.rows["score"][best.rows["prompt"] == best.texts.index(text)]
            np.testing.assert_array_equal(np.sort(chosen), np.sort(scores)[-3:])


def test_a_prompt_is_learnt_or_held_out_whatever_else_there_is(codec, archive):
    with open_examples(codec, archive) as examples:
        trained, held_out = examples.split(0.25)
        of_prompt = examples.rows["prompt"]
        kept = {examples.texts[number] for number in of_prompt[held_out]}
        assert len(kept) == round(0.25 * len(PROMPTS))
        assert not set(of_prompt[trained]) & set(of_prompt[held_out])
        assert sorted([*trained, *held_out]) == list(range(len(examples.rows)))
        assert not len(examples.split(0)[1])
    with open_examples(codec, archive, score="0..") as fewer:
        assert {fewer.texts[number] for number in fewer.rows["prompt"][fewer.split(0.25)[1]]} == kept


def test_nothing_left_to_learn_is_an_error(codec, archive):
    with open_examples(codec, archive, prompt=PROMPTS[0]) as examples, pytest.raises(UserError, match="held-out"):
        examples.split(0.5)


def test_weights_grow_with_the_score_within_a_prompt(codec, archive):
    with open_examples(codec, archive) as examples:
        weights = examples.weights("score")
        assert weights.mean() == pytest.approx(1, rel=1e-5)
        for number in range(len(PROMPTS)):
            rows = examples.rows["prompt"] == number
            order = np.argsort(examples.rows["score"][rows])
            assert (np.diff(weights[rows][order]) > 0).all()
        assert (examples.weights(None) == 1).all()


def test_pairs_are_of_one_prompt_with_a_gap(codec, archive):
    with open_examples(codec, archive) as examples:
        trained, _ = examples.split(0.25)
        pairs = examples.pairs(trained, "score", 0.5)
        rows = examples.rows[pairs]
        assert len(pairs) and set(pairs.ravel()) <= set(trained)
        assert (rows["prompt"][:, 0] == rows["prompt"][:, 1]).all()
        assert (rows["score"][:, 0] - rows["score"][:, 1] >= 0.5).all()
        with pytest.raises(UserError, match="gap"):
            examples.pairs(trained, "score", 99.0)


def test_judged_pairs_have_the_better_image_first(codec, models, tmp_path):
    path = write_archive(tmp_path / "a.db", models)
    with Archive.open(path, "w") as opened:  # images 1 and 9 are of one prompt, 1 and 2 are not
        judged = [("second", 1, 9), ("tie", 1, 17), ("first", 1, 2), ("first", 10, 2)]
        add_ratings(opened, [Rating("me", "pair", image, value, 5.0, other) for value, image, other in judged])
    with open_examples(codec, path) as examples:
        pairs = examples.pairs(np.arange(len(examples.rows)), "pairs", 0.0)
        assert examples.rows["id"][pairs].tolist() == [[9, 1], [10, 2]]


def test_an_archive_of_another_codec_is_refused(models, archive):
    other = load_checkpoint(None, "codec")
    with pytest.raises(UserError, match=other.name):
        open_examples(other, archive)


@pytest.mark.parametrize("filters", [{"best": 2}, {"score": "1.."}])
def test_images_without_a_score_are_refused_where_it_counts(filters, codec, models, tmp_path):
    path = write_archive(tmp_path / "a.db", models, clip_score_input=None)
    with pytest.raises(UserError, match="score"):
        open_examples(codec, path, **filters)


@pytest.mark.parametrize("name", ["score", "rating"])
def test_pairs_of_images_without_scores_or_ratings_name_the_flag_that_needs_them(name, codec, models, tmp_path):
    path = write_archive(tmp_path / "a.db", models, clip_score_input=None)
    with open_examples(codec, path) as examples, pytest.raises(UserError, match=f"no {name}, .*--prefer"):
        examples.pairs(np.arange(len(examples.rows)), name, 0.0)


def test_captions_that_are_cut_are_counted(codec, models, archive):
    tokenizer = load_checkpoint(models.dalle_bart, "generator").load_tokenizer()
    with open_examples(codec, archive) as examples:
        length = tokenizer.encode([PROMPTS[0]], 100)[1].sum()
        assert examples.count_cut(tokenizer, length) == 0
        assert examples.count_cut(tokenizer, length - 1) == len(PROMPTS)


def test_damaged_tokens_are_named(codec, models, tmp_path):
    path = write_archive(tmp_path / "a.db", models, count=8)
    with Archive.open(path, "w") as opened, opened.transaction():
        opened.connection.execute("UPDATE images SET quantvec = x'ffff' WHERE id = 3")
    with open_examples(codec, path) as examples, pytest.raises(UserError, match="image 3"):
        examples.read(range(8))
