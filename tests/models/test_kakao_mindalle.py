"""minDALL-E against the outputs of Kakao Brain's program (golden/mindalle_kakao/README.md), and its loader."""

import dataclasses
import functools
import gzip
import io
import shutil
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import golden

from dm_generations.errors import UserError
from dm_generations.models.kakao_mindalle.checkpoint import read_codec, read_generator
from dm_generations.models.kakao_mindalle.network import KakaoMinDalle, KakaoMinDalleConfig
from dm_generations.models.loading import Checkpoint, load_checkpoint
from dm_generations.models.registry import parameter_shapes
from dm_generations.models.vqgan.network import VQGAN
from dm_generations.sampling import logits as sampling
from dm_generations.weights.native import flatten, unflatten

CASES = sorted(path.parents[1] for path in golden("mindalle_kakao").glob("**/ckpt/stage2_last.ckpt"))
CASE = CASES[0]
SMALL = KakaoMinDalleConfig(9, 7, embed_dim=8, n_layers=2, n_heads=2, ctx_len_img=4, ctx_len_txt=3)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@functools.cache
def loaded(case: Path, role: str) -> Checkpoint:
    return load_checkpoint(case / "ckpt", role)


def arrays_of(case: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(case / name) as file:
        return dict(file)


@functools.partial(jax.jit, static_argnums=0)
def stepped(model, params, input_ids, tokens):
    """The logits (B, L, V) of a generation that samples `tokens` (B, L), with parameters as a CPU takes them."""
    _, params = model.prepare_params(model.config, params, "cpu")
    apply = functools.partial(model.apply, {"params": params})

    def step(state, inputs):
        cache, token = state
        token_after, number = inputs
        logits, cache = apply(cache, token, number, method="decode_step")
        return (cache, token_after), logits

    text = apply(input_ids, jnp.zeros_like(input_ids), method="encode_prompt")
    cache = apply(text, method="init_cache")
    start = jnp.full(len(tokens), model.config.start_token, jnp.int32)
    steps = jnp.arange(tokens.shape[1])
    return jax.lax.scan(step, (cache, start), (tokens.T, steps))[1].swapaxes(0, 1)


@every_case
def test_logits_are_those_of_the_original_with_and_without_a_cache(case):
    checkpoint, arrays = loaded(case, "generator"), arrays_of(case, "stage2.npz")
    model, params = KakaoMinDalle(checkpoint.config), jax.tree.map(jnp.asarray, checkpoint.params)
    text, codes = arrays["text_ids"].astype(np.int32), arrays["codes"].astype(np.int32)
    image, words = jax.jit(model.apply)({"params": params}, text, codes)
    assert image.dtype == words.dtype == jnp.float32
    np.testing.assert_allclose(image, arrays["logits_img"], atol=1e-4)
    np.testing.assert_allclose(words, arrays["logits_txt"], atol=1e-4)
    np.testing.assert_allclose(stepped(model, params, text, codes), arrays["logits_img_cached"], atol=1e-4)


@every_case
def test_filtered_logits_give_the_probabilities_that_the_original_sampled_from(case):
    checkpoint, arrays = loaded(case, "generator"), arrays_of(case, "stage2.npz")
    model, params = KakaoMinDalle(checkpoint.config), jax.tree.map(jnp.asarray, checkpoint.params)
    names = [name.removesuffix("__settings") for name in arrays if name.endswith("__settings")]
    assert names
    for name in names:
        top_k, top_p, temperature, _ = arrays[f"{name}__settings"]
        logits = stepped(model, params, arrays["text_ids"], arrays[f"{name}__codes"])
        rows = logits.reshape(-1, logits.shape[-1])
        settings = [(int(top_k), np.int32), (top_p or 1, np.float32), (temperature, np.float32)]
        columns = [jnp.full(len(rows), value, dtype) for value, dtype in settings]
        filtered = sampling.filter_logits(rows, *columns, rows.shape[1], checkpoint.config.sampling_order)
        probabilities = jax.nn.softmax(filtered).reshape(logits.shape)
        np.testing.assert_allclose(probabilities, arrays[f"{name}__probs"], atol=1e-4, err_msg=name)


@pytest.mark.e2e
@every_case
def test_the_codec_decodes_and_encodes_as_the_original(case):
    checkpoint, arrays = loaded(case, "codec"), arrays_of(case, "stage1.npz")
    variables = {"params": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), checkpoint.params)}
    # the trimmed copy has no encoder, and float16, where the largest difference is 0.01
    is_whole = "encoder" in checkpoint.params
    tolerance = 1e-4 if is_whole else 0.02
    codes = arrays["codes"].reshape(len(arrays["codes"]), -1).astype(np.int32)
    decode = jax.jit(functools.partial(VQGAN(checkpoint.config).apply, method="decode_code"))
    pixels = np.asarray(decode(variables, codes)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(pixels, arrays["decoded_nchw"] * 0.5 + 0.5, atol=tolerance)
    np.testing.assert_allclose(pixels.clip(0, 1), arrays["pixels01_nchw"], atol=tolerance)
    if is_whole:
        encode = jax.jit(functools.partial(VQGAN(checkpoint.config).apply, method="encode"))
        rows, indices = encode(variables, arrays["input_nchw"].transpose(0, 2, 3, 1) * 0.5 + 0.5)
        np.testing.assert_array_equal(indices, arrays["indices"])
        np.testing.assert_allclose(rows, arrays["quant_nhwc"], atol=1e-4)


@every_case
def test_weights_are_views_of_the_files(case):
    for role in ("generator", "codec"):
        for name, array in flatten(loaded(case, role).params).items():
            assert not array.flags.owndata and not array.flags.writeable, name


@pytest.mark.e2e
def test_bfloat16_is_near_float32():
    checkpoint, arrays = loaded(CASE, "generator"), arrays_of(CASE, "stage2.npz")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), checkpoint.params)
    model = KakaoMinDalle(checkpoint.config, jnp.bfloat16)
    logits = stepped(model, params, arrays["text_ids"], arrays["codes"])
    assert logits.dtype == jnp.float32
    expected = arrays["logits_img"]
    np.testing.assert_allclose(logits, expected, atol=0.075 * expected.std())


def parameter_names(config):
    return parameter_shapes("mindalle", config).keys()


def test_layers_without_bias_have_none():
    for option, layer in (("attn_bias", "/attn/"), ("mlp_bias", "/mlp_")):
        without = dataclasses.replace(SMALL, **{option: False})
        gone = parameter_names(SMALL) - parameter_names(without)
        assert gone == {name for name in parameter_names(SMALL) if layer in name and name.endswith("/bias")} != set()


def test_the_approximate_gelu_is_another_but_near():
    random = np.random.default_rng(0)
    shapes = parameter_shapes("mindalle", SMALL)
    params = unflatten({name: random.normal(size=shape).astype("f") for name, shape in shapes.items()})
    ids = [np.ones((1, length), np.int32) for length in (SMALL.ctx_len_txt, SMALL.ctx_len_img)]
    exact, near = (
        jax.jit(KakaoMinDalle(dataclasses.replace(SMALL, gelu_use_approx=option)).apply)({"params": params}, *ids)[0]
        for option in (False, True)
    )
    assert 1e-4 < np.abs(exact - near).max() < 0.5


def test_what_the_config_leaves_out_has_the_values_of_the_1_3b_model():
    config = KakaoMinDalleConfig.from_dict({"n_layers": 3, "embd_pdrop": 0.0})
    assert (config.n_layers, config.n_heads, config.embed_dim) == (3, 24, 1536)
    assert (config.image_length, config.max_text_length, config.codebook_size) == (256, 64, 16384)


def test_the_archive_of_the_download_loads_as_the_folder(tmp_path):
    path = tmp_path / "1.3B.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        archive.add(CASE / "ckpt", "1.3B")
    for role in ("generator", "codec"):
        checkpoint = load_checkpoint(path, role)
        expected = flatten(loaded(CASE, role).params)
        found = flatten(checkpoint.params)
        assert found.keys() == expected.keys() and checkpoint.config == loaded(CASE, role).config
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    tokenizer = load_checkpoint(path, "generator").tokenizer
    for file in (CASE / "ckpt" / "tokenizer").iterdir():
        assert (tokenizer / file.name).read_bytes() == file.read_bytes()


def test_nothing_of_an_archive_leaves_its_folder(tmp_path):
    path, outside = tmp_path / "model.tar", tmp_path / "stage2_last.ckpt"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("1.3B/config.yaml")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "victim")
        archive.addfile(link)
        member = tarfile.TarInfo("../../../../" + str(outside))
        member.size = 3
        archive.addfile(member, io.BytesIO(b"bad"))
    with pytest.raises(UserError, match=r"model.tar.* lacks config.yaml"):
        load_checkpoint(path, "generator")
    assert sorted(tmp_path.iterdir()) == [path]


def test_damaged_archives_are_named(tmp_path):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        archive.add(CASE / "ckpt" / "config.yaml", "config.yaml")
        archive.add(CASE / "ckpt" / "stage2_last.ckpt", "stage2_last.ckpt")
    for name, content in (
        ("cut.tar.gz", whole.getvalue()[:-2000]),
        ("empty.tar.gz", b""),
        ("text.tgz", b"no archive"),
        ("gzip.tar.gz", gzip.compress(b"no archive", mtime=0)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_checkpoint(tmp_path / name, "generator")


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("hparams", "n_layers", lambda n: n + 1, r"has {} blocks, .*config\.yaml says {new}"),
        ("hparams", "n_layers", lambda _: 10**9, r"config\.yaml: .*n_layers must be .*not {new}"),
        ("hparams", "n_heads", lambda n: n * 97, r"config\.yaml: .*embed_dim .* n_heads {new}"),
        ("hparams", "embed_dim", lambda n: n * 2, r"has shape"),
        ("hparams", "mlp_bias", lambda _: False, r"has unexpected blocks\.0\.mlp\.0\.bias"),
        ("hparams", "ctx_len_img", lambda _: None, r"config\.yaml: .*ctx_len_img must be"),
        ("stage2", "type", lambda _: "igpt", r"config\.yaml: stage2\.type is 'igpt'"),
        ("stage2", "hparams", lambda _: 3, r"config\.yaml: hparams must hold names and values, not 3"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error_that_says_what(section, name, value, message, tmp_path):
    values = yaml.safe_load((CASE / "ckpt" / "config.yaml").read_text())
    part = values["stage2"] if section == "stage2" else values["stage2"][section]
    old, part[name] = part[name], value(part[name])
    shutil.copy(CASE / "ckpt" / "stage2_last.ckpt", tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=message.format(old, new=part[name])):
        load_checkpoint(tmp_path, "generator")


def test_a_folder_without_its_config_is_an_error_and_one_without_weights_is_not_ours(tmp_path):
    assert read_generator(tmp_path) is None and read_codec(tmp_path) is None
    shutil.copy(CASE / "ckpt" / "stage2_last.ckpt", tmp_path)
    assert read_codec(tmp_path) is None
    for path in (tmp_path, tmp_path / "stage2_last.ckpt"):
        with pytest.raises(UserError, match=r"lacks config.yaml"):
            read_generator(path)
