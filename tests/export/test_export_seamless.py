"""Sheets of images that are decoded as one token grid."""

import numpy as np
import pytest
from codec_kit import random_params
from decode_kit import all_files, change, random_tokens, read_images, write_archive_2022
from helpers import first_of
from tiny import CODEBOOK_SIZE, GRID, IMAGE_SIZE, tiny_vqgan

from dm_generations.cli import main
from dm_generations.errors import UserError
from dm_generations.export.output_file import fill_cells
from dm_generations.inference.decoder import Decoder
from dm_generations.models.dvae.discrete import DiscreteVAEConfig
from dm_generations.models.dvae.openai import OpenAIVAEConfig
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.registry import get_kind
from dm_generations.models.vqgan.network import VQGANConfig
from dm_generations.weights.native import unflatten

CONFIGS = {
    "vqgan": VQGANConfig(
        ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=8, n_embed=50, num_groups=4
    ),
    "discrete_vae": DiscreteVAEConfig(
        image_size=16, num_tokens=50, codebook_dim=8, num_layers=2, num_resnet_blocks=1, hidden_dim=8
    ),
    "openai_vae": OpenAIVAEConfig(n_hid=8, n_init=8, n_blk_per_group=1, vocab_size=50, image_size=32),
}
ROWS, COLS = 2, 3


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory):
    return tiny_vqgan(tmp_path_factory.mktemp("models") / "vqgan")


@pytest.fixture(scope="module")
def tiny_codec(codec_folder):
    return Decoder.from_checkpoint(load_checkpoint(codec_folder, "codec"), batch_size=4)


@pytest.fixture
def decode(codec_folder, tmp_path):
    """Runs `decode --mode gallery` on five images, 3 x 2 to a file, into `out`; returns its exit status."""
    db = write_archive_2022(tmp_path / "archive.db", random_tokens(5, GRID**2, CODEBOOK_SIZE))

    def run(*flags):
        layout = ["--mode", "gallery", "--gallery-cols", COLS, "--gallery-rows", ROWS]
        words = ["decode", "--db", db, "--codec", codec_folder, "--out-dir", tmp_path / "out", *layout, *flags]
        return main([str(word) for word in words])

    run.db, run.out = db, tmp_path / "out"
    return run


@pytest.mark.e2e
@pytest.mark.parametrize("kind", first_of(CONFIGS))
def test_a_sheet_is_one_image_of_one_grid(kind):
    """The grids laid side by side here, one by one, and given to the network as it is written."""
    config = CONFIGS[kind]
    params = unflatten(random_params(kind, config))
    codec = Decoder(kind, config, params, batch_size=4)
    tokens = random_tokens(ROWS * COLS, config.grid**2, 50)
    grid = np.block([[tokens[row * COLS + col].reshape(config.grid, -1) for col in range(COLS)] for row in range(ROWS)])
    model = get_kind(kind).network_class(config)
    pixels = model.apply({"params": params}, grid[None].astype(np.int32), method="decode_code")
    expected = (np.asarray(pixels).clip(0, 1) * 255).astype(np.uint8)
    found = codec.tiled(ROWS, COLS).decode(tokens[None])
    assert found.shape == expected.shape == (1, ROWS * codec.image_size, COLS * codec.image_size, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.e2e
def test_images_of_a_sheet_run_into_each_other(tiny_codec):
    """Across the middle, alone and as one: only the decoder that sees both sides changes what is near the seam."""
    tokens = random_tokens(2, tiny_codec.token_count, CODEBOOK_SIZE)
    apart = np.concatenate(list(tiny_codec.decode(tokens)), axis=1)
    assert (tiny_codec.tiled(1, 2).decode(tokens[None])[0] != apart).any()
    np.testing.assert_array_equal(tiny_codec.tiled(1, 1).decode(tokens[:, None]), tiny_codec.decode(tokens))


def test_sheets_divide_the_batch_and_have_one_shape(tiny_codec, monkeypatch):
    sheets = tiny_codec.tiled(1, 2)
    assert (sheets.batch_size, tiny_codec.tiled(5, 5).batch_size, tiny_codec.batch_size) == (2, 1, 4)
    tokens = random_tokens(6, tiny_codec.token_count, CODEBOOK_SIZE).reshape(3, 2, -1)  # a batch, and a short one
    shapes, decode_batch = set(), sheets.decode_batch
    monkeypatch.setattr(sheets, "decode_batch", lambda batch: shapes.add(batch.shape) or decode_batch(batch))
    np.testing.assert_array_equal(sheets.decode(tokens)[2:], sheets.decode(tokens[2:]))
    assert shapes == {(2, 2, tiny_codec.token_count)}


def test_a_sheet_that_no_memory_holds_is_refused(tiny_codec):
    with pytest.raises(UserError, match=r"sheet of 900 x 800 .* GB"):
        tiny_codec.tiled(800, 900)


def test_cells_without_an_image_get_another():
    rows = fill_cells({1: np.array([7, 7]), 2: np.array([8, 8])}, 4)
    assert rows.tolist() == [[7, 7], [7, 7], [8, 8], [8, 8]]


@pytest.mark.e2e
def test_a_seamless_gallery_is_decoded_as_one(decode, tiny_codec):
    assert decode("--seamless") == 0
    (sheet,) = read_images(decode.out).values()
    tokens = random_tokens(5, GRID**2, CODEBOOK_SIZE)
    expected = tiny_codec.tiled(ROWS, COLS).decode(fill_cells(dict(enumerate(tokens)), 6)[None])[0].copy()
    expected[IMAGE_SIZE:, 2 * IMAGE_SIZE :] = 0  # there is no sixth image
    np.testing.assert_array_equal(sheet, expected)


def test_pages_of_a_seamless_gallery(decode):
    assert decode("--seamless", "--gallery-rows", 1) == 0
    second, first = read_images(decode.out).values()  # ",page=2" sorts first
    assert first.shape == second.shape == (IMAGE_SIZE, COLS * IMAGE_SIZE, 3)
    assert (second[:, 2 * IMAGE_SIZE :] == 0).all() and (second[:, : 2 * IMAGE_SIZE] > 0).any()


def test_a_bad_row_leaves_a_black_cell(decode):
    change(decode.db, "UPDATE images SET quantvec = x'00' WHERE id = 2")
    assert decode("--seamless") == 1
    ((path, sheet),) = read_images(decode.out).items()
    assert ",incomplete_" in path
    cells = sheet.reshape(ROWS, IMAGE_SIZE, COLS, IMAGE_SIZE, 3).swapaxes(1, 2).reshape(6, -1)
    assert (cells.max(axis=1) > 0).tolist() == [True, False, True, True, True, False]


def test_a_gallery_that_is_there_stays_as_with_other_options(decode, capsys):
    assert decode() == 0
    plain = all_files(decode.out)
    assert decode("--seamless") == 0 and all_files(decode.out) == plain
    assert "1 file" in capsys.readouterr().out.splitlines()[-2]
    assert decode("--seamless", "--overwrite") == 0 and all_files(decode.out) != plain


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--captions"], "use just one of --seamless and --captions"),
        (["--score-labels"], "use just one of --seamless and --score-labels"),
        (["--mode", "images"], "--seamless has no effect here: it is for --mode gallery"),
        (["--output", "npy"], "--seamless has no effect here: it is for --mode gallery"),
        (["--gallery-cols", "900", "--gallery-rows", "800"], "GB to decode"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(decode, capsys, flags, message):
    assert decode("--seamless", *flags) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not decode.out.exists()


def test_output_names_images_whatever_their_format(decode):
    assert decode("--output", "pictures", "--format", "webp") == 0
    assert any(path.endswith(".webp") for path in all_files(decode.out))
