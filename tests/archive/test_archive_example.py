"""The example of the specification: `schema/example.db` reads as `schema/example.json` says."""

import contextlib
import json
import shutil
import sqlite3
import struct
import subprocess

import pytest
from helpers import ROOT

from dm_generations.archive import Archive, merge, verify

EXAMPLE = ROOT / "schema" / "example.db"
EXPECTED = json.loads((ROOT / "schema" / "example.json").read_text(encoding="utf-8"))


def read(path) -> dict:
    """All of an archive, as another language would read it from the specification."""
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row

        def table(sql: str) -> list[dict]:
            return [dict(row) for row in connection.execute(sql)]

        meta = table("SELECT format, version FROM meta")[0]
        models = {row.pop("id"): row for row in table("SELECT * FROM models ORDER BY id")}
        for model in models.values():
            for name in ("config", "token_shape", "image_shape"):
                model[name] = None if model[name] is None else json.loads(model[name])
        vocabularies = {row["id"]: row for row in table("SELECT * FROM vocabularies")}
        prompts = {row["id"]: row for row in table("SELECT * FROM prompts")}
        sc_prompts = {row["id"]: row["desc"] for row in table("SELECT * FROM sc_prompts")}
        images = []
        for row in table("SELECT * FROM images ORDER BY id"):
            prompt = prompts[row.pop("prompt_id")]
            image = {"prompt": prompt["desc"], "sc_prompt": sc_prompts[row.pop("sc_prompt_id")], **row}
            if prompt["vocabulary_id"] is not None:
                vocabulary = vocabularies[prompt["vocabulary_id"]]
                image["class"] = [vocabulary["name"], json.loads(vocabulary["labels"])[prompt["class_label"]]]
            blob = image.pop("quantvec")
            image["tokens"] = list(struct.unpack(f"<{len(blob) // 2}H", blob))
            image["extra_settings"] = json.loads(image["extra_settings"] or "{}")
            image["scores"] = table(
                "SELECT model_id, reads, value, time FROM scores JOIN scorers ON scorers.id = scorer_id"
                f" WHERE image_id = {row['id']} ORDER BY scorers.id"
            )
            image["vectors"] = {
                str(vector["model_id"]): list(struct.unpack(f"<{len(vector['vector']) // 2}e", vector["vector"]))
                for vector in table(f"SELECT model_id, vector FROM vectors WHERE image_id = {row['id']}")
            }
            images.append(image)
        ratings = table("SELECT rater, kind, image_id, other_id, value, time FROM ratings ORDER BY time")
    named = {str(row_id): model for row_id, model in models.items()}
    return {**meta, "models": named, "images": images, "ratings": ratings}


def test_plain_sql_reads_what_is_expected():
    assert read(EXAMPLE) == EXPECTED


def test_the_package_reads_the_same(tmp_path):
    with Archive.open(EXAMPLE) as archive:
        assert (archive.version, list(verify(archive))) == (EXPECTED["version"], [])
        rows = list(archive.read_rows(image["id"] for image in EXPECTED["images"]))
        texts, models = archive.prompts(), archive.models()
    for row, image in zip(rows, EXPECTED["images"], strict=True):
        assert list(struct.unpack(f"<{len(row.quantvec) // 2}H", row.quantvec)) == image["tokens"]
        assert (texts[row.prompt_id], row.key0, row.key1) == (image["prompt"], image["key0"], image["key1"])
        assert row.params.cond_scale == image["cond_scale"] and row.quantvec_md5 == image["quantvec_md5"]
        shape = EXPECTED["models"][str(image["codec_id"])]["token_shape"]
        assert json.loads(json.dumps(models[row.codec_id].token_shape)) == shape
    merge([EXAMPLE], tmp_path / "copy.db")
    assert read(tmp_path / "copy.db") == EXPECTED


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="needs the program sqlite3")
def test_tools_that_copy_tables_keep_the_identity(tmp_path):
    dumped, cloned = tmp_path / "dumped.db", tmp_path / "cloned.db"
    sql = subprocess.run(["sqlite3", EXAMPLE, ".dump"], capture_output=True, check=True, timeout=60).stdout
    subprocess.run(["sqlite3", dumped], input=sql, check=True, timeout=60)
    subprocess.run(["sqlite3", EXAMPLE, f".clone {cloned}"], capture_output=True, check=True, timeout=60)
    for copy in (dumped, cloned):
        with Archive.open(copy) as archive:
            assert archive.version == EXPECTED["version"] and list(verify(archive)) == []
        assert read(copy) == EXPECTED
