"""Initial tokens, which come from an image or a file, and which a model continues."""

import dataclasses
import hashlib
import io

import numpy as np
import pytest
from decode_kit import GOLDEN_CODEC
from PIL import Image
from tiny import tiny_dalle_bart, tiny_vqgan

from dm_generations.errors import UserError
from dm_generations.export.encoders import encode_npy
from dm_generations.inference.decoder import Decoder
from dm_generations.inference.generator import Generator
from dm_generations.models.loading import load_checkpoint
from dm_generations.pipelines import init_tokens
from dm_generations.sampling.params import SamplingParams

TOKENS = np.array([0, 3, 15, 7], np.uint16)


@pytest.fixture(scope="module")
def codec():
    return load_checkpoint(GOLDEN_CODEC, "codec")


def saved(path, array, **options):
    np.save(path, array, **options)
    return path


@pytest.mark.parametrize("dtype", ["<u2", "<i8", ">i4", "u1", ">u8"])
def test_reads_tokens_of_any_integer_dtype(tmp_path, dtype):
    found = init_tokens.read_token_file(saved(tmp_path / "t.npy", TOKENS.astype(dtype).reshape(2, 2)), 4, 16)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, TOKENS)


def test_reads_what_output_npy_writes(tmp_path):
    (tmp_path / "t.npy").write_bytes(encode_npy(TOKENS))
    np.testing.assert_array_equal(init_tokens.read_token_file(tmp_path / "t.npy", 4, 16), TOKENS)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(5), "holds 5 tokens; images of this model have 4"),
        (np.array([0, 1, 2, 16]), "gives token 16, outside the model's codebook of 16"),
        (np.array([0, -1, 2, 3]), "gives token -1, outside"),
        (np.array([0, 2**63, 2, 3], np.uint64), "gives token 9,223,372,036,854,775,808, outside"),
        (np.zeros(4), "holds float64 values"),
        (np.zeros(4, bool), "holds bool values"),
        (np.zeros(0, int), "holds 0 tokens"),
        (np.array([{}] * 4), "is not a .npy file of tokens"),
    ],
)
def test_unusable_tokens_are_refused(tmp_path, array, message):
    path = saved(tmp_path / "t.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=message) as raised:
        init_tokens.read_token_file(path, 4, 16)
    assert "\n" not in str(raised.value)


def huge() -> bytes:
    """A file whose header tells of more codes than there are."""
    return encode_npy(TOKENS).replace(b"(4,)", b"(9" + b"9" * 12 + b",)").replace(b" " * 12, b"", 1)


@pytest.mark.parametrize("content", [b"", b"codes", encode_npy(TOKENS)[:-1], encode_npy(TOKENS)[:40], huge()])
def test_other_token_files_are_refused(tmp_path, content):
    (tmp_path / "t.npy").write_bytes(content)
    with pytest.raises(UserError, match="is not a .npy file of tokens"):
        init_tokens.read_token_file(tmp_path / "t.npy", 4, 16)


def test_a_missing_file_and_an_npz_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read .*No such file"):
        init_tokens.read_token_file(tmp_path / "none.npy", 4, 16)
    np.savez(tmp_path / "t.npz", TOKENS)
    with pytest.raises(UserError, match="is an .npz file"):
        init_tokens.read_token_file(tmp_path / "t.npz", 4, 16)


def test_an_image_is_cut_to_its_middle_square(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = (10, 200, 30)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels.swapaxes(0, 1)).save(tmp_path / "high.png")
    for name in ("wide.png", "high.png"):
        found = init_tokens.read_image(tmp_path / name, 10)
        assert found.shape == (10, 10, 3) and found.dtype == np.uint8
        assert (found == (10, 200, 30)).all()


def test_an_image_of_the_right_size_stays_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    np.testing.assert_array_equal(init_tokens.read_image(tmp_path / "p.png", 8), pixels)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("LA", (0, 0), (255, 255, 255)),
        ("L", 9, (9, 9, 9)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 0x8040, (128, 128, 128)),
    ],
)
def test_images_of_other_modes(tmp_path, mode, colour, expected):
    Image.new(mode, (4, 4), colour).save(tmp_path / "p.png")
    assert (init_tokens.read_image(tmp_path / "p.png", 4) == expected).all()


def test_a_palette_with_a_transparent_colour(tmp_path):
    Image.new("P", (4, 4), 0).save(tmp_path / "p.png", transparency=0)
    assert (init_tokens.read_image(tmp_path / "p.png", 4) == 255).all()


def test_a_photograph_is_turned_as_it_says(tmp_path):
    picture = Image.new("RGB", (8, 8), "black")
    picture.paste("white", (0, 0, 8, 4))
    tags = Image.Exif()
    tags[0x0112] = 3  # upside down
    picture.save(tmp_path / "p.png", exif=tags)
    found = init_tokens.read_image(tmp_path / "p.png", 8)
    assert (found[:4] == 0).all() and (found[4:] == 255).all()


def png_bytes(size=(64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"not a picture", png_bytes()[:200], b"GIF89a" + bytes(20)])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "p.png").write_bytes(content)
    with pytest.raises(UserError, match="p.png.*not an image") as raised:
        init_tokens.read_image(tmp_path / "p.png", 8)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="cannot read .*No such file"):
        init_tokens.read_image(tmp_path / "none.png", 8)


def test_floating_point_pixels_are_refused(tmp_path):
    """They have no agreed range: those from 0 to 1 would all be black."""
    Image.new("F", (8, 8), 0.5).save(tmp_path / "p.tif")
    with pytest.raises(UserError, match=r"p\.tif' has floating-point pixels; save it with 8 or 16 bits"):
        init_tokens.read_image(tmp_path / "p.tif", 8)


@pytest.mark.parametrize("limit", [3000, 1000])  # of Pillow: it warns above, and refuses above twice as many
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, limit):
    (tmp_path / "p.png").write_bytes(png_bytes())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match=f"has more than {limit:,} pixels"):
        init_tokens.read_image(tmp_path / "p.png", 8)


def test_encodes_as_the_original_did(codec):
    """Its pixels are rounded to bytes here, so codes that were a close call may be others."""
    with np.load(GOLDEN_CODEC / "golden.npz") as arrays:
        pixels = (arrays["pixels"].clip(0, 1) * 255).round().astype(np.uint8)
        is_clear = arrays["argmin_margin"] > 0.05 * arrays["argmin_margin"].max()
        found = init_tokens.encode_images(pixels, codec)
        assert found.dtype == np.uint16 and is_clear.mean() > 0.5
        np.testing.assert_array_equal(found[is_clear], arrays["indices"][is_clear])


def test_what_the_shipped_codec_makes_of_its_own_picture():
    """Encoded, decoded: near the picture. The codes need not be the same, for many give nearly the same pixels."""
    shipped = load_checkpoint(None, "codec")
    codec = Decoder.from_checkpoint(shipped, batch_size=1)
    tokens = init_tokens.encode_images(SMOOTH := smooth_picture(codec.image_size)[None], shipped)
    picture = codec.decode(tokens)
    assert np.abs(picture.astype(int) - SMOOTH).mean() < 12
    again = codec.decode(init_tokens.encode_images(picture, shipped))
    assert np.abs(again.astype(int) - picture).mean() < 6


def smooth_picture(size: int) -> np.ndarray:
    """A red disc on white, (size, size, 3) uint8: what the codec was trained for."""
    rows, cols = np.indices((size, size)) - (size - 1) / 2
    is_inside = rows**2 + cols**2 < (size / 3) ** 2
    return np.where(is_inside[..., None], (220, 40, 40), (255, 255, 255)).astype(np.uint8)


def test_a_codec_without_an_encoder_is_refused(codec, tmp_path):
    parts = {name: codec.params[name] for name in ("decoder", "post_quant_conv", "quantize")}
    assert init_tokens.has_encoder(codec)
    with pytest.raises(UserError, match="codec 'a' has no encoder"):
        init_tokens.encode_image_file(tmp_path / "p.png", dataclasses.replace(codec, params=parts), 64)


@pytest.mark.parametrize(("token_count", "expected"), [(64, 28), (256, 112), (1024, 448)])
def test_seven_sixteenths_are_kept_unless_told_otherwise(token_count, expected):
    assert init_tokens.resolve_init_count(None, token_count) == expected
    assert init_tokens.resolve_init_count(token_count - 1, token_count) == token_count - 1


@pytest.mark.parametrize("count", [0, -1, 64, 65])
def test_counts_that_keep_nothing_or_everything_are_refused(count):
    with pytest.raises(UserError, match=f"--init-count {count} is not between 1 and 63"):
        init_tokens.resolve_init_count(count, 64)


def test_the_md5_is_of_what_an_archive_would_store():
    expected = hashlib.md5(bytes([0, 0, 3, 0, 15, 0])).hexdigest()
    assert init_tokens.InitTokens(TOKENS, 3).md5 == init_tokens.InitTokens(TOKENS.astype(">u2"), 3).md5 == expected


def test_flags_together(codec, tmp_path):
    path = saved(tmp_path / "t.npy", np.zeros(64, int))
    Image.new("RGB", (50, 40), "red").save(tmp_path / "p.png")
    assert init_tokens.load_init_tokens(None, None, None, codec, 64, 16) is None
    found = init_tokens.load_init_tokens(None, path, 5, codec, 64, 16)
    assert found.count == 5 and found.tokens.tolist() == [0] * 64
    found = init_tokens.load_init_tokens(tmp_path / "p.png", None, None, codec, 64, codec.config.codebook_size)
    assert found.count == 28 and found.tokens.shape == (64,) and found.tokens.dtype == np.uint16
    with pytest.raises(UserError, match="use just one of --init-image and --init-tokens"):
        init_tokens.load_init_tokens(tmp_path / "p.png", path, None, codec, 64, 16)
    with pytest.raises(UserError, match="--init-count needs --init-image"):
        init_tokens.load_init_tokens(None, None, 5, codec, 64, 16)


def test_a_generator_keeps_the_initial_tokens(tmp_path):
    """The whole way: an image, its tokens, the first of them kept and the rest sampled."""
    codec = load_checkpoint(tiny_vqgan(tmp_path / "vqgan"), "codec")
    generator = Generator.load(str(tiny_dalle_bart(tmp_path / "dalle_bart")), batch_size=2)
    Image.effect_noise((9, 9), 80).save(tmp_path / "p.png")
    found = init_tokens.load_init_tokens(
        tmp_path / "p.png", None, None, codec, generator.token_count, generator.codebook_size
    )
    keys = np.array([[0, 1], [0, 2]], np.uint32)
    init = np.stack([found.tokens] * 2)
    tokens = generator.generate(["a", "b"], SamplingParams(), keys, init_tokens=init, init_count=found.count)
    assert found.count == 7
    np.testing.assert_array_equal(tokens[:, :7], init[:, :7])
    assert (tokens[0, 7:] != tokens[1, 7:]).any()
