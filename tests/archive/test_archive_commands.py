"""info, verify and merge as commands."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
from archive_kit import archive_v1, execute, fill, new_image, run_program
from helpers import ROOT, golden

from dm_generations.archive import Archive, init_md5
from dm_generations.cli import build_parser
from dm_generations.cli.common import file_size, printable


def command(*words) -> int:
    args = build_parser().parse_args([str(word) for word in words])
    return args.run(args)


@pytest.fixture
def ours(tmp_path):
    path = tmp_path / "ours.db"
    with Archive.create(path) as archive:
        fill(
            archive,
            *(new_image(i, clip_score_input=float(i), clip_score_tokenized=1.0) for i in range(3)),
            *(new_image(i, prompt="evil \x1b[31m\u202e" + "x" * 500, temperature=0.7) for i in range(2)),
        )
    return path


def test_info_prints_what_is_there(ours, capsys):
    assert command("info", "--db", ours) == 0
    out = capsys.readouterr().out
    for text in (
        "format 3",
        "5 images in 2 groups, 2 to 3 in each",
        "1970-01-01 00:01:40 UTC to 1970-01-01 00:01:41 UTC",
        "1  a red cube  (3 images)",
        "1  (empty: the model's own)  (5 images)",
        "temperature  0.7 1.0\n",
        "2x2 tokens (8 bytes)  5 images",
        "clip_score_input      0.00  1.00  2.00  (3 images)",
        "codec      tiny  sha256 bbbbbbbbbbbb, 2x2 of 300 tokens, 16x16 px  (5 images)",
        "clip       tiny  sha256 cccccccccccc  (3 images)",
    ):
        assert text in out, out
    assert "\x1b" not in out and "\u202e" not in out and r"evil \x1b[31m\u202ex" in out
    assert max(map(len, out.splitlines()[1:])) < 160


def test_info_of_how_tokens_were_sampled(tmp_path, capsys):
    quantvec = new_image(3).quantvec
    with Archive.create(tmp_path / "a.db") as archive:
        fill(
            archive,
            new_image(1, log_prob=-40.5, dtype="float32"),
            new_image(2, log_prob=-60.0, dtype="bfloat16"),
            new_image(3, dtype="bfloat16", init_count=1, init_md5=init_md5(quantvec, 1)),
            new_image(4),
        )
    assert command("info", "--db", tmp_path / "a.db") == 0
    out = capsys.readouterr().out
    for text in (
        "log_prob              -60.00  -50.25  -40.50  (2 images)",
        "  bfloat16              (2 images)\n  float32               (1 image)\n",
        "with initial tokens: 1 image\n",
    ):
        assert text in out, out
    assert command("info", "--json", "--db", tmp_path / "a.db") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["log_prob"] == {"image_count": 2, "smallest": -60.0, "mean": -50.25, "largest": -40.5}
    assert found["image_count_by_dtype"] == {"bfloat16": 2, "float32": 1} and found["continued_count"] == 1


def test_info_leaves_out_what_an_archive_does_not_record(ours, tmp_path, capsys):
    for path, layout in ((ours, "format 3"), (archive_v1(tmp_path / "v1.db", [1]), "format 1")):
        assert command("info", "--db", path) == 0
        out = capsys.readouterr().out
        assert layout in out and not any(word in out for word in ("log_prob", "float32", "initial tokens")), out


def test_info_json_of_a_2022_archive(capsys):
    assert command("info", "--json", "--db", golden("original_script") / "archive.db") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["layout"], found["image_count"], found["group_count"]) == ("2022", 101, 25)
    assert found["axes"]["temperature"] == [0.4, 0.7, 1.0, 3.0]
    assert found["prompts"][1] == {"id": 2, "text": "a facebook-branded dinosaur", "image_count": 14}
    assert found["sc_prompts"][0]["text"] is None
    assert found["tokens"] == [{"byte_count": 128, "grid": 8, "image_count": 101}]
    assert found["scores"]["clip_score_input"]["largest"] == pytest.approx(36.36583)
    assert (found["log_prob"]["image_count"], found["image_count_by_dtype"], found["continued_count"]) == (0, {}, 0)


def test_info_of_an_empty_archive(tmp_path, capsys):
    Archive.create(tmp_path / "a.db").close()
    assert command("info", "--db", tmp_path / "a.db") == 0
    assert "0 images in 0 groups\n" in capsys.readouterr().out


def test_verify_exits_1_when_something_is_wrong(ours, capsys):
    assert command("verify", "--db", ours) == 0
    (verdict,) = capsys.readouterr().out.splitlines()
    assert str(ours) in verdict
    assert "5 images" in verdict
    execute(ours, "UPDATE images SET quantvec_md5 = ? WHERE id = 3", "0" * 32)
    assert command("verify", "--db", ours) == 1
    problem, verdict = capsys.readouterr().out.splitlines()
    assert problem.startswith("images 3: quantvec_md5 ")
    assert hashlib.md5(new_image(2).quantvec).hexdigest() in problem
    assert "1 problem" in verdict
    assert command("verify", "--json", "--db", ours) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert (json.loads(line)["table"], json.loads(line)["id"]) == ("images", 3)


def test_merge_reports(ours, tmp_path, capsys):
    assert command("merge", ours, ours, "--into", tmp_path / "all.db") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.findall(r"\b\d+\b", line.replace(str(ours), "")) for line in lines] == [["5", "0"], ["0", "5"]]


def test_archive_commands_need_the_standard_library_only():
    assert run_program("import_archive_commands.py") == (0, "[]\n", "")


def test_prompts_beyond_the_encoding_of_the_output_are_spelled_out(tmp_path):
    path = tmp_path / "rocket.db"
    with Archive.create(path) as archive:
        fill(archive, new_image(0, prompt="火 na\xefve"))
    words = [sys.executable, "-m", "dm_generations", "info", "--db", str(path)]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}  # of a file or pipe, on Windows
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert b"  1  \\u706b na\xefve  (1 image)" in done.stdout


def test_printable_and_file_size():
    assert printable("a\tb\u202e\U000e0001é🥑") == r"a\tb\u202e\U000e0001é🥑"
    assert printable("x" * 200, 10) == "x" * 9 + "…" and printable("x" * 10, 10) == "x" * 10
    assert [file_size(n) for n in (0, 999, 1000, 12_345_678)] == ["0 bytes", "999 bytes", "1.0 kB", "12.3 MB"]
