"""A converted model is the same model, and known by the same hash."""

import numpy as np
import pytest
from codec_kit import random_params, saved, taming_state
from helpers import golden
from tiny import tiny_dalle_bart

from dm_generations.archive import Archive
from dm_generations.errors import UserError
from dm_generations.models.loading import find_checkpoint, load_checkpoint
from dm_generations.models.registry import ROLES
from dm_generations.models.vqgan.network import VQGANConfig
from dm_generations.paths import shipped
from dm_generations.pipelines.convert import convert
from dm_generations.weights import native

WIDE = VQGANConfig(ch=64, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=16, n_embed=50)
SOURCES = [
    sorted(golden(name).glob(f"**/{file_name}"))[0].parent
    for name, file_name in (
        ("dalle_bart", "flax_model.msgpack"),
        ("dalle_pytorch", "dalle.pt"),
        ("min_dalle", "encoder.pt"),
        ("mindalle_kakao", "stage2_last.ckpt"),
        ("taming", "*.ckpt"),
        ("vqgan_jax", "flax_model.msgpack"),
        ("clip", "model.safetensors"),
    )
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: "-".join(source.parts[-2:]))
def test_every_model_of_a_folder_is_known_by_the_same_hash(source, tmp_path):
    convert(str(source), tmp_path / "out")
    pairs = [[find_checkpoint(folder, role) for folder in (source, tmp_path / "out")] for role in ROLES]
    infos = [[checkpoint.model_info() for checkpoint in pair] for pair in pairs if pair != [None, None]]
    assert infos and all(before.matches(after) for before, after in infos)


@pytest.mark.e2e
def test_other_weights_have_another_hash(tmp_path):
    hashes = set()
    for change in ("nothing", "value", "name", "dtype"):
        flat = random_params("vqgan", WIDE)
        if change == "value":
            flat["decoder/conv_in/bias"][0] += 1
        elif change == "name":
            same = ("decoder/mid/block_1/conv1/bias", "decoder/mid/block_1/conv2/bias")
            flat |= {name: flat[other] for name, other in zip(same, reversed(same), strict=True)}
        state = detoker_state(flat)
        if change == "dtype":
            state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"].astype(np.float16)
        (tmp_path / change).mkdir()
        hashes.add(load_checkpoint(saved(tmp_path / change / "detoker.pt", state), "codec").sha256)
    assert len(hashes) == 4


def detoker_state(flat):
    state = {name.removeprefix("quantize."): array for name, array in taming_state(flat).items()}
    return {name: array for name, array in state.items() if not name.startswith(("encoder.", "quant_conv."))}


def test_the_shipped_archive_names_the_models_that_ship():
    with Archive.open(shipped("archive/emoji.db")) as archive:
        recorded = {model.name: model.sha256 for model in archive.models().values()}
    loaded = [load_checkpoint(None, role) for role in ("generator", "codec", "clip")]
    assert recorded == {checkpoint.name: checkpoint.sha256 for checkpoint in loaded}


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    model = tiny_dalle_bart(tmp_path / "model")
    assert "tokenizer" not in convert(str(model), tmp_path / "whole")[0]
    (model / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (model / "enwiki-words-frequency.txt").write_text("the 5")
    assert "--tokenizer" in convert(str(model), tmp_path / "bare")[0]
    assert "--tokenizer" not in convert(str(model), tmp_path / "given", tmp_path / "tokenizer.json")[0]


@pytest.mark.parametrize("step", ["digest", "serialize"])
def test_weights_that_do_not_fit_are_one_line(step, tmp_path, monkeypatch):
    model = tiny_dalle_bart(tmp_path / "model")

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(native, step, fail)
    with pytest.raises(UserError, match="not enough memory"):
        convert(str(model), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
