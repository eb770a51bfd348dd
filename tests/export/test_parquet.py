"""`export --to parquet`: a folder that the Hugging Face hub shows as images."""

import io
import json

import numpy as np
import pytest
from archive_kit import CLIP, GENERATOR, execute, new_image
from PIL import Image
from tiny import CODEBOOK_SIZE, GRID

from dm_generations.archive import Archive
from dm_generations.cli import main
from dm_generations.inference.decoder import Decoder
from dm_generations.models.loading import load_checkpoint

pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.e2e

TOKENS = np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (3, GRID**2)).astype("<u2")
NAME = "`x`\n# a heading"


@pytest.fixture
def archive(models, tmp_path):
    path = tmp_path / "a.db"
    codec = load_checkpoint(str(models.vqgan), "codec").model_info()
    with Archive.create(path) as opened, opened.transaction():
        ids = [opened.model_id(model) for model in (GENERATOR, codec, CLIP)]
        opened.add_images((new_image(key, quantvec=row.tobytes()) for key, row in enumerate(TOKENS)), *ids, 1)
        opened.connection.execute("UPDATE models SET name = ? WHERE id = 1", (NAME,))
    return path


def export(archive, out, *flags):
    return main(["export", str(archive), "--to", "parquet", "--out", str(out), *map(str, flags)])


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_the_column_of_images_is_typed_for_the_hub(image_format, archive, models, tmp_path):
    flags = ["--codec", models.vqgan, "--format", image_format, "--license", "cc0-1.0"]
    assert export(archive, tmp_path / "set", *flags) == 0
    table = pq.read_table(tmp_path / "set" / "data")
    hub = json.loads(table.schema.metadata[b"huggingface"])
    assert hub["info"]["features"]["image"] == {"_type": "Image"}
    images = table["image"].to_pylist()
    pixels = [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in images]
    np.testing.assert_array_equal(pixels, Decoder.load(models.vqgan)(TOKENS))
    assert len({image["path"] for image in images}) == 3 and table["tokens"].to_pylist() == TOKENS.tolist()
    assert main(["import", str(tmp_path / "set"), "--into", str(tmp_path / "b.db")]) == 0
    rows = "SELECT quantvec, key1, time_start, codec_id FROM images"
    assert execute(tmp_path / "b.db", rows) == execute(archive, rows)


def test_the_card_has_yaml_and_the_command_and_no_markup_of_others(archive, tmp_path):
    yaml = pytest.importorskip("yaml")
    assert export(archive, tmp_path / "set", "--no-images") == 0
    assert b"huggingface" not in pq.read_schema(next((tmp_path / "set" / "data").iterdir())).metadata
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    _, head, text = card.split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["license"] == "unknown" and facts["size_categories"] == ["n<1K"]
    assert facts["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    named = [line for line in text.splitlines() if "a heading" in line]
    assert named and all(line.startswith("    ") for line in named)


@pytest.mark.parametrize("flags", [["--no-images", "--codec", "x"], ["--license", "a b"], ["--where", "top_k=99"]])
def test_a_wrong_flag_writes_nothing(flags, archive, tmp_path, capsys):
    assert export(archive, tmp_path / "set", *flags) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "set").exists()


def test_a_codec_of_other_tokens_is_refused(archive, tmp_path, capsys):
    assert export(archive, tmp_path / "set") == 1
    assert "--codec" in capsys.readouterr().err and not (tmp_path / "set").exists()
