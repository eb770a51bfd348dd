"""VQGANs of vqgan-jax against numbers recorded from it: decoding, other grids, encoding."""

import json
import shutil

import codec_kit
import numpy as np
import pytest
from helpers import golden_dirs

from dm_generations.errors import UserError
from dm_generations.models.loading import load_checkpoint

# The fuller set comes first, so that a folder that both sets have is taken from it.
FOLDERS = {
    file.parent.name: file.parent for root in golden_dirs("vqgan_jax")[::-1] for file in root.glob("*/golden.npz")
}


@pytest.fixture(scope="module", params=sorted(FOLDERS))
def case(request):
    folder = FOLDERS[request.param]
    with np.load(folder / "golden.npz") as arrays:
        yield load_checkpoint(folder, "codec"), dict(arrays)


@pytest.mark.parametrize("suffix", ["", "_other_grid"])
def test_decodes_as_the_original(case, suffix):
    model, arrays = case
    tokens = arrays[f"tokens{suffix}"].astype(np.int32)
    pixels = codec_kit.applied(model, "decode_code", tokens.reshape(len(tokens), -1))
    codec_kit.assert_close(pixels, arrays[f"decoded{suffix}"])


@pytest.mark.e2e
def test_encodes_as_the_original(case):
    model, arrays = case
    continuous = codec_kit.applied(model, "encode_continuous", arrays["pixels"])
    codec_kit.assert_close(continuous.reshape(arrays["encoder_out"].shape), arrays["encoder_out"])
    rows, indices = codec_kit.applied(model, "encode", arrays["pixels"])
    is_clear = arrays["argmin_margin"].reshape(indices.shape) > 1e-3
    np.testing.assert_array_equal(np.asarray(indices)[is_clear], arrays["indices"].reshape(indices.shape)[is_clear])
    if is_clear.all():
        codec_kit.assert_close(np.asarray(rows), arrays["quant_states"].reshape(rows.shape))
        codec_kit.assert_close(codec_kit.applied(model, "__call__", arrays["pixels"]), arrays["reconstruction"])


@pytest.mark.parametrize("option", ["double_z", "give_pre_end"])
def test_an_option_that_is_not_supported_is_named(option, tmp_path):
    source = next(iter(FOLDERS.values()))
    values = json.loads((source / "config.json").read_text()) | {option: True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    shutil.copyfile(source / "flax_model.msgpack", tmp_path / "flax_model.msgpack")
    with pytest.raises(UserError, match=rf"config\.json: {option} is True, which is not supported$"):
        load_checkpoint(tmp_path, "codec")
