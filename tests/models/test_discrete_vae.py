"""DALLE-pytorch's own discrete VAE: recorded numbers of the original, and its files."""

import functools
from pathlib import Path

import codec_kit
import numpy as np
import pytest
import torch_files
from helpers import golden

from dm_generations.errors import UserError
from dm_generations.models.base import RawCheckpoint
from dm_generations.models.dvae.checkpoint import discrete_vae_config, discrete_vae_params, read_discrete_vae
from dm_generations.models.dvae.discrete import DiscreteVAEConfig
from dm_generations.models.loading import check_names_and_shapes
from dm_generations.models.registry import parameter_shapes
from dm_generations.weights.state_dict import strip_prefix
from dm_generations.weights.torch_file import read_torch

CASES = sorted(path.parent for path in golden("dalle_pytorch").glob("*/*/dalle.pt"))
SIZES = {"image_size": 16, "num_tokens": 9, "codebook_dim": 5, "num_layers": 2, "num_resnet_blocks": 2, "hidden_dim": 4}


def cases_with(array: str):
    """Parametrises `folder` over the cases that recorded this array."""
    found = [folder for folder in CASES if array in np.load(folder / "golden.npz").files]
    assert found
    return pytest.mark.parametrize("folder", found, ids=lambda folder: folder.name)


@functools.cache
def recorded(folder: Path) -> tuple[RawCheckpoint, dict[str, np.ndarray]]:
    """The VAE inside a recorded `dalle.pt`, its names and shapes checked, and the recorded arrays."""
    file = folder / "dalle.pt"
    content = read_torch(file)
    config = discrete_vae_config(content["vae_params"], file)
    params = discrete_vae_params(strip_prefix(content["weights"], "vae."), file)
    expected = parameter_shapes("discrete_vae", config)
    source = RawCheckpoint("discrete_vae", config, params, (file,))
    check_names_and_shapes(expected, source)
    with np.load(folder / "golden.npz") as arrays:
        return source, dict(arrays)


@cases_with("decoded_nchw")
def test_decodes_as_the_original_and_undoes_its_normalisation(folder):
    source, arrays = recorded(folder)
    expected = codec_kit.nhwc(arrays["decoded_nchw"])
    pixels = codec_kit.applied(source, "decode_code", arrays["image_tokens"][: len(expected)])
    codec_kit.assert_close((pixels - 0.5) / 0.5, expected)


@cases_with("vae_indices")
def test_encodes_as_the_original(folder):
    source, arrays = recorded(folder)
    rows, indices = codec_kit.applied(source, "encode", codec_kit.nhwc(arrays["vae_input01_nchw"]))
    np.testing.assert_array_equal(indices, arrays["vae_indices"].reshape(indices.shape))
    codebook = np.asarray(source.params["codebook"]["embedding"])
    np.testing.assert_array_equal(np.asarray(rows).reshape(-1, codebook.shape[1]), codebook[indices.reshape(-1)])


def vae_file(path, **changes):
    """A `vae.pt` of its trainer, and its parameters by path."""
    config = DiscreteVAEConfig.from_dict(SIZES)
    flat = codec_kit.random_params("discrete_vae", config)
    weights = {}
    for name, array in flat.items():
        parts = name.replace("net_", "net/").replace("_0/", "/0/").split("/")
        name = ".".join([*parts[:-1], "bias" if parts[-1] == "bias" else "weight"])
        weights[name] = torch_files.tensor(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)
    hparams = SIZES | changes.pop("hparams", {})
    return torch_files.save(path, {"hparams": hparams, "weights": weights} | changes), flat


def test_a_file_of_the_trainer_gives_its_own_arrays(tmp_path):
    file, flat = vae_file(tmp_path / "vae.pt")
    for path in (file, tmp_path):
        source = read_discrete_vae(path)
        assert source.config == DiscreteVAEConfig.from_dict(SIZES)
        codec_kit.assert_same(source.params, flat)


def test_normalisation_is_the_one_of_the_file(tmp_path):
    """Means and deviations scale and shift what the network gives; None leaves it alone."""
    source = read_discrete_vae(vae_file(tmp_path / "vae.pt", hparams={"normalization": None})[0])
    tokens = np.arange(16)[None] % 9
    raw = codec_kit.applied(source, "decode_code", tokens)
    normalization = ([0.1, 0.2, 0.3, 0], [0.5, 0.6, 0.7, 1])  # as later versions have it, with a fourth channel
    file, _ = vae_file(tmp_path / "vae.pt", hparams={"normalization": normalization})
    pixels = codec_kit.applied(read_discrete_vae(file), "decode_code", tokens)
    codec_kit.assert_close(pixels, np.asarray(raw) * [0.5, 0.6, 0.7] + [0.1, 0.2, 0.3], 1e-6)


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"channels": 4}, "channels must be 3"),
        ({"num_layers": 0}, "num_layers must be"),
        ({"num_layers": 10**9}, "num_layers must be"),
        ({"num_resnet_blocks": 10**9}, "num_resnet_blocks must be"),
        ({"image_size": 18}, "cannot be halved"),
        ({"hidden_dim": "4"}, "hidden_dim must be"),
        ({"normalization": 7}, "normalization must be"),
        ({"normalization": ([0.5] * 3, [0, 1, 1])}, "normalization must be"),
    ],
)
def test_sizes_that_no_network_has_are_one_line(tmp_path, hparams, message):
    file, _ = vae_file(tmp_path / "vae.pt", hparams=hparams)
    with pytest.raises(UserError, match=rf"vae\.pt: .*{message}"):
        read_discrete_vae(file)


def test_other_files_are_left_to_other_readers(tmp_path):
    assert read_discrete_vae(tmp_path) is None
    torch_files.save(tmp_path / "vae.pt", {"hparams": {}, "weights": {"x": 1}})
    assert read_discrete_vae(tmp_path) is None
    file, _ = vae_file(tmp_path / "vae.pt", weights={"codebook.weight": "no tensor"})
    with pytest.raises(UserError, match=r"codebook.weight' is not a tensor"):
        read_discrete_vae(file)
