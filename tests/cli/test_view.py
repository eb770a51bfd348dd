"""Decoded folders: their names, their galleries, their page, and plots of the archive."""

import json
import sys
import webbrowser
from pathlib import Path

import pytest
from decode_kit import read_images
from tiny import CODEBOOK_SIZE

from dm_generations.cli import main
from dm_generations.cli.common import command_words
from dm_generations.cli.decode import find_out_dir
from dm_generations.export.plots import mean_intervals, seconds_per_image, token_counts


def command(*words) -> int:
    return main(list(map(str, words)))


@pytest.fixture(scope="module")
def archive(models, tmp_path_factory):
    """Three images of each of two prompts."""
    db = tmp_path_factory.mktemp("archive") / "mine.db"
    flags = ["--model", models.dalle_bart, "--codec", models.vqgan, "--clip", models.clip, "--batch-size", 4]
    assert command("generate", "--db", db, *flags, "--prompts", "a boat", "a cat", "--n", 3) == 0
    return db


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Addresses that the browser was asked to open; the working folder is empty."""
    addresses: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: addresses.append(address) or True)
    monkeypatch.chdir(tmp_path)
    return addresses


@pytest.mark.parametrize(
    ("archive", "mode", "expected"),
    [
        (None, "images", "images"),
        (None, "gallery", "gallery"),
        ("a/mine.db", "images", "mine"),
        ("mine.db", "gallery", "mine-gallery"),
        ("mine", "images", "mine-images"),  # not the archive itself
    ],
)
def test_a_folder_has_the_name_of_its_archive(archive, mode, expected, monkeypatch):
    path = None if archive is None else Path(archive)
    assert find_out_dir(path, mode) == Path(expected)
    monkeypatch.setattr(sys, "argv", ["/some/where/dm_generations_decode.py"])
    assert find_out_dir(path, mode) == Path(mode)


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        ("/usr/bin/dm-generations", ["dm-generations", "decode"]),
        ("/x/dm_generations/__main__.py", ["python", "-m", "dm_generations", "decode"]),
        ("x/dm_generations_decode.py", ["python", "x/dm_generations_decode.py"]),
    ],
)
def test_hints_use_the_name_the_program_was_started_by(started, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [started])
    assert command_words("decode") == expected
    with pytest.raises(SystemExit):
        main(["decode", "--help"])
    assert f"  {' '.join(expected)} " in capsys.readouterr().out.rpartition("\nexample")[2]


@pytest.mark.e2e
def test_galleries_are_trimmed_and_what_a_page_leaves_out_is_counted(archive, models, tmp_path, capsys):
    out = tmp_path / "out"
    gallery = ["decode", archive, "--codec", models.vqgan, "--mode", "gallery", "--out-dir", out]
    layout = ["--gallery-cols", 2, "--gallery-rows", 3]
    assert command(*gallery, *layout, "--prompt-texts", "a boat") == 0
    assert "warning" not in capsys.readouterr().err
    assert command(*gallery, *layout, "--prompt-texts", "a cat", "--n-best", 1) == 0
    assert "warning: 1 other file" in capsys.readouterr().err
    boat, cat = read_images(out).values()
    assert (boat.shape[0], boat.shape[1]) == (2 * cat.shape[0], 2 * cat.shape[1])
    assert cat.shape[0] == cat.shape[1]
    seamless = [*gallery[:-1], tmp_path / "seamless", *layout, "--seamless"]
    assert command(*seamless) == 0
    assert [pixels.shape for pixels in read_images(tmp_path / "seamless").values()] == [boat.shape] * 2


def test_view_decodes_and_opens_the_page(archive, models, opened, tmp_path, capsys):
    assert command("view", archive, "--codec", models.vqgan, "--no-open") == 0
    page = tmp_path / "mine" / "samplebrowser.html"
    assert page.is_file() and opened == []
    assert len(list((tmp_path / "mine").glob("*/*.png"))) == 6
    assert capsys.readouterr().out.splitlines()[-1] == "mine/samplebrowser.html"
    assert command("view", "mine") == 0
    assert opened == [page.as_uri()]
    (tmp_path / "empty").mkdir()
    assert command("view", "empty") == 1
    assert "empty" in capsys.readouterr().err


@pytest.mark.e2e
def test_reports_as_json(archive, models, tmp_path, capsys):
    flags = ["--model", models.dalle_bart, "--codec", models.vqgan, "--no-score", "--json"]
    db = tmp_path / "a.db"
    # Without noise all images are the same.
    assert command("generate", "--db", db, *flags, "--prompts", "a boat", "--n", 3, "--temperature", 0) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["added_count"], report["distinct_count"], report["existing_count"]) == (3, 1, 0)
    assert command("score", archive, "--json") == 0
    assert json.loads(capsys.readouterr().out)["due_count"] == 0
    assert command("merge", archive, "--into", tmp_path / "b.db", "--json") == 0
    assert [source["added_count"] for source in json.loads(capsys.readouterr().out)] == [6]


@pytest.mark.parametrize("kind", ["score", "tokens", "time"])
def test_plots(kind, archive, tmp_path):
    pytest.importorskip("matplotlib")
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        assert command("plot", archive, "--kind", kind, "--out", tmp_path / name) == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    assert command("plot", archive, "--kind", kind, "--out", tmp_path / "a.gif") == 1
    assert not (tmp_path / "a.gif").exists()


def test_figures_of_plots():
    assert mean_intervals([(3, 1.0), (1, 5.0), (3, 3.0), (3, None)]) == [(1, 5.0, 0.0, 1), (3, 2.0, 1.96, 2)]
    blobs = [b"\x00\x00\x02\x00", b"\x02\x00", None, b"\x01", CODEBOOK_SIZE.to_bytes(2, "little")]
    counts = token_counts(blobs, CODEBOOK_SIZE)
    assert counts.sum() == 3 and counts[[0, 2]].tolist() == [1, 2]
    assert seconds_per_image([(1.0, 3.0), (1.0, 3.0), (5.0, 6.0), (7.0, None)]) == [(2, 1.0), (1, 1.0)]


def test_completion_lists_commands_and_flags(capsys):
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh"):
        assert command("completion", shell) == 0
        script = capsys.readouterr().out
        assert "--gallery-cols" in script and "dm-generations" in script


@pytest.mark.parametrize(
    ("words", "expected"), [(["decod"], "decode"), (["decode", "--gallery-col", "3"], "--gallery-cols")]
)
def test_mistyped_commands_and_flags_are_answered_with_what_is_like_them(words, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert f"'{expected}'" in capsys.readouterr().err.partition("did you mean")[2]


@pytest.mark.e2e
def test_demo_shows_images_in_one_go(opened, tmp_path, capsys):
    assert command("demo", "a rocket", "--n", 2) == 0
    assert opened == [(tmp_path / "demo" / "samplebrowser.html").as_uri()]
    assert len(list((tmp_path / "demo").glob("*/*.png"))) == 2
    assert command("demo", "a rocket", "--n", 2, "--no-open") == 0
    assert "nothing to do" in capsys.readouterr().out
