"""min-dalle's PyTorch files: recorded numbers of the original, and what the files do not say."""

import json
import shutil

import codec_kit
import jax
import numpy as np
import pytest
from helpers import ROOT, golden

from dm_generations.errors import UserError
from dm_generations.models.dalle_mini.checkpoint import min_dalle_config, read_min_dalle
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.vqgan.checkpoint import read_detoker
from dm_generations.models.vqgan.network import VQGANConfig
from dm_generations.weights.native import flatten
from dm_generations.weights.torch_file import read_torch

GENERATORS = sorted(file.parent for file in golden("min_dalle").glob("*/decoder.pt"))
# Weights that are not in the repository, but made here as they were when the images were recorded.
SEEDED = sorted(file.parent for file in ROOT.glob("tests/golden/min_dalle/*/shapes.json"))
DETOKERS = [*SEEDED, *sorted(file.parent for file in golden("min_dalle").glob("*/detoker.pt"))]
DETOKER_CONFIG = VQGANConfig(
    ch=32,
    ch_mult=(1, 1, 2),
    num_res_blocks=2,
    attn_resolutions=(64,),  # the lowest of the three levels at 256 pixels
    z_channels=8,
    n_embed=20,
    embed_dim=8,
    group_norm_eps=1e-5,
)


SMALLEST = min(GENERATORS, key=lambda folder: (folder / "decoder.pt").stat().st_size)


@pytest.fixture(scope="module", params=GENERATORS, ids=lambda folder: folder.name)
def case(request):
    model = load_checkpoint(request.param, "generator")
    with np.load(request.param / "golden.npz") as arrays:
        return model, dict(arrays), request.param


def logits_of(model, arrays, tokens):
    """Teacher-forced logits (2n, L, V + 1) of `tokens` (n, L): n rows without the prompt, then n with it."""
    rows = np.repeat([0, 1], len(tokens))
    mask = arrays["text_tokens"][rows] != 1
    return np.asarray(
        codec_kit.applied(
            model, "__call__", arrays["text_tokens"][rows], mask.astype(np.int32), np.tile(tokens, (2, 1))
        )
    )


def test_encodes_text_as_the_original(case):
    model, arrays, _ = case
    mask = arrays["text_tokens"] != 1
    state = np.asarray(codec_kit.applied(model, "encode", arrays["text_tokens"], mask.astype(np.int32)))
    codec_kit.assert_close(state[mask], arrays["encoder_state"][mask])


def test_logits_are_those_of_the_original(case):
    model, arrays, _ = case
    logits = logits_of(model, arrays, arrays["prev_tokens"])
    if "logits" in arrays:
        codec_kit.assert_close(logits, arrays["logits"])
    if "logits_at_steps" in arrays:
        codec_kit.assert_close(logits[:, arrays["logit_steps"]], arrays["logits_at_steps"])
        np.testing.assert_array_equal(logits.argmax(-1), arrays["logits_argmax_all"])


def test_the_weights_that_it_sampled_from_come_out(case):
    """What the original gave to its sampler, step by step: guidance, top_k with ties, then temperature."""
    model, arrays, _ = case
    settings = [name.removesuffix("__settings") for name in arrays if name.endswith("__settings")]
    assert settings
    for name in settings:
        temperature, top_k, scale, _ = arrays[f"{name}__settings"]
        logits = logits_of(model, arrays, arrays[f"{name}__image_tokens"][:, :-1])
        expected = arrays.get(f"{name}__multinomial_weights")
        if expected is None:
            expected = arrays[f"{name}__multinomial_weights_at_steps"]
            logits = logits[:, arrays["logit_steps"]]
        without, with_prompt = np.split(logits[..., : expected.shape[-1]].astype(np.float64), 2)
        guided = without + scale * (with_prompt - without)
        least, most = (np.sort(guided)[..., [-int(k)]] for k in (top_k, 1))
        # Amplified by guidance and temperature; a code at the edge of top_k may fall to either side of it.
        weights = np.exp((guided - most) / temperature) * (guided >= least)
        at_edge = np.abs(guided - least) < 1e-3 * (expected == 0)
        np.testing.assert_allclose(np.where(at_edge, 0, weights), expected, atol=2e-3)


def test_sizes_are_those_of_the_constructor(case):
    model, _, folder = case
    sizes = json.loads((folder / "constructor_args.json").read_text())
    assert [getattr(model.config, ours) for ours in ("text_vocab_size", "max_text_length", "image_length")] == [
        sizes[theirs] for theirs in ("text_vocab_count", "text_token_count", "image_token_count")
    ]
    assert model.config.image_vocab_size == sizes["image_vocab_count"]
    assert model.config.decoder_attention_heads == sizes["attention_head_count"]
    assert model.config.start_token == sizes["bos_token"]


def test_weights_are_the_ones_of_the_file_as_they_are(case):
    """Views in the file's float16, and each tensor of both files used once."""
    model, _, folder = case
    stored = [array for part in ("encoder", "decoder") for array in read_torch(folder / f"{part}.pt").values()]
    found = list(flatten(model.params).values())
    assert sorted(array.nbytes for array in found) == sorted(array.nbytes for array in stored)
    assert all(array.dtype == np.float16 and not array.flags.owndata for array in found)


@pytest.fixture
def folder(tmp_path):
    """The tiny files without what says their heads."""
    for part in ("encoder", "decoder"):
        shutil.copy(SMALLEST / f"{part}.pt", tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    return tmp_path


def test_without_a_side_file_heads_and_start_are_those_of_the_published_models(folder):
    """Heads are 64 wide; the start token is 16,384, or the last row of a smaller table."""
    source = read_min_dalle(folder)
    width, last = source.config.d_model, source.config.image_vocab_size
    assert last < 16384
    assert (source.config.decoder_attention_heads, source.config.start_token) == (max(1, width // 64), last)
    assert source.tokenizer == folder and source.text_style == "min_dalle"
    decoder = {name: np.broadcast_to(array, array.shape) for name, array in read_torch(folder / "decoder.pt").items()}
    decoder["embed_tokens.weight"] = np.broadcast_to(np.float16(0), (16416, width))
    files = (folder / "encoder.pt", folder / "decoder.pt")
    assert min_dalle_config(read_torch(files[0]), decoder, files, {}).start_token == 16384


def test_the_config_of_dalle_mini_decides_where_it_lies_beside(folder):
    plain = read_min_dalle(folder).config
    start, heads = plain.image_vocab_size - 7, plain.decoder_attention_heads
    values = {"encoder_attention_heads": 4 * heads, "decoder_start_token_id": start}
    (folder / "config.json").write_text(json.dumps(values))
    config = read_min_dalle(folder).config
    assert (config.encoder_attention_heads, config.decoder_attention_heads) == (4 * heads, heads)
    assert config.start_token == start
    (folder / "config.json").write_text("[")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        read_min_dalle(folder)
    (folder / "config.json").write_text(json.dumps({"attention_head_count": plain.d_model + 1}))
    with pytest.raises(UserError, match=rf"decoder\.pt: .*encoder_attention_heads {plain.d_model + 1}"):
        read_min_dalle(folder)


@pytest.mark.e2e
def test_names_of_the_hub_and_saved_norm_scales(folder):
    """`encoder_mini.pt` and its sibling; files saved after loading have all scales, each of them 1."""
    for part in ("encoder", "decoder"):
        state = dict(read_torch(folder / f"{part}.pt"))
        for name in list(state):
            if "norm" in name.lower() or "ln" in name:
                state.setdefault(name.replace(".bias", ".weight"), np.ones_like(state[name]))
        codec_kit.saved(folder / f"{part}_mini.pt", state)
    plain = load_checkpoint(folder, "generator")
    with_scales = load_checkpoint(folder / "decoder_mini.pt", "generator")
    assert with_scales.config.force_ln_scale and not plain.config.force_ln_scale
    ids = np.ones((1, plain.config.max_text_length), np.int32)
    ids[0, :3] = 0, 5, 2
    tokens = np.arange(plain.config.image_length)[None] % plain.config.codebook_size
    results = [
        codec_kit.applied(model, "__call__", ids, (ids != 1).astype(np.int32), tokens) for model in (plain, with_scales)
    ]
    np.testing.assert_allclose(*results, atol=1e-5)
    for part in ("encoder", "decoder"):
        (folder / f"{part}.pt").unlink()
    assert read_min_dalle(folder).files == (folder / "encoder_mini.pt", folder / "decoder_mini.pt")


def test_a_damaged_file_is_one_line(folder):
    decoder = {name: np.array(array) for name, array in read_torch(folder / "decoder.pt").items()}  # not mapped
    without_norm = {name: array for name, array in decoder.items() if name != "final_ln.bias"}
    codec_kit.saved(folder / "decoder.pt", without_norm)
    with pytest.raises(UserError, match=r"decoder.pt lacks final_ln.bias;"):
        load_checkpoint(folder, "generator")
    for name in ("lm_head.weight", "embed_positions.weight", "layers.0.glu.fc0.weight"):
        codec_kit.saved(folder / "decoder.pt", {key: array for key, array in decoder.items() if key != name})
        with pytest.raises(UserError, match=f"decoder.pt lacks the tensor {name}"):
            read_min_dalle(folder)
    for name in ("lm_head.bias", "lm_head.weight_x"):
        codec_kit.saved(folder / "decoder.pt", decoder | {name: np.zeros(3, np.float32)})
        with pytest.raises(UserError, match=r"decoder.pt has unexpected .*lm_head"):
            load_checkpoint(folder, "generator")
    last = max((name for name in decoder if name.endswith("glu.fc0.weight")), key=lambda name: int(name.split(".")[1]))
    codec_kit.saved(folder / "decoder.pt", {name: array for name, array in decoder.items() if name != last})
    with pytest.raises(UserError, match=rf"decoder.pt lacks {last};"):
        load_checkpoint(folder, "generator")
    codec_kit.saved(folder / "decoder.pt", decoder)
    content = (folder / "decoder.pt").read_bytes()
    (folder / "decoder.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"decoder.pt"):
        read_min_dalle(folder)


def test_other_files_are_left_to_other_readers(tmp_path):
    assert read_min_dalle(tmp_path) is None and read_detoker(tmp_path) is None
    for name in ("encoder", "decoder", "detoker", "dalle"):
        codec_kit.saved(tmp_path / f"{name}.pt", {"weight": np.zeros((2, 2), np.float32)})
    for path in (tmp_path, tmp_path / "dalle.pt", tmp_path / "decoder.pt"):
        assert read_min_dalle(path) is None and read_detoker(path) is None


@pytest.fixture(params=DETOKERS, ids=lambda folder: folder.name)
def recorded(request, tmp_path):
    """A folder with detoker.pt, and the recorded arrays."""
    with np.load(request.param / "golden.npz") as file:
        arrays = dict(file)
    if request.param in SEEDED:
        shapes = json.loads((request.param / "shapes.json").read_text())
        codec_kit.saved(tmp_path / "detoker.pt", seeded_state(shapes))
        return tmp_path, arrays
    return request.param, arrays


def seeded_state(shapes):
    """Weights in the order of `shapes`; NumPy promises that RandomState's numbers never change (NEP 19)."""
    numbers, state = np.random.RandomState(20221121), {}
    for name, shape in shapes.items():
        values = numbers.standard_normal(shape)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        elif name.endswith("bias"):
            values = 0.1 * values + 0.5 * (name == "decoder.conv_out.bias")
        elif len(shape) == 4:
            values = values / np.prod(shape[1:]) ** 0.5
        state[name] = values.astype(np.float32)
    return state


@pytest.mark.e2e
def test_images_are_those_of_the_original(recorded):
    """Floats in 0..255. Grids go down the columns first; a seamless one is decoded as one map of tokens."""
    folder, arrays = recorded
    model = load_checkpoint(folder, "codec")
    tokens = arrays["tokens"].astype(np.int32)
    count, side = round(len(tokens) ** 0.5), round(tokens.shape[1] ** 0.5)

    def tiled(parts):  # (count * count, side, side, ...) -> (count * side, count * side, ...), down first
        columns = [np.concatenate(parts[i : i + count], axis=0) for i in range(0, len(parts), count)]
        return np.concatenate(columns, axis=1)

    def images(tokens):
        return np.clip(codec_kit.applied(model, "decode_code", tokens), 0, 1) * 255

    codec_kit.assert_close(tiled(list(images(tokens))), arrays["images_grid"])
    codec_kit.assert_close(images(tokens[2:3])[0], arrays["image_2_alone"])
    seamless = tiled(list(tokens.reshape(-1, side, side))).reshape(1, -1)
    codec_kit.assert_close(images(seamless)[0], arrays["images_seamless"])


@pytest.fixture
def detoker(tmp_path):
    """A `detoker.pt` with random weights, and its parameters by path."""
    flat = codec_kit.random_params("vqgan", DETOKER_CONFIG)
    flat = {name: array for name, array in flat.items() if not name.startswith(("encoder/", "quant_conv/"))}
    state = codec_kit.taming_state(flat)
    state = {name.removeprefix("quantize."): array for name, array in state.items()}
    return codec_kit.saved(tmp_path / "detoker.pt", state), flat, state


@pytest.mark.e2e
def test_a_detoker_gives_its_own_arrays_and_sizes(detoker):
    file, flat, _ = detoker
    for path in (file, file.parent):
        source = read_detoker(path)
        assert source.config == DETOKER_CONFIG
        codec_kit.assert_same(source.params, flat)
    model = load_checkpoint(file, "codec")
    pixels = jax.device_get(codec_kit.applied(model, "decode_code", np.arange(4)[None]))
    assert pixels.shape == (1, 8, 8, 3) and np.isfinite(pixels).all()


def test_a_damaged_detoker_is_one_line(detoker):
    file, _, state = detoker
    codec_kit.saved(file, {name: array for name, array in state.items() if name != "decoder.conv_in.bias"})
    with pytest.raises(UserError, match=r"detoker\.pt lacks decoder\.conv_in\.bias"):
        load_checkpoint(file, "codec")


@pytest.mark.parametrize(
    ("image_vocab_size", "side", "start", "codes"),
    [
        (16415, {"bos_token": 16383}, 16383, 16384),  # 0.4.11 starts from a code, which its model can draw too
        (16415, {"bos_token": 16415}, 16415, 16384),  # and its first versions from the last row
        (16415, {}, 16384, 16384),
        (16384, {}, 16384, 16384),
        (71, {"bos_token": 64}, 64, 64),
    ],
)
def test_whatever_it_starts_from_codes_are_those_of_the_codebook(folder, image_vocab_size, side, start, codes):
    """min-dalle draws among the first 16,384 columns alone."""
    files = (folder / "encoder.pt", folder / "decoder.pt")
    encoder, decoder = (dict(read_torch(file)) for file in files)
    width = encoder["embed_tokens.weight"].shape[1]
    decoder["embed_tokens.weight"] = np.broadcast_to(np.float16(0), (image_vocab_size + 1, width))
    config = min_dalle_config(encoder, decoder, files, side)
    assert (config.start_token, config.codebook_size) == (start, codes)
