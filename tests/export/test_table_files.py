"""Rows as JSON lines, CSV and NumPy arrays: the same images in each."""

import csv
import json

import numpy as np
import pytest
from archive_kit import execute, fill, new_image

from dm_generations.archive import Archive, Selection
from dm_generations.errors import UserError
from dm_generations.export.table_files import FORMS, write_table

PROMPTS = ("a, b", "a, b", 'd\u00e9j\u00e0 "vu"\n')


@pytest.fixture
def db(tmp_path):
    path = tmp_path / "a.db"
    with Archive.create(path) as archive:
        scores = (1.5, None, 2.5)
        images = zip(PROMPTS, scores, strict=True)
        fill(
            archive,
            *(
                new_image(key, prompt=prompt, sc_prompt=None if key else "blur", clip_score_input=score)
                for key, (prompt, score) in enumerate(images)
            ),
        )
    return path


def write(db, form, out, selection=None):
    with Archive.open(db) as archive:
        return write_table(archive, out, form, selection or Selection())


def read(path, form):
    """(prompt, key1, score, tokens) of each image."""
    if form == "jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [(row["prompt"], row["key1"], row["clip_score_input"], row["tokens"]) for row in rows]
    if form == "csv":
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        scores = [float(row["clip_score_input"]) if row["clip_score_input"] else None for row in rows]
        tokens = [list(map(int, row["tokens"].split())) for row in rows]
        return [(row["prompt"], int(row["key1"]), s, t) for row, s, t in zip(rows, scores, tokens, strict=True)]
    if form == "npy":
        tokens = np.load(path)
        return [(PROMPTS[place], place, (1.5, None, 2.5)[place], row.tolist()) for place, row in enumerate(tokens)]
    with np.load(path) as arrays:
        prompts = arrays["prompts"][arrays["prompt"]].tolist()
        scores = [None if np.isnan(score) else score for score in arrays["clip_score_input"].tolist()]
        assert [arrays["sc_prompts"][place] if place >= 0 else None for place in arrays["sc_prompt"]][:2] == [
            "blur",
            None,
        ]
        return list(zip(prompts, arrays["key1"].tolist(), scores, arrays["tokens"].tolist(), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_hold_the_images(form, db, tmp_path):
    assert write(db, form, tmp_path / "out") == 3
    expected = [
        (prompt, key, score, [key, 2, 3, 4])
        for key, (prompt, score) in enumerate(zip(PROMPTS, (1.5, None, 2.5), strict=True))
    ]
    assert read(tmp_path / "out", form) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"a.db", "out"}


@pytest.mark.parametrize("form", ["jsonl", "csv", "npz"])
def test_filters_apply(form, db, tmp_path):
    assert write(db, form, tmp_path / "out", Selection.of(prompt=PROMPTS[0], min_score=0)) == 1
    assert [row[1] for row in read_first(tmp_path / "out", form)] == [0]


def read_first(path, form):
    if form == "npz":
        with np.load(path) as arrays:
            return [(None, key) for key in arrays["key1"].tolist()]
    return read(path, form)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_written_over_or_left(form, db, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="out"):
        write(db, form, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
    execute(db, "PRAGMA ignore_check_constraints = ON")
    execute(db, "UPDATE images SET quantvec = x'0100', quantvec_md5 = lower(hex(randomblob(16))) WHERE id = 2")
    with pytest.raises(UserError, match="image 2"):
        write(db, form, tmp_path / "new")
    with pytest.raises(UserError, match="nowhere"):
        write(db, form, tmp_path / "nowhere" / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"a.db", "out"}


def test_an_array_has_rows_of_one_length(db, tmp_path):
    with Archive.open(db, "w") as archive, archive.transaction():
        archive.add_images([new_image(9, quantvec=bytes(10))], None, None, None, None)
    for form in ("npy", "npz"):
        with pytest.raises(UserError, match="image 4"):
            write(db, form, tmp_path / "new")
    assert write(db, "jsonl", tmp_path / "new") == 4
