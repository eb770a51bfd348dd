"""The diffusion decoder against the original's numbers: network, schedules, steps, trajectories and images.

B: batch   H, W: pixels   S: steps
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_kit import nhwc
from diffusion_kit import TINY, parameters, tiny_decoder, torch_state, two_storages
from helpers import golden_dirs
from torch_files import save, tensor

from dm_generations.errors import UserError
from dm_generations.models.clip.network import CLIP
from dm_generations.models.clip.preprocessing import OPENAI_MEAN, OPENAI_STD
from dm_generations.models.diffusion_decoder import samplers
from dm_generations.models.diffusion_decoder.checkpoint import preset_config
from dm_generations.models.diffusion_decoder.guidance import (
    GuidanceScales,
    cut_out,
    draw_cutouts,
    guidance_loss,
)
from dm_generations.models.diffusion_decoder.network import Condition, PreparedUNet, sinusoid
from dm_generations.models.diffusion_decoder.samplers import DDIM, DDPM, Prediction, Schedule, Steps
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.registry import parameter_shapes
from dm_generations.pipelines.convert import convert

FOLDERS = golden_dirs("diffusion")
CASES = [path.parent for folder in FOLDERS for path in sorted(folder.glob("*/golden.npz"))]
MODELS = [folder for folder in CASES if (folder / "model-latest.pt").exists()]
HAVE_LAYERS = [folder for folder in CASES if (folder / "weights.npz").exists()]
HAVE_IMAGES = [folder for folder in CASES if "ddim10_pred_xstart" in np.load(folder / "golden.npz")]
RUNS = ("ddim10", "ddpm25")
in_cases = pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
in_models = pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)


@functools.cache
def arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "golden.npz") as found:
        return dict(found)


@functools.cache
def network_of(folder: Path, dtype: str = "float32"):
    """The network of a case as a function of x (B, H, W, 3), times (B,) and rows of tokens; compiled for one image."""
    config, params, unet = prepared(folder, dtype)
    compiled = jax.jit(unet)

    def network(x, times, tokens):
        vectors = vectors_of(folder, tokens)
        rows = [compiled(params, x[i : i + 1], times[i : i + 1], vectors[i : i + 1]) for i in range(len(x))]
        return jnp.concatenate(rows)

    return config, network


def prepared(folder: Path, dtype: str = "float32"):
    checkpoint = load_checkpoint(folder / "model-latest.pt", "decoder")
    unet = PreparedUNet(checkpoint.config, np.dtype(dtype), "cpu")
    return checkpoint.config, unet.prepare_params(checkpoint.params), unet


def vectors_of(folder: Path, tokens: np.ndarray) -> np.ndarray:
    side = round(tokens.shape[1] ** 0.5)
    return arrays(folder)["codebook"][tokens].reshape(len(tokens), side, side, -1)


def images(name: str, folder: Path) -> np.ndarray:
    """An array of images that are stored as value * 32."""
    return nhwc(arrays(folder)[f"{name}_int8"].astype(np.float32) / 32)


def steps_of(run: str, config=None) -> Steps:
    return Steps.parse(run.removeprefix("ddpm"), None, 1000 if config is None else config.diffusion_steps)


def step_noise(run: str, folder: Path, number: int, like: np.ndarray) -> np.ndarray:
    found = arrays(folder).get(f"{run}_noise_int8")
    return np.zeros_like(like) if found is None else nhwc(found[number].astype(np.float32) / 32)


def trajectory(run: str, folder: Path, clips: bool = False, dtype: str = "float32"):
    """All x and x0 of a run."""
    config, network = network_of(folder, dtype)
    x = last = images(f"{run}_xT", folder)
    tokens = arrays(folder)["tokens"][: len(x)]
    steps, xs, x0s = steps_of(run, config), [], []
    for number, row in enumerate(steps.rows(config)):
        noise = step_noise(run, folder, number, x)
        predict = functools.partial(network, tokens=tokens)
        x, last = samplers.denoise(predict, steps.sampler, row, x, last, noise, clips)
        xs.append(np.asarray(x))
        x0s.append(np.asarray(last))
    return xs, x0s


def assert_like(found, expected, atol: float) -> None:
    """Within `atol`; of values that a run lets grow, within 1e-4 of the largest."""
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol if largest < 20 else 1e-4 * largest)


def assert_same_bytes(found, expected, most: int = 1, share: float = 0.01) -> None:
    difference = np.abs(np.asarray(found, int) - expected)
    assert difference.max() <= most and (most > 1 or (difference > 0).mean() <= share)


# Schedules and samplers, without a network.


@pytest.mark.parametrize("file", [folder / "respacing.json" for folder in FOLDERS], ids=lambda file: file.parts[-4])
def test_steps_are_those_of_the_original(file):
    for text, expected in json.loads(file.read_text()).items():
        if isinstance(expected, list) and len(expected) > 1:
            assert list(Steps.parse(text, None, 1000).timesteps) == expected, text
        else:
            with pytest.raises(UserError):
                Steps.parse(text, None, 1000)


@in_cases
@pytest.mark.parametrize("run", RUNS)
def test_schedules(folder, run):
    found = arrays(folder)
    values = json.loads((folder / "config.json").read_text())["model_and_diffusion"]
    config = dataclasses.replace(TINY, noise_schedule=values["noise_schedule"])
    np.testing.assert_allclose(
        samplers.make_betas(config.noise_schedule, values["diffusion_steps"]), found["sched_full_betas"], rtol=1e-12
    )
    schedule = Schedule.of(config, list(steps_of(run).timesteps))
    np.testing.assert_array_equal(schedule.timesteps, found[f"sched_{run}_timesteps"])
    for name in ("betas", "alphas_cumprod", "posterior_log_variance_clipped"):
        np.testing.assert_allclose(getattr(schedule, name), found[f"sched_{run}_{name}"], rtol=1e-9, atol=1e-12)
    for name in ("posterior_mean_coef1", "posterior_mean_coef2"):
        np.testing.assert_allclose(getattr(schedule, name), found[f"sched_{run}_{name}"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("folder", HAVE_IMAGES, ids=lambda folder: folder.name)
def test_steps_from_recorded_images(folder):
    """Each recorded x follows from the x before and the image predicted from it; no network is needed."""
    found = arrays(folder)
    values = json.loads((folder / "config.json").read_text())["model_and_diffusion"]
    steps = steps_of("ddim10")
    rows = steps.rows(dataclasses.replace(TINY, noise_schedule=values["noise_schedule"]))
    samples = dict(zip(found["ddim10_sample_steps"].tolist(), map(nhwc, found["ddim10_sample"]), strict=True))
    samples[-1] = images("ddim10_xT", folder)
    predicted = dict(
        zip(found["ddim10_pred_xstart_steps"].tolist(), map(nhwc, found["ddim10_pred_xstart"]), strict=True)
    )
    checked = 0
    for number, x0 in predicted.items():
        if number in samples and number - 1 in samples:
            x, row = samples[number - 1], rows[number]
            x_next, _ = steps.sampler.step(row, Prediction(x, x0, x0, 0.0, np.zeros_like(x)))
            assert_like(x_next, samples[number], 2e-4)
            checked += 1
    assert checked
    if len(rows) - 1 in predicted:
        assert_same_bytes(samplers.to_uint8(predicted[len(rows) - 1]), found["ddim10_uint8"])


def test_a_faster_solver_comes_closer_to_the_exact_image():
    """The noise of images of one normal distribution is known, and with it where each noise ends."""
    spread = 0.5
    schedule = Schedule.of(TINY, list(range(1000)))
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 3)).astype(np.float32)
    exact = spread * x / np.sqrt(1 - schedule.alphas_cumprod[-1] * (1 - spread**2))

    def error(text: str) -> float:
        steps = Steps.parse(text, None, 1000)
        found = last = x
        for row in steps.rows(TINY):
            share = 1 - row["deviation"] ** 2

            def network(x, times, row=row, share=share):
                return row["deviation"] * x / (share * spread**2 + row["deviation"] ** 2)

            found, last = samplers.denoise(network, steps.sampler, row, found, last, np.zeros_like(x))
        return float(np.abs(last - exact).max())

    assert error("dpm25") < error("ddim25") / 4
    assert error("dpm50") < error("dpm10") / 5
    assert error("dpm250") < 0.01


def test_eta_one_has_the_noise_of_ancestral_sampling():
    """With noise of eta 1, DDIM draws from the distribution of DDPM with its smallest variance."""
    schedule = Schedule.of(TINY, list(range(0, 1000, 40)))
    sigma = DDIM(1.0).tables(schedule, True)["sigma"]
    np.testing.assert_allclose(2 * np.log(sigma[1:]), schedule.posterior_log_variance_clipped[1:], rtol=1e-9)
    random = np.random.default_rng(0)
    x, x0, noise = random.standard_normal((3, 1, 4, 4, 3)).astype(np.float32)
    ddim, ddpm = Steps.parse("ddim25", 1.0, 1000), Steps.parse("ddim25", None, 1000)
    ddpm = dataclasses.replace(ddpm, sampler=DDPM())
    for row, other in zip(ddim.rows(TINY)[:-1], ddpm.rows(TINY)[:-1], strict=True):
        found = [
            steps.sampler.step(each, Prediction(x, x0, x0, -1.0, noise))[0]
            for steps, each in ((ddim, row), (ddpm, other))
        ]
        np.testing.assert_allclose(*found, atol=2e-5)


@pytest.mark.parametrize(
    "text", ["x", "25.5", "ddim", "dpm1", "dpm1001", "ddim0", "plms50", "1001", "500,501", "ddim10,10"]
)
def test_steps_that_cannot_be_taken(text):
    with pytest.raises(UserError):
        Steps.parse(text, None, 1000)


def test_eta_is_for_ddim():
    with pytest.raises(UserError, match="eta"):
        Steps.parse("25", 0.5, 1000)


def test_noise_is_normal_and_belongs_to_its_key():
    keys = samplers.noise_keys(np.array([[1, 2], [3, 4], [1, 2]]), np.array([0, 0, 1]), seed=7)
    draw_noise = jax.jit(samplers.normal, static_argnums=2)
    noise = np.asarray(draw_noise(keys, 0, (64, 64, 3)))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02 and 3.5 < np.abs(noise).max() < 6.8
    alone = np.asarray(draw_noise(keys[1:2], 0, (64, 64, 3)))
    np.testing.assert_array_equal(alone[0], noise[1])
    other_seed = samplers.noise_keys(np.array([[1, 2]]), np.zeros(1), seed=8)
    draws = ((keys, 1), (other_seed, 0))
    others = [noise[1], noise[2], *(draw_noise(some, draw, (64, 64, 3))[0] for some, draw in draws)]
    for other in map(np.asarray, others):
        assert abs(np.corrcoef(noise[0].ravel(), other.ravel())[0, 1]) < 0.05


# The network.


@in_cases
def test_times(folder):
    found = arrays(folder)
    expected = found["unet_t_sinusoid"]
    np.testing.assert_allclose(sinusoid(found["unet_t"], expected.shape[1]), expected, atol=2e-4)


@pytest.mark.parametrize("folder", HAVE_LAYERS, ids=lambda folder: folder.name)
def test_what_enters_the_network(folder):
    """The time embedding and the condition, each in the original's layout of weights."""
    found = arrays(folder)
    weights = dict(np.load(folder / "weights.npz"))
    first, second = (weights[f"time_embed.{number}.weight"] for number in (0, 2))
    hidden = found["unet_t_sinusoid"] @ first.T + weights["time_embed.0.bias"]
    time = np.asarray(jax.nn.silu(hidden)) @ second.T + weights["time_embed.2.bias"]
    np.testing.assert_allclose(time, found["mid_time_emb"], atol=2e-4)
    kernel = weights["external_block.op.weight"].transpose(2, 3, 1, 0)
    params = {"op": {"kernel": kernel, "bias": weights["external_block.op.bias"]}}
    condition = Condition(kernel.shape[-1], jnp.float32).apply({"params": params}, vectors_of(folder, found["tokens"]))
    np.testing.assert_allclose(condition, nhwc(found["mid_external"]), atol=2e-4)


@pytest.mark.e2e
@in_models
def test_network(folder):
    found = arrays(folder)
    _, network = network_of(folder)
    out = network(images("unet_x", folder), found["unet_t"], found["tokens"])
    np.testing.assert_allclose(out, nhwc(found["unet_out"]), atol=2e-4)


@pytest.mark.e2e
@in_models
def test_network_in_float16(folder):
    found = arrays(folder)
    expected = nhwc(found["unet_out_fp16"])
    _, network = network_of(folder, "float16")
    count = len(expected)
    out = network(images("unet_x", folder)[:count], found["unet_t"][:count], found["tokens"][:count])
    np.testing.assert_allclose(out, expected, atol=5e-3)
    _, x0s = trajectory("ddim10", folder, dtype="float16")
    np.testing.assert_allclose(x0s[-1], nhwc(found["ddim10_fp16_final"]), atol=2e-2)
    assert_same_bytes(samplers.to_uint8(x0s[-1]), found["ddim10_fp16_uint8"], most=3)


@pytest.mark.e2e
@in_models
@pytest.mark.parametrize("run", RUNS)
def test_trajectories(folder, run):
    found = arrays(folder)
    xs, x0s = trajectory(run, folder)
    for place, number in enumerate(found[f"{run}_sample_steps"]):
        assert_like(xs[number], nhwc(found[f"{run}_sample"][place]), 2e-4)
    for place, number in enumerate(found[f"{run}_pred_xstart_steps"]):
        assert_like(x0s[number], nhwc(found[f"{run}_pred_xstart"][place]), 2e-3)
    np.testing.assert_array_equal(xs[-1], x0s[-1])
    assert_same_bytes(samplers.to_uint8(x0s[-1]), found[f"{run}_uint8"])


@pytest.mark.e2e
@in_models
@pytest.mark.parametrize("run", RUNS)
def test_clipped_trajectories(folder, run):
    found = arrays(folder)
    _, x0s = trajectory(run, folder, clips=True)
    np.testing.assert_allclose(x0s[-1], nhwc(found[f"{run}_clipped_final"]), atol=2e-4)
    assert_same_bytes(samplers.to_uint8(x0s[-1]), found[f"{run}_clipped_uint8"])


@pytest.mark.e2e
@in_models
def test_single_steps(folder):
    """From each recorded x to the next, so that no error of an earlier step counts."""
    found = arrays(folder)
    config, network = network_of(folder)
    for run in RUNS:
        numbers = found[f"{run}_sample_steps"].tolist()
        recorded = dict(zip(numbers, map(nhwc, found[f"{run}_sample"]), strict=True))
        steps = steps_of(run, config)
        for number, row in enumerate(steps.rows(config)):
            if number - 1 not in recorded or number not in recorded:
                continue
            x = recorded[number - 1]
            predict = functools.partial(network, tokens=found["tokens"][: len(x)])
            noise = step_noise(run, folder, number, x)
            assert_like(samplers.denoise(predict, steps.sampler, row, x, x, noise)[0], recorded[number], 2e-4)


@pytest.mark.e2e
@in_models
def test_the_distribution_of_a_step(folder):
    found = arrays(folder)
    config, network = network_of(folder)
    steps = steps_of("ddpm25", config)
    number = len(steps.timesteps) - 1 - int(found["pmv_t"])
    (place,) = np.flatnonzero(found["ddpm25_sample_steps"] == number - 1)
    x, row = nhwc(found["ddpm25_sample"][place]), steps.rows(config)[number]
    x0, variance = samplers.predict(functools.partial(network, tokens=found["tokens"][: len(x)]), row, x)
    mean, log_variance = steps.sampler.distribution(row, Prediction(x, x0, x0, variance, np.zeros_like(x)))
    assert_like(mean, nhwc(found["pmv_mean"]), 2e-4)
    assert_like(log_variance, nhwc(found["pmv_log_variance"]), 2e-4)


@pytest.mark.e2e
def test_winograds_convolutions_are_the_same(tmp_path):
    """Of a network that is wide enough for them, and of one as accelerators compute it."""
    config = dataclasses.replace(TINY, num_channels=64, level_channels=(64, 64), emb_output_dims=64, image_size=8)
    checkpoint = load_checkpoint(tiny_decoder(tmp_path, config), "decoder")
    random = np.random.default_rng(0)
    x, vectors = random.standard_normal((2, 8, 8, 3)), random.standard_normal((2, 8, 8, 4))
    found = []
    for platform in ("cpu", "gpu"):
        unet = PreparedUNet(config, np.dtype("float32"), platform)
        params = unet.prepare_params(checkpoint.params)
        found.append(jax.jit(unet)(params, jnp.float32(x), jnp.float32([3, 700]), jnp.float32(vectors)))
    np.testing.assert_allclose(*found, atol=1e-4)


# Files.


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("trainer", "changes"),
    [
        (two_storages, {"learn_sigma": False, "use_scale_shift_norm": False, "attention_levels": ()}),
        (parameters, {"attention_levels": (0,), "level_channels": (64, 96), "num_res_blocks": 2, "num_channels": 64}),
    ],
)
def test_sizes_follow_from_names_and_shapes(trainer, changes, tmp_path):
    config = dataclasses.replace(TINY, **changes, noise_schedule="cosine", use_new_attention_order=True)
    file = tiny_decoder(tmp_path, config)
    save(file, trainer(torch_state(config)))
    found = load_checkpoint(file, "decoder")
    assert found.config == config
    kernel = found.params["input_blocks_1_0"]["in_layers_2"]["kernel"]
    np.testing.assert_array_equal(
        kernel.transpose(3, 2, 0, 1), torch_state(config)["input_blocks.1.0.in_layers.2.weight"]
    )
    convert(str(file), tmp_path / "converted")
    again = load_checkpoint(tmp_path / "converted", "decoder")
    assert (again.config, again.sha256) == (config, found.sha256)


@pytest.mark.e2e
def test_presets_have_the_parameters_of_the_real_files():
    # Of 2.36 GB, 1.83 GB and 1.30 GB of float32.
    counts = {256: 590_179_334, 128: 457_870_854, 64: 324_702_662}
    for size, count in counts.items():
        config = preset_config(size)
        shapes = parameter_shapes("diffusion_decoder", config)
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == count
        assert config.image_size == size == config.image_side(16)


def write(folder: Path, change, values: dict | None = None) -> Path:
    """A file whose tensors `change` has changed, and values of its JSON; None is one without a JSON."""
    file = tiny_decoder(folder)
    state = torch_state(TINY)
    change(state)
    save(file, {name: tensor(array) for name, array in state.items()})
    if values is None:
        (folder / "config.json").unlink()
    else:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | values))
    return file


def drop_condition(state) -> None:
    del state["external_block.op.weight"], state["external_block.op.bias"]


def widen_input(state) -> None:
    state["input_blocks.0.0.weight"] = np.repeat(state["input_blocks.0.0.weight"], 2, axis=1)


def cut(state) -> None:
    for name in [name for name in state if name.startswith("output_blocks.3")]:
        del state[name]


@pytest.mark.parametrize(
    ("change", "values", "text"),
    [
        (drop_condition, {}, "reads no tokens"),
        (widen_input, {}, "super-resolution"),
        (cut, {}, "output_blocks"),
        (lambda state: None, None, "noise_schedule"),
        (lambda state: None, {"noise_schedule": "quadratic"}, "noise_schedule"),
        (lambda state: None, {"num_head_channels": 24}, "num_head_channels"),
        (lambda state: None, {"num_channels": 64}, "num_channels"),
        (lambda state: None, {"predict_xstart": True}, "predict_xstart"),
        (lambda state: state.pop("out.0.bias"), {}, "out.0.bias"),
        (lambda state: state.update({"middle_block.0.in_layers.0.bias": np.ones(32)}), {}, "middle_block"),
    ],
)
def test_files_that_are_no_such_decoder(change, values, text, tmp_path):
    with pytest.raises(UserError, match=text) as error:
        load_checkpoint(write(tmp_path, change, values), "decoder")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_an_optimiser_is_named_as_one(tmp_path):
    file = save(tmp_path / "opt.pt", {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]})
    with pytest.raises(UserError, match="optimiser"):
        load_checkpoint(file, "decoder")


def test_a_codec_is_named_as_one(models):
    with pytest.raises(UserError, match="a codec, not a decoder"):
        load_checkpoint(models.vqgan, "decoder")


# Guidance.


GUIDED = [folder for folder in MODELS if (folder / "guided.npz").exists()]


def features_of(folder: Path):
    """The image tower of the case's CLIP, on images in [0, 1], and the size that it reads."""
    checkpoint = load_checkpoint(folder / "clip", "clip")
    network = CLIP(checkpoint.config)
    params = jax.tree.map(jnp.asarray, checkpoint.params)

    def features(pixels):
        normalised = (pixels - jnp.array(OPENAI_MEAN)) / jnp.array(OPENAI_STD)
        return network.apply({"params": params}, normalised, method="get_image_features")

    return features, checkpoint.config.vision_config.image_size


@functools.cache
def guided_network(folder: Path):
    """x0, the variance and the gradient of a case's network and CLIP, compiled for both of its runs."""
    with np.load(folder / "guided.npz") as found:
        found = dict(found)
    features, cut_size = features_of(folder)
    _, params, unet = prepared(folder)
    scales = GuidanceScales(*(float(found[name]) for name in ("clip_guidance_scale", "tv_scale", "range_scale")))

    @jax.jit
    def predict(row, x, cutouts, vectors):
        targets, weights = (jnp.stack([found[name]] * len(x)) for name in ("target_embeds", "weights"))
        loss = guidance_loss(features, cut_size, cutouts, targets, weights, scales)
        return samplers.guide(functools.partial(unet, params, vectors=vectors), row, x, loss)

    return found, predict


@pytest.mark.e2e
@pytest.mark.parametrize("folder", GUIDED, ids=lambda folder: folder.name)
@pytest.mark.parametrize("run", ["ddpm3", "ddim4"])
def test_guidance(folder, run):
    found, predict = guided_network(folder)
    config = load_checkpoint(folder / "model-latest.pt", "decoder").config
    x = last = nhwc(found[f"{run}_xT_int8"].astype(np.float32) / 32)
    vectors = vectors_of(folder, arrays(folder)["tokens"][: len(x)])
    steps = steps_of(run, config)
    names = {"time", "recip", "recipm1", "deviation"}  # the same for all samplers

    def check(array, expected):
        np.testing.assert_allclose(array, nhwc(expected), rtol=0, atol=1e-3 * np.abs(expected).max())

    for number, row in enumerate(steps.rows(config)):
        noise = np.zeros_like(x)
        if f"{run}_noise_int8" in found:
            noise = nhwc(found[f"{run}_noise_int8"][number].astype(np.float32) / 32)
        cutouts = np.stack([found[f"{run}_cutouts_size_x_y"][number]] * len(x))
        x0, variance, gradient = predict({name: row[name] for name in names}, x, cutouts, vectors)
        check(gradient, found[f"{run}_gradient"][number])
        x, last = steps.sampler.step(row, Prediction(x, x0, last, variance, noise, gradient))
        check(x, found[f"{run}_sample"][number])
    check(last, found[f"{run}_pred_xstart_final"])
    assert_same_bytes(samplers.to_uint8(last)[0], found[f"{run}_uint8"])


def test_cutouts_are_inside_and_averaged():
    keys = np.array([[1, 2], [3, 4]], np.uint32)
    draw = jax.jit(draw_cutouts, static_argnums=(2, 3, 4))
    cutouts = np.asarray(draw(keys, 3, 50, 32, 16))
    np.testing.assert_array_equal(cutouts[1:], draw(keys[1:], 3, 50, 32, 16))
    sides, lefts, tops = np.moveaxis(cutouts, -1, 0)
    assert sides.min() >= 16 and len(set(sides.ravel())) > 8
    assert min(lefts.min(), tops.min()) == 0 and max((lefts + sides).max(), (tops + sides).max()) <= 32
    images = np.random.default_rng(0).random((1, 32, 32, 3), np.float32)
    cut = cut_out(images, np.array([[[32, 0, 0], [16, 5, 9], [20, 1, 2]]]), 16)[0]
    np.testing.assert_allclose(cut[0], images[0].reshape(16, 2, 16, 2, 3).mean((1, 3)), atol=1e-6)
    np.testing.assert_allclose(cut[1], images[0, 9:25, 5:21], atol=1e-6)
    np.testing.assert_allclose(cut[2, 0, 0], images[0, 2:4, 1:3].mean((0, 1)), atol=1e-6)
