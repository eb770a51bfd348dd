"""Small archives for tests."""

import contextlib
import dataclasses
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from helpers import ROOT

from dm_generations.archive import Archive, ModelInfo, NewImage
from dm_generations.sampling.params import SamplingParams

GENERATOR = ModelInfo("generator", "tiny", "a" * 64, {"layers": 1})
CODEC = ModelInfo("codec", "tiny", "b" * 64, {}, token_shape=(2, 2), codebook_size=300, image_shape=(16, 16))
CLIP = ModelInfo("clip", "tiny", "c" * 64, {})

COLUMNS_2022 = """id INTEGER PRIMARY KEY, prompt_id INTEGER, sc_prompt_id INTEGER, top_k INTEGER, top_p REAL,
    temperature REAL, cond_scale REAL, key0 INTEGER, key1 INTEGER, quantvec BLOB, quantvec_md5 TEXT,
    clip_score_input REAL, clip_score_tokenized REAL"""


def new_image(key: int = 0, **changes) -> NewImage:
    """An image whose tokens depend on its key; `changes` are fields of `NewImage` or its settings."""
    params = {"top_k": 50, "top_p": 0.9, "temperature": 1.0, "cond_scale": 3.0}
    params |= {name: changes.pop(name) for name in params.keys() & changes.keys()}
    values = {
        "prompt": "a red cube",
        "sc_prompt": None,
        "params": SamplingParams(**params),
        "key0": 1,
        "key1": key,
        "quantvec": bytes([key % 256, 0, 2, 0, 3, 0, 4, 0]),
        "time_start": 100.0,
        "time_end": 101.5,
    }
    return NewImage(**{**values, **changes})


def fill(archive: Archive, *images: NewImage, clip: ModelInfo | None = CLIP) -> int:
    """Add images of the tiny models in a transaction; return how many were new."""
    with archive.transaction():
        models = [None if model is None else archive.model_id(model) for model in (GENERATOR, CODEC, clip)]
        return archive.add_images(images, *models, sampler_version=1)


def archive_v1(path: Path, keys: Iterable[int] = (), version: int = 1) -> Path:
    """A file of version 1 or 2, as programs of that time wrote it, with images `new_image(key)` of the tiny models."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript((ROOT / "schema" / "0001.sql").read_text())
        connection.executemany(
            "INSERT INTO models (kind, name, sha256, config, grid, codebook_size, image_size) VALUES (?,?,?,?,?,?,?)",
            [
                (
                    *(m.kind, m.name, m.sha256, json.dumps(m.config, separators=(",", ":"))),
                    *(m.token_shape and m.token_shape[0], m.codebook_size, m.image_shape and m.image_shape[0]),
                )
                for m in (GENERATOR, CODEC, CLIP)
            ],
        )
        connection.execute("INSERT INTO prompts (desc) VALUES ('a red cube')")
        for image in map(new_image, keys):
            insert_v1(connection, image)
        connection.commit()
        if version == 2:
            connection.executescript((ROOT / "schema" / "0002.sql").read_text())
    return path


def insert_v1(connection: sqlite3.Connection, image: NewImage) -> int:
    """Store an image as programs of version 1 do; return how many rows that added."""
    return connection.execute(
        """INSERT INTO images (prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, key0, key1, quantvec,
            quantvec_md5, time_start, time_end, generator_id, codec_id, sampler_version)
        VALUES (1, 1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1, 2, 1) ON CONFLICT DO NOTHING""",
        (
            *(*dataclasses.astuple(image.params), image.key0, image.key1, image.quantvec),
            *(hashlib.md5(image.quantvec).hexdigest(), image.time_start, image.time_end),
        ),
    ).rowcount


def archive_2022(path: Path, columns: str = COLUMNS_2022) -> Path:
    """A file in the 2022 layout with prompts 3 and 7 and no images."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(f"""
            CREATE TABLE prompts (id INTEGER PRIMARY KEY, desc TEXT);
            CREATE TABLE sc_prompts (id INTEGER PRIMARY KEY, desc TEXT);
            CREATE TABLE images ({columns});
            INSERT INTO prompts VALUES (3, 'a blue ball'), (7, 'a red cube');
            INSERT INTO sc_prompts VALUES (1, NULL);
        """)
    return path


def execute(path: Path, query: str, *parameters) -> list[tuple]:
    """Run SQL on a file without the package."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA legacy_alter_table = ON")  # tables are renamed although views refer to them
        return connection.execute(query, parameters).fetchall()


def leave_log(path: Path) -> None:
    """Put an archive into WAL mode, and delete its first image in a log that stays next to it."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    with connection:
        connection.execute("DELETE FROM images WHERE id = (SELECT min(id) FROM images)")
    copies = {name: path.with_name(path.name + name).read_bytes() for name in ("", "-wal", "-shm")}
    connection.close()  # writes the log into the file, and removes it
    for name, content in copies.items():
        path.with_name(path.name + name).write_bytes(content)


def start_program(name: str, *arguments: object, cwd: Path = ROOT, **options) -> subprocess.Popen:
    """Start a file of tests/programs, with the package and the modules of tests to import."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, str(ROOT / "tests" / "programs" / name), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **pipes, **options)


def run_program(name: str, *arguments: object, cwd: Path = ROOT) -> tuple[int, str, str]:
    """Run such a file; return its exit status and what it wrote on stdout and stderr."""
    with start_program(name, *arguments, cwd=cwd) as program:
        out, errors = program.communicate(timeout=120)
    return program.returncode, out, errors
