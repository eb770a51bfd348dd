"""DALLE-pytorch against the outputs of the original and of Jack000's fork (tests/golden/dalle_pytorch/README.md).

The originals computed in float32, within 1.7e-5 of float64.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import first_fast, first_of, golden

from dm_generations.errors import UserError
from dm_generations.models.base import RawCheckpoint
from dm_generations.models.dalle_pytorch import checkpoint as loader
from dm_generations.models.dalle_pytorch.network import DallePytorch, DallePytorchConfig, make_mask
from dm_generations.models.dvae.discrete import DiscreteVAE
from dm_generations.models.loading import check_names_and_shapes
from dm_generations.models.registry import parameter_shapes
from dm_generations.sampling import logits as sampling
from dm_generations.weights.native import flatten

GOLDEN = golden("dalle_pytorch")
CASES = sorted(str(file.parent.relative_to(GOLDEN)) for file in GOLDEN.glob("*/*/dalle.pt"))
IS_HIDDEN = -1e38  # logits below are those that the original masked
GUIDED_STEPS = 16  # recorded of each generation

SMALL = DallePytorchConfig(
    num_text_tokens=9, text_seq_len=5, num_image_tokens=7, image_fmap_size=3, dim=8, depth=2, heads=2, dim_head=12
)


@functools.cache
def source(case: str) -> RawCheckpoint:
    return loader.read_generator(GOLDEN / case)


@functools.cache
def arrays(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / case / "golden.npz") as file:
        return dict(file)


# With attention of several kinds.
MIXED_CASES = [case for case in CASES if "conv_like" in source(case).config.attn_types]
# Long sequences take many seconds to compute.
EVERY_CASE = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.e2e] * (source(case).config.image_length > 100)) for case in CASES],
)


@functools.partial(jax.jit, static_argnums=0)
def full_logits(model, params, text, image_tokens):
    return model.apply({"params": params}, text, image_tokens)


@functools.partial(jax.jit, static_argnums=0)
def cached_logits(model, params, text, image_tokens):
    """(B, L, num_image_tokens) of `init_cache` and then a step after the other, with parameters as a CPU takes them."""
    _, params = model.prepare_params(model.config, params, "cpu")
    read = model.apply({"params": params}, text, jnp.ones_like(text), method="encode_prompt")
    cache = model.apply({"params": params}, read, method="init_cache")

    def step(cache, inputs):
        logits, cache = model.apply({"params": params}, cache, *inputs, method="decode_step")
        return cache, logits

    before = jnp.roll(image_tokens, 1, axis=1).T  # what step 0 gets does not matter
    steps = jnp.arange(image_tokens.shape[1], dtype=jnp.int32)
    return jax.lax.scan(step, cache, (before, steps))[1].swapaxes(0, 1)


def run(function, case: str, text, image_tokens) -> np.ndarray:
    params = jax.tree.map(jnp.asarray, source(case).params)
    return np.asarray(function(DallePytorch(source(case).config), params, jnp.asarray(text), jnp.asarray(image_tokens)))


def run_halves(case: str, image_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cached logits, conditional and unconditional, of the recorded prompts with these tokens."""
    text = arrays(case)["text"]
    logits = run(
        cached_logits, case, np.concatenate([text, np.zeros_like(text)]), np.concatenate([image_tokens, image_tokens])
    )
    return np.split(logits, 2)


def image_part(config: DallePytorchConfig, logits: np.ndarray) -> np.ndarray:
    """Logits of image tokens alone, from those of the whole sequence and vocabulary."""
    return logits[:, config.text_seq_len :, config.text_rows :]


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found < IS_HIDDEN, expected < IS_HIDDEN)
    seen = expected >= IS_HIDDEN
    np.testing.assert_allclose(found[seen], expected[seen], rtol=0, atol=1e-4)


@pytest.mark.e2e
@EVERY_CASE
def test_logits_are_those_of_the_original(case):
    numbers = arrays(case)
    text, image = numbers["text"], numbers["image_tokens"]
    prompts = {
        "logits": (text, image),
        "logits_null": (np.zeros_like(text), image),
        "logits_prefix": (text, image[:, : int(numbers["prefix_image_len"])]),
        "logits_text_only": (text, image[:, :0]),
    }
    for name in numbers.keys() & prompts.keys():
        assert_same(run(full_logits, case, *prompts[name]), numbers[name])


@pytest.mark.e2e
@pytest.mark.parametrize("case", first_of(CASES))
def test_cached_steps_give_the_uncached_logits(case):
    numbers, config = arrays(case), source(case).config
    text, image = numbers["text"], numbers["image_tokens"]
    halves = run_halves(case, image)
    for found, prompt in zip(halves, (text, np.zeros_like(text)), strict=True):
        assert found.dtype == np.float32
        expected = image_part(config, run(full_logits, case, prompt, image))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    if "logits_null" in numbers:
        cond, uncond = (image_part(config, numbers[name]) for name in ("logits", "logits_null"))
        rows = (half.reshape(-1, half.shape[-1]) for half in halves)
        guided = np.asarray(sampling.guide(*rows, jnp.full(cond.shape[0] * cond.shape[1], 3.0)))
        np.testing.assert_allclose(guided.reshape(cond.shape), uncond + 3 * (cond - uncond), rtol=0, atol=5e-4)


@pytest.mark.parametrize("case", first_fast(case for case in CASES if "gen__tokens" in arrays(case)))
def test_sampling_repeats_the_original(case):
    """Its logits, its filter, and with its noise its tokens."""
    numbers, config = arrays(case), source(case).config
    filter_thres, temperature, _, _ = numbers["gen__settings"]
    tokens = numbers["gen__tokens"]
    count = min(GUIDED_STEPS, tokens.shape[1])
    logits = run_halves(case, tokens)[0][:, :count]
    recorded, kept, noise = (
        numbers[f"gen__step_{name}"][:, :count, config.text_rows :] for name in ("logits", "filtered", "gumbel")
    )
    np.testing.assert_allclose(logits, recorded, rtol=0, atol=1e-4)
    rows = logits.shape[0] * count
    settings = (
        jnp.full(rows, config.top_k_of(filter_thres), jnp.int32),
        jnp.ones(rows),
        jnp.full(rows, temperature, jnp.float32),
    )
    logits, noise = (jnp.asarray(part.reshape(rows, -1)) for part in (logits, noise))
    filtered = np.asarray(sampling.filter_logits(logits, *settings, config.codebook_size, config.sampling_order))
    is_kept = kept.reshape(rows, -1) >= IS_HIDDEN
    np.testing.assert_array_equal(np.isfinite(filtered), is_kept)
    drawn = sampling.sample_with_noise(logits, noise, *settings, config.codebook_size, config.sampling_order)
    np.testing.assert_array_equal(np.asarray(drawn).reshape(-1, count), tokens[:, :count])


@pytest.mark.parametrize("case", first_fast(case for case in CASES if "gen_cond3__tokens" in arrays(case)))
def test_the_original_guides_only_the_first_token(case):
    """What it computed from then on is the unconditional logits; ours are guided throughout, see the cached steps."""
    numbers, config = arrays(case), source(case).config
    scale = numbers["gen_cond3__settings"][2]
    tokens = numbers["gen_cond3__tokens"]
    recorded = numbers["gen_cond3__step_logits"][:, :, config.text_rows :]
    cond, uncond = (half[:, : recorded.shape[1]] for half in run_halves(case, tokens))
    first = uncond[:, 0] + scale * (cond[:, 0] - uncond[:, 0])
    np.testing.assert_allclose(recorded[:, 0], first, rtol=0, atol=5e-4)
    np.testing.assert_allclose(recorded[:, 1:], uncond[:, 1:], rtol=0, atol=1e-4)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in CASES for name in ("topp09", "topk") if f"gen_{name}__tokens" in arrays(case)],
)
def test_the_fork_samples_from_the_recorded_probabilities(case, name):
    numbers, config = arrays(case), source(case).config
    threshold, temperature, _ = numbers[f"gen_{name}__settings"]
    steps, expected = numbers[f"gen_{name}__steps"], numbers[f"gen_{name}__probs_at_steps"]
    logits = run_halves(case, numbers[f"gen_{name}__tokens"])[0][:, steps]
    rows = logits.shape[0] * len(steps)
    filtered = sampling.filter_logits(
        jnp.asarray(logits.reshape(rows, -1)),
        jnp.full(rows, config.top_k_of(threshold) if name == "topk" else 0, jnp.int32),
        jnp.full(rows, 1.0 if name == "topk" else threshold, jnp.float32),
        jnp.full(rows, temperature, jnp.float32),
        config.codebook_size,
        config.sampling_order,
    )
    found = np.asarray(jax.nn.softmax(filtered)).reshape(*logits.shape[:2], -1)
    np.testing.assert_allclose(found, expected[:, :, config.text_rows :], rtol=0, atol=1e-4)
    assert expected[:, :, : config.text_rows].max() == 0


@pytest.mark.parametrize("case", CASES)
def test_files_name_the_parameters_of_the_network(case):
    found = {name: array.shape for name, array in flatten(source(case).params).items()}
    assert found == parameter_shapes("dalle_pytorch", source(case).config)


@pytest.mark.parametrize("case", CASES)
def test_config_survives_json(case):
    config = source(case).config
    assert DallePytorchConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def block_layout(config: DallePytorchConfig, seed: int) -> tuple[str, ...]:
    blocks = config.sequence_length // 16
    layout = np.random.default_rng(seed).integers(0, 2, (blocks, blocks)) | np.eye(blocks, dtype=int)
    return tuple("".join(map(str, row)) for row in layout)


def is_visible(config: DallePytorchConfig, attn_type: str, query: int, key: int) -> bool:
    """README rule 7 and its section on sparse attention, one pair of positions at a time."""
    if key > query:
        return False
    if attn_type == "sparse":
        return config.sparse_layout[query // 16][key // 16] == "1"
    if attn_type == "full" or key <= config.text_seq_len:
        return True
    (row, column), (key_row, key_column) = (
        divmod(position - config.text_seq_len - 1, config.image_fmap_size) for position in (query, key)
    )
    if attn_type == "axial_row":
        return row == key_row
    if attn_type == "axial_col":
        return column == key_column
    offsets = range(-4, 1) if config.conv_like == "causal" else range(-2, 3)
    return key_row - row in offsets and key_column - column in offsets


@pytest.mark.parametrize("attn_type", ["full", "axial_row", "axial_col", "conv_like", "sparse"])
@pytest.mark.parametrize(
    ("text_seq_len", "side", "conv_like"), [(7, 7, "causal"), (15, 7, "centred"), (16, 4, "causal")]
)
def test_masks_follow_the_rules(attn_type, text_seq_len, side, conv_like):
    if attn_type == "sparse":
        text_seq_len = 16 * text_seq_len - side**2 % 16  # whole blocks
    config = dataclasses.replace(SMALL, text_seq_len=text_seq_len, image_fmap_size=side, conv_like=conv_like)
    if attn_type == "sparse":
        config = dataclasses.replace(config, attn_types=("sparse",), sparse_layout=block_layout(config, side))
    positions = range(config.sequence_length)
    expected = [[is_visible(config, attn_type, query, key) for key in positions] for query in positions]
    np.testing.assert_array_equal(make_mask(config, attn_type), expected)


MIXED = ("axial_col", "conv_like", "axial_row", "full")


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("options", "dtype", "tolerance"),
    first_of(
        [
            # halves and quarters of unequal size
            ({"dim": 6, "shift_tokens": True, "depth": 4, "attn_types": MIXED}, "float32", 1e-4),
            ({"dim": 7, "shift_tokens": True, "image_fmap_size": 1, "sandwich_norm": True}, "float32", 1e-4),
            (
                {"dim": 5, "shift_tokens": True, "image_fmap_size": 2, "text_seq_len": 1, "stable": True},
                "float32",
                1e-4,
            ),
            ({"rotary_emb": True, "reversible": True, "shift_tokens": True, "layer_scale": False}, "float32", 1e-4),
            (
                {"depth": 5, "shared_attn_ids": [1, 1, 2], "shared_ff_ids": [0], "share_input_output_emb": True},
                "float32",
                1e-4,
            ),
            ({"image_fmap_size": 6, "conv_like": "centred", "attn_types": ["conv_like"]}, "float32", 1e-4),
            (
                {
                    "text_seq_len": 12,
                    "image_fmap_size": 6,
                    "attn_types": ["sparse", "full"],
                    "sparse_layout": ["100", "110", "011"],
                },
                "float32",
                1e-4,
            ),
            ({"rotary_emb": True, "shift_tokens": True, "sandwich_norm": True}, "bfloat16", 0.1),
        ],
        count=4,
    ),
    ids=str,
)
def test_cached_steps_agree_for_other_options(options, dtype, tolerance):
    config = DallePytorchConfig.from_dict(dataclasses.asdict(SMALL) | options)
    model, random = DallePytorch(config, jnp.dtype(dtype)), np.random.default_rng(0)
    shapes = parameter_shapes("dalle_pytorch", config)
    params = loader.unflatten({name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()})
    text = random.integers(0, config.num_text_tokens, (2, config.text_seq_len), np.int32)
    image = random.integers(0, config.num_image_tokens, (2, config.image_length), np.int32)
    full = np.asarray(full_logits(model, params, text, image))
    cached = np.asarray(cached_logits(model, params, text, image))
    assert np.ptp(cached) > 1
    np.testing.assert_allclose(cached, image_part(config, full), rtol=0, atol=tolerance * np.ptp(cached))


def changed(monkeypatch, case: str, change) -> Path:
    """Path of a file like `case`'s, as it would read with `change(content)` applied."""
    path = GOLDEN / case / "dalle.pt"
    content = loader.read_torch(path)
    content = content | {name: dict(content[name]) for name in ("hparams", "weights")}
    change(content)
    monkeypatch.setattr(loader, "read_torch", lambda _: content)
    return path


@pytest.mark.parametrize(
    ("case", "version", "conv_like", "sampling_order"),
    [
        ("lucidrains", "1.6.6", "causal", "temperature_first"),
        ("lucidrains", "1.5.0", "causal", "temperature_first"),
        ("lucidrains", "1.4.2", "centred", "temperature_first"),
        ("lucidrains", None, "causal", "temperature_first"),  # the wrappers are those of 1.4.0 and later
        ("jack", None, "centred", "top_p_first"),
        ("jack", "1.1.6", "centred", "temperature_first"),
        ("jack", "1.10.0", "causal", "temperature_first"),
    ],
)
def test_versions_decide_the_window_and_the_order(monkeypatch, case, version, conv_like, sampling_order):
    is_fork = case == "jack"
    case = next(name for name in MIXED_CASES if (source(name).config.sampling_order == "top_p_first") == is_fork)
    path = changed(monkeypatch, case, lambda content: content.update(version=version))
    config = loader.read_generator(path).config
    assert (config.conv_like, config.sampling_order) == (conv_like, sampling_order)


def test_options_are_read_from_the_weights():
    names = ("shift_tokens", "rotary_emb", "sandwich_norm", "reversible")
    for case in CASES:
        hparams = loader.read_torch(GOLDEN / case / "dalle.pt")["hparams"]
        config = source(case).config
        assert {name: getattr(config, name) for name in names} == {name: hparams[name] for name in names}, case


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(weights=[1]), "weights is not a dict"),
        (lambda content: content.update(weights="To get a working standard checkpoint, ..."), "DeepSpeed has them"),
        (lambda content: content["hparams"].pop("depth"), "hparams: depth must be"),
        (lambda content: content["hparams"].update(text_seq_len=1 << 30), "transformer.pos_emb has"),
        (lambda content: content["hparams"].update(depth=1 << 30), "depth must be .*1073741824"),
        (lambda content: content["hparams"].update(heads="8"), "heads must be"),
        (lambda content: content["hparams"].update(attn_types=["full", "mlp"]), "gMLP layers are not supported"),
        (lambda content: content["hparams"].update(attn_types=["sparse"]), "needs a layout"),
        (
            lambda content: content["hparams"].update(num_text_tokens=1000),
            "weight has shape .* image_emb.weight",
        ),
        (lambda content: content["hparams"].update(shared_attn_ids=[0]), "share attention of different types"),
        (lambda content: content["weights"].pop("to_logits.1.weight"), "lacks the tensor to_logits.1.weight"),
        (lambda content: content["weights"].pop("transformer.pos_emb"), "lacks the tensor transformer.pos_emb"),
        (lambda content: content["weights"].update(x="y"), "'x' is not a tensor"),
    ],
)
def test_broken_files_are_one_line_errors(monkeypatch, change, message):
    case = next(name for name in MIXED_CASES if source(name).config.rotary_emb)
    path = changed(monkeypatch, case, change)
    with pytest.raises(UserError, match=message) as caught:
        loader.read_generator(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", MIXED_CASES)
def test_a_tensor_that_does_not_fit_is_named_as_the_file_does(monkeypatch, case):
    path = GOLDEN / case / "dalle.pt"
    weights = loader.read_torch(path)["weights"]
    roles = (loader.read_generator, loader.read_codec)
    expected = [parameter_shapes(found.kind, found.config) for found in (role(path) for role in roles)]

    def message(change) -> str:
        def check() -> None:
            for role, shapes in zip(roles, expected, strict=True):
                check_names_and_shapes(shapes, role(path))

        with monkeypatch.context() as patch:
            changed(patch, case, lambda content: change(content["weights"]))
            with pytest.raises(UserError) as caught:
                check()
        return str(caught.value)

    layer = next(name for name in weights if name.endswith("to_qkv.weight"))
    names = {layer, layer.replace("to_qkv", "to_out.0"), "to_logits.0.bias", "to_logits.1.bias", "image_emb.weight"}
    names |= {name for name in weights if name.startswith(("transformer.layers.layers.0.1.", "image_pos_emb"))}
    names |= {"vae.codebook.weight", "vae.encoder.0.0.weight"}
    for index, name in enumerate(sorted(names)):
        assert re.match(rf"{path} lacks {name}(,| and|;)", message(lambda content, name=name: content.pop(name)))
        array = weights[name]
        other = [array[..., None], np.repeat(array, 2, -1), array.reshape(-1)[:2]][index % 3]
        found = message(lambda content, new={name: other}: content.update(new))
        assert found.startswith(f"{path}: {name} has shape {other.shape}, its config asks for {array.shape}")
    for name in ("vae.decoder.9.weight", "transformer.layers.layers.0.1.fn.norm2.weight", "other"):
        found = message(lambda content, name=name: content.update({name: np.zeros((2, 3), np.float32)}))
        assert found.startswith(f"{path} has unexpected {name};")


def test_other_files_are_not_of_this_format(monkeypatch, tmp_path):
    for change in (lambda content: content.pop("vae_params"), lambda content: content.pop("weights")):
        path = changed(monkeypatch, CASES[0], change)
        assert loader.read_generator(path) is None and loader.read_codec(path) is None
    assert loader.read_generator(tmp_path) is None
    (tmp_path / "encoder.pt").write_bytes(b"")
    (tmp_path / "decoder.pt").write_bytes(b"")
    assert loader.read_generator(tmp_path) is None and loader.read_codec(tmp_path) is None


def test_tokenizer_beside_the_file_is_found(tmp_path):
    (tmp_path / "dalle.pt").write_bytes((GOLDEN / CASES[-1] / "dalle.pt").read_bytes())
    assert loader.read_generator(tmp_path).tokenizer is None
    (tmp_path / "chinese.model").touch()
    assert loader.read_generator(tmp_path / "dalle.pt").tokenizer == tmp_path / "chinese.model"


@pytest.mark.parametrize("case", [case for case in CASES if "decoded_nchw" in arrays(case)])
def test_own_vae_decodes_as_the_original_before_normalisation(case):
    """Rule 14: the original gives the decoder's output as it is; what was meant undoes the change of its input."""
    vae = loader.read_codec(GOLDEN / case)
    decoded = arrays(case)["decoded_nchw"].transpose(0, 2, 3, 1)
    tokens = arrays(case)["image_tokens"][: len(decoded)]
    found = DiscreteVAE(vae.config).apply({"params": vae.params}, tokens, method="decode_code")
    np.testing.assert_allclose(found, decoded * 0.5 + 0.5, rtol=0, atol=1e-4)
    assert vae.config.grid == source(case).config.image_fmap_size


def other_vae(content: dict, tensors: dict[str, tuple[int, ...]]) -> None:
    """Put another VAE in place of the one in `content`."""
    kept = {name: value for name, value in content["weights"].items() if not name.startswith("vae.")}
    content["weights"] = kept | {f"vae.{name}": np.zeros(shape, np.float32) for name, shape in tensors.items()}
    content["vae_params"] = None


def test_vqgan_inside_is_found_at_the_size_of_the_network(monkeypatch):
    tensors = {
        "model.quantize.embed.weight": (40, 6),
        "model.post_quant_conv.weight": (4, 6, 1, 1),
        "model.encoder.conv_in.weight": (32, 3, 3, 3),
        "model.decoder.conv_out.weight": (3, 32, 3, 3),
        "model.loss.logvar": (),
        **{f"model.decoder.up.{i}.block.0.conv1.weight": (32 << i, 32 << i, 3, 3) for i in range(4)},
        "model.decoder.up.3.attn.0.q.weight": (256, 256, 1, 1),
    }
    case = CASES[0]
    grid = source(case).config.image_fmap_size
    path = changed(monkeypatch, case, lambda content: other_vae(content, tensors))
    vae = loader.read_codec(path)
    assert vae.kind == "vqgan" and "loss" not in vae.params
    assert (vae.config.is_gumbel, vae.config.is_signed, vae.config.codebook_size) == (True, True, 40)
    assert (vae.config.resolution, vae.config.grid, vae.config.attn_resolutions) == (8 * grid, grid, (grid,))


def test_openai_vae_inside_is_found_at_the_size_of_the_network(monkeypatch):
    tensors = {
        "dec.blocks.input.w": (8, 40, 1, 1),
        "dec.blocks.group_1.block_1.res_path.conv_1.w": (8, 8, 1, 1),
        "dec.blocks.output.conv.w": (6, 16, 1, 1),
        "enc.blocks.input.w": (16, 3, 7, 7),
    }
    path = changed(monkeypatch, CASES[-1], lambda content: other_vae(content, tensors))
    vae = loader.read_codec(path)
    assert vae.kind == "openai_vae" and vae.params["encoder"]["input"]["kernel"].shape == (7, 7, 3, 16)
    assert (vae.config.grid, vae.config.codebook_size) == (source(CASES[-1]).config.image_fmap_size, 40)


def test_file_without_vae_has_no_codec(monkeypatch):
    path = changed(monkeypatch, CASES[0], lambda content: other_vae(content, {}))
    assert loader.read_codec(path) is None


def test_filter_thres_is_a_share_of_all_tokens():
    config = dataclasses.replace(SMALL, num_text_tokens=80, num_image_tokens=15)
    assert config.text_rows + config.num_image_tokens == 100
    assert [config.top_k_of(thres) for thres in (0.9, 0.5, 0.995, 0.0)] == [9, 50, 1, 100]


def test_shared_ids_are_texts_in_files_of_the_trainer(monkeypatch):
    """It splits what its command line has, "1,0,1", at the commas."""
    path = changed(monkeypatch, CASES[-1], lambda content: content["hparams"].update(shared_ff_ids=("1", "0", "1")))
    config = loader.read_generator(path).config
    assert dataclasses.replace(config, depth=4).ff_sources == (0, 1, 0, 0)
    assert DallePytorchConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(UserError, match="shared_ff_ids must be a list of ids"):
        dataclasses.replace(SMALL, shared_ff_ids=(0.5,))


@pytest.mark.e2e
def test_padding_is_read_by_position():
    """A zero is the padding id of its place."""
    model = DallePytorch(SMALL)
    text, image = jnp.zeros((1, 5), jnp.int32), jnp.zeros((1, 9), jnp.int32)
    params = model.init(jax.random.key(0), text, image)["params"]
    padding = SMALL.num_text_tokens + jnp.arange(5)[None]
    np.testing.assert_allclose(full_logits(model, params, text, image), full_logits(model, params, padding, image))
    assert np.abs(full_logits(model, params, text, image) - full_logits(model, params, text + 1, image)).max() > 1e-3
