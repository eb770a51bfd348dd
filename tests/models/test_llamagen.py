"""LlamaGen against the outputs of its own program (golden/llamagen/README.md), and its loader."""

import functools
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import first_of, golden
from token_kit import sampled, stepped, tolerance
from torch_files import save, tensor

from dm_generations.archive.records import ClassLabel
from dm_generations.errors import UserError
from dm_generations.models.llamagen.network import LlamaGen, LlamaGenConfig, rotary_table
from dm_generations.models.llamagen.tokenizer import CaptionCleaner, CaptionTokenizer, ClassTokenizer
from dm_generations.models.loading import Checkpoint, find_checkpoint, load_checkpoint
from dm_generations.models.registry import parameter_shapes
from dm_generations.models.vqgan.network import VQGAN
from dm_generations.sampling.params import Unconditional
from dm_generations.weights.native import flatten, unflatten
from dm_generations.weights.torch_file import read_torch

CASES = sorted(path.parent for path in golden("llamagen").glob("**/settings.json"))
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def settings_of(case: Path) -> dict:
    return json.loads((case / "settings.json").read_text())


def overrides_of(case: Path) -> dict[str, int]:
    """What the files of a case do not say."""
    return {name: settings_of(case)["gpt"][name] for name in ("n_head", "block_size")}


@functools.cache
def loaded(case: Path, role: str = "generator") -> Checkpoint:
    return load_checkpoint(case, role, overrides_of(case) if role == "generator" else {})


def arrays_of(case: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(case / name) as file:
        return dict(file)


def conditions(arrays: dict[str, np.ndarray], config: LlamaGenConfig, count: int) -> list[np.ndarray]:
    """Ids, mask and unconditional ids of `count` images."""
    if config.num_classes:
        ids = arrays["class_ids"][:count, None]
        return [ids, np.ones_like(ids), np.full_like(ids, config.num_classes)]
    ids, mask = arrays["input_ids"][:count], arrays["attention_mask"][:count]
    return [ids, mask, np.full_like(ids, -1)]


def on_device(checkpoint: Checkpoint):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), checkpoint.params)


@pytest.mark.e2e
@every_case
def test_logits_and_tokens_are_those_of_the_original(case):
    checkpoint, arrays = loaded(case), arrays_of(case, "gpt_golden.npz")
    model, params, atol = LlamaGen(checkpoint.config), on_device(checkpoint), tolerance(checkpoint)
    codes = arrays["codes"]
    ids, mask, uncond_ids = conditions(arrays, checkpoint.config, len(codes))
    if "rope_table" in arrays:
        np.testing.assert_allclose(np.stack(rotary_table(checkpoint.config), -1), arrays["rope_table"], atol=1e-6)
    whole = jax.jit(model.apply)({"params": params}, ids, mask, codes)
    np.testing.assert_allclose(whole, arrays["logits"], atol=atol)
    np.testing.assert_allclose(stepped(model, params, ids, mask, codes), arrays["logits"], atol=atol)
    uncond = stepped(model, params, uncond_ids, mask, codes)
    np.testing.assert_allclose(uncond, arrays["logits_uncond"], atol=atol)
    for name, setting in settings_of(case)["settings"].items():
        if f"{name}__codes" not in arrays:
            continue
        codes, scale = arrays[f"{name}__codes"], setting["cfg_scale"]
        cond, uncond = (stepped(model, params, each, mask, codes) for each in (ids, uncond_ids))
        guided = uncond + scale * (cond - uncond) if scale > 1 else cond
        if setting["cfg_interval"] >= 0:
            is_guided = np.arange(codes.shape[1]) <= setting["cfg_interval"] + 1
            guided = jnp.where(is_guided[:, None], guided, cond)
        np.testing.assert_allclose(guided, arrays[f"{name}__steps_guided_logits"], atol=10 * atol, err_msg=name)
        if atol > 1e-4:  # other weights, other tokens now and then
            guided = arrays[f"{name}__steps_guided_logits"]
        if setting["sample_logits"]:
            filters = setting["top_k"], setting["top_p"], setting["temperature"]
            tokens = sampled(guided, arrays[f"{name}__steps_exponential"], *filters)
        else:
            tokens = np.asarray(guided).argmax(axis=-1)
        np.testing.assert_array_equal(tokens, codes, err_msg=name)


def codec_cases() -> list[Path]:
    return [case for case in CASES if list(case.glob("vq_*.pt"))]


@pytest.mark.e2e
@pytest.mark.parametrize("case", first_of(codec_cases()), ids=lambda case: case.name)
def test_the_codec_decodes_and_encodes_as_the_original(case):
    from dm_generations.inference.decoder import Decoder

    checkpoint, arrays = loaded(case, "codec"), arrays_of(case, "vq_golden.npz")
    network, variables = VQGAN(checkpoint.config), {"params": on_device(checkpoint)}
    decode = jax.jit(functools.partial(network.apply, method="decode_code"))
    pixels = np.asarray(decode(variables, arrays["codes"])).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(pixels * 2 - 1, arrays["decoded_nchw"], atol=1e-4)
    encode = jax.jit(functools.partial(network.apply, method="encode"))
    rows, tokens = encode(variables, (arrays["input_nchw"].transpose(0, 2, 3, 1) + 1) / 2)
    np.testing.assert_array_equal(tokens, arrays["indices"])
    np.testing.assert_allclose(rows.transpose(0, 3, 1, 2), arrays["quant_nchw"], atol=1e-4)
    decoder = Decoder.from_checkpoint(checkpoint, len(pixels), grid=math.isqrt(settings_of(case)["gpt"]["block_size"]))
    difference = decoder(arrays["codes"]).astype(int) - arrays["pixels_uint8_nhwc"]
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.001


def text_files(name: str) -> list[Path]:
    return sorted(golden("llamagen").glob(f"**/{name}"))


@pytest.mark.parametrize("file", text_files("caption_cleaning.json"), ids=lambda file: file.parent.name)
def test_captions_are_cleaned_as_by_the_original(file):
    clean = CaptionCleaner()
    for row in json.loads(file.read_text())["rows"]:
        assert (clean.once(row["text"]), clean(row["text"])) == (row["once"], row["twice"])


def test_a_long_caption_takes_no_long_time():
    assert CaptionCleaner()("a.a" * 100_000 + "-" * 100_000 + "((((" * 100_000)


@pytest.mark.parametrize("file", text_files("tokenizer.json"), ids=lambda file: file.parents[1].name)
def test_captions_become_the_ids_and_features_of_the_original(file):
    case = file.parents[1]
    arrays, prompts = arrays_of(case, "gpt_golden.npz"), settings_of(case)["prompts"]
    length = arrays["input_ids"].shape[1]
    tokenizer = CaptionTokenizer(file, 1 << 20)
    ids, mask = tokenizer.encode(prompts, length)
    np.testing.assert_array_equal(ids, arrays["input_ids"])
    np.testing.assert_array_equal(mask, arrays["attention_mask"])
    ids, uncond_mask = tokenizer.encode([Unconditional(prompt) for prompt in prompts], length)
    assert (ids == -1).all()
    np.testing.assert_array_equal(uncond_mask, mask)


def test_classes_become_rows_of_the_table():
    ids, mask = ClassTokenizer(Path(), 11).encode([ClassLabel("", 3), None], 1)
    assert (ids.tolist(), mask.tolist()) == ([[3], [10]], [[1], [1]])


# What a file can be, made of a case.

CASE = next(case for case in CASES if settings_of(case)["gpt"].get("num_classes"))
GPT = next(CASE.glob("c2i_*.pt"))
OPTIONS = overrides_of(CASE)


@functools.cache
def gpt_state() -> dict[str, np.ndarray]:
    return read_torch(GPT)["model"]


def write(path: Path, content) -> Path:
    def converted(value):
        if isinstance(value, dict):
            return {name: converted(each) for name, each in value.items()}
        return tensor(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value

    return save(path, converted(content))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,  # FSDP
        lambda state: {"model": state, "ema": {name: array * 2 for name, array in state.items()}, "steps": 7},
        lambda state: {"module": {f"module.{name}": array for name, array in state.items()}},
        lambda state: {"model": {f"_orig_mod.{name}": array for name, array in state.items()}},
        lambda state: {f"_fsdp_wrapped_module.{name}": array for name, array in state.items()},
        lambda state: {"model": {**state, "freqs_cis": np.zeros(3, np.float32)}},
    ],
)
def test_what_training_wraps_around_the_weights_is_left_behind(wrap, tmp_path):
    found = load_checkpoint(write(tmp_path / "c2i_B_256.pt", wrap(gpt_state())), "generator", OPTIONS)
    expected = flatten(loaded(CASE).params)
    for name, array in flatten(found.params).items():
        np.testing.assert_array_equal(array, expected[name])


def test_grouped_queries_are_seen_in_the_shapes(tmp_path):
    dim, head = loaded(CASE).config.dim, loaded(CASE).config.dim // OPTIONS["n_head"]
    state = {
        name: array[: dim + 2 * head] if name.endswith("wqkv.weight") else array for name, array in gpt_state().items()
    }
    config = load_checkpoint(write(tmp_path / "x.pt", {"model": state}), "generator", OPTIONS).config
    assert (config.sizes.heads, config.sizes.kv_heads) == (OPTIONS["n_head"], 1)


@pytest.mark.e2e
def test_one_head_of_keys_for_all_is_as_equal_heads():
    """Attention with grouped queries equals attention with repeated keys."""
    small = LlamaGenConfig(
        dim=16, n_layer=2, n_head=4, kv_dim=8, hidden_dim=8, vocab_size=7, block_size=4, num_classes=3
    )
    shapes = parameter_shapes("llamagen", small)
    random = np.random.default_rng(0)
    flat = {name: random.normal(size=shape).astype("f") for name, shape in shapes.items()}
    full = dict(flat)
    for name, array in flat.items():
        if name.endswith("qkv/kernel"):
            q, k, v = np.split(array, (16, 24), axis=1)
            repeated = [np.repeat(part.reshape(16, 2, 4), 2, axis=1).reshape(16, 16) for part in (k, v)]
            full[name] = np.concatenate([q, *repeated], axis=1)
    inputs = np.array([[1]]), np.array([[1]]), np.array([[3, 1, 4, 1]])
    logits = [
        jax.jit(LlamaGen(config).apply)({"params": unflatten(params)}, *inputs)
        for config, params in ((small, flat), (LlamaGenConfig(**{**vars(small), "kv_dim": 16}), full))
    ]
    np.testing.assert_allclose(*logits, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "side"), [("c2i_B_256.pt", 16), ("c2i_XL_384.pt", 24), ("t2i_512.pt", 32), ("x.pt", 16)]
)
def test_the_name_of_the_file_tells_the_grid(name, side, tmp_path):
    path = shutil.copy(GPT, tmp_path / name)
    assert load_checkpoint(path, "generator", {"n_head": OPTIONS["n_head"]}).config.grid == side


def test_a_model_of_a_known_size_needs_no_heads():
    sizes = {name: LlamaGenConfig(dim=dim).sizes for name, dim in (("B", 768), ("XL", 1280), ("3B", 3200))}
    assert {name: (size.heads, size.head_width) for name, size in sizes.items()} == {
        "B": (12, 64),
        "XL": (20, 64),
        "3B": (32, 100),
    }


def refusal(path: Path, role: str = "generator", **options) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, role, options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_heads_are_asked_for():
    message = refusal(GPT, block_size=OPTIONS["block_size"])
    assert GPT.name in message
    assert "wqkv" in message
    assert "--heads" in message
    assert "--heads" in refusal(GPT, n_head=OPTIONS["n_head"] + 1)


@pytest.mark.parametrize("shape", [(1,), (0,)])
def test_stubs_of_sharded_training_are_named(shape, tmp_path):
    state = gpt_state() | {"layers.1.attention.wo.weight": np.zeros(shape, np.float32)}
    message = refusal(write(tmp_path / "c2i_B_256.pt", {"module": state}), **OPTIONS)
    assert "c2i_B_256.pt" in message
    assert "layers.1.attention.wo.weight" in message


def test_a_missing_tensor_has_the_name_of_the_file(tmp_path):
    state = {name: array for name, array in gpt_state().items() if name != "layers.0.feed_forward.w3.weight"}
    message = refusal(write(tmp_path / "c2i_B_256.pt", {"model": state}), **OPTIONS)
    assert "layers.0.feed_forward.w3.weight" in message


def test_a_generator_is_no_codec():
    message = refusal(GPT, "codec")
    assert GPT.name in message
    assert any(name in message for name in gpt_state())
    assert find_checkpoint(GPT, "codec") is None


def test_captions_need_t5_next_to_the_model(tmp_path):
    dim, vocabulary = loaded(CASE).config.dim, len(gpt_state()["tok_embeddings.weight"])
    caption = {
        "cls_embedding.cap_proj.fc1.weight": np.zeros((dim, 8), np.float32),
        "cls_embedding.cap_proj.fc2.weight": np.zeros((dim, dim), np.float32),
        "cls_embedding.uncond_embedding": np.zeros((5, 8), np.float32),
    }
    state = {name: array for name, array in gpt_state().items() if "cls_embedding" not in name} | caption
    path = write(tmp_path / "t2i_XL_256.pt", {"model": state})
    message = refusal(path, **OPTIONS)
    assert path.name in message
    assert "flan-t5" in message
    assert vocabulary


def test_two_models_in_a_folder_are_not_chosen_from(tmp_path):
    for name in ("c2i_B_256.pt", "c2i_L_256.pt"):
        shutil.copy(GPT, tmp_path / name)
    message = refusal(tmp_path)
    assert "c2i_B_256.pt" in message
    assert "c2i_L_256.pt" in message
