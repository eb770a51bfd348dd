"""A large archive: a question about a few of its images reads a small part of the file."""

import contextlib
import os
import sqlite3
from pathlib import Path

import pytest
from decode_kit import random_tokens, read_images
from tiny import CODEBOOK_SIZE

from dm_generations.archive import Archive, NewImage
from dm_generations.archive.records import INSERT_COLUMNS
from dm_generations.cli import main
from dm_generations.models.loading import load_checkpoint
from dm_generations.sampling.params import SamplingParams

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="/proc/self/io tells what was read")
SIDE = 32  # tokens a side: 2 KB an image
OF_A_PROMPT = 40

# Copies of the images of the first prompt with other keys, for each other prompt.
CHANGED = {"prompt_id": "prompts.id", "key0": "prompts.id"}
COPY = f"""
INSERT INTO images ({", ".join(INSERT_COLUMNS)})
SELECT {", ".join(CHANGED.get(name, f"images.{name}") for name in INSERT_COLUMNS)}
FROM prompts JOIN images ON images.prompt_id = 1 WHERE prompts.id > 1
"""


def write_archive(path: Path, codec, prompt_count: int) -> None:
    tokens = random_tokens(OF_A_PROMPT, SIDE**2, CODEBOOK_SIZE).astype("<u2")
    with Archive.create(path) as archive, archive.transaction():
        codec_id = archive.model_id(codec.model_info(SIDE))
        params = SamplingParams()
        images = [NewImage("a boat", None, params, 0, key, row.tobytes(), 0.0, 1.0) for key, row in enumerate(tokens)]
        archive.add_images(images, None, codec_id, None, None)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "PRAGMA synchronous = OFF; PRAGMA journal_mode = OFF; PRAGMA cache_size = -200000; BEGIN"
        )
        texts = ((f"prompt {number}",) for number in range(2, prompt_count + 1))
        connection.executemany("INSERT INTO prompts (desc) VALUES (?)", texts)
        connection.execute(COPY)
        connection.commit()


def read_bytes() -> int:
    """How many bytes this process has read, from the system's cache too."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "prompt_count", [pytest.param(400, marks=pytest.mark.e2e), pytest.param(16_000, marks=pytest.mark.slow)]
)
def test_few_images_of_many_are_read_alone(prompt_count, models, tmp_path, capsys):
    db = tmp_path / "large.db"
    write_archive(db, load_checkpoint(models.vqgan, "codec"), prompt_count)
    size = db.stat().st_size
    assert size > prompt_count * OF_A_PROMPT * 2 * SIDE**2
    prompt = f"prompt {prompt_count}"
    decode = ["decode", str(db), "--codec", str(models.vqgan), "--cpu-only", "--batch-size", "1", "--n-best", "1"]
    commands = {
        "list": ["list", str(db), "--limit", "20"],
        "list of a prompt": ["list", str(db), "--prompt-texts", prompt],
        "decode": [*decode, "--prompt-texts", prompt, "--out-dir", str(tmp_path / "out")],
    }
    for name, words in commands.items():
        before = read_bytes()
        assert main(words) == 0
        assert read_bytes() - before < size / 10, name
        assert len(capsys.readouterr().out.splitlines()) > 0
    assert len(read_images(tmp_path / "out")) == 1
