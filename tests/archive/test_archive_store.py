"""Writing, and reading back by group."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import sqlite3

import pytest
from archive_kit import CLIP, CODEC, GENERATOR, execute, fill, new_image

from dm_generations.archive import Archive, ArchiveError, GroupKey, ModelInfo, Selection, init_md5
from dm_generations.archive.queries import ALL_IDS_BEST_FIRST, COUNT_GROUPS, IDS_BEST_FIRST
from dm_generations.archive.records import GROUP_COLUMNS, grid_side, tokens_below
from dm_generations.archive.selection import compile_selection
from dm_generations.sampling.params import SamplingParams

GROUP = GroupKey(1, 1, SamplingParams(50, 0.9, 1.0, 3.0))


@pytest.fixture
def archive(tmp_path):
    with Archive.create(tmp_path / "a.db") as archive:
        yield archive


def test_a_row_comes_back_as_it_was_stored(archive):
    fill(archive, new_image(7, clip_score_input=20.5, clip_score_tokenized=19.5, time_scored=102.0))
    (row,) = archive.rows(GROUP)
    assert dataclasses.asdict(row) == {
        **{"id": 1, "prompt_id": 1, "sc_prompt_id": 1},
        "params": {"top_k": 50, "top_p": 0.9, "temperature": 1.0, "cond_scale": 3.0},
        **{"key0": 1, "key1": 7, "quantvec": b"\x07\x00\x02\x00\x03\x00\x04\x00"},
        "quantvec_md5": hashlib.md5(b"\x07\x00\x02\x00\x03\x00\x04\x00").hexdigest(),
        **{"clip_score_input": 20.5, "clip_score_tokenized": 19.5, "generator_id": 1, "codec_id": 2},
        **{"sampler_version": 1, "log_prob": None, "dtype": None, "init_count": 0, "init_md5": ""},
        **{"time_end": 101.5, "extra_settings": ""},
    }
    assert archive.models() == {1: GENERATOR, 2: CODEC, 3: CLIP}
    assert (archive.prompts(), archive.sc_prompts()) == ({1: "a red cube"}, {1: None})
    times = execute(archive.path, "SELECT time_start, time_end, time_scored, clip_id, sampler_version FROM images")
    assert times == [(100.0, 101.5, 102.0, 3, 1)]


def test_how_tokens_were_sampled_comes_back(archive):
    initial = new_image(8).quantvec[:6]
    fill(
        archive,
        new_image(8, log_prob=-71.25, dtype="bfloat16", init_count=3, init_md5=hashlib.md5(initial).hexdigest()),
    )
    (row,) = archive.rows(GROUP)
    assert (row.log_prob, row.dtype, row.init_count) == (-71.25, "bfloat16", 3)
    assert row.init_md5 == init_md5(row.quantvec, 3) == hashlib.md5(initial).hexdigest()
    assert init_md5(row.quantvec, 0) == ""


def test_rows_are_best_first_with_ties_by_id_and_unscored_last(archive):
    scores = [1.0, None, 3.0, 1.0, 3.0, -2.0]
    fill(archive, *(new_image(i, clip_score_input=score) for i, score in enumerate(scores)))
    assert [row.id for row in archive.rows(GROUP)] == [3, 5, 1, 4, 6, 2]
    assert [row.id for row in archive.rows(GROUP, limit=2)] == [3, 5]


def test_a_group_larger_than_a_chunk_keeps_its_order(archive):
    fill(archive, *(new_image(i, clip_score_input=float(i % 40)) for i in range(1300)))
    rows = list(archive.rows(GROUP))
    assert rows == sorted(rows, key=lambda row: (-row.clip_score_input, row.id)) and len(rows) == 1300


def test_groups_are_ordered_counted_and_selected(archive):
    fill(
        archive,
        *(new_image(i, prompt="b", top_k=0) for i in range(3)),
        *(new_image(i, prompt="a", sc_prompt="blurry") for i in range(2)),
        new_image(9, prompt="b", temperature=0.5),
    )
    groups = [(group.key, group.count) for group in archive.groups()]
    assert groups == [
        (GroupKey(1, 1, SamplingParams(0, 0.9, 1.0, 3.0)), 3),
        (GroupKey(1, 1, SamplingParams(50, 0.9, 0.5, 3.0)), 1),
        (GroupKey(2, 2, SamplingParams(50, 0.9, 1.0, 3.0)), 2),
    ]
    assert [group.count for group in archive.groups(prompt=[1])] == [3, 1]
    assert [group.count for group in archive.groups(sc_prompt=2)] == [2]


def test_an_image_is_stored_once(archive):
    images = [new_image(i) for i in range(5)]
    assert fill(archive, *images) == 5
    assert fill(archive, *images, new_image(5), new_image(5)) == 1
    assert fill(archive, new_image(0, cond_scale=10.0)) == 1
    assert archive.count() == 7


def continued(key: int, init_count: int, **changes):
    """The image of a key whose first tokens count as initial ones."""
    quantvec = new_image(key).quantvec
    return new_image(key, init_count=init_count, init_md5=init_md5(quantvec, init_count), **changes)


def test_a_key_after_other_initial_tokens_is_another_image(archive):
    assert fill(archive, new_image(1), continued(1, 1), continued(1, 2), continued(1, 2)) == 3
    assert archive.existing_keys(GROUP, 1) == {(1, 1)}
    fill(archive, continued(5, 2))
    assert archive.existing_keys(GROUP, 1, init_md5=init_md5(new_image(5).quantvec, 2)) == {(1, 5)}
    assert archive.existing_keys(GROUP, 1, init_md5="0" * 32) == set()


def test_without_a_known_generator_images_differ_by_their_tokens(archive):
    one, other = new_image(1), new_image(1, quantvec=bytes(8))
    with archive.transaction():
        assert archive.add_images([one, other, one], None, None, None, None) == 2
        assert archive.add_images([one, other], None, None, None, None) == 0


def test_existing_keys_are_those_of_the_generator(archive):
    fill(archive, new_image(4), new_image(2**32 - 1), new_image(6, top_k=0))
    assert archive.existing_keys(GROUP, 1) == {(1, 4), (1, 2**32 - 1)}
    assert archive.existing_keys(GROUP, 1, sampler_version=1) == {(1, 4), (1, 2**32 - 1)}
    assert archive.existing_keys(GROUP, 1, sampler_version=2) == set()
    assert archive.existing_keys(GROUP, None) == set()


def test_scoring_fills_what_is_missing_while_it_reads(archive):
    fill(archive, new_image(0, clip_score_input=5.0, clip_score_tokenized=5.0), *map(new_image, range(1, 1200)))
    rows = archive.rows_to_score()
    for _ in range(3):
        with archive.transaction():
            scores = [(row.id, 1.0, 2.0) for row in itertools.islice(rows, 200)]
            assert archive.set_scores(scores, archive.model_id(CLIP), 200.0) == 200
    assert next(rows).id == 602
    assert sum(1 for _ in archive.rows_to_score()) == 599
    assert sum(1 for _ in archive.rows_to_score(rescore=True)) == archive.count_to_score(rescore=True) == 1200
    with archive.transaction():
        same, other = archive.model_id(CLIP), archive.model_id(dataclasses.replace(CLIP, sha256="d" * 64))
    assert sum(1 for _ in archive.rows_to_score(True, same)) == archive.count_to_score(True, same) == 599
    assert archive.count_to_score(True, other) == 1200 and archive.count_to_score() == 599


def test_a_failed_transaction_leaves_nothing(archive):
    def images():
        yield new_image(1)
        raise ValueError("the model broke")

    with pytest.raises(ValueError, match="the model broke"), archive.transaction():
        archive.add_images(images(), None, None, None, 1)
    assert (archive.count(), archive.prompts()) == (0, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantvec": bytes(6)}, "6 bytes.*tiny.* 8"),
        ({"quantvec": b"\x2c\x01" + bytes(6)}, "tiny.*300"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"cond_scale": float("nan")}, "cond_scale"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"key1": 2**32}, "key1"),
        ({"key1": 2**70}, "64"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"prompt": "a\ud800b"}, "surrogate"),
        ({"clip_score_input": float("inf")}, "clip_score_input"),
        ({"log_prob": float("-inf")}, "log_prob"),
        ({"log_prob": "likely"}, "log_prob"),
        ({"dtype": "float64"}, "dtype"),
        ({"init_count": 5, "init_md5": "0" * 32}, "init_count.* 5.* 4 tokens"),
        ({"init_count": -1}, "init_count.*-1"),
        ({"init_count": 2, "init_md5": "0" * 32}, "init_md5.*0{32}"),
        ({"init_count": 2}, "init_md5"),
        ({"init_md5": "0" * 32}, "init_md5.*0{32}"),
    ],
)
def test_bad_values_are_refused(archive, changes, message):
    with pytest.raises(ArchiveError, match=message):
        fill(archive, new_image(1), new_image(2, **changes))
    assert archive.count() == 0


def test_prompts_of_any_text_and_length(archive):
    texts = ["x" * 10_000, "../../etc", "🥑 <b>'\"%s", "", "\n\x1b[31m"]
    fill(archive, *(new_image(i, prompt=text) for i, text in enumerate(texts)))
    assert list(archive.prompts().values()) == texts


def test_a_model_is_the_same_by_hash_and_config_not_by_name(archive):
    with archive.transaction():
        first = archive.model_id(ModelInfo("clip", "here", "d" * 64, {"a": 1, "b": 2}))
        assert archive.model_id(ModelInfo("clip", "moved", "d" * 64, {"b": 2, "a": 1})) == first
        assert archive.model_id(ModelInfo("clip", "here", "d" * 64, {"a": 2})) != first


def test_the_2022_script_can_read_it(archive):
    """Its own queries: distinct settings, then tokens best first."""
    fill(archive, *(new_image(i, clip_score_input=float(i)) for i in range(3)))
    archive.close()
    with contextlib.closing(sqlite3.connect(archive.path)) as connection:
        groups = connection.execute(
            "SELECT DISTINCT prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale FROM images"
        ).fetchall()
        assert groups == [(1, 1, 50, 0.9, 1.0, 3.0)]
        rows = connection.execute(
            "SELECT quantvec FROM images WHERE prompt_id = 1 ORDER BY clip_score_input DESC"
        ).fetchall()
        assert [row[0][0] for row in rows] == [2, 1, 0]
        assert connection.execute("SELECT desc FROM sc_prompts WHERE id = 1").fetchone() == (None,)
        assert connection.execute("PRAGMA application_id").fetchone() == (0x444D4731,)


def test_groups_are_read_from_the_index_alone(archive):
    """What makes listing quick; a sort or the table itself would cost seconds at a million rows."""
    fill(archive, new_image(1))
    key = dict.fromkeys((*GROUP_COLUMNS, "limit"), 1)
    for filters in ({}, {"prompt": 1, "score": "3..", "temperature": "1..2"}, {"best": 2, "distinct": True}):
        where = compile_selection(archive, Selection.of(**filters))
        for query in (COUNT_GROUPS, IDS_BEST_FIRST, ALL_IDS_BEST_FIRST):
            plan = archive.connection.rows(
                f"EXPLAIN QUERY PLAN {query.format(table='images', where=where.sql, rank=where.rank)}",
                {**key, **where.parameters},
            )
            steps = [row[3] for row in plan if "images" in row[3] or "USE TEMP" in row[3]]
            assert len(steps) == 1 and "COVERING INDEX images_by_group" in steps[0], steps


def test_six_thousand_images_stay_small(archive):
    fill(archive, *(new_image(i % 32, cond_scale=i / 32, clip_score_input=1 / (i + 1)) for i in range(6048)))
    archive.close()
    per_row = archive.path.stat().st_size / 6048  # here with 8 bytes of tokens, to which 120 come
    assert per_row + 120 < 500, per_row
    assert os.listdir(archive.path.parent) == ["a.db"]


@pytest.mark.parametrize("codebook_size", [1, 255, 256, 257, 300, 512, 16384, 65535, 65536])
def test_tokens_below_at_the_edge(codebook_size):
    largest = (codebook_size - 1).to_bytes(2, "little")
    assert tokens_below(bytes(6) + largest, codebook_size)
    if codebook_size < 65536:
        assert not tokens_below(codebook_size.to_bytes(2, "little") + bytes(6), codebook_size)


def test_grid_side_is_of_whole_squares_only():
    assert [grid_side(n) for n in (0, 2, 7, 8, 9, 12, 128, 512)] == [None, 1, None, 2, None, None, 8, 16]
