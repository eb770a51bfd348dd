"""From a class, a caption or a prompt to the page, with the small golden models of today's token models."""

import contextlib
import json

import numpy as np
import pytest
from helpers import golden
from PIL import Image
from ray_kit import PickledPool

from dm_generations.archive import Archive
from dm_generations.archive.records import ClassLabel
from dm_generations.cli import main
from dm_generations.models.registry import get_kind, parameter_shapes
from dm_generations.models.vqgan.network import VQGANConfig
from dm_generations.weights.native import save, unflatten

pytestmark = pytest.mark.e2e

CLASSES = min(path.parent for path in golden("llamagen").glob("**/c2i_*.pt"))
PROMPTS = min(path.parent for path in golden("janus").glob("**/settings.json"))
GPT = json.loads((CLASSES / "settings.json").read_text())["gpt"]
SIDE = int(GPT["block_size"] ** 0.5)
CLASS_MODEL = ["--model", str(next(CLASSES.glob("c2i_*.pt"))), "--heads", str(GPT["n_head"]), "--grid", str(SIDE)]
BATCH = ["--batch-size", "4", "--cpu-only"]


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """A codec with random weights that is large enough for each model."""
    config = VQGANConfig(
        **{"ch": 8, "ch_mult": (1, 1), "num_res_blocks": 1, "attn_resolutions": (), "resolution": 32},
        **{"z_channels": 8, "n_embed": 256, "embed_dim": 4, "num_groups": 4, "is_signed": True, "is_normalized": True},
    )
    random = np.random.default_rng(0)
    shapes = parameter_shapes("vqgan", config)
    params = unflatten({name: random.normal(0, 0.3, size=shape).astype("f") for name, shape in shapes.items()})
    folder = tmp_path_factory.mktemp("codec")
    save(folder, get_kind("vqgan").name, {**vars(config)}, params)
    return str(folder)


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def db(codec, tmp_path_factory):
    """Images of three classes, guided throughout and at the start alone."""
    path = tmp_path_factory.mktemp("db") / "classes.db"
    generate_classes(path, codec)
    return path


def generate_classes(path, codec):
    words = ["--classes", "0-1", "3", "--n", 2, "--cfg-interval", -1, 2, "--no-score", "--codec", codec, *BATCH]
    assert run("generate", "--db", path, *CLASS_MODEL, *words) == 0


def test_classes_become_rows(db):
    with Archive.open(db) as archive:
        assert archive.count() == 12
        assert {(label.label, label.vocabulary) for label in archive.classes().values()} == {
            (label, f"classes-{GPT['num_classes']}") for label in (0, 1, 3)
        }
        groups = archive.groups()
        assert {group.key.extra_settings for group in groups} == {"", '{"cfg_interval":2}'}
        # the settings of LlamaGen's own program
        assert {(group.key.params.top_k, group.key.params.cond_scale) for group in groups} == {(2000, 4.0)}


def test_a_pool_samples_the_same_classes(db, codec, tmp_path, monkeypatch):
    monkeypatch.setattr("dm_generations.cli.generate.ray_pool", lambda args: contextlib.nullcontext(PickledPool()))
    generate_classes(tmp_path / "pool.db", codec)
    found = []
    for path in (db, tmp_path / "pool.db"):
        with Archive.open(path) as archive:
            classes = archive.classes()
            rows = [(group.key, row) for group in archive.groups() for row in archive.rows(group.key)]
            found.append([(classes[key.prompt_id], key.extra_settings, row.key, row.quantvec) for key, row in rows])
    assert found[1] == found[0]


def test_only_what_is_missing_is_generated(db, codec, capsys):
    words = [*CLASS_MODEL, "--codec", codec, "--no-score", *BATCH]
    assert run("generate", "--db", db, *words, "--classes", "0-1", "3", "--n", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out)["added_count"] == 0


def test_the_interval_guides_the_first_tokens_alone(db):
    with Archive.open(db) as archive:
        prompt_ids = {label: row_id for row_id, label in archive.classes().items()}
        label = ClassLabel(f"classes-{GPT['num_classes']}", 3)
        groups = [group.key for group in archive.groups() if group.key.prompt_id == prompt_ids[label]]
        whole, part = (
            {row.key0: np.frombuffer(row.quantvec, "<u2") for row in archive.rows(key)}
            for key in sorted(groups, key=lambda key: key.extra_settings)
        )
    for key, tokens in whole.items():
        np.testing.assert_array_equal(tokens[:4], part[key][:4])
    assert any((tokens != part[key]).any() for key, tokens in whole.items())


@pytest.mark.parametrize("check", ["--regenerate", "--replay"])
def test_rows_of_classes_are_repeated(db, check):
    assert run("verify", db, check, *CLASS_MODEL, *BATCH) == 0


def test_a_changed_token_is_found(db, tmp_path):
    copy = tmp_path / "copy.db"
    copy.write_bytes(db.read_bytes())
    with Archive.open(copy, "w") as archive, archive.transaction():
        (row,) = archive.read_rows(archive.image_ids()[:1])
        tokens = np.frombuffer(row.quantvec, "<u2").copy()
        tokens[-1] = (tokens[-1] + 1) % GPT["num_classes"]
        from dm_generations.archive import quantvec_md5

        values = (tokens.tobytes(), quantvec_md5(tokens.tobytes()), row.id)
        archive.connection.execute("UPDATE images SET quantvec = ?, quantvec_md5 = ? WHERE id = ?", values)
    assert run("verify", copy, "--regenerate", *CLASS_MODEL, *BATCH) == 1


def test_to_files_the_page_and_one_array(db, codec, tmp_path):
    assert run("export", db, "--codec", codec, "--fid", tmp_path / "all.npz", "--cpu-only") == 0
    with np.load(tmp_path / "all.npz") as file:
        assert file.files == ["arr_0"]
        found = file["arr_0"]
    assert (found.shape, found.dtype) == ((12, 2 * SIDE, 2 * SIDE, 3), np.uint8)
    folder = tmp_path / "png"
    assert run("decode", db, "--codec", codec, "--out-dir", folder, "--batch-size", 5, "--cpu-only") == 0
    assert (folder / "samplebrowser.html").is_file()
    files = {np.asarray(Image.open(path)).tobytes() for path in folder.rglob("*.png")}
    assert files == {image.tobytes() for image in found}


def test_a_damaged_image_leaves_no_array(db, codec, tmp_path, capsys):
    copy = tmp_path / "copy.db"
    copy.write_bytes(db.read_bytes())
    with Archive.open(copy, "w") as archive, archive.transaction():
        row_id = archive.image_ids()[-1]
        archive.connection.execute("UPDATE images SET quantvec = x'ffff' WHERE id = ?", (row_id,))
    assert run("export", copy, "--codec", codec, "--fid", tmp_path / "a.npz", "--cpu-only") == 1
    assert f"image {row_id}" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.npz*"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--classes", GPT["num_classes"]], str(GPT["num_classes"])),
        (["--classes", "0", "9999"], "9999"),
        (["--classes", "3-1"], "3-1"),
        (["--classes", "cat"], "cat"),
        (["--prompts", "a cat"], "--classes"),
        (["--classes", "0", "--sc-prompts", "a cat"], "a cat"),
        (["--classes", "0", "--prompts", "a cat"], "--classes"),
        (["--classes", "0", "--cfg-interval", "-2"], "cfg_interval"),
    ],
)
def test_bad_classes(words, named, codec, tmp_path, capsys):
    path = tmp_path / "new.db"
    assert run("generate", "--db", path, *CLASS_MODEL, *words, "--codec", codec, "--no-score", *BATCH) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert named in error
    assert not path.exists()


def test_a_class_for_a_model_of_texts(tmp_path, capsys):
    assert run("generate", "--db", tmp_path / "new.db", "--classes", 3, "--no-score", *BATCH) == 1
    assert "--prompts" in capsys.readouterr().err
    assert (
        run("generate", "--db", tmp_path / "new.db", "--prompts", "a", "--cfg-interval", 3, "--no-score", *BATCH) == 1
    )
    assert "cfg_interval" in capsys.readouterr().err


def test_prompts_with_janus(codec, tmp_path):
    path = tmp_path / "janus.db"
    words = ["--prompts", "a red cube", "two", "--n", 2, "--no-score", *BATCH]
    model = ["--model", PROMPTS, "--tokenizer", PROMPTS / "tokenizer.json"]
    assert run("generate", "--db", path, *model, "--codec", codec, *words) == 0
    with Archive.open(path) as archive:
        params = {group.key.params for group in archive.groups()}
        assert {(each.top_k, each.cond_scale) for each in params} == {(0, 5.0)}
    assert run("verify", path, "--regenerate", *model, *BATCH) == 0
    # A row is the same alone as in a batch with a longer prompt.
    alone = tmp_path / "alone.db"
    assert run("generate", "--db", alone, *model, "--codec", codec, "--prompts", "two", *words[3:]) == 0
    rows = []
    for file in (path, alone):
        with Archive.open(file) as archive:
            rows.append({(row.key0, row.quantvec) for row in archive.read_rows(archive.image_ids())})
    assert rows[1] <= rows[0]


@pytest.mark.parametrize("path", sorted(golden("llamagen").glob("**/t2i_*.pt")), ids=lambda path: path.parent.name)
def test_captions_with_llamagen(path, tmp_path, capsys):
    gpt = json.loads((path.parent / "settings.json").read_text())["gpt"]
    model = ["--model", path.parent, "--heads", gpt["n_head"], "--grid", int(gpt["block_size"] ** 0.5)]
    prompts = ["--prompts", "a cat", "A blue Porsche 356 parked in front of a yellow wall", "--n", 2]
    file = tmp_path / "captions.db"
    assert run("generate", "--db", file, *model, *prompts, "--no-score", *BATCH) == 0  # its own codec is in the folder
    assert run("verify", file, "--regenerate", *model, *BATCH) == 0
    converted = tmp_path / "converted"
    assert run("convert", path.parent, "--out", converted, *model[2:]) == 0
    assert run("verify", file, "--regenerate", "--model", converted, *BATCH) == 0
