"""OpenAI's discrete VAE against its public description in float64, and its pickled modules."""

import codec_kit
import numpy as np
import pytest
import torch_files
from torch_files import Call, Global

from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder
from dm_generations.models.base import RawCheckpoint
from dm_generations.models.dvae.checkpoint import read_openai_vae
from dm_generations.models.dvae.openai import OpenAIVAEConfig
from dm_generations.models.loading import load_checkpoint
from dm_generations.weights.native import unflatten
from dm_generations.weights.torch_file import read_torch, state_of

CONFIG = OpenAIVAEConfig(n_hid=8, n_init=6, n_blk_per_group=2, vocab_size=12, image_size=32)
RESIDUAL_GAIN = 1 / 8**2  # 4 groups of 2 blocks


@pytest.fixture(scope="module")
def flat():
    return codec_kit.random_params("openai_vae", CONFIG)


def source_of(flat):
    return RawCheckpoint("openai_vae", CONFIG, unflatten(flat), ())


def convolved(x, flat, name):
    """The plain sum of a stride-1 convolution with zeros around; x (B, H, W, C) float64."""
    kernel, bias = (flat[f"{name}/{leaf}"].astype(np.float64) for leaf in ("kernel", "bias"))
    size, (height, width) = kernel.shape[0], x.shape[1:3]
    half = (size - 1) // 2
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    return bias + sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(size) for j in range(size))


def through_groups(x, flat, part, between):
    """The four groups of blocks: x + gain * conv_4(relu(...conv_1(relu(x)))); `between` two groups."""
    for group in range(1, 5):
        if group > 1:
            x = between(x)
        for block in (f"{part}/group_{group}/block_{i}" for i in (1, 2)):
            h = x
            for i in range(1, 5):
                h = convolved(np.maximum(h, 0), flat, f"{block}/conv_{i}")
            if f"{block}/id_path/kernel" in flat:
                x = convolved(x, flat, f"{block}/id_path")
            x = x + RESIDUAL_GAIN * h
    return np.maximum(x, 0)


def test_decodes_as_described(flat):
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 16))
    one_hot = np.eye(CONFIG.vocab_size)[tokens].reshape(2, 4, 4, -1)
    x = convolved(one_hot, flat, "decoder/input")
    x = through_groups(x, flat, "decoder", lambda x: x.repeat(2, axis=1).repeat(2, axis=2))
    means = 1 / (1 + np.exp(-convolved(x, flat, "decoder/output")[..., :3]))
    pixels = codec_kit.applied(source_of(flat), "decode_code", tokens)
    assert pixels.shape == (2, 32, 32, 3) and np.ptp(pixels) > 0.1
    codec_kit.assert_close(pixels, (means - 0.1) / 0.8, 1e-5)


def test_encodes_as_described(flat):
    pixels = np.random.default_rng(2).random((2, 32, 32, 3), np.float32)
    x = convolved(0.8 * pixels.astype(np.float64) + 0.1, flat, "encoder/input")
    x = through_groups(x, flat, "encoder", lambda x: x.reshape(2, len(x[0]) // 2, 2, -1, 2, x.shape[-1]).max((2, 4)))
    logits = convolved(x, flat, "encoder/output").reshape(2, 16, -1)
    found = codec_kit.applied(source_of(flat), lambda network, x: network.encoder(x), 0.8 * pixels + np.float32(0.1))
    codec_kit.assert_close(found.reshape(logits.shape), logits, 1e-5)
    _, indices = codec_kit.applied(source_of(flat), "encode", pixels)
    best, second = np.sort(logits)[..., :-3:-1].transpose(2, 0, 1)
    is_clear = best - second > 1e-4
    assert is_clear.mean() > 0.9 and len(np.unique(indices)) > 1
    np.testing.assert_array_equal(np.asarray(indices)[is_clear], logits.argmax(-1)[is_clear])


def test_a_codec_of_flat_colours_gives_them_back(flat):
    """Weights made by hand: each code is a colour. Codes to pixels to codes, and the colours are right."""
    flat = {name: np.zeros_like(array) for name, array in flat.items()}
    for name in flat:
        if name.endswith("id_path/kernel"):
            np.fill_diagonal(flat[name][0, 0], 1)
    colours = np.random.default_rng(3).random((CONFIG.vocab_size, 3))
    mapped = 0.8 * colours + 0.1
    logits = np.log(mapped / (1 - mapped))
    flat["decoder/input/kernel"][0, 0] = np.concatenate([logits, -logits], axis=1)  # what relu lets through: either
    flat["decoder/output/kernel"][0, 0, :3, :3] = np.eye(3)
    flat["decoder/output/kernel"][0, 0, 3:6, :3] = -np.eye(3)
    flat["encoder/input/kernel"][3, 3, :, :3] = np.eye(3)
    flat["encoder/output/kernel"][0, 0, :3] = 2 * mapped.T  # largest at the nearest colour
    flat["encoder/output/bias"][:] = -(mapped**2).sum(1)
    tokens = np.random.default_rng(4).integers(0, CONFIG.vocab_size, (2, 16))
    pixels = codec_kit.applied(source_of(flat), "decode_code", tokens)
    expected = colours[tokens].reshape(2, 4, 4, 3).repeat(8, axis=1).repeat(8, axis=2)
    np.testing.assert_allclose(pixels, expected, atol=1e-5)
    _, indices = codec_kit.applied(source_of(flat), "encode", pixels)
    np.testing.assert_array_equal(indices, tokens)


def module(name, parameters=None, children=None):
    """A module as torch pickles it."""
    state = {"training": False, "_parameters": parameters or {}, "_buffers": {}, "_modules": children or {}}
    return Call(Global(*name.rsplit(".", 1)), (), state, new=True)


def pickled_part(flat, part):
    """The nested modules of OpenAI's `Encoder` or `Decoder` with the weights of `flat`."""
    tree = {}
    for name, array in flat.items():
        top, *modules, leaf = name.split("/")
        if top != part:
            continue
        if modules[-1].startswith("conv_"):
            modules.insert(-1, "res_path")
        if modules == ["output"]:
            modules.append("conv")
        node = tree
        for name_of_module in modules:
            node = node.setdefault(name_of_module, {})
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
        node["w" if leaf == "kernel" else "b"] = torch_files.tensor(array)

    def built(node):
        if "w" in node:
            return module("dall_e.utils.Conv2d", node)
        children = {name: built(child) for name, child in node.items()}
        return module("torch.nn.modules.container.Sequential", children=children)

    return module(f"dall_e.{part}.{part.title()}", children={"blocks": built(tree)})


@pytest.fixture
def folder(tmp_path, flat):
    for part in ("encoder", "decoder"):
        torch_files.save(tmp_path / f"{part}.pkl", pickled_part(flat, part))
    return tmp_path


def test_pickled_modules_give_their_own_arrays(folder, flat):
    source = read_openai_vae(folder)
    codec_kit.assert_same(source.params, flat)
    assert source.config == OpenAIVAEConfig(n_hid=8, n_init=6, vocab_size=12)  # 256 pixels: the file does not say
    assert (source.config.grid, source.config.codebook_size) == (32, 12)
    assert load_checkpoint(folder / "decoder.pkl", "codec").kind == "openai_vae"
    for file in source.files:
        state = state_of(read_torch(file))
        named = [source.name_in_file(path, flat[path].shape) for path in flat if source.file_of(path) == file]
        assert dict(named) == {name: array.shape for name, array in state.items()}


@pytest.mark.e2e
def test_the_decoder_alone_is_a_codec(folder):
    (folder / "encoder.pkl").unlink()
    model = load_checkpoint(folder, "codec")
    assert set(model.params) == {"decoder"}
    tokens = np.arange(4, dtype=np.uint16)[None]
    pixels = codec_kit.applied(model, "decode_code", tokens)
    pictures = Decoder.from_checkpoint(model, batch_size=2, grid=2).decode(tokens)
    np.testing.assert_allclose(pictures, np.clip(pixels, 0, 1) * 255, atol=1.001)
    assert pictures.shape == (1, 16, 16, 3) and pictures.dtype == np.uint8


def test_the_encoder_alone_is_refused(folder):
    (folder / "decoder.pkl").unlink()
    with pytest.raises(UserError, match=r"lacks decoder\.pkl"):
        read_openai_vae(folder)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (module("dall_e.decoder.Decoder", {"blocks.input.w": torch_files.tensor(np.zeros(3))}), "has shape"),
        (Call(Global("os", "system"), ("touch ran",)), "is not a network that torch pickled"),
        ({"blocks.input.w": 3}, "blocks.input.w is not a tensor"),
    ],
)
def test_what_is_no_decoder_is_one_line(folder, monkeypatch, value, message):
    monkeypatch.chdir(folder)
    torch_files.save(folder / "decoder.pkl", value)
    with pytest.raises(UserError, match=rf"decoder\.pkl.*{message}"):
        read_openai_vae(folder)
    assert not (folder / "ran").exists()


def test_other_files_are_left_to_other_readers(tmp_path):
    assert read_openai_vae(tmp_path) is None
    torch_files.save(tmp_path / "decoder.pkl", {"layers": [1, 2]})
    assert read_openai_vae(tmp_path) is None
