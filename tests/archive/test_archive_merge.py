"""Archives that are added to one."""

import os
import signal

import pytest
from archive_kit import (
    CLIP,
    CODEC,
    COLUMNS_2022,
    GENERATOR,
    archive_2022,
    archive_v1,
    execute,
    fill,
    new_image,
    run_program,
)
from helpers import golden

from dm_generations.archive import Archive, ArchiveError, ModelInfo, SourceReport, init_md5, merge, verify


def make(path, *images, **options):
    with Archive.create(path) as archive:
        fill(archive, *images, **options)
    return path


def images(path) -> list[tuple]:
    """What the archive holds, without ids."""
    with Archive.open(path) as archive:
        assert [str(problem) for problem in verify(archive)] == []
        prompts, sc_prompts = archive.prompts(), archive.sc_prompts()
        return [
            (prompts[row.prompt_id], sc_prompts[row.sc_prompt_id], row.params.top_k, row.key1, row.quantvec)
            for row in archive.rows_to_score(rescore=True)
        ]


def test_prompts_get_new_ids_and_images_are_added_once(tmp_path):
    a = make(tmp_path / "a.db", new_image(1, prompt="x"), new_image(2, prompt="y", sc_prompt="blurry"))
    b = make(
        tmp_path / "b.db",
        new_image(9, prompt="z", sc_prompt="dark"),
        new_image(2, prompt="y", sc_prompt="blurry"),
        new_image(3, prompt="x"),
    )
    target = tmp_path / "all.db"
    assert merge([a, b, a], target) == [
        SourceReport(str(a), 2, 2, 0, 0),
        SourceReport(str(b), 3, 2, 0, 0),
        SourceReport(str(a), 2, 0, 0, 0),
    ]
    assert [image[:4] for image in images(target)] == [
        *[("x", None, 50, 1), ("y", "blurry", 50, 2), ("z", "dark", 50, 9), ("x", None, 50, 3)]
    ]
    with Archive.open(target) as archive:
        assert list(archive.models().values()) == [GENERATOR, CODEC, CLIP]
    before = target.read_bytes()
    assert [report.added_count for report in merge([b, a], target)] == [0, 0]
    assert target.read_bytes()[100:] == before[100:]  # the header counts changes
    assert sorted(os.listdir(tmp_path)) == ["a.db", "all.db", "b.db"]


def test_all_columns_survive(tmp_path):
    sampling = {"log_prob": -9.5, "dtype": "float16", "init_count": 2, "init_md5": init_md5(new_image(5).quantvec, 2)}
    image = new_image(5, clip_score_input=3.5, clip_score_tokenized=2.5, time_scored=110.0, **sampling)
    source = make(tmp_path / "a.db", image, new_image(6))
    merge([source], tmp_path / "b.db")
    assert execute(tmp_path / "b.db", "SELECT * FROM images") == execute(source, "SELECT * FROM images")


def test_missing_scores_are_filled_and_others_stay(tmp_path):
    target = make(tmp_path / "t.db", new_image(1), new_image(2, clip_score_input=7.0))
    other_clip = ModelInfo("clip", "other", "e" * 64, {})
    scores = {"clip_score_input": 5.0, "clip_score_tokenized": 4.0, "time_scored": 120.0}
    source = make(tmp_path / "s.db", *(new_image(i, **scores) for i in (1, 2, 3)), clip=other_clip)
    assert merge([source], target) == [SourceReport(str(source), 3, 1, 1, 0)]
    query = """SELECT key1, clip_score_input, clip_score_tokenized, time_scored, models.name
        FROM images JOIN models ON models.id = clip_id ORDER BY key1"""
    assert execute(target, query) == [
        (1, 5.0, 4.0, 120.0, "other"),
        (2, 7.0, None, None, "tiny"),
        (3, 5.0, 4.0, 120.0, "other"),
    ]


def test_scores_of_other_tokens_of_the_same_key_are_not_taken(tmp_path):
    """On other hardware the same key can give another token, and so another image and score."""
    target = make(tmp_path / "t.db", new_image(1))
    source = make(tmp_path / "s.db", new_image(1, quantvec=bytes(8), clip_score_input=5.0))
    assert merge([source], target) == [SourceReport(str(source), 1, 0, 0, 0)]
    assert execute(target, "SELECT quantvec, clip_score_input FROM images") == [(new_image(1).quantvec, None)]


def test_version_1_is_added_and_does_not_change(tmp_path):
    source = archive_v1(tmp_path / "v1.db", [1, 2])
    before = source.read_bytes()
    target = make(tmp_path / "t.db", new_image(2), new_image(3, dtype="float32"))
    assert merge([source], target) == [SourceReport(str(source), 2, 1, 0, 0)]
    merge([source], tmp_path / "new.db")
    assert source.read_bytes() == before
    assert execute(target, "SELECT key1, log_prob, dtype, init_count, init_md5 FROM images") == [
        (2, None, None, 0, ""),
        (3, None, "float32", 0, ""),
        (1, None, None, 0, ""),
    ]
    assert images(tmp_path / "new.db") == images(source)


def test_a_target_of_version_1_is_updated(tmp_path):
    source = make(tmp_path / "s.db", new_image(1), new_image(2, log_prob=-3.0))
    target = archive_v1(tmp_path / "v1.db", [1])
    assert merge([source], target) == [SourceReport(str(source), 2, 1, 0, 0)]
    assert execute(target, "SELECT key1, log_prob FROM images") == [(1, None), (2, -3.0)]


def test_columns_of_2022_that_share_a_name_with_later_ones_mean_something_else(tmp_path):
    source = archive_2022(tmp_path / "a.db", f"{COLUMNS_2022}, dtype TEXT, init_count INTEGER, init_md5 TEXT")
    values = "(1, 3, 1, 50, 1.0, 1.0, 1.0, 1, 2, x'0100', NULL, NULL, NULL, 'jpeg', 700, NULL)"
    execute(source, f"INSERT INTO images VALUES {values}")
    assert merge([source], tmp_path / "b.db") == [SourceReport(str(source), 1, 1, 0, 0)]
    assert execute(tmp_path / "b.db", "SELECT dtype, init_count, init_md5 FROM images") == [(None, 0, "")]


def test_a_wrong_md5_of_initial_tokens_stops_a_merge(tmp_path):
    source = make(tmp_path / "s.db", new_image(1, init_count=1, init_md5=init_md5(new_image(1).quantvec, 1)))
    for change, message in [
        ("init_md5 = quantvec_md5", "init_md5 .* 1 tokens"),
        ("init_count = 3", "init_md5 .* 3 tokens"),
    ]:
        execute(source, f"UPDATE images SET {change}")
        with pytest.raises(ArchiveError, match=f"image 1: {message}"):
            merge([source], tmp_path / "t.db")
    assert not (tmp_path / "t.db").exists()


def test_a_2022_archive_is_added_and_does_not_change(tmp_path):
    source = golden("original_script") / "archive.db"
    before = source.read_bytes()
    target = tmp_path / "new.db"
    assert merge([source, source], target) == [
        SourceReport(str(source), 101, 101, 0, 0),
        SourceReport(str(source), 101, 0, 0, 0),
    ]
    assert images(target) == images(source)
    with Archive.open(target) as archive, Archive.open(source) as original:
        assert [group.count for group in archive.groups()] == [group.count for group in original.groups()]
        assert {(row.generator_id, row.codec_id) for row in archive.rows_to_score(rescore=True)} == {(None, None)}
    assert source.read_bytes() == before


def test_the_same_key_of_another_model_is_another_image(tmp_path):
    a = make(tmp_path / "a.db", new_image(1))
    with Archive.create(tmp_path / "b.db") as archive, archive.transaction():
        other = archive.model_id(ModelInfo("generator", "other", "f" * 64, {}))
        archive.add_images([new_image(1)], other, None, None, 1)
    merge([a, tmp_path / "b.db"], tmp_path / "t.db")
    assert len(images(tmp_path / "t.db")) == 2


BAD_ROWS = {
    "prompt_id 4 ": "(5, 4, 1, 50, 1.0, 1.0, 1.0, 1, 2, x'0100', NULL, NULL, NULL)",
    "sc_prompt_id 9 ": "(5, 3, 9, 50, 1.0, 1.0, 1.0, 1, 2, x'0100', NULL, NULL, NULL)",
    "quantvec ": "(5, 3, 1, 50, 1.0, 1.0, 1.0, 1, 2, 'tokens', NULL, NULL, NULL)",
    "quantvec_md5 ": "(5, 3, 1, 50, 1.0, 1.0, 1.0, 1, 2, x'0100', 'zz', NULL, NULL)",
    "temperature": "(5, 3, 1, 50, 1.0, -1.0, 1.0, 1, 2, x'0100', NULL, NULL, NULL)",
    "top_k": "(5, 3, 1, NULL, 1.0, 1.0, 1.0, 1, 2, x'0100', NULL, NULL, NULL)",
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_a_bad_row_stops_the_whole_merge(tmp_path, message):
    good = make(tmp_path / "good.db", new_image(1))
    bad = archive_2022(tmp_path / "bad.db")
    execute(bad, f"INSERT INTO images VALUES {BAD_ROWS[message]}")
    existing = make(tmp_path / "existing.db", new_image(2))
    for target in (tmp_path / "new.db", existing):
        with pytest.raises(ArchiveError, match=f"bad.db: image 5:? .*{message}"):
            merge([good, bad], target)
    assert sorted(os.listdir(tmp_path)) == ["bad.db", "existing.db", "good.db"]
    assert [image[3] for image in images(existing)] == [2]


def test_refusals(tmp_path):
    a = make(tmp_path / "a.db", new_image(1))
    old = archive_2022(tmp_path / "old.db")
    os.link(a, tmp_path / "same.db")
    for sources, target, message in [
        ([a], a, "a.db: .* source .* target"),
        ([a, tmp_path / "same.db"], a, "a.db: .* source .* target"),
        ([a], old, "old.db: .* 2022"),
        ([a, tmp_path / "missing.db"], tmp_path / "new.db", "missing.db"),
        ([a], tmp_path / "no" / "new.db", "no: "),
    ]:
        with pytest.raises(ArchiveError, match=message):
            merge(sources, target)
    assert sorted(os.listdir(tmp_path)) == ["a.db", "old.db", "same.db"]


def test_prompts_that_generate_refuses_are_added(tmp_path):
    source = archive_2022(tmp_path / "a.db")
    execute(source, "INSERT INTO prompts VALUES (8, CAST(x'610062' AS TEXT))")
    merge([source], tmp_path / "b.db")
    with Archive.open(tmp_path / "b.db") as archive:
        assert list(archive.prompts().values()) == ["a blue ball", "a red cube", "a\0b"]


@pytest.mark.e2e
def test_more_sources_than_files_that_may_be_open(tmp_path):
    resource = pytest.importorskip("resource")
    sources = [make(tmp_path / f"{i}.db", new_image(i)) for i in range(80)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        reports = merge(sources, tmp_path / "all.db")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [report.added_count for report in reports] == [1] * 80


def test_a_killed_merge_leaves_nothing_that_the_next_one_does_not_remove(tmp_path):
    source = make(tmp_path / "s.db", *map(new_image, range(50)))
    status, _, errors = run_program("merge_until_killed.py", 20, "--into", tmp_path / "all.db", source)
    assert status == -signal.SIGKILL, errors
    assert len(os.listdir(tmp_path)) > 1
    assert not (tmp_path / "all.db").exists()
    merge([source], tmp_path / "all.db")
    assert sorted(os.listdir(tmp_path)) == ["all.db", "s.db"]
    assert images(tmp_path / "all.db") == images(source)
