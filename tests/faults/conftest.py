"""Tiny archives and the command that decodes them, for all tests of a decode that meets trouble."""

import pytest
from decode_kit import all_files, random_tokens, write_archive_2022
from faults_kit import Command, without_progress
from tiny import CODEBOOK_SIZE, GRID, tiny_vqgan

from dm_generations.cli import main


@pytest.fixture(scope="session")
def codec(tmp_path_factory):
    return tiny_vqgan(tmp_path_factory.mktemp("models") / "vqgan")


@pytest.fixture
def archive(tmp_path):
    """Six images of one prompt and setting, in the 2022 layout, with ids 1 to 6, the best first."""
    return write_archive_2022(tmp_path / "archive.db", random_tokens(6, GRID**2, CODEBOOK_SIZE))


@pytest.fixture
def decode(codec, archive, tmp_path, capfd):
    """Runs the command on `archive` into `out`; returns its exit status and what it printed on stderr."""

    def run(*flags, db=archive, codec=codec, out=tmp_path / "out"):
        command = ["decode", "--db", str(db), "--codec", str(codec), "--out-dir", str(out), "--batch-size", "4"]
        status = main([*command, *flags])
        return status, without_progress(capfd.readouterr().err)

    return run


@pytest.fixture
def many(tmp_path):
    """1,500 images of five prompts, in the 2022 layout."""
    tokens = random_tokens(300, GRID**2, CODEBOOK_SIZE)
    prompts = tuple(f"a boat of {wood}" for wood in ("oak", "ash", "elm", "fir", "yew"))
    return write_archive_2022(tmp_path / "many.db", tokens, prompts)


@pytest.fixture
def command(codec, many):
    """The decode of `many`."""
    return Command(many, codec)


@pytest.fixture
def whole(command, tmp_path):
    """The files of an undisturbed run of `command`, by path."""
    assert command.run(tmp_path / "whole") == 0
    return all_files(tmp_path / "whole")
