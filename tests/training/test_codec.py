"""`train --train-codec`: its losses and their gradients, runs that are stopped, and what it writes is a codec."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_kit import saved
from decode_kit import read_images
from PIL import Image
from tiny import IMAGE_SIZE, tiny_vqgan
from training_kit import read_log, write_archive

from dm_generations.archive import Archive
from dm_generations.cli import main
from dm_generations.errors import UserError
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.vqgan.network import VQGAN
from dm_generations.training.codec import CodecTrainer, codebook_loss
from dm_generations.training.options import TrainOptions
from dm_generations.training.pairs import Pairs
from dm_generations.training.perceptual import perceptual_distance, read_perceptual
from dm_generations.weights import native
from dm_generations.weights.native import flatten, read_params, read_safetensors

COUNT, BATCH = 12, 2
LARGE = 32  # pixels a side, which a discriminator sees a patch of
STAGES = {0: (0, 2), 1: (5, 7), 2: (10, 12, 14), 3: (17, 19, 21), 4: (24, 26, 28)}  # of VGG16, from torchvision


def write_images(folder, size):
    """Smooth ones, so that there is something to learn."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = rng.integers(256, size=(3, 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"image {number}")
    return folder


def perceptual_state(seed=0):
    """A VGG16 of a few channels with the heads of LPIPS, by the names of their files."""
    rng = np.random.default_rng(seed)
    vgg, heads, width = {"classifier.0.weight": np.zeros((1, 1), np.float32)}, {}, 3
    for number, places in STAGES.items():
        for place in places:
            new = 3 + number
            vgg[f"features.{place}.weight"] = rng.normal(size=(new, width, 3, 3)).astype(np.float32) / 3
            vgg[f"features.{place}.bias"] = rng.normal(size=new).astype(np.float32) / 3
            width = new
        heads[f"lin{number}.model.1.weight"] = rng.random((1, width, 1, 1)).astype(np.float32)
    return vgg, heads


@pytest.fixture(scope="module")
def perceptual_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perceptual")
    vgg, heads = perceptual_state()
    return saved(folder / "vgg16.pth", vgg), saved(folder / "vgg.pth", heads)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), IMAGE_SIZE)


@pytest.fixture(scope="module")
def train(models, images):
    def train(run, *flags, source=images, codec=models.vqgan, status=0):
        words = ["train", source, "--train-codec", "--run", run, "--codec", codec, "--log-every", 1]
        words += ["--steps", 30, "--batch-size", 4, "--held-out", 0.3, "--learning-rate", 0.01, "--warmup", 0]
        assert main([str(word) for word in (*words, *flags)]) == status
        return run

    return train


@pytest.fixture(scope="module")
def tuned(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("train") / "tuned")


@pytest.fixture(scope="module")
def large_codec(tmp_path_factory):
    return tiny_vqgan(tmp_path_factory.mktemp("large") / "codec", resolution=LARGE)


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)])
def has_perceptual(request):
    return request.param


@pytest.fixture(scope="module")
def train_large(train, large_codec, has_perceptual, perceptual_files, tmp_path_factory):
    """With the adversarial loss."""
    source = write_images(tmp_path_factory.mktemp("large") / "images", LARGE)

    def train_large(run):
        flags = ["--adversarial-from", 1, "--steps", 3, "--batch-size", BATCH, "--held-out", 0]
        flags += ["--perceptual", *perceptual_files] if has_perceptual else []
        flags += ["--save-every", 1, "--keep", 3, "--clip-norm", 0, "--learning-rate", 1e-5]
        return train(run, *flags, source=source, codec=large_codec)

    return train_large


@pytest.fixture(scope="module")
def whole(train_large, tmp_path_factory):
    return train_large(tmp_path_factory.mktemp("train") / "whole")


# The losses in float64, from the papers.


def convolve(x, kernel, stride=1):
    """A convolution of (B, H, W, C) by (height, width, C, D) over a border of zeros of 1 pixel."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], (1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijcd->bhwd", windows, np.float64(kernel), optimize=True)


def look(state, image):
    """The features of an image (H, W, 3) in [-1, 1], of length 1 at each place."""
    x, found = ((image - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450])[None], []
    for number, places in STAGES.items():
        if number:
            side = x.shape[1] // 2
            x = x[:, : 2 * side, : 2 * side].reshape(1, side, 2, side, 2, -1).max((2, 4))
        for place in places:
            kernel = state[f"features.{place}.weight"].transpose(2, 3, 1, 0)
            x = np.maximum(convolve(x, kernel) + state[f"features.{place}.bias"], 0)
        lengths = np.sqrt((x**2).sum(-1, keepdims=True))
        found.append(x / (lengths + 1e-10))
    return found


def lpips(state, images, others):
    distances = []
    for pair in zip(images, others, strict=True):
        stages = zip(*(look(state, image) for image in pair), strict=True)
        heads = [state[f"lin{number}.model.1.weight"].reshape(-1) for number in STAGES]
        distances.append(sum((((a - b) ** 2) @ head).mean() for (a, b), head in zip(stages, heads, strict=True)))
    return np.array(distances)


def judge(params, images):
    """Logits of the discriminator: 4x4 convolutions, three of stride 2, with batch norms between the first and last."""
    x = images
    for number, stride in enumerate((2, 2, 2, 1)):
        x = convolve(x, params[f"conv_{number}/kernel"], stride) + params.get(f"conv_{number}/bias", 0)
        if number:
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
            norm = f"norm_{number}"
            x = (x - mean) / np.sqrt(variance + 1e-5) * params[f"{norm}/scale"] + params[f"{norm}/bias"]
        x = np.where(x > 0, x, 0.2 * x)
    return convolve(x, params["conv_out/kernel"]) + params["conv_out/bias"]


def hinge(params, images, output):
    real, fake = judge(params, images), judge(params, output)
    return (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()) / 2


def gradient(function, array):
    """By differences."""
    found, before = np.zeros(array.size), function(array)
    for number in range(array.size):
        moved = array.copy()
        moved.flat[number] += 1e-6
        found[number] = (function(moved) - before) / 1e-6
    return found.reshape(array.shape)


@dataclasses.dataclass
class Step:
    """What a step of training had before it, and what it was told."""

    images: np.ndarray  # (B, S, S, 3), -1 is black and 1 is white
    vectors: np.ndarray  # (B, h, w, D), before and after quantisation
    rows: np.ndarray
    hidden: np.ndarray  # what the decoder's last layer reads
    kernel: np.ndarray
    bias: np.ndarray
    discriminator: dict

    def output(self, kernel):
        return 2 * (convolve(self.hidden, kernel) + self.bias) - 1


def read_state(run, step):
    return read_safetensors(run / "checkpoints" / f"{step:08}" / "state.safetensors")


def read_step(run, codec, number) -> Step:
    """Step `number`, from the checkpoint before it."""
    options = TrainOptions(
        archives=(), run=run, train_codec=True, adversarial_from=1, steps=3, warmup=0, batch_size=BATCH, held_out=0
    )
    trainer = CodecTrainer(codec, options)
    trainer.use(Pairs(run / "pairs", codec.config.grid**2, LARGE))
    pixels = np.asarray(trainer.make_batch(number)["pixels"])[0]
    checkpoint = run / "checkpoints" / f"{number:08}"
    params, model = read_params(checkpoint), VQGAN(codec.config)

    @jax.jit
    def look_inside(params, pixels):
        vectors = model.apply({"params": params}, pixels, method="encode_continuous")
        rows, _ = model.apply({"params": params}, pixels, method="encode")
        _, inside = model.apply(
            {"params": params},
            rows,
            method="decode",
            capture_intermediates=lambda module, name: module.name == "norm_out",
            mutable=["intermediates"],
        )
        return vectors, rows, inside["intermediates"]["decoder"]["norm_out"]["__call__"][0]

    vectors, rows, normed = (np.float64(each) for each in look_inside(params, pixels.astype(np.float32) / 255))
    last = params["decoder"]["conv_out"]
    state = read_state(run, number)
    discriminator = {
        name.removeprefix("discriminator/"): np.float64(each)
        for name, each in state.items()
        if name.startswith("discriminator/")
    }
    hidden = normed / (1 + np.exp(-normed))
    kernel, bias = np.float64(last["kernel"]), np.float64(last["bias"])
    return Step(pixels / 127.5 - 1, vectors, rows, hidden, kernel, bias, discriminator)


def adam_gradient(run, name, number, decay):
    """The gradient that a step had, from Adam's averages before and after it."""
    before, after = (
        next(np.float64(each) for key, each in read_state(run, step).items() if key.endswith(f"mu/{name}"))
        for step in (number, number + 1)
    )
    return (after - decay * before) / (1 - decay)


@pytest.mark.e2e
def test_losses_and_gradients_are_those_of_a_computation_in_float64(whole, large_codec, has_perceptual):
    number = 2
    step, line = read_step(whole, load_checkpoint(large_codec, "codec"), number), read_log(whole)[number]
    vgg, heads = perceptual_state()

    def parts_of(kernel):
        output = step.output(kernel)
        parts = {"l1": np.abs(step.images - output).mean()}
        return parts | ({"perceptual": lpips(vgg | heads, step.images, output).mean()} if has_perceptual else {})

    def adversarial(kernel):
        return -judge(step.discriminator, step.output(kernel)).mean()

    output = step.output(step.kernel)
    squares = ((step.vectors - step.rows) ** 2).mean()
    expected = {
        **parts_of(step.kernel),
        "codebook": squares + 0.25 * squares,
        "adversarial": adversarial(step.kernel),
        "discriminator": hinge(step.discriminator, step.images, output),
    }
    one, two = gradient(lambda kernel: sum(parts_of(kernel).values()), step.kernel), gradient(adversarial, step.kernel)
    weight = 0.8 * np.clip(np.linalg.norm(one) / (np.linalg.norm(two) + 1e-4), 0, 1e4)
    expected["adversarial_weight"] = weight
    parts = sum(parts_of(step.kernel).values()) + expected["codebook"]
    expected["loss"] = parts + weight * expected["adversarial"]
    assert expected.keys() == line.keys() - {"step", "seconds", "gradient_norm", "learning_rate"}
    for name, value in expected.items():
        np.testing.assert_allclose(line[name], value, rtol=2e-3, err_msg=name)
    found = adam_gradient(whole, "params/decoder/conv_out/kernel", number, 0.9)
    np.testing.assert_allclose(found, one + weight * two, rtol=0.02, atol=0.02 * np.abs(found).max())

    def of_discriminator(bias):
        return hinge(step.discriminator | {"norm_3/bias": bias}, step.images, output)

    some = slice(0, 20)
    bias = step.discriminator["norm_3/bias"]
    wanted = gradient(lambda part: of_discriminator(np.concatenate([part, bias[20:]])), bias[some])
    found = adam_gradient(whole, "discriminator/norm_3/bias", number, 0.5)[some]
    np.testing.assert_allclose(found, wanted, rtol=0.02, atol=0.02 * np.abs(wanted).max())


@pytest.mark.e2e
def test_the_discriminator_waits_for_its_step(whole):
    lines = read_log(whole)
    assert [line["adversarial_weight"] > 0 for line in lines] == [False, True, True]
    parts = [lines[0].get(name, 0) for name in ("l1", "perceptual", "codebook")]
    assert lines[0]["loss"] == pytest.approx(sum(parts), rel=1e-4)
    states = [read_state(whole, step) for step in (1, 2)]
    names = [name for name in states[0] if name.startswith("discriminator/")]
    assert np.abs(states[0]["discriminator/conv_1/kernel"]).max() < 0.2  # as it began
    assert all((states[0][name] != states[1][name]).any() for name in names)
    moments = [each for name, each in states[0].items() if "/mu/discriminator/" in name]
    assert len(moments) == len(names) and not any(each.any() for each in moments)


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_weights(train_large, whole, tmp_path, monkeypatch):
    step = CodecTrainer.step

    def stop_at_2(self, state, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, state, number)

    with monkeypatch.context() as patch:
        patch.setattr(CodecTrainer, "step", stop_at_2)
        with pytest.raises(AssertionError):
            train_large(tmp_path / "run")
    train_large(tmp_path / "run")
    for read in (lambda run: flatten(read_params(run / "model")), lambda run: read_state(run, 3)):
        one, two = read(whole), read(tmp_path / "run")
        assert one.keys() == two.keys()
        for name, leaf in one.items():
            np.testing.assert_array_equal(leaf, two[name], name)
    assert [line["loss"] for line in read_log(whole)] == [line["loss"] for line in read_log(tmp_path / "run")]


@pytest.mark.e2e
def test_it_learns_to_reconstruct(tuned):
    lines = read_log(tuned)
    assert lines[-1]["l1"] < 0.8 * lines[0]["l1"]
    assert lines[-1]["held_out_l1"] < 0.8 * lines[0]["l1"]
    assert not {"perceptual", "discriminator"} & lines[-1].keys()


@pytest.mark.e2e
def test_what_it_writes_encodes_and_decodes(models, tuned, images, tmp_path, capsys):
    new, old = load_checkpoint(tuned / "model", "codec"), load_checkpoint(models.vqgan, "codec")
    assert new.sha256 != old.sha256 and new.config == old.config
    assert new.lineage["step"] == 30 and new.lineage["base"]["sha256"] == old.sha256
    words = ["encode", images, "--db", tmp_path / "new.db", "--codec", tuned / "model"]
    assert main([str(word) for word in words]) == 0
    with Archive.open(tmp_path / "new.db") as archive:
        assert [model.sha256 for model in archive.models().values() if model.kind == "codec"] == [new.sha256]
    decode = ["decode", tmp_path / "new.db", "--codec", tuned / "model", "--out-dir", tmp_path / "out"]
    assert main([str(word) for word in decode]) == 0
    assert "other weights" not in capsys.readouterr().err
    found = read_images(tmp_path / "out")
    assert len(found) == COUNT and {image.shape for image in found.values()} == {(IMAGE_SIZE, IMAGE_SIZE, 3)}
    archive = write_archive(tmp_path / "old.db", models, count=2)
    decode = ["decode", archive, "--codec", tuned / "model", "--out-dir", tmp_path / "old"]
    assert main([str(word) for word in decode]) == 0
    assert "other weights" in capsys.readouterr().err


@pytest.mark.e2e
def test_weights_that_are_no_numbers_stop_it(train, tmp_path, capsys):
    broken = tiny_vqgan(tmp_path / "codec")
    params = flatten(read_params(broken))
    params = {name: np.array(each) for name, each in params.items()}
    params["decoder/conv_out/bias"][:] = np.nan
    config = native.read_config(broken)
    native.save(broken, "vqgan", config, native.unflatten(params))
    train(tmp_path / "run", codec=broken, status=1)
    message = capsys.readouterr().err
    assert "nan" in message and "step 1" in message
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_only_vectors_and_rows_move_in_the_codebook_loss():
    rng = np.random.default_rng(0)
    vectors, rows = rng.standard_normal((2, 3, 2, 2, 5), np.float32)
    np.testing.assert_allclose(codebook_loss(vectors, rows), 1.25 * ((vectors - rows) ** 2).mean((1, 2, 3)), rtol=1e-5)
    moves = jax.grad(lambda *pair: codebook_loss(*pair).sum(), (0, 1))(jnp.array(vectors), jnp.array(rows))
    slope = 2 * (vectors - rows) / vectors[0].size
    np.testing.assert_allclose(moves[0], slope, rtol=1e-4)
    np.testing.assert_allclose(moves[1], -0.25 * slope, rtol=1e-4)


def test_the_perceptual_distance_is_that_of_a_computation_in_float64(perceptual_files, tmp_path):
    """By the names of the files of torchvision and lpips, and by those of one file of both."""
    rng = np.random.default_rng(1)
    one, two = np.float32(rng.uniform(-1, 1, (2, 2, 19, 19, 3)))
    one[0, :, :4] = two[0, :, :4] = 0
    vgg, heads = perceptual_state()
    wanted = lpips(vgg | heads, np.float64(one), np.float64(two))
    distance = jax.jit(jax.value_and_grad(lambda *inputs: perceptual_distance(*inputs).sum(), 2))
    whole = {
        f"loss.perceptual_loss.net.slice{1 + number}.{place}.{leaf}": vgg[f"features.{place}.{leaf}"]
        for number, places in STAGES.items()
        for place in places
        for leaf in ("weight", "bias")
    }
    whole |= {f"loss.perceptual_loss.{name}": each for name, each in heads.items()} | {"decoder": np.ones(3)}
    for files in (perceptual_files, [saved(tmp_path / "last.ckpt", whole)]):
        stages = read_perceptual(files)
        found, slope = distance(stages, one, two)
        assert found == pytest.approx(wanted.sum(), rel=1e-4)
        assert np.isfinite(slope).all() and np.abs(slope).max() > 0
        np.testing.assert_allclose(distance(stages, one, one)[0], 0, atol=1e-6)
        assert np.isfinite(distance(stages, one, one)[1]).all()


def test_perceptual_files_that_do_not_fit_are_refused(perceptual_files, tmp_path):
    vgg, heads = perceptual_state()
    misshapen = heads | {"lin2.model.1.weight": np.ones((1, 2, 1, 1), np.float32)}
    for named, *states in (
        ("features.0.weight", heads),
        ("lin0.model.1.weight", vgg),
        ("lin2.model.1.weight", vgg, misshapen),
        ("features.28.bias", {name: each for name, each in vgg.items() if name != "features.28.bias"}, heads),
        ("features.5.weight", vgg | {"features.5.weight": np.ones((4, 3, 2, 2), np.float32)}, heads),
        ("features.0.weight", {"encoder.conv_in.weight": np.ones((2, 3, 3, 3), np.float32)}),
    ):
        files = [saved(tmp_path / f"{number}.pth", state) for number, state in enumerate(states)]
        with pytest.raises(UserError, match=named) as error:
            read_perceptual(files)
        assert "\n" not in str(error.value) and str(files[0]) in str(error.value)
    with pytest.raises(UserError, match="missing"):
        read_perceptual([tmp_path / "missing.pth"])


@pytest.mark.parametrize(
    ("changes", "flags", "named"),
    [
        ({"is_gumbel": True}, [], "codec"),
        ({"is_dot_product": True}, [], "codec"),
        ({}, ["--adversarial-from", 0], "--adversarial-from"),
        ({}, ["--perceptual", "vgg.pth"], "--perceptual"),
        ({"resolution": 16}, ["--perceptual", "vgg.pth"], "vgg.pth"),
    ],
)
def test_codecs_that_cannot_be_trained_are_refused(changes, flags, named, train, tmp_path, capsys):
    codec = tiny_vqgan(tmp_path / "other", **changes)
    train(tmp_path / "run", *flags, codec=codec, status=1)
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_codec_without_an_encoder_is_refused(models, train, tmp_path, capsys):
    params = {name: part for name, part in read_params(models.vqgan).items() if name not in VQGAN.ENCODER_PARTS}
    native.save(tmp_path / "half", "vqgan", native.read_config(models.vqgan), params)
    train(tmp_path / "run", codec=tmp_path / "half", status=1)
    assert "encoder" in capsys.readouterr().err


def test_a_folder_without_images_is_refused(train, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    train(tmp_path / "run", source=tmp_path / "empty", status=1)
    assert str(tmp_path / "empty") in capsys.readouterr().err
    assert not (tmp_path / "run" / "pairs").exists()


def test_options_that_do_nothing_are_refused(train, tmp_path, capsys):
    for flags in (
        ("--lora-rank", 4),
        ("--ema", 0.5),
        ("--model", "x"),
        ("--config", "x.json"),
        ("--decoder",),
        ("--adversarial-from", 30),
        ("--adversarial-from", -1),
    ):
        train(tmp_path / "run", *flags, status=1)
        assert flags[0] in capsys.readouterr().err
    for flags in (("--adversarial-from", "1"), ("--perceptual", "vgg.pth")):
        assert main(["train", "a.db", "--run", str(tmp_path / "run"), *flags]) == 1
        assert flags[0] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
