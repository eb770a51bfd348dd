"""What notebooks written for the package min-dalle do, with `MinDalle` of this one."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image
from tiny import GRID, IMAGE_SIZE, tiny_models

import dm_generations
from dm_generations import MinDalle
from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder
from dm_generations.inference.generator import Generator
from dm_generations.models.loading import load_checkpoint
from dm_generations.sampling.params import SamplingParams
from dm_generations.sampling.prng import row_key

SIZE = 2 * IMAGE_SIZE  # of a grid of 2 x 2


class Torch:
    """Something of torch's: `str` gives "torch.float16" or "cuda:0"."""

    __module__ = "torch"

    def __init__(self, text: str):
        self.text = text

    def __str__(self) -> str:
        return self.text


@pytest.fixture(scope="module")
def model(models):
    return MinDalle(model=models.dalle_bart, codec=models.vqgan, is_verbose=False)


@pytest.fixture(scope="module")
def tokens(models):
    """What the sampling loop samples for "a boat", seed 7 and the default settings, (4, L)."""
    keys = np.array([row_key(7, i) for i in range(4)], np.uint32)
    generator = Generator.load(str(models.dalle_bart), batch_size=4)
    return generator.generate(["a boat"] * 4, SamplingParams(256, 1.0, 1.0, 16.0), keys)


@pytest.fixture(scope="module")
def decoder(models):
    return Decoder.from_checkpoint(load_checkpoint(models.vqgan, "codec"), batch_size=4)


@pytest.fixture(scope="module")
def image(model):
    return model.generate_image("a boat", seed=7, grid_size=2)


@pytest.mark.e2e
def test_the_snippet_of_its_readme_runs_with_the_embedded_model(capsys):
    """Without its folder of downloads, and without `device="cuda"`, which is a warning where there is no GPU."""
    model = MinDalle(dtype=Torch("torch.float32"), is_mega=True, is_reusable=True)
    image = model.generate_image(
        text="Nuclear explosion broccoli",
        seed=3,
        grid_size=1,
        is_seamless=False,
        temperature=1,
        top_k=256,
        supercondition_factor=32,
        is_verbose=True,
    )
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert "seed 3" in capsys.readouterr().out
    generator = Generator.load(batch_size=1)
    keys = np.array([row_key(3, 0)], np.uint32)
    tokens = generator.generate(["Nuclear explosion broccoli"], SamplingParams(256, 1.0, 1.0, 32.0), keys)
    (expected,) = Decoder.from_checkpoint(load_checkpoint(None, "codec"), batch_size=1).decode(tokens)
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_images_fill_the_grid_column_by_column(image, tokens, decoder):
    first, second, third, fourth = decoder.decode(tokens)
    expected = np.concatenate([np.concatenate([first, second]), np.concatenate([third, fourth])], axis=1)
    assert image.size == (SIZE, SIZE)
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_images_one_by_one(model, tokens, decoder):
    images = model.generate_images(text="a boat", seed=7, grid_size=2, is_seamless=False, temperature=1)
    assert isinstance(images, np.ndarray) and images.dtype == np.float32
    np.testing.assert_array_equal(images, decoder.decode(tokens))


def test_arrays_go_where_tensors_go(model):
    images = model.generate_images(text="a boat", seed=7, grid_size=2)
    found = images.to("cpu").numpy()
    assert type(found) is np.ndarray and found.dtype == np.float32
    integers = images.to(Torch("torch.uint8")).cpu().numpy()
    assert integers.dtype == np.uint8
    assert Image.fromarray(integers[0]).size == (IMAGE_SIZE, IMAGE_SIZE)
    assert images.to(Torch("cuda:0"), np.float64).dtype == np.float64
    np.testing.assert_array_equal(integers, found)


def test_a_seamless_grid_is_decoded_as_one(model, tokens, decoder):
    image = model.generate_image("a boat", 7, 2, is_seamless=True)
    np.testing.assert_array_equal(image, model.generate_image("a boat", 7, 2, True, 1.0, 256, 16.0))
    expected = decoder.tiled(2, 2).decode(tokens[[0, 2, 1, 3]][None])[0]
    np.testing.assert_array_equal(np.asarray(image), expected)
    images = model.generate_images("a boat", 7, 2, is_seamless=True)
    np.testing.assert_array_equal(images[1], expected[IMAGE_SIZE:, :IMAGE_SIZE])


def test_a_stream_has_eight_steps_and_ends_with_the_image(model, image, tokens, decoder):
    steps = list(model.generate_image_stream("a boat", 7, 2, True, False, 1, 256, 16))
    assert len(steps) == 8 and all(step.size == (SIZE, SIZE) for step in steps)
    np.testing.assert_array_equal(np.asarray(steps[-1]), np.asarray(image))
    half = tokens.copy()
    half[:, GRID**2 // 2 :] = tokens[:, :1]
    np.testing.assert_array_equal(np.asarray(steps[3])[:IMAGE_SIZE, :IMAGE_SIZE], decoder.decode(half)[0])


def test_streams_of_arrays(model, image):
    (alone,) = model.generate_image_stream("a boat", seed=7, grid_size=2, progressive_outputs=False)
    (raw,) = model.generate_raw_image_stream("a boat", seed=7, grid_size=2)
    *_, images = model.generate_images_stream(text="a boat", seed=7, grid_size=2, progressive_outputs=True)
    np.testing.assert_array_equal(np.asarray(alone), np.asarray(image))
    assert raw.dtype == np.float32 and images.shape == (4, IMAGE_SIZE, IMAGE_SIZE, 3)
    np.testing.assert_array_equal(raw, np.asarray(image))
    np.testing.assert_array_equal(images[2], raw[:IMAGE_SIZE, IMAGE_SIZE:])


@pytest.mark.e2e
def test_settings_reach_the_sampling_loop(model, models, decoder):
    image = model.generate_image("a cat", 2**64 - 1, temperature=0.5, top_k=0, supercondition_factor=3)
    keys = np.array([row_key(2**64 - 1, 0)], np.uint32)
    generator = Generator.load(str(models.dalle_bart), batch_size=1)
    (expected,) = decoder.decode(generator.generate(["a cat"], SamplingParams(0, 1.0, 0.5, 3.0), keys))
    np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.e2e
def test_seed_minus_one_is_another_one_each_time(model, capsys):
    for _ in range(2):
        model.generate_image("a boat", -1, is_verbose=True)
    first, second = capsys.readouterr().out.splitlines()
    seed = int(first.rsplit(" ", 1)[1])
    assert first != second and seed >= 0
    first_images = model.generate_images("a boat", seed)
    np.testing.assert_array_equal(first_images, model.generate_images("a boat", seed))


@pytest.mark.parametrize(
    "arguments",
    [
        {"grid_size": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"supercondition_factor": float("inf")},
        {"top_k": -1},
        {"seed": 2**64},
    ],
)
def test_values_out_of_range_are_refused_by_name(model, arguments):
    (name,) = arguments
    with pytest.raises(UserError, match=name):
        model.generate_image("a boat", **arguments)


def test_an_unknown_setting_is_an_error(model):
    with pytest.raises(TypeError, match="condition_factor"):
        model.generate_image("a boat", condition_factor=3)


def test_models_are_found_where_its_download_puts_them(tmp_path, image):
    tiny_models(tmp_path).dalle_bart.rename(tmp_path / "dalle_bart_mini")
    model = MinDalle(str(tmp_path), is_mega=False, is_verbose=False)
    np.testing.assert_array_equal(np.asarray(model.generate_image("a boat", 7, 2)), np.asarray(image))
    with pytest.raises(UserError, match="dalle_bart_mega"):
        MinDalle(models_root=tmp_path)
    with pytest.raises(UserError, match="models_root"):
        MinDalle(tmp_path, model=tmp_path / "dalle_bart_mini")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (Torch("torch.bfloat16"), "bfloat16"),
        (Torch("torch.float16"), "float16"),
        ("bfloat16", "bfloat16"),
        (np.float16, "float16"),
        (np.dtype("float32"), "float32"),
    ],
)
def test_dtypes_of_torch_and_numpy(models, dtype, expected):
    model = MinDalle(model=models.dalle_bart, codec=models.vqgan, dtype=dtype, is_reusable=False, is_verbose=False)
    assert model.dtype == expected


@pytest.mark.e2e
def test_half_precision(models):
    model = MinDalle(
        model=models.dalle_bart, codec=models.vqgan, dtype=Torch("torch.bfloat16"), device="cpu", is_verbose=False
    )
    assert model.generate_image("a boat", 7, 2).size == (SIZE, SIZE)


@pytest.mark.parametrize("dtype", ["float64", "fast", Torch("torch.int8"), None, 5])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(UserError, match="float32, bfloat16, float16"):
        MinDalle(dtype=dtype)


@pytest.mark.parametrize("device", ["abacus", Torch("abacus:1")])
def test_a_device_that_is_not_there_is_a_warning(device):
    with pytest.warns(UserWarning, match="abacus"):
        MinDalle(device=device, is_reusable=False, is_verbose=False)


@pytest.mark.e2e
def test_models_are_loaded_for_each_call_if_not_reusable(models, tmp_path, image):
    models = tiny_models(tmp_path)
    model = MinDalle(model=models.dalle_bart, codec=models.vqgan, is_reusable=False, is_verbose=False)
    np.testing.assert_array_equal(np.asarray(model.generate_image("a boat", 7, 2)), np.asarray(image))
    models.vqgan.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="vqgan"):
        model.generate_image("a boat", 7, 2)


@pytest.mark.e2e
def test_the_package_imports_jax_only_when_asked():
    program = ROOT / "tests" / "programs" / "import_lazily.py"
    subprocess.run([sys.executable, program], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    with pytest.raises(AttributeError, match="MaxDalle"):
        dm_generations.MaxDalle  # noqa: B018
