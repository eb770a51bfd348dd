"""Open-MAGVIT2 and IBQ against numbers of the originals, their moving averages, and what is refused."""

import json

import codec_kit
import jax
import numpy as np
import pytest
import torch_files
from helpers import golden

from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.open_magvit2.network import OpenMagvit2Config
from dm_generations.models.registry import parameter_shapes
from dm_generations.models.vqgan.network import Quantize, VQGANConfig
from dm_generations.weights.native import unflatten
from dm_generations.weights.state_dict import split_list_indices, torch_name

CASES = sorted(file.parent for file in golden("open_magvit2").glob("*/golden.npz"))
QUANTIZERS = sorted(golden("open_magvit2").glob("*/quantizer.npz"))
YAML = """
model:
  class_path: {path}
  init_args:
    embed_dim: {embed_dim}
    n_embed: {n_embed}
    use_ema: {use_ema}
    ddconfig:
      {{double_z: false, z_channels: 4, resolution: 8, in_channels: 3, out_ch: 3, ch: 32, ch_mult: [1, 1],
       num_res_blocks: 1, attn_resolutions: [4], dropout: 0.0}}
"""
LFQ = {"path": "src.Open_MAGVIT2.models.lfqgan.VQModel", "embed_dim": 4, "n_embed": 16, "use_ema": "true"}
IBQ = {"path": "src.IBQ.models.ibqgan.IBQ", "embed_dim": 6, "n_embed": 20, "use_ema": "true"}
CONFIGS = {
    "open_magvit2": OpenMagvit2Config(ch=32, ch_mult=(1, 1), num_res_blocks=1, resolution=8, z_channels=4),
    "vqgan": VQGANConfig(
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        attn_resolutions=(4,),
        resolution=8,
        z_channels=4,
        n_embed=20,
        embed_dim=6,
        is_signed=True,
        is_dot_product=True,
    ),
}


@pytest.mark.e2e
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decodes_as_the_original_with_its_moving_averages(case):
    with np.load(case / "golden.npz") as arrays:
        model, arrays = load_checkpoint(case, "codec"), dict(arrays)
    bits = json.loads((case / "settings.json").read_text("utf-8"))["bits"]
    assert model.config.codebook_size == 2**bits
    pixels = codec_kit.applied(model, "decode_code", arrays["codes"])
    codec_kit.assert_close(2 * pixels - 1, codec_kit.nhwc(arrays["decoded_nchw"]))
    found = Decoder.from_checkpoint(model, batch_size=1)(arrays["codes"])
    assert np.abs(found.astype(int) - arrays["pixels_uint8_nhwc"]).max() <= 1
    assert (found == arrays["pixels_uint8_nhwc"]).mean() > 0.99


@pytest.mark.e2e
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_encodes_as_the_original(case):
    with np.load(case / "golden.npz") as arrays:
        model, arrays = load_checkpoint(case, "codec"), dict(arrays)
    if "encoder" not in model.params:
        pytest.skip("only the full set of golden files has the encoder")
    pixels = (codec_kit.nhwc(arrays["input_nchw"]) + 1) / 2
    continuous = codec_kit.applied(model, "encode_continuous", pixels)
    codec_kit.assert_close(continuous, codec_kit.nhwc(arrays["encoder_out_nchw"]))
    _, tokens = codec_kit.applied(model, "encode", pixels)
    np.testing.assert_array_equal(tokens, arrays["indices"])


@pytest.mark.parametrize("file", QUANTIZERS, ids=lambda file: file.parent.name)
def test_ibq_takes_the_row_of_the_largest_product(file):
    with np.load(file) as arrays:
        codebook, z, expected = (arrays[name] for name in ("embedding", "z_nchw", "indices"))
        lookup = codec_kit.nhwc(arrays["quant_nchw"])
    quantize = Quantize(
        VQGANConfig(n_embed=len(codebook), embed_dim=codebook.shape[1], is_dot_product=True), np.float32
    )
    params = {"params": {"embedding": {"embedding": codebook}}}
    indices = quantize.apply(params, codec_kit.nhwc(z))
    np.testing.assert_array_equal(indices.reshape(len(z), -1), expected)
    codec_kit.assert_close(quantize.apply(params, indices, method="lookup"), lookup, 1e-6)


def torch_state(kind, seed):
    """Random weights under the names of the original."""
    flat = codec_kit.random_params(kind, CONFIGS[kind], seed)
    if kind == "vqgan":
        return codec_kit.taming_state(flat)
    named = {torch_name(split_list_indices(path), array.shape)[0]: array for path, array in flat.items()}
    return {
        name: array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
        for name, array in named.items()
    }


def write(folder, kind, values, changes=None):
    """A checkpoint with moving averages; returns its weights and these."""
    weights, averages = torch_state(kind, 0), torch_state(kind, 1)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(YAML.format(**values))
    content = weights | {f"model_ema.{name.replace('.', '')}": array for name, array in averages.items()}
    content |= {"model_ema.decay": np.ones(()), "loss.logvar": np.ones(2, np.float32)} | (changes or {})
    tensors = {name: torch_files.tensor(array) for name, array in content.items() if array is not None}
    torch_files.save(folder / "last.ckpt", {"epoch": 3, "state_dict": tensors})
    return weights, averages


@pytest.mark.e2e
@pytest.mark.parametrize(("kind", "values"), [("open_magvit2", LFQ), ("vqgan", IBQ)])
def test_the_moving_averages_count_where_the_config_says_so(kind, values, tmp_path):
    weights, averages = write(tmp_path / "on", kind, values)
    write(tmp_path / "off", kind, values | {"use_ema": "false"})
    for folder, expected in (("on", averages), ("off", weights)):
        model = load_checkpoint(tmp_path / folder, "codec")
        assert (model.kind, model.config) == (kind, CONFIGS[kind])
        found = model.params["decoder"]["conv_in"]["bias"]
        np.testing.assert_array_equal(found, expected["decoder.conv_in.bias"])
        shapes = jax.tree.map(np.shape, model.params)
        assert sum(jax.tree.leaves(jax.tree.map(np.prod, shapes, is_leaf=lambda x: isinstance(x, tuple)))) == sum(
            array.size for array in expected.values()
        )


@pytest.mark.parametrize(("kind", "values"), [("open_magvit2", LFQ), ("vqgan", IBQ)])
@pytest.mark.parametrize("shape", [None, (3,)])
@pytest.mark.e2e
def test_a_moving_average_that_does_not_fit_is_named(kind, values, shape, tmp_path):
    changes = {"model_ema.decoderconv_inbias": None if shape is None else np.zeros(shape, np.float32)}
    write(tmp_path / "a", kind, values, changes)
    with pytest.raises(UserError, match=r"last\.ckpt.*model_ema\.decoderconv_inbias") as error:
        load_checkpoint(tmp_path / "a", "codec")
    assert "\n" not in str(error.value)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("kind", "values", "named"),
    [
        ("open_magvit2", LFQ | {"n_embed": 32}, "n_embed"),
        ("open_magvit2", LFQ | {"embed_dim": 5}, "embed_dim"),
        ("open_magvit2", LFQ | {"embed_dim": "4\n    token_factorization: [1"}, "config.yaml"),
        ("vqgan", IBQ | {"n_embed": "20\n    cosine_similarity: true"}, "cosine_similarity"),
        ("vqgan", IBQ | {"embed_dim": 7}, r"model_ema\.(post_)?quant"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(kind, values, named, tmp_path):
    write(tmp_path / "a", kind, values)
    with pytest.raises(UserError, match=named):
        load_checkpoint(tmp_path / "a", "codec")


@pytest.mark.e2e
def test_more_tokens_than_an_archive_holds_decode_in_python():
    """The published tokenizers have 2^18 tokens."""
    config = OpenMagvit2Config(ch=32, ch_mult=(1,), num_res_blocks=1, resolution=2, z_channels=18)
    params = codec_kit.random_params("open_magvit2", config)
    decoder = Decoder("open_magvit2", config, unflatten(params), batch_size=1)
    last = 2**18 - 1
    pixels = decoder([[0, 1, 65536, last], [0, 1, 0, last]])
    assert pixels.shape == (2, 2, 2, 3)
    assert (pixels[0] != pixels[1]).any()
    with pytest.raises(UserError, match="262,144"):
        decoder([[0, 0, 0, last + 1]])


def test_every_parameter_has_the_name_of_its_average(tmp_path):
    _, averages = write(tmp_path / "a", "open_magvit2", LFQ)
    from dm_generations.models.open_magvit2.checkpoint import read_tokenizer

    raw = read_tokenizer(tmp_path / "a")
    named = dict(raw.name_in_file(path, shape) for path, shape in parameter_shapes(raw.kind, raw.config).items())
    assert named == {f"model_ema.{name.replace('.', '')}": array.shape for name, array in averages.items()}
