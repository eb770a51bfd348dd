"""VQGANs of taming-transformers: recorded numbers of the originals, the pairing of files, and what is refused."""

import math
import shutil

import codec_kit
import numpy as np
import pytest
import torch_files
from helpers import golden, golden_dirs

from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.vqgan.checkpoint import config_from_shapes, read_taming
from dm_generations.models.vqgan.network import VQGANConfig

CASES = sorted(file.parent for file in golden("taming").glob("*/golden.npz"))
# Too large for a checkout: weights of Chameleon's kind.
CHAMELEONS = sorted(file.parent for folder in golden_dirs("chameleon") for file in folder.glob("*/golden.npz"))
# Two levels, so that attention, shortcuts and resampling are there; 32 groups need 32 channels.
YAML = """
model:
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 6
    n_embed: 20
    ddconfig:
      {double_z: false, z_channels: 8, resolution: 16, in_channels: 3, out_ch: 3, ch: 32, ch_mult: [1, 2],
       num_res_blocks: 1, attn_resolutions: [8], dropout: 0.0}
"""
CONFIG = VQGANConfig(
    ch=32,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(8,),
    resolution=16,
    z_channels=8,
    n_embed=20,
    embed_dim=6,
    is_signed=True,
)


@pytest.fixture(scope="module", params=CASES, ids=lambda folder: folder.name)
def case(request):
    with np.load(request.param / "golden.npz") as arrays:
        yield load_checkpoint(request.param, "codec"), dict(arrays)


def test_decodes_as_the_original(case):
    model, arrays = case
    pixels = codec_kit.applied(model, "decode_code", arrays["codes"])
    codec_kit.assert_close(2 * pixels - 1, codec_kit.nhwc(arrays["decoded_nchw"]))


def test_encodes_as_the_original(case):
    model, arrays = case
    pixels = (codec_kit.nhwc(arrays["input_nchw"]) + 1) / 2
    continuous = codec_kit.applied(model, "encode_continuous", pixels)
    codec_kit.assert_close(continuous, codec_kit.nhwc(arrays["encoder_out_nchw"]))
    _, indices = codec_kit.applied(model, "encode", pixels)
    name = "argmax" if model.config.is_gumbel else "argmin"
    is_clear = arrays[f"{name}_margin"] > 1e-3
    expected = arrays["argmax_indices" if model.config.is_gumbel else "indices"]
    np.testing.assert_array_equal(np.asarray(indices)[is_clear], expected[is_clear])


@pytest.mark.e2e
@pytest.mark.parametrize("folder", CHAMELEONS, ids=lambda folder: folder.name)
def test_the_tokenizer_of_chameleon_is_such_a_vqgan(folder):
    with np.load(folder / "golden.npz") as arrays:
        found = load_checkpoint(folder, "codec"), dict(arrays)
    test_decodes_as_the_original(found)
    test_encodes_as_the_original(found)
    pixels = Decoder.from_checkpoint(found[0], batch_size=1)(found[1]["codes"])
    assert (pixels == found[1]["pixels_uint8_nhwc"]).mean() > 0.99


@pytest.mark.e2e
def test_bfloat16_stays_near_float32(case):
    """Half of its 8 bits of precision are left at the end: 6% of the range at the worst pixel, 1% on average."""
    model, arrays = case
    exact = codec_kit.applied(model, "decode_code", arrays["codes"])
    rounded = codec_kit.applied(model, "decode_code", arrays["codes"], dtype="bfloat16")
    codec_kit.assert_close(rounded, exact, 0.06)
    assert np.abs(rounded - exact).mean() < 0.01 * np.abs(exact).max()


@pytest.mark.parametrize("file", sorted(golden("vqgan_jax").glob("*/golden.npz")), ids=lambda file: file.parent.name)
def test_a_codec_decodes_another_grid_to_larger_images(file):
    with np.load(file) as arrays:
        tokens, pixels = arrays["tokens_other_grid"], arrays["decoded_other_grid"]
    grid = math.isqrt(tokens[0].size)
    codec = Decoder.from_checkpoint(load_checkpoint(file.parent, "codec"), batch_size=1, grid=grid)
    assert (codec.token_count, codec.image_size) == (grid**2, pixels.shape[1])
    expected = (pixels.clip(0, 1) * 255).astype(np.uint8)
    assert np.abs(codec.decode(tokens.reshape(len(tokens), -1)).astype(int) - expected).max() <= 1


@pytest.fixture(scope="module")
def flat():
    return codec_kit.random_params("vqgan", CONFIG)


def lightning(path, state, **changes):
    tensors = {name: torch_files.tensor(array) for name, array in (state | changes).items()}
    return torch_files.save(path, {"epoch": 3, "state_dict": tensors})


def test_a_file_of_lightning_and_one_of_a_state_dict_give_their_own_arrays(tmp_path, flat):
    """Each tensor under its name in the network, a view of the file; losses are left behind."""
    (tmp_path / "model.yaml").write_text(YAML)
    state = codec_kit.taming_state(flat)
    loss = {"loss.perceptual_loss.net.slice1.0.weight": np.zeros((2, 3, 3, 3), np.float32)}
    for file in (lightning(tmp_path / "a.ckpt", state, **loss), codec_kit.saved(tmp_path / "b.ckpt", state)):
        source = read_taming(file)
        assert source.config == CONFIG
        codec_kit.assert_same(source.params, flat)
        named = dict(source.name_in_file(path, array.shape) for path, array in flat.items())
        assert named == {name: array.shape for name, array in state.items()}


def test_shapes_tell_what_the_yaml_says(tmp_path, flat):
    state = codec_kit.taming_state(flat)
    assert config_from_shapes(state, tmp_path, resolution=16, is_signed=True) == CONFIG


def test_what_the_yaml_leaves_out_has_the_default_of_taming(tmp_path, flat):
    lightning(tmp_path / "last.ckpt", codec_kit.taming_state(flat))
    (tmp_path / "model.yaml").write_text(YAML.replace("ch_mult: [1, 2],", ""))
    assert read_taming(tmp_path).config.ch_mult == (1, 2, 4, 8)


def test_the_yaml_may_lie_in_a_folder_of_configs(tmp_path, flat):
    for folder in ("run/checkpoints", "run/configs"):
        (tmp_path / folder).mkdir(parents=True)
    lightning(tmp_path / "run/checkpoints/last.ckpt", codec_kit.taming_state(flat))
    (tmp_path / "run/configs/2021-project.yaml").write_text(YAML)
    (tmp_path / "run/configs/2021-lightning.yaml").write_text("lightning: {trainer: {gpus: 1}}")
    for path in ("run", "run/checkpoints/last.ckpt"):
        assert read_taming(tmp_path / path).config == CONFIG


def test_what_macos_writes_next_to_files_is_passed_over(tmp_path, flat):
    lightning(tmp_path / "a.ckpt", codec_kit.taming_state(flat))
    (tmp_path / "a.yaml").write_text(YAML)
    for name in ("._a.ckpt", "._a.yaml"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    assert read_taming(tmp_path).config == CONFIG


def test_a_second_yaml_that_is_none_is_passed_over(tmp_path, flat):
    lightning(tmp_path / "a.ckpt", codec_kit.taming_state(flat))
    (tmp_path / "a.yaml").write_text(YAML)
    for text in ("model: {params: {ddconfig: [", "a: &a 1\nb: *a", "\0", "- 1"):
        (tmp_path / "0.yaml").write_text(text)
        assert read_taming(tmp_path).config == CONFIG


def test_of_several_files_the_names_decide(tmp_path, flat):
    """As in the cache of DALLE-pytorch."""
    file = lightning(tmp_path / "vqgan.1024.model.ckpt", codec_kit.taming_state(flat))
    (tmp_path / "vqgan.1024.config.yml").write_text(YAML)
    (tmp_path / "vqgan.16384.config.yml").write_text(YAML.replace("n_embed: 20", "n_embed: 99"))
    assert read_taming(file).config.n_embed == 20
    shutil.copy(file, tmp_path / "vqgan.16384.model.ckpt")
    with pytest.raises(UserError, match=r"several checkpoints .*name the file"):
        read_taming(tmp_path)


def test_what_is_not_a_vqgan_is_left_to_other_readers(tmp_path):
    assert read_taming(tmp_path) is None
    codec_kit.saved(tmp_path / "last.ckpt", {"head.weight": np.zeros((2, 2), np.float32)})
    assert read_taming(tmp_path) is None and read_taming(tmp_path / "last.ckpt") is None
    (tmp_path / "config.yaml").write_text("stage1: {embed_dim: 3}")
    assert read_taming(tmp_path) is None


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (YAML.replace("n_embed: 20", "n_embed: 21"), r"last\.ckpt.*quantize.embedding.weight has shape \(20, 6\)"),
        (YAML.replace("n_embed: 20", ""), r"model\.yaml.*n_embed is missing"),
        (YAML.replace(", attn_resolutions: [8]", ""), r"model\.yaml.*attn_resolutions is missing"),
        (YAML.replace("resolution: 16, ", ""), r"model\.yaml.*resolution is missing"),
        (YAML.replace("double_z: false", "double_z: true"), r"model\.yaml.*double_z True is not supported, only false"),
        (YAML.replace("dropout", "give_pre_end: true, dropout"), r"model\.yaml.*give_pre_end True is not supported"),
        (YAML.replace("embed_dim: 6", "embed_dim: 6\n    remap: used.npy"), r"model\.yaml.*remap is not supported"),
        (YAML.replace("ch: 32", "ch: -1"), r"model\.yaml.*ch must be a whole number.*-1"),
        (YAML.replace("[1, 2]", "7"), r"model\.yaml.*ch_mult must be a list.*7"),
        (
            YAML.replace("num_res_blocks: 1", "num_res_blocks: 1000000000"),
            r"model\.yaml.*num_res_blocks must be.*1000000000",
        ),
        (YAML.replace("[1, 2]", str([1] * 17)), r"model\.yaml.*ch_mult"),
        (YAML.replace("ch: 32", "ch: &a 32").replace("n_embed: 20", "n_embed: *a"), r"model\.yaml has an alias"),
        ("model: {params: {ddconfig: [", r"model\.yaml is not YAML"),
        ("!!python/object/apply:os.system ['touch ran']", r"model\.yaml is not YAML"),
        ("a: " + "[" * 5000, r"model\.yaml is not YAML"),
        ("n: " + "9" * 5000, r"model\.yaml is not YAML"),
        ("- 1", "must hold a YAML mapping"),
        ("#" * (1 << 16) + "\na: 1", "too long"),
        ("n: 1" + ":59" * 300_000, "too long"),  # a number to the base 60
    ],
)
def test_a_yaml_that_does_not_fit_is_one_line(tmp_path, monkeypatch, flat, yaml, message):
    monkeypatch.chdir(tmp_path)
    lightning(tmp_path / "last.ckpt", codec_kit.taming_state(flat))
    (tmp_path / "model.yaml").write_text(yaml)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(tmp_path, "codec")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert not (tmp_path / "ran").exists()


def test_a_tensor_missing_or_more_is_named(tmp_path, flat):
    (tmp_path / "model.yaml").write_text(YAML)
    state = codec_kit.taming_state(flat)
    lightning(tmp_path / "last.ckpt", state, **{"decoder.extra.weight": np.zeros((1, 1, 1, 1), np.float32)})
    with pytest.raises(UserError, match=r"last.ckpt has unexpected decoder.extra.weight"):
        load_checkpoint(tmp_path, "codec")
    lightning(tmp_path / "last.ckpt", {name: array for name, array in state.items() if "norm_out" not in name})
    with pytest.raises(UserError, match=r"last.ckpt lacks decoder.norm_out.bias, .* and 1 more"):
        load_checkpoint(tmp_path, "codec")


def test_a_checkpoint_without_its_yaml_asks_for_it(tmp_path, flat):
    file = lightning(tmp_path / "last.ckpt", codec_kit.taming_state(flat))
    with pytest.raises(UserError, match=r"last\.ckpt lacks its \.yaml"):
        read_taming(file)


def test_shapes_of_a_damaged_file_are_one_line(tmp_path, flat):
    state = codec_kit.taming_state(flat)
    for name in ("quantize.embedding.weight", "post_quant_conv.weight", "decoder.conv_out.weight"):
        with pytest.raises(UserError, match=f"lacks the tensor {name}"):
            config_from_shapes({key: array for key, array in state.items() if key != name}, tmp_path)
        with pytest.raises(UserError, match=f"{name} has shape"):
            config_from_shapes(state | {name: np.zeros((0, 3, 3), np.float32)}, tmp_path)
