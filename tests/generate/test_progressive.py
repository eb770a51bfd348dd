"""Pictures of the codes so far."""

import os

import numpy as np
import pytest
from decode_kit import all_files, pictures
from tiny import tiny_vqgan

from dm_generations.decode.codec import Codec
from dm_generations.errors import UserError
from dm_generations.generate.progressive import filled, progress_file, write_progress
from dm_generations.generate.sweep import Combination, Draw
from dm_generations.models.loading import load_checkpoint

COMBINATION = Combination("a boat", None, 256, 1.0, 1.0, 3.0)
DRAWS = [Draw(COMBINATION, 7, index) for index in range(2)]
TOKENS = np.array([[3, 4, 5], [6, 7, 8]], np.uint16)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tiny_vqgan(tmp_path_factory.mktemp("models") / "vqgan")
    return Codec.from_checkpoint(load_checkpoint(folder, "codec"), batch_size=2)


def test_each_picture_is_filled_with_its_own_first_code():
    found = filled(TOKENS, 5)
    assert found.tolist() == [[3, 4, 5, 3, 3], [6, 7, 8, 6, 6]] and found.dtype == np.uint16
    np.testing.assert_array_equal(filled(TOKENS, 3), TOKENS)


def test_writes_each_picture_as_far_as_it_is(codec, tmp_path):
    paths = write_progress(tmp_path / "out", DRAWS, TOKENS, codec)
    write_progress(tmp_path / "out", DRAWS, filled(TOKENS, 16), codec)
    assert [path.name for path in paths] == [progress_file(draw, 3) for draw in DRAWS]
    found = pictures(tmp_path / "out")
    expected = codec.decode(filled(TOKENS, 16))
    for draw, picture in zip(DRAWS, expected, strict=True):
        for count in (3, 16):
            np.testing.assert_array_equal(found[progress_file(draw, count)], picture)
    assert len(all_files(tmp_path / "out")) == 4


def test_names_tell_pictures_and_steps_apart():
    other = [Combination("a boat", None, 256, 1.0, 0.7, 3.0), Combination("a boat!", None, 256, 1.0, 1.0, 3.0)]
    draws = [*DRAWS, *(Draw(combination, 7, 0) for combination in other)]
    names = [progress_file(draw, count) for draw in draws for count in (8, 64, 1024)]
    assert len(set(names)) == 12
    assert names[0].endswith("_7_0_0008_a boat.png") and names[:3] == sorted(names[:3])


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "🐈" * 10_000, "a\0b\n<c>", "\ud800", ""])
def test_names_stay_in_their_folder(prompt):
    name = progress_file(Draw(Combination(prompt, None, 0, 1.0, 1.0, 1.0), 2**32 - 1, 2**32 - 1), 1024)
    assert os.path.basename(name) == name and len(name.encode()) <= 255 and name.endswith(".png")


def test_a_folder_that_is_a_file_is_refused(codec, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="cannot write into .*out"):
        write_progress(tmp_path / "out", DRAWS, TOKENS, codec)
    assert (tmp_path / "out").read_text() == "mine"
