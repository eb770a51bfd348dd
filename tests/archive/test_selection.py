"""Which images are selected: the same by Python's keywords and by `--where`, in every version of the format."""

import csv
import datetime
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from archive_kit import archive_2022, archive_v1, execute, fill, new_image

from dm_generations.archive import Archive, Selection, info, merge, verify
from dm_generations.archive.selection import WHERE_NAMES, Filters, compile_selection, parse_where
from dm_generations.cli import build_parser, main
from dm_generations.errors import UserError
from dm_generations.sampling.prng import row_key

DAY = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC).timestamp()
KEYS = {seed: [row_key(seed, index) for index in range(3)] for seed in (0, 5)}


def image(number: int, **changes):
    return new_image(number, **changes)


@pytest.fixture
def path(tmp_path):
    """Images 1 to 8; 3 has the tokens of 2, and 8 of 7."""
    with Archive.create(tmp_path / "a.db") as archive:
        fill(
            archive,
            image(1, clip_score_input=10.0, top_k=50),
            image(2, clip_score_input=20.0, top_k=256),
            image(3, clip_score_input=30.0, top_k=256, quantvec=new_image(2).quantvec),
            image(4, top_k=0, cond_scale=10.0, sc_prompt="blurry"),
            image(5, prompt="a blue ball", clip_score_tokenized=7.0),
            image(6, prompt="a blue ball", time_start=DAY, time_end=DAY + 1),
            image(7, prompt="a, b", key0=KEYS[0][2][0], **{}),
            image(8, prompt="a, b", quantvec=new_image(7).quantvec),
        )
        with archive.transaction():
            archive.connection.execute("UPDATE images SET key0 = ?, key1 = ? WHERE id = 7", KEYS[0][2])
            archive.connection.execute("UPDATE images SET key0 = ?, key1 = ? WHERE id = 8", KEYS[5][1])
    return tmp_path / "a.db"


CASES = [
    ({}, [1, 2, 3, 4, 5, 6, 7, 8]),
    ({"prompt": "a blue ball"}, [5, 6]),
    ({"prompt": ["a blue ball", 3]}, [5, 6, 7, 8]),
    ({"prompt": "a, b"}, [7, 8]),
    ({"sc_prompt": "blurry"}, [4]),
    ({"sc_prompt": 1}, [1, 2, 3, 5, 6, 7, 8]),
    ({"top_k": 256}, [2, 3]),
    ({"top_k": [0, 256]}, [2, 3, 4]),
    ({"top_k": "0,256"}, [2, 3, 4]),
    ({"top_k": "..0, 100.."}, [2, 3, 4]),
    ({"top_k": "0..50", "prompt": "a red cube"}, [1, 4]),
    ({"cond_scale": "3.5.."}, [4]),
    ({"temperature": 1, "cond_scale": 10}, [4]),
    ({"score": "20.."}, [2, 3]),
    ({"min_score": 15, "max_score": 20}, [2]),
    ({"max_score": 10}, [1]),
    ({"score_tokenized": 7}, [5]),
    ({"model": "tiny"}, [1, 2, 3, 4, 5, 6, 7, 8]),
    ({"model": "aaaaaa", "codec": "b" * 64, "top_k": 0}, [4]),
    ({"seed": 0}, [7]),
    ({"seed": [5, 0]}, [7, 8]),
    ({"key": "1:2"}, [2]),
    ({"key": [(1, 2), (1, 5)]}, [2, 5]),
    ({"key": (1, 2)}, [2]),
    ({"time": "2026-03-01"}, [6]),
    ({"time": datetime.date(2026, 3, 1)}, [6]),
    ({"time": "2026-03-01T00:00"}, [6]),
    ({"time": "2026-01-01..2026-03-01"}, [6]),
    ({"time": "..2026-02-28"}, [1, 2, 3, 4, 5, 7, 8]),
    ({"distinct": True}, [1, 3, 4, 5, 6, 7]),
    ({"distinct": True, "max_score": 20}, [1, 2]),
    ({"best": 1}, [1, 3, 4, 5, 7]),
    ({"best": 1, "distinct": True, "max_score": 20}, [1, 2]),
]


def selected(archive, **filters) -> list[int]:
    return sorted(archive.image_ids(where=compile_selection(archive, Selection.of(**filters))))


def copy_2022(path, target):
    """The images of an archive in the layout of 2022, whose ids are not declared as such."""
    archive_2022(target, "id, prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, key0, key1, quantvec, "
                 "clip_score_input, clip_score_tokenized, time_start")  # fmt: skip
    execute(target, "DELETE FROM prompts")
    execute(target, "DELETE FROM sc_prompts")
    for table in ("prompts", "sc_prompts"):
        for row in execute(path, f"SELECT id, desc FROM {table}"):
            execute(target, f"INSERT INTO {table} VALUES (?, ?)", *row)
    columns = "id, prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, key0, key1, quantvec, "
    columns += "clip_score_input, clip_score_tokenized, time_start"
    for row in execute(path, f"SELECT {columns} FROM images ORDER BY id"):
        execute(target, f"INSERT INTO images ({columns}) VALUES ({', '.join('?' * len(row))})", *row)


@pytest.mark.parametrize(("filters", "ids"), CASES, ids=lambda value: repr(value))
def test_filters_select(path, filters, ids):
    with Archive.open(path) as archive:
        where = compile_selection(archive, Selection.of(**filters))
        assert sorted(archive.image_ids(where=where)) == ids
        assert [row_id for (row_id,) in archive.scan(["id"], where=where)] == ids
        assert archive.count(where) == ids.__len__() == sum(group.count for group in archive.groups(**filters))
        by_group = [row.id for group in archive.count_groups(where) for row in archive.rows(group.key, where=where)]
        assert by_group == list(archive.image_ids(where=where))
        assert info(archive, Selection.of(**filters)).image_count == len(ids)
        unscored = [row.id for row in archive.rows_to_score(where=where)]
        assert unscored == ids and archive.count_to_score(where=where) == len(ids)


@pytest.mark.parametrize(("filters", "ids"), CASES, ids=lambda value: repr(value))
def test_filters_select_the_same_in_the_layout_of_2022(path, tmp_path, filters, ids):
    copy_2022(path, tmp_path / "2022.db")
    with Archive.open(tmp_path / "2022.db") as archive:
        if {"model", "codec"} & filters.keys():
            with pytest.raises(UserError, match=r"tiny|aaaaaa"):
                selected(archive, **filters)
            return
        where = compile_selection(archive, Selection.of(**filters))
        by_group = [row.id for group in archive.count_groups(where) for row in archive.rows(group.key, where=where)]
        assert selected(archive, **filters) == sorted(by_group) == ids


def test_older_formats_are_selected_from(tmp_path):
    with Archive.open(archive_v1(tmp_path / "1.db", keys=range(4))) as archive:
        assert selected(archive, key=["1:1", "1:3"], best=1) == [2]
        assert selected(archive, model="tiny", distinct=True) == [1, 2, 3, 4]


def test_an_archive_may_grow_between_two_uses_of_a_selection(path):
    with Archive.open(path, "w") as archive:
        assert 2 in selected(archive, best=1, top_k=256, max_score=20)
        fill(archive, image(99, clip_score_input=19.9, cond_scale=99.0))
        assert len(selected(archive, best=1)) == 6


BAD = [
    ({"top_k": "many"}, "top_k.*many"),
    ({"top_k": float("nan")}, "top_k"),
    ({"top_k": []}, "top_k"),
    ({"top_k": list(range(5000))}, "top_k"),
    ({"score": "30..20"}, r"score.*30\.\.20"),
    ({"score": "1..2..3"}, "score"),
    ({"time": "yesterday"}, "time.*yesterday"),
    ({"seed": -1}, "seed.*-1"),
    ({"seed": "x"}, "seed.*x"),
    ({"key": "12"}, "key.*12"),
    ({"key": "1:99999999999"}, "key.*99999999999"),
    ({"best": 0}, "0"),
    ({"prompt": [1.5]}, "prompt.*1.5"),
    ({"colour": 1}, "colour"),
    ({"top_q": 1}, "top_q"),
    ({"prompt": "a blue bal"}, "'a blue bal'.*'a blue ball'"),
    ({"prompt": 99}, "99"),
    ({"prompt": "'; DROP TABLE images; --"}, "DROP"),
    ({"model": "tinny"}, "tinny.*tiny"),
    ({"model": "aaa"}, "aaa"),
    ({"codec": "a" * 64}, "tiny"),
]


@pytest.mark.parametrize(("filters", "message"), BAD, ids=lambda value: repr(value)[:40])
def test_wrong_filters_are_named_in_one_line(path, filters, message):
    with Archive.open(path) as archive, pytest.raises(UserError, match=message) as caught:
        archive.groups(**filters)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["score>20", "score>=20", "score", "=3", "1=1", "prompt=a red cube", "id=1 OR 1=1", "quantvec=3", ""]
)
def test_conditions_that_are_none_are_refused(text):
    with pytest.raises(UserError, match=r"--where|filter"):
        parse_where([text])


def test_conditions_and_keywords_have_the_same_names():
    assert set(WHERE_NAMES) <= set(Filters.__annotations__)
    assert parse_where(["top-k=1", "top_k=2", "seed=3"]) == {"top_k": ["1", "2"], "seed": ["3"]}


# The same flags in every command.

SELECTING = ("decode", "info", "list", "score", "merge", "verify")


@pytest.mark.parametrize("command", SELECTING)
def test_commands_have_the_same_flags(command):
    words = ["--into", "t.db"] if command == "merge" else []
    flags = ["--prompt-ids", "1", "--prompt-texts", "x", "--sc-prompt-ids", "1", "--sc-prompt-texts", "x"]
    flags += ["--where", "top_k=1", "seed=2", "--where", "score=3..", "--n-best", "4", "--distinct"]
    args = build_parser().parse_args([command, "a.db", *words, *flags])
    assert (args.where, args.n_best, args.distinct) == (["top_k=1", "seed=2", "score=3.."], 4, True)


@pytest.mark.parametrize("command", ["decode", "info", "list", "verify", "score"])
def test_an_archive_is_given_once(command, capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([command, "a.db", "--db", "b.db"])
    assert ended.value.code == 2
    assert build_parser().parse_args([command, "--db", "b.db"]).db == Path("b.db")


def test_score_needs_an_archive():
    with pytest.raises(SystemExit):
        build_parser().parse_args(["score"])


def listed(capsys, *words) -> str:
    assert main(["list", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_list_prints_rows_for_programs(path, capsys):
    rows = list(csv.DictReader(io.StringIO(listed(capsys, path, "--format", "csv", "--where", "top_k=256"))))
    assert [row["id"] for row in rows] == ["3", "2"] and {row["prompt"] for row in rows} == {"a red cube"}
    lines = listed(capsys, "--db", path, "--format", "jsonl", "--prompt-texts", "a, b", "--distinct").splitlines()
    (values,) = map(json.loads, lines)
    assert (values["id"], values["key0"], values["key1"]) == (7, *KEYS[0][2])
    assert (values["top_p"], values["model"], values["clip_score_input"]) == (0.9, "tiny", None)
    assert list(values) == list(rows[0])


def test_list_prints_a_table_of_hostile_prompts(path, capsys):
    with Archive.open(path, "w") as archive:
        fill(archive, image(50, prompt="evil\n\x1b[31m\u202e" + "x" * 5000))
    table = listed(capsys, path)
    assert "\x1b" not in table and "\u202e" not in table
    assert len(table.splitlines()) == 10 and max(map(len, table.splitlines())) < 200
    assert len(listed(capsys, path, "--limit", 3).splitlines()) == 4


@pytest.mark.parametrize("command", ["info", "list", "verify"])
def test_nothing_selected_is_an_error_that_says_what_there_is(path, command, capsys):
    assert main([command, str(path), "--where", "top_k=257"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "top_k" in error and "256" in error
    assert main([command, str(path), "--where", "score=99.."]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_info_of_a_selection_lists_what_it_has(path, capsys):
    with Archive.open(path) as archive:
        found = info(archive, Selection.of(prompt="a blue ball", time="2026-03-01"))
    assert [prompt.text for prompt in found.prompts] == ["a blue ball"]
    assert (found.image_count, found.first_time, found.axes["top_k"]) == (1, DAY, [50])
    assert {model.kind for model in found.models} == {"generator", "codec"}


def test_verify_checks_what_is_selected(path):
    execute(path, "UPDATE images SET quantvec_md5 = ? WHERE id = 2", "0" * 32)
    with Archive.open(path) as archive:
        assert [problem.id for problem in verify(archive)] == [2]
        assert list(verify(archive, compile_selection(archive, Selection.of(top_k="..100")))) == []


def test_merge_takes_what_is_selected_with_its_prompts_and_models(path, tmp_path):
    other = tmp_path / "other.db"
    with Archive.create(other) as archive:
        fill(archive, image(30, prompt="only here"))
    target = tmp_path / "t.db"
    selection = Selection.of(prompt=["a blue ball", "only here"])
    assert [report.added_count for report in merge([path, other], target, selection)] == [2, 1]
    with Archive.open(target) as archive:
        assert list(archive.prompts().values()) == ["a blue ball", "only here"]
        assert sorted(model.kind for model in archive.models().values()) == ["codec", "generator"]
        assert list(verify(archive)) == []
    for wrong in (Selection.of(prompt="nowhere"), Selection.of(score="99..")):
        with pytest.raises(UserError):
            merge([path, other], tmp_path / "new.db", wrong)
        assert not (tmp_path / "new.db").exists()


def test_decode_writes_what_is_selected(path, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--mode", "npy", "--out-dir", str(out), "--where", "top_k=256", "--distinct"]
    assert main(["decode", str(path), *words]) == 0
    (file,) = out.rglob("*.npy")
    with Archive.open(path) as archive:
        (row,) = archive.read_rows([3])
    assert np.load(file).astype("<u2").tobytes() == row.quantvec and "k=256" in file.name
    assert main(["decode", "--db", str(path), *words[:4], "--prompt-texts", "a blue bal"]) == 1
    assert "a blue ball" in capsys.readouterr().err


def test_nothing_is_written_to_an_archive_that_is_read(path):
    before = path.read_bytes()
    copy = shutil.copy(path, path.with_name("copy.db"))
    with Archive.open(copy) as archive:
        selected(archive, best=1, distinct=True)
    assert copy.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.db", "copy.db"]
