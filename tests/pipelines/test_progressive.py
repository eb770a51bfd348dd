"""Unfinished images, as `--progressive` writes them."""

import os

import numpy as np
import pytest
from decode_kit import all_files, read_images

from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder
from dm_generations.models.loading import load_checkpoint
from dm_generations.pipelines.progressive import pad_tokens, partial_image_name, write_partial_images
from dm_generations.pipelines.sweep import Combination, Sample
from dm_generations.sampling.params import SamplingParams

PARAMS = SamplingParams(256, 1.0, 1.0, 3.0)
COMBINATION = Combination("a boat", None, PARAMS)
SAMPLES = [Sample(COMBINATION, 7, index) for index in range(2)]
TOKENS = np.array([[3, 4, 5], [6, 7, 8]], np.uint16)


@pytest.fixture(scope="module")
def decoder(models):
    return Decoder.from_checkpoint(load_checkpoint(models.vqgan, "codec"), batch_size=2)


def test_each_image_is_filled_with_its_own_first_token():
    found = pad_tokens(TOKENS, 5)
    assert found.tolist() == [[3, 4, 5, 3, 3], [6, 7, 8, 6, 6]]
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(pad_tokens(TOKENS, 3), TOKENS)


def test_writes_each_unfinished_image(decoder, tmp_path):
    paths = write_partial_images(tmp_path / "out", SAMPLES, 3, TOKENS, decoder)
    write_partial_images(tmp_path / "out", SAMPLES, 16, pad_tokens(TOKENS, 16), decoder)
    assert [path.name for path in paths] == [partial_image_name(sample, 3) for sample in SAMPLES]
    found = read_images(tmp_path / "out")
    expected = decoder.decode(pad_tokens(TOKENS, 16))
    for sample, image in zip(SAMPLES, expected, strict=True):
        for count in (3, 16):
            np.testing.assert_array_equal(found[partial_image_name(sample, count)], image)
    assert len(all_files(tmp_path / "out")) == 4


def test_names_tell_images_and_steps_apart():
    other = [
        Combination("a boat", None, SamplingParams(256, 1.0, 0.7, 3.0)),
        Combination("a boat!", None, PARAMS),
    ]
    samples = [*SAMPLES, *(Sample(combination, 7, 0) for combination in other)]
    names = [partial_image_name(sample, count) for sample in samples for count in (8, 64, 1024)]
    assert len(set(names)) == 12
    assert names[0].endswith("_7_0_0008_a boat.png")
    assert names[:3] == sorted(names[:3])


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "🐈" * 10_000, "a\0b\n<c>", "\ud800", ""])
def test_names_stay_in_their_folder(prompt):
    name = partial_image_name(Sample(Combination(prompt, None, SamplingParams()), 2**32 - 1, 2**32 - 1), 1024)
    assert os.path.basename(name) == name
    assert len(name.encode()) <= 255
    assert name.endswith(".png")


def test_a_folder_that_is_a_file_is_refused(decoder, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="out"):
        write_partial_images(tmp_path / "out", SAMPLES, 3, TOKENS, decoder)
    assert (tmp_path / "out").read_text() == "mine"
