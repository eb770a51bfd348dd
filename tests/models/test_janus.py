"""Janus against the outputs of transformers and of the original (golden/janus/README.md), and its loader."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import first_of, golden
from token_kit import sampled, stepped

from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder
from dm_generations.models.janus.network import Janus
from dm_generations.models.janus.tokenizer import JanusTokenizer
from dm_generations.models.loading import Checkpoint, find_checkpoint, load_checkpoint
from dm_generations.models.vqgan.network import VQGAN
from dm_generations.sampling.params import Unconditional
from dm_generations.weights.native import flatten

CASES = sorted(path.parent for path in golden("janus").glob("**/settings.json"))
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# What transformers does unless told otherwise.
DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "guidance_scale": 5.0}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def arrays_of(case: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(case / name) as file:
        return dict(file)


@functools.cache
def loaded(case: Path, role: str = "generator") -> Checkpoint:
    return load_checkpoint(case, role)


def on_device(checkpoint: Checkpoint):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), checkpoint.params)


def texts_of(case: Path, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, mask and unconditional ids of the case's prompts."""
    prompts = [row["prompt"] for row in read_json(case / "text_golden.json")["rows"]]
    tokenizer = JanusTokenizer(case, loaded(case).config.vocab_size)
    ids, mask = tokenizer.encode(prompts, length)
    uncond_ids, _ = tokenizer.encode([Unconditional(prompt) for prompt in prompts], length)
    return ids, mask, uncond_ids


@every_case
def test_prompts_become_the_ids_of_the_original(case):
    ids, mask, uncond_ids = texts_of(case, 100)
    for number, row in enumerate(read_json(case / "text_golden.json")["rows"]):
        is_text = mask[number] > 0
        assert mask[number].tolist() == sorted(mask[number])  # padding first
        assert ids[number][is_text].tolist() == row["ids"]
        assert uncond_ids[number][is_text].tolist() == row["uncond_ids"]


@every_case
def test_a_long_prompt_keeps_what_comes_after_it(case):
    tokenizer = JanusTokenizer(case, loaded(case).config.vocab_size)
    ids, mask = tokenizer.encode(["a " * 1000, "a"], 40)
    assert mask[0].all()
    assert ids[0, -4:].tolist() == ids[1, -4:].tolist()


@pytest.mark.e2e
@pytest.mark.parametrize("case", first_of(CASES[::-1]), ids=lambda case: case.name)
def test_logits_and_tokens_are_those_of_the_original(case):
    checkpoint, arrays = loaded(case), arrays_of(case, "gpt_golden.npz")
    model, params = Janus(checkpoint.config), on_device(checkpoint)
    # a shorter prompt takes less time, and gives the same numbers
    ids, mask, uncond_ids = texts_of(case, 48)

    def logits(which: np.ndarray, rows: list[int], codes: np.ndarray) -> np.ndarray:
        missing = 6 - len(rows)  # up to as many rows as there are ever, for which one program serves
        rows, padded = rows + [0] * missing, np.pad(codes, ((0, missing), (0, 0)))
        return np.asarray(stepped(model, params, which[rows], mask[rows], padded))[: len(codes)]

    codes = arrays["codes"]
    first = [0] * len(codes)
    whole = jax.jit(model.apply)({"params": params}, ids[first], mask[first], codes)
    np.testing.assert_allclose(whole, arrays["one__logits_cond"], atol=1e-4)
    np.testing.assert_allclose(logits(ids, first, codes), arrays["one__logits_cond"], atol=1e-4)
    np.testing.assert_allclose(logits(uncond_ids, first, codes), arrays["one__logits_uncond"], atol=1e-4)
    for name, setting in read_json(case / "settings.json")["settings"].items():
        codes, is_original = arrays[f"{name}__codes"], "original" in name
        rows = [0] * len(codes) if is_original else [number * 3 // len(codes) for number in range(len(codes))]
        values = DEFAULTS | ({"top_k": 0} if is_original else {}) | setting
        scale = values.get("cfg_weight", values["guidance_scale"])
        cond, uncond = (logits(which, rows, codes) for which in (ids, uncond_ids))
        guided = uncond + scale * (cond - uncond)
        if f"{name}__steps_guided_logits" in arrays:
            np.testing.assert_allclose(guided, arrays[f"{name}__steps_guided_logits"], atol=1e-3, err_msg=name)
        if f"{name}__steps_exponential" in arrays:
            filters = values["top_k"], values["top_p"], values["temperature"]
            tokens = sampled(guided, arrays[f"{name}__steps_exponential"], *filters)
        else:
            tokens = np.asarray(guided).argmax(axis=-1)
        np.testing.assert_array_equal(tokens, codes, err_msg=name)


def test_no_top_k_is_the_default():
    assert loaded(CASES[0]).config.default_params.top_k == 0


@pytest.mark.e2e
@pytest.mark.parametrize(
    "case", first_of([case for case in CASES if (case / "vq_golden.npz").is_file()]), ids=lambda case: case.name
)
def test_the_codec_decodes_and_encodes_as_the_original(case):
    checkpoint, arrays = loaded(case, "codec"), arrays_of(case, "vq_golden.npz")
    network, variables = VQGAN(checkpoint.config), {"params": on_device(checkpoint)}
    pixels = np.asarray(jax.jit(functools.partial(network.apply, method="decode_code"))(variables, arrays["codes"]))
    np.testing.assert_allclose(pixels.transpose(0, 3, 1, 2) * 2 - 1, arrays["decoded_nchw"], atol=1e-4)
    images = (arrays["input_nchw"].transpose(0, 2, 3, 1) + 1) / 2
    _, tokens = jax.jit(functools.partial(network.apply, method="encode"))(variables, images)
    np.testing.assert_array_equal(tokens, arrays["indices_original"])
    decoder = Decoder.from_checkpoint(checkpoint, len(pixels))
    np.testing.assert_array_equal(decoder(arrays["codes"]), arrays["pixels_uint8_nhwc"])


@pytest.mark.parametrize(
    "case", [case for case in CASES if (case / "original_layout").is_dir()], ids=lambda case: case.name
)
def test_both_layouts_hold_the_same_models(case):
    for role in ("generator", "codec"):
        options = {"block_size": loaded(case).config.block_size} if role == "generator" else {}
        other = load_checkpoint(case / "original_layout", role, options)
        ours, theirs = flatten(loaded(case, role).params), flatten(other.params)
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name], err_msg=name)
        if role == "generator":
            assert other.config.sizes == loaded(case).config.sizes


def test_weights_are_views_of_the_file():
    for name, array in flatten(loaded(CASES[0]).params).items():
        assert not array.flags.owndata, name
        assert not array.flags.writeable, name


def copy_with(tmp_path: Path, **changes) -> Path:
    """The first case with other entries of the language model's config."""
    for file in CASES[0].iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    values = read_json(CASES[0] / "config.json")
    values["text_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_attention_heads": 7, "head_dim": None}, "heads"),
        ({"num_hidden_layers": 3}, "model.language_model.layers.2"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_what_does_not_fit_is_named(changes, named, tmp_path):
    with pytest.raises(UserError, match=named) as caught:
        load_checkpoint(copy_with(tmp_path, **changes), "generator")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_without_weights(tmp_path):
    folder = copy_with(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        find_checkpoint(folder, "generator")
