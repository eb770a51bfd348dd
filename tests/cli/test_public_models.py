"""Public checkpoints, as tiny golden files of each format: from text to PNG by the commands of the models page."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from amused_kit import small
from decode_kit import random_tokens, write_archive_2022
from helpers import ROOT, golden_dirs
from PIL import Image
from tiny import CODEBOOK_SIZE, GRID, tiny_dalle_bart, tiny_vqgan
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from dm_generations import Decoder, Generator, cli
from dm_generations.archive import Archive, ImageRow
from dm_generations.archive.records import TOKEN_DTYPE
from dm_generations.models.base import default_params_of
from dm_generations.models.loading import Models, load_checkpoint, load_models
from dm_generations.pipelines.generate import GenerateOptions, prepare
from dm_generations.pipelines.sweep import DEFAULT_PARAMS, DEFAULT_SEED, load_sweep
from dm_generations.sampling.prng import row_key

PROMPT = "a red cat"
LETTERS = ["<s>", "<pad>", "</s>", "<unk>", "Ġ", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A folder with one small vocabulary as tokenizer.json, and as vocab.json with merges.txt."""
    folder = tmp_path_factory.mktemp("letters")
    ids = {letter: index for index, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def cases(name: str, marker: str) -> list[Path]:
    """Folders below golden/`name` that hold a file `marker`, each once though the full set has it too."""
    found = {
        path.parent.relative_to(root): path.parent for root in golden_dirs(name)[::-1] for path in root.rglob(marker)
    }
    return [found[key] for key in sorted(found)]


DALLE_BARTS = cases("dalle_bart", "flax_model.msgpack")
MIN_DALLES = cases("min_dalle", "encoder.pt")
KAKAOS = cases("mindalle_kakao", "stage2_last.ckpt")
DALLE_PYTORCHES = cases("dalle_pytorch", "dalle.pt")
CODECS = [*cases("vqgan_jax", "flax_model.msgpack")[:1], *cases("taming", "last.ckpt")]


def run(*words) -> None:
    assert cli.main([str(word) for word in words]) == 0


def run_badly(capsys, *words) -> str:
    """Run a command that is refused; return the line that says why."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    return errors


def stored_rows(db: Path) -> list[ImageRow]:
    with Archive.open(db) as archive:
        return [row for group in archive.groups() for row in archive.rows(group.key)]


def stored_tokens(db: Path) -> np.ndarray:
    """The tokens of an archive, (n, L)."""
    return np.stack([np.frombuffer(row.quantvec, TOKEN_DTYPE) for row in stored_rows(db)])


def codec_for(model: str | Path, folder: Path) -> Path:
    """Write a codec that is compatible with a generator."""
    config = load_checkpoint(model, "generator").config
    grid = int(config.image_length**0.5)
    return tiny_vqgan(folder, resolution=2 * grid, n_embed=config.codebook_size)


# From the commands of the table to PNG


TOKEN_MODELS = ("llamagen", "llamagen_t2i", "deepseek-community/Janus-Pro-1B")  # see test_token_models.py
LIKE_MINI = ("dalle-mini/dalle-mega", "kuprel/min-dalle")  # of other sizes, or another file of the same weights


def table_flags() -> list[str]:
    """The flags in the table of models, a row each."""
    text = (ROOT / "docs" / "reference" / "models.md").read_text("utf-8")
    return re.findall(r"^\|.*\| `(--[^`]+)` \|$", text, flags=re.MULTILINE)


def smallest_dalle_pytorch() -> Path:
    """Return the `dalle.pt` with the fewest tokens an image, of those whose vocabulary holds all letters."""
    paths = [folder / "dalle.pt" for folder in DALLE_PYTORCHES]
    configs = {path: load_checkpoint(path, "generator").config for path in paths}
    usable = [path for path, config in configs.items() if config.text_vocab_size >= len(LETTERS)]
    return min(usable, key=lambda path: configs[path].image_length)


def write_models(flags: dict[str, str], letters: Path) -> None:
    """Write tiny models of the formats in the table where the flags of a row look for them."""
    has_codec, vocabulary = "--codec" in flags, ("vocab.json", "merges.txt")
    sources = {
        "dalle-mini/dalle-mini": (DALLE_BARTS[0], vocabulary),
        "dalle-mini/dalle-mega": (DALLE_BARTS[-1], vocabulary),
        "kuprel/min-dalle": (MIN_DALLES[0], vocabulary),
        "minDALL-E": (KAKAOS[0], ()),
        "dalle.pt": (smallest_dalle_pytorch(), ()),
    }
    model = Path(flags["--model"])
    if flags["--model"].startswith("amused/"):
        small(model)
        return
    source, names = sources[flags["--model"]]
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, model)
    for name in names:
        shutil.copyfile(letters / name, model / name)
    if "--tokenizer" in flags:
        shutil.copyfile(letters / "tokenizer.json", flags["--tokenizer"])
    if has_codec:
        codec_for(model, Path(flags["--codec"]))
    elif not (model.is_file() or (model / "config.yaml").exists()):  # those have their codec
        codec_for(model, model / "codec")


def generate_in_python(models: Models) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens (1, L) and images (1, H, W, 3) of the first seed."""
    generator = Generator(models.generator, models.generator.load_tokenizer(), batch_size=1)
    keys = np.array([row_key(DEFAULT_SEED, 0)], np.uint32)
    params = default_params_of(models.generator.config) or DEFAULT_PARAMS
    tokens = generator.generate([PROMPT], params, keys)
    return tokens, Decoder.from_checkpoint(models.codec, batch_size=1, grid=models.grid).decode(tokens)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[pytest.mark.slow] * (row.split()[1] in LIKE_MINI), id=row)
        for row in table_flags()
        if row.startswith("--model") and row.split()[1] not in TOKEN_MODELS
    ],
)
def test_the_commands_of_the_table(row, letters, tmp_path, monkeypatch):
    """With the hub switched off, and the models in folders of the names that they have there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    words = row.split()
    flags = dict(zip(words[::2], words[1::2], strict=True))
    write_models(flags, letters)
    short = ["--batch-size", 1, "--cpu-only"]
    run("generate", "--db", "a.db", "--prompts", PROMPT, "--n", 1, "--no-score", *short, *words)
    codec = flags.get("--codec", flags["--model"])
    run("decode", "--db", "a.db", "--codec", codec, "--out-dir", "images", *short)

    tokenizer = Path(flags["--tokenizer"]) if "--tokenizer" in flags else None
    tokens, images = generate_in_python(
        load_models(flags["--model"], flags.get("--codec"), None, is_scored=False, tokenizer=tokenizer)
    )
    np.testing.assert_array_equal(stored_tokens(Path("a.db")), tokens)
    (path,) = Path("images").rglob("*.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), images[0])


def test_the_table_names_a_command_for_every_role():
    flags = {row.split()[0] for row in table_flags()}
    assert flags == {"--model", "--codec", "--clip"}


@pytest.mark.e2e
@pytest.mark.parametrize("codec", CODECS, ids=lambda path: path.name)
def test_codecs_decode_an_archive(codec, tmp_path):
    checkpoint = load_checkpoint(codec, "codec")
    config = checkpoint.config
    tokens = random_tokens(1, config.grid**2, config.codebook_size)
    db = write_archive_2022(tmp_path / "a.db", tokens)
    run("decode", "--db", db, "--out-dir", tmp_path / "images", "--codec", codec, "--batch-size", 1, "--cpu-only")
    (path,) = (tmp_path / "images").rglob("*.png")
    (expected,) = Decoder.from_checkpoint(checkpoint, batch_size=1).decode(tokens)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), expected)


# Options of single kinds of models


@pytest.mark.slow
def test_the_noise_of_dalle_mini_is_stored_apart_and_repeats(letters, tmp_path):
    """The same keys with other noise are other rows; a key alone generates its row anew."""
    model = DALLE_BARTS[-1]
    words = ["--no-score", "--model", model, "--codec", codec_for(model, tmp_path / "codec"), "--tokenizer", letters]
    words += ["--batch-size", 2, "--prompts", PROMPT, "--cpu-only"]
    run("generate", "--db", tmp_path / "a.db", "--n", 4, *words, "--rng", "dalle-mini")
    rows = stored_rows(tmp_path / "a.db")
    top_k = load_checkpoint(model, "generator").config.top_k
    assert [row.params.top_k for row in rows] == [top_k] * 4
    key = f"{rows[2].key0}:{rows[2].key1}"
    run("generate", "--db", tmp_path / "b.db", "--keys", key, *words, "--rng", "dalle-mini")
    run("generate", "--db", tmp_path / "b.db", "--keys", key, *words, "--rng", "rows", "--top-k", top_k)
    found = [row.quantvec for row in stored_rows(tmp_path / "b.db")]
    assert len(found) == 2
    assert rows[2].quantvec in found


def test_defaults_of_dalle_mini_come_from_config_json(models, tmp_path):
    model = tiny_dalle_bart(tmp_path / "model", top_k=7, top_p=0.75, temperature=0.5)
    paths = {"db": tmp_path / "a.db", "model": str(model), "codec": str(models.vqgan)}
    flags = {"prompts": [PROMPT], "temperature": [2]}
    found = {}
    for rng in ("dalle-mini", "rows"):
        options = GenerateOptions(**paths, is_scored=False, batch_size=1, rng=rng)
        _, sweep = prepare(load_sweep(flags), options, "r")
        found[rng] = sweep.top_k, sweep.top_p, sweep.temperature
    assert found == {"dalle-mini": ((7,), (0.75,), (2.0,)), "rows": ((256,), (1.0,), (2.0,))}


def test_tokens_as_npy(models, tmp_path):
    words = ["--no-score", "--model", models.dalle_bart, "--codec", models.vqgan, "--batch-size", 4, "--cpu-only"]
    db, out = tmp_path / "a.db", tmp_path / "npy"
    run("generate", "--db", db, "--prompts", PROMPT, "--n", 3, *words, "--output", "npy", "--out-dir", out)
    files = sorted(out.rglob("*.npy"))
    tokens = [np.load(path, allow_pickle=False) for path in files]
    assert [array.shape for array in tokens] == [(GRID**2,)] * 3
    assert {array.dtype for array in tokens} == {np.dtype("<i8")}
    assert sorted(map(tuple, stored_tokens(db))) == sorted(map(tuple, tokens))
    run("decode", "--db", db, "--output", "npy", "--out-dir", tmp_path / "decoded")
    found = sorted((tmp_path / "decoded").rglob("*.npy"))
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in files]


def test_a_codec_with_more_tokens_is_a_warning(models, tmp_path, capsys):
    codec = tiny_vqgan(tmp_path / "codec", n_embed=CODEBOOK_SIZE + 1)
    words = ["--no-score", "--model", models.dalle_bart, "--batch-size", 4, "--prompts", PROMPT, "--n", 1]
    run("generate", "--db", tmp_path / "a.db", *words, "--codec", codec)
    assert re.search(r"^warning: .*'codec'", capsys.readouterr().err, flags=re.MULTILINE)
    run("generate", "--db", tmp_path / "b.db", *words, "--codec", models.vqgan)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--rng", "dalle-mini", "--model", DALLE_PYTORCHES[0] / "dalle.pt", "--tokenizer", "LETTERS"], ["dalle.pt"]),
        (["--model", "MODEL"], ["'dalle_bart'", "--codec"]),  # the embedded codec has another grid
        (["--keys", "12"], ["--keys", "'12'"]),
        (["--keys", "1:2", "--n", "4"], ["--keys", "--n"]),
        (["--keys", f"1:{2**32}"], ["4,294,967,295"]),
        (["--conv-like", "causal"], ["conv_like"]),
        (["--cond-scale-of", "first"], ["guides_first_code_alone"]),
    ],
)
def test_incompatible_flags_are_one_line_and_leave_nothing(words, names, letters, models, tmp_path, capsys):
    paths = {"LETTERS": letters / "tokenizer.json", "MODEL": models.dalle_bart}
    words = [paths.get(word, word) for word in words]
    error = run_badly(capsys, "generate", "--db", tmp_path / "a.db", "--prompts", PROMPT, "--no-score", *words)
    assert all(name in error for name in names)
    assert not (tmp_path / "a.db").exists()


def test_the_tokenizer_of_another_model_is_an_error(letters, models, tmp_path, capsys):
    model = tiny_dalle_bart(tmp_path / "model", encoder_vocab_size=len(LETTERS) // 2)
    words = ["--model", model, "--codec", models.vqgan, "--tokenizer", letters, "--prompts", PROMPT, "--no-score"]
    error = run_badly(capsys, "generate", "--db", tmp_path / "a.db", *words)
    assert "tokenizer" in error
    assert not (tmp_path / "a.db").exists()


@pytest.mark.slow
def test_the_condition_scale_of_the_first_token_alone(letters, tmp_path, capsys):
    """With `--cond-scale-of first` the first token is the guided one, and the others follow without the prompt."""
    model = DALLE_PYTORCHES[0] / "dalle.pt"
    words = ["--model", model, "--tokenizer", letters / "tokenizer.json", "--batch-size", 2, "--cpu-only"]
    settings = ["--prompts", PROMPT, "--temperature", 0, "--cond-scale", 3, "--n", 1, "--no-score"]
    tokens = {}
    for guided in ("all", "first"):
        db = tmp_path / f"{guided}.db"
        run("generate", "--db", db, *words, *settings, "--cond-scale-of", guided)
        (tokens[guided],) = stored_tokens(db).astype(np.int32)
    # The flag is part of the model: it says which rows are meant, and samples them anew.
    run("verify", "--db", db, *words, "--regenerate", "--cond-scale-of", "first")
    assert cli.main([str(word) for word in ["verify", "--db", db, *words, "--regenerate"]]) == 1
    assert "'dalle.pt'" in capsys.readouterr().err
    assert tokens["all"][0] == tokens["first"][0]

    found = load_checkpoint(model, "generator")
    null = np.zeros((1, found.config.text_seq_len), np.int32)
    logits = found.network_class(found.config).apply({"params": found.params}, null, tokens["first"][None])
    image = np.asarray(logits)[0, found.config.text_seq_len :, -found.config.codebook_size :]
    np.testing.assert_array_equal(image.argmax(1)[1:], tokens["first"][1:])
