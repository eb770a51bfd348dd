"""Text of others reaches a terminal as printable text in lines of ours: no escape sequences, no reversed text."""

import contextlib
import dataclasses
import os
import sqlite3
import subprocess
import sys

import pytest
from archive_kit import CLIP, CODEC, GENERATOR, new_image
from helpers import ROOT

from dm_generations.archive import Archive
from dm_generations.cli import COMMANDS, main
from dm_generations.weights.hub import choose_files

# A title, a colour, a cleared screen in one byte each for C1, a new line, reversed text, a surrogate of a file name.
HOSTILE = "\x1b]0;x\x07\x1b[31m\x9b2J\r\nerror: \u202e\u2066\u200f\u2028"
NAME = HOSTILE + ("\udcff" if os.name == "posix" else "")


def assert_harmless(text, line_count=None):
    lines = text.split("\n")
    assert all(line.isprintable() for line in lines), ascii(text)
    if line_count is not None:
        assert lines[-1] == "" and len(lines) == line_count + 1, text


def run(capsys, *words):
    """The status of a command, and what it printed on both streams; nothing is printed when the parser refuses."""
    try:
        status = main([str(word) for word in words])
    except SystemExit as stopped:
        status = stopped.code
    return status, capsys.readouterr()


MISSING = {
    "info": ["--db", NAME],
    "list": [NAME],
    "verify": ["--db", NAME],
    "decode": ["--db", NAME],
    "export": [NAME, "--to", "npy", "--out", "new.npy"],
    "import": [NAME, "--into", "new.db"],
    "score": ["--db", NAME],
    "find": ["--db", NAME, "--duplicates"],
    "compare": ["--db", NAME],
    "contact-sheet": ["--db", NAME, "--rows", "prompt", "--cols", "top_k"],
    "browse": ["--db", NAME, "--no-open"],
    "export-site": ["--db", NAME, "--out-dir", "site"],
    "demo": ["a", "--db", f"{NAME}/a.db", "--no-open"],
    "view": [NAME, "--no-open"],
    "plot": [NAME],
    "ratings": ["--db", NAME, "--rank"],
    "merge": ["--into", "new.db", NAME],
    "encode": [NAME, "--db", "new.db"],
    "train": ["--db", NAME, "--run", "run"],
    "convert": [NAME, "--out", "new"],
    "generate": ["--db", "new.db", "--prompts", "a", "--model", NAME],
}


@pytest.mark.parametrize("command", MISSING)
def test_a_name_of_no_file(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, printed = run(capsys, command, *MISSING[command])
    assert status == 1
    assert_harmless(printed.err, line_count=1)


@pytest.mark.parametrize(
    "words", [["info", "--json", NAME, NAME], [NAME], ["decode", "--n-best", NAME], ["decode", "--format", NAME]]
)
def test_flags(words, capsys):
    status, printed = run(capsys, *words)
    assert status == 2
    assert_harmless(printed.err, line_count=1)


@pytest.fixture
def db(tmp_path):
    """An archive whose every text is hostile."""
    path = tmp_path / (NAME.replace("/", "") + ".db")
    with Archive.create(path) as archive, archive.transaction():
        generator, codec, clip = (
            archive.model_id(dataclasses.replace(model, name=HOSTILE)) for model in (GENERATOR, CODEC, CLIP)
        )
        archive.add_images([new_image(prompt=HOSTILE, sc_prompt=HOSTILE)], generator, codec, clip, sampler_version=1)
    return path


@pytest.mark.parametrize("words", [["info"], ["verify"], ["info", "--json"], ["verify", "--json"]])
def test_texts_of_an_archive(words, db, capsys):
    _, printed = run(capsys, *words, "--db", db)
    assert_harmless(printed.out + printed.err)


def test_an_archive_is_decoded_merged_and_decoded_by_other_weights(db, tmp_path, capsys):
    status, printed = run(capsys, "merge", db, "--into", tmp_path / f"{HOSTILE}2.db")
    assert status == 0
    assert_harmless(printed.out + printed.err, line_count=1)
    for mode in ("npy", "images"):  # the codec of the second is not that of the archive
        _, printed = run(capsys, "decode", "--db", db, "--out-dir", tmp_path / HOSTILE, "--mode", mode)
        assert_harmless(printed.out + printed.err, line_count=1)


def test_names_in_the_schema_and_errors_of_sqlite(db, capsys):
    quoted = f'"{HOSTILE}"'
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute(f"CREATE TRIGGER {quoted} AFTER INSERT ON images BEGIN SELECT {quoted}; END")
        connection.execute(f"CREATE VIEW {quoted} AS SELECT x FROM {quoted}")
        connection.commit()
    refused = []
    for words in (["info", "--db"], ["verify", "--db"], ["score", "--db"], ["merge", db, "--into"]):
        status, printed = run(capsys, *words, db)
        assert_harmless(printed.out + printed.err)
        refused += [printed.err] * (status == 1)
    assert refused


def test_names_of_files_in_a_repository():
    names = ["config.json", f"{HOSTILE}.json", f"{HOSTILE}.safetensors", "model.safetensors"]
    assert choose_files(names, [["*.safetensors"]], False) == ["model.safetensors", "config.json"]


RUNS = {
    "a warning of a library": "warnings.warn(TEXT)",
    "a message of a library": "logging.getLogger('library').warning(TEXT)",
    "an error that is no UserError": "raise ValueError(TEXT)",
    "an interrupt that a library makes an error": "signal.raise_signal(signal.SIGINT)",
}


@pytest.mark.parametrize("what", RUNS)
def test_what_libraries_say(what):
    program = f"""
import logging, signal, warnings
from dm_generations.cli import COMMANDS, program
TEXT = {HOSTILE!a}
def run(args):
    try:
        {RUNS[what]}
    except KeyboardInterrupt:
        raise RuntimeError(TEXT)
    return 3
COMMANDS["info"].run = run
program(["info"])
"""
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, timeout=60)
    assert_harmless(done.stderr.decode("utf-8", "strict").replace(os.linesep, "\n"))
    assert done.stderr
    assert done.returncode == {"warn": 3, "logg": 3, "rais": 1, "sign": 130}[RUNS[what][:4]]


def test_all_commands_are_tried():
    assert MISSING.keys() == COMMANDS.keys() - {"completion"}  # which reads no file
