"""Public checkpoints, as tiny golden files of each format: from text to PNG by the commands that README.md shows."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, golden, golden_dirs
from PIL import Image
from tiny import tiny_dalle_bart, tiny_vqgan
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from dm_generations import cli
from dm_generations.archive import Archive
from dm_generations.models.loading import load_checkpoint
from dm_generations.weights import native

pytestmark = pytest.mark.e2e

PROMPT = "a red cat"
LETTERS = ["<s>", "<pad>", "</s>", "<unk>", "Ġ", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A folder with one small vocabulary as tokenizer.json, and as vocab.json with merges.txt."""
    folder = tmp_path_factory.mktemp("letters")
    ids = {piece: index for index, piece in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def run(*words) -> None:
    assert cli.main([str(word) for word in words]) == 0


def drawn_and_decoded(tmp_path: Path, *words, codec=None) -> np.ndarray:
    """The picture that `generate` with these words and `decode` make: (H, W, 3) uint8."""
    db, out = tmp_path / "drawn.db", tmp_path / "pictures"
    flags = [] if codec is None else ["--codec", codec]
    run("generate", "--db", db, "--prompts", PROMPT, "--n", 1, "--batch-size", 2, "--cpu-only", *flags, *words)
    model = words[words.index("--model") + 1]
    run("decode", "--db", db, "--out-dir", out, "--codec", codec or model, "--batch-size", 2, "--cpu-only")
    (picture,) = out.rglob("*.png")
    return np.asarray(Image.open(picture))


def codec_for(model, tmp_path: Path) -> Path:
    """A codec of ours that fits a generator."""
    config = load_checkpoint(model, "generator").config
    grid = int(config.image_length**0.5)
    return tiny_vqgan(tmp_path / "codec", resolution=2 * grid, n_embed=config.codebook_size)


def cases(name: str, marker: str) -> list[Path]:
    """Folders below golden/`name` that hold a file `marker`, each once though the full set has it too."""
    found = {
        path.parent.relative_to(root): path.parent for root in golden_dirs(name)[::-1] for path in root.rglob(marker)
    }
    return [found[key] for key in sorted(found)]


def titles(paths: list[Path]) -> list[str]:
    return ["-".join(path.parts[-2:]) for path in paths]


DALLE_BARTS = cases("dalle_bart", "flax_model.msgpack")
MIN_DALLES = cases("min_dalle", "encoder.pt")
DALLE_PYTORCHES = cases("dalle_pytorch", "dalle.pt")
# Those whose generator is fast to compile: the networks have their own tests for every case.
QUICK = 2


@pytest.mark.parametrize("model", DALLE_BARTS[:QUICK], ids=titles(DALLE_BARTS[:QUICK]))
def test_dalle_mini(model, letters, tmp_path):
    picture = drawn_and_decoded(
        tmp_path, "--no-score", "--model", model, "--tokenizer", letters, codec=codec_for(model, tmp_path)
    )
    assert picture.shape == (8, 8, 3) and picture.std() > 0


@pytest.mark.parametrize("model", MIN_DALLES[:QUICK], ids=titles(MIN_DALLES[:QUICK]))
def test_min_dalle_finds_its_own_files(model, letters, tmp_path):
    """Everything in one folder, as people have it: encoder, decoder, vocabulary, and some codec as --codec."""
    folder = tmp_path / "min-dalle"
    shutil.copytree(model, folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(letters / name, folder / name)
    picture = drawn_and_decoded(tmp_path, "--no-score", "--model", folder, codec=codec_for(folder, tmp_path))
    assert picture.std() > 0


def test_mindalle_needs_nothing_but_its_folder(tmp_path, capsys):
    model = golden("mindalle_kakao/ckpt")
    picture = drawn_and_decoded(tmp_path, "--no-score", "--model", model)
    assert picture.shape == (16, 16, 3) and picture.std() > 0
    assert (
        f"decode --db {tmp_path / 'drawn.db'} --codec {model}\n" in capsys.readouterr().out
    )  # the codec is there, too


@pytest.mark.parametrize("model", DALLE_PYTORCHES[:QUICK], ids=titles(DALLE_PYTORCHES[:QUICK]))
def test_dalle_pytorch_brings_its_codec(model, letters, tmp_path):
    picture = drawn_and_decoded(
        tmp_path, "--no-score", "--model", model / "dalle.pt", "--tokenizer", letters / "tokenizer.json"
    )
    assert picture.std() > 0


CODECS = [golden("vqgan_jax/a"), *cases("taming", "last.ckpt")]


@pytest.mark.parametrize("codec", CODECS, ids=titles(CODECS))
def test_codecs(codec, tmp_path):
    config = load_checkpoint(codec, "codec").config
    model = tiny_dalle_bart(
        tmp_path / "model",
        image_length=config.grid**2,
        image_vocab_size=config.codebook_size,
        decoder_start_token_id=config.codebook_size,
    )
    picture = drawn_and_decoded(tmp_path, "--no-score", "--model", model, codec=codec)
    assert picture.shape == (config.image_size, config.image_size, 3) and picture.std() > 0


def test_dalle_mini_noise_is_told_apart_and_repeats(letters, tmp_path):
    """The same keys with another generator of noise are other rows; a key alone gives its row again."""
    model = golden("dalle_bart/mini")
    codec = codec_for(model, tmp_path)
    words = ["--no-score", "--model", model, "--codec", codec, "--tokenizer", letters, "--batch-size", 2]
    words += ["--prompts", PROMPT, "--rng", "dalle-mini", "--cpu-only"]
    run("generate", "--db", tmp_path / "a.db", "--n", 4, *words)
    with Archive.open(tmp_path / "a.db") as archive:
        (group,) = archive.groups()
        assert group.key.params.top_k == 50 and group.count == 4
        rows = list(archive.rows(group.key))
    row = rows[2]
    run("generate", "--db", tmp_path / "b.db", "--keys", f"{row.key0}:{row.key1}", *words)
    run(
        "generate",
        "--db",
        tmp_path / "b.db",
        "--keys",
        f"{row.key0}:{row.key1}",
        *words,
        "--rng",
        "rows",
        "--top-k",
        50,
    )
    with Archive.open(tmp_path / "b.db") as archive:
        (group,) = archive.groups()
        again = [other.quantvec for other in archive.rows(group.key)]
    assert len(again) == 2 and row.quantvec in again


def test_what_no_flag_gives_dalle_mini_takes_from_config_json(tmp_path):
    """Its `generate` reads these three there."""
    model = tiny_dalle_bart(tmp_path / "model", top_k=7, top_p=0.75, temperature=0.5)
    words = ["--no-score", "--model", model, "--codec", tiny_vqgan(tmp_path / "codec"), "--prompts", PROMPT]
    words += ["--n", 1, "--batch-size", 1, "--cpu-only", "--db", tmp_path / "a.db"]
    run("generate", *words, "--rng", "dalle-mini")
    run("generate", *words, "--rng", "dalle-mini", "--temperature", 2)
    run("generate", *words)
    with Archive.open(tmp_path / "a.db") as archive:
        params = [group.key.params for group in archive.groups()]
    found = sorted((row.top_k, row.top_p, row.temperature) for row in params)
    assert found == [(7, 0.75, 0.5), (7, 0.75, 2.0), (256, 1.0, 1.0)]


def test_tokens_as_npy(letters, tmp_path):
    model = golden("dalle_bart/mini")
    codec = codec_for(model, tmp_path)
    words = ["--no-score", "--model", model, "--codec", codec, "--tokenizer", letters, "--batch-size", 2, "--cpu-only"]
    db, out = tmp_path / "a.db", tmp_path / "npy"
    run("generate", "--db", db, "--prompts", PROMPT, "--n", 3, *words, "--output", "npy", "--out-dir", out)
    files = sorted(out.rglob("*.npy"))
    tokens = [np.load(path, allow_pickle=False) for path in files]
    assert [array.shape for array in tokens] == [(16,)] * 3 and {array.dtype for array in tokens} == {np.dtype("<i8")}
    with Archive.open(db) as archive:
        (group,) = archive.groups()
        stored = [np.frombuffer(row.quantvec, "<u2") for row in archive.rows(group.key)]
    assert sorted(map(tuple, stored)) == sorted(map(tuple, tokens))
    run("decode", "--db", db, "--output", "npy", "--out-dir", tmp_path / "again")
    assert [p.read_bytes() for p in sorted((tmp_path / "again").rglob("*.npy"))] == [p.read_bytes() for p in files]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rng", "dalle-mini", "--model", golden("mindalle_kakao/ckpt")], "repeats DALL-E mini and mega"),
        (
            ["--rng", "dalle-mini", "--model", DALLE_PYTORCHES[0] / "dalle.pt", "--tokenizer", "LETTERS"],
            "repeats DALL-E mini and mega",
        ),
        (["--model", golden("dalle_bart/mini")], "takes 8x8: give the model's own codec"),
        (["--model", golden("mindalle_kakao/ckpt"), "--codec", golden("vqgan_jax/a")], "give the model's own codec"),
        (["--keys", "12"], "is not two whole numbers"),
        (["--keys", "1:2", "--n", "4"], "use just one of --keys and of --n with --seed"),
        (["--keys", f"1:{2**32}"], "must be from 0 to 4,294,967,295"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(words, expected, letters, tmp_path, capsys):
    db = tmp_path / "x.db"
    words = [letters / "tokenizer.json" if word == "LETTERS" else word for word in words]
    assert cli.main([str(w) for w in ["generate", "--db", db, "--prompts", PROMPT, "--no-score", *words]]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and expected in error and "\n" not in error
    assert not db.exists()


def test_a_tokenizer_of_another_model_is_found_out(tmp_path, capsys):
    model, db = golden("dalle_bart/mini"), tmp_path / "x.db"
    words = ["--model", model, "--codec", codec_for(model, tmp_path), "--tokenizer", golden("dalle_bart/text")]
    assert (
        cli.main([str(w) for w in ["generate", "--db", db, "--prompts", PROMPT, "--no-score", "--n", 1, *words]]) == 1
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "tokenizer" in error and "99" in error
    assert not db.exists()


def readme_flags() -> list[str]:
    """The flags of the README's table of models, a row each."""
    text = (ROOT / "README.md").read_text("utf-8")
    return re.findall(r"^\|.*\| `(--[^`]+)` \|$", text, flags=re.MULTILINE)


def folder_with(source: Path, folder: Path, *more: Path) -> Path:
    shutil.copytree(source, folder)
    for path in more:
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture
def people_have(tmp_path, letters, monkeypatch):
    """A working folder in which the README's names are tiny models of these formats; the hub is never asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    vocabulary = (letters / "vocab.json", letters / "merges.txt")
    mini = folder_with(golden("dalle_bart/mini"), tmp_path / "dalle-mini/dalle-mini", *vocabulary)
    folder_with(golden("dalle_bart/mega"), tmp_path / "dalle-mini/dalle-mega", *vocabulary)
    codec_for(mini, tmp_path).rename(tmp_path / "dalle-mini/vqgan_imagenet_f16_16384")
    min_dalle = folder_with(golden("min_dalle/tiny_from_flax"), tmp_path / "kuprel/min-dalle", *vocabulary)
    detoker = load_checkpoint(tmp_path / "dalle-mini/vqgan_imagenet_f16_16384", "codec")
    native.save(min_dalle / "codec", "vqgan", dataclasses.asdict(detoker.config), detoker.params)
    folder_with(golden("mindalle_kakao/ckpt"), tmp_path / "minDALL-E")
    shutil.copyfile(next(p for p in DALLE_PYTORCHES if "jack" in p.parts) / "dalle.pt", tmp_path / "dalle.pt")
    shutil.copyfile(letters / "tokenizer.json", tmp_path / "bpe.json")
    folder_with(golden("taming/gumbel"), tmp_path / "vqgan_gumbel_f8")
    return tmp_path


@pytest.mark.parametrize("flags", [f for f in readme_flags() if f.startswith("--model")])
def test_commands_of_the_readme_draw(flags, people_have, capfd):
    words = [
        "generate",
        "--db",
        "x.db",
        "--prompts",
        PROMPT,
        "--n",
        "1",
        "--batch-size",
        "2",
        "--no-score",
        "--cpu-only",
    ]
    run(*words, *flags.split())
    with Archive.open(people_have / "x.db") as archive:
        assert archive.count() == 1
    # This fixture's Gumbel VQGAN has more codes than its dalle.pt draws; all others fit.
    assert ("warning: codec" in capfd.readouterr().err) == ("vqgan_gumbel_f8" in flags)


def test_the_table_has_every_format():
    assert len(readme_flags()) == 10


def test_condition_scale_as_dalle_pytorch_has_it(letters, tmp_path, capsys):
    """With `--cond-scale-of first` the first code is the guided one, and all later ones follow without the prompt."""
    model = DALLE_PYTORCHES[0] / "dalle.pt"
    words = ["--model", model, "--tokenizer", letters / "tokenizer.json", "--no-score", "--batch-size", 2, "--n", 1]
    words += ["--prompts", PROMPT, "--temperature", 0, "--cond-scale", 3, "--cpu-only"]
    tokens = {}
    for guided in ("all", "first"):
        db = tmp_path / f"{guided}.db"
        run("generate", "--db", db, *words, "--cond-scale-of", guided)
        with Archive.open(db) as archive:
            (group,) = archive.groups()
            (row,) = archive.rows(group.key)
        tokens[guided] = np.frombuffer(row.quantvec, "<u2").astype(np.int32)
        # The flag is part of the model: it says which rows are meant, and draws them again.
        checked = ["verify", "--db", db, *words[:4], "--batch-size", 2, "--cpu-only", "--regenerate"]
        run(*checked, "--cond-scale-of", guided)
    assert cli.main([str(word) for word in checked]) == 1
    assert "'dalle.pt'" in capsys.readouterr().err
    assert tokens["all"][0] == tokens["first"][0]

    found = load_checkpoint(model, "generator")
    null = np.zeros((1, found.config.text_seq_len), np.int32)
    logits = found.network_class(found.config).apply({"params": found.params}, null, tokens["first"][None])
    image = np.asarray(logits)[0, found.config.text_seq_len :, -found.config.codebook_size :]
    np.testing.assert_array_equal(image.argmax(1)[1:], tokens["first"][1:])


@pytest.mark.parametrize("flags", [["--conv-like", "causal"], ["--cond-scale-of", "first"]])
def test_flags_of_dalle_pytorch_are_refused_elsewhere(flags, tmp_path, capsys):
    assert cli.main(["generate", "--db", str(tmp_path / "x.db"), "--prompts", PROMPT, "--no-score", *flags]) == 1
    assert "'embedded/dalle_bart' is a dalle_bart, which has no option" in capsys.readouterr().err
