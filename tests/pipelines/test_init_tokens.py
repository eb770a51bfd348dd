"""Initial tokens, which come from an image or a file, and which a model continues."""

import dataclasses
import hashlib
import io
import struct

import numpy as np
import pytest
from decode_kit import GOLDEN_CODEC
from PIL import Image, ImageCms, PngImagePlugin

from dm_generations.errors import UserError
from dm_generations.export.output_file import encode_npy
from dm_generations.inference.decoder import Decoder
from dm_generations.inference.encoder import Encoder
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
    ("array", "names"),
    [
        (np.arange(5), ["5", "4"]),
        (np.array([0, 1, 2, 16]), ["token 16"]),
        (np.array([0, -1, 2, 3]), ["token -1"]),
        (np.array([0, 2**63, 2, 3], np.uint64), ["9,223,372,036,854,775,808"]),
        (np.zeros(4), ["float64"]),
        (np.zeros(4, bool), ["bool"]),
        (np.zeros(0, int), ["0", "4"]),
        (np.array([{}] * 4), [".npy"]),
    ],
)
def test_unusable_tokens_are_refused(tmp_path, array, names):
    path = saved(tmp_path / "t.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=r"t\.npy") as raised:
        init_tokens.read_token_file(path, 4, 16)
    assert all(name in str(raised.value) for name in names)
    assert "\n" not in str(raised.value)


def huge() -> bytes:
    """A file whose header has a size of more tokens than there are."""
    return encode_npy(TOKENS).replace(b"(4,)", b"(9" + b"9" * 12 + b",)").replace(b" " * 12, b"", 1)


@pytest.mark.parametrize("content", [b"", b"tokens", encode_npy(TOKENS)[:-1], encode_npy(TOKENS)[:40], huge()])
def test_other_token_files_are_refused(tmp_path, content):
    (tmp_path / "t.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"t\.npy"):
        init_tokens.read_token_file(tmp_path / "t.npy", 4, 16)


def test_a_missing_file_and_an_npz_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.npy"):
        init_tokens.read_token_file(tmp_path / "none.npy", 4, 16)
    np.savez(tmp_path / "t.npz", TOKENS)
    with pytest.raises(UserError, match=r"t\.npz"):
        init_tokens.read_token_file(tmp_path / "t.npz", 4, 16)


def test_an_image_is_cropped_to_its_middle_square(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = (10, 200, 30)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels.swapaxes(0, 1)).save(tmp_path / "high.png")
    for name in ("wide.png", "high.png"):
        found = init_tokens.read_image(tmp_path / name, 10)
        assert found.shape == (10, 10, 3)
        assert found.dtype == np.uint8
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
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))
    tags = Image.Exif()
    tags[0x0112] = 3  # upside down
    image.save(tmp_path / "p.png", exif=tags)
    found = init_tokens.read_image(tmp_path / "p.png", 8)
    assert (found[:4] == 0).all()
    assert (found[4:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone(tmp_path, orientation):
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4, :4], upright[:4, 4:] = (250, 0, 0), (0, 250, 0)
    steps = {2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1)}
    steps |= {6: np.rot90, 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x, 3)}
    tags = Image.Exif()
    tags[0x0112] = orientation
    stored = np.ascontiguousarray(steps.get(orientation, np.array)(upright))
    Image.fromarray(stored).save(tmp_path / "p.png", exif=tags)
    np.testing.assert_array_equal(init_tokens.read_image(tmp_path / "p.png", 8), upright)


def test_broken_exif_data_do_not_count(tmp_path):
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "p.png", exif=b"Exif\0\0garbage" * 5)
    assert (init_tokens.read_image(tmp_path / "p.png", 4) == (9, 8, 7)).all()


@pytest.mark.parametrize(("value", "expected"), [(0x8040, 128), (-5, 0), (0x4000_0000, 128), (2**31 - 1, 255)])
def test_gray_of_32_bits_is_scaled(tmp_path, value, expected):
    Image.fromarray(np.full((4, 4), value, np.int32)).save(tmp_path / "p.tif")
    assert (init_tokens.read_image(tmp_path / "p.tif", 4) == expected).all()


@pytest.mark.parametrize("kind", ["add_text", "add_itxt"])
@pytest.mark.parametrize("zip", [False, True])
def test_a_long_text_in_a_png_is_no_damage(tmp_path, kind, zip):
    """Programs that make images store their workflow there. More than Pillow keeps in all is refused as what it is."""
    for megabytes in (10, 70):
        info = PngImagePlugin.PngInfo()
        getattr(info, kind)("workflow", "x" * (megabytes << 20), zip=zip)
        Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / f"{megabytes}.png", pnginfo=info)
    assert (init_tokens.read_image(tmp_path / "10.png", 4) == (9, 8, 7)).all()
    with pytest.raises(UserError, match=r"70\.png.* MiB of text"):
        init_tokens.read_image(tmp_path / "70.png", 4)


def wide_gamut_profile() -> bytes:
    """An RGB profile near Display P3, with a gamma of 2.2, as phones tag their photographs."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    white = fixed(0.9642, 1, 0.8249)
    gamma = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"wide\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + white,
        b"rXYZ": b"XYZ " + bytes(4) + fixed(0.51512, 0.24120, -0.00105),
        b"gXYZ": b"XYZ " + bytes(4) + fixed(0.29198, 0.69225, 0.04189),
        b"bXYZ": b"XYZ " + bytes(4) + fixed(0.15710, 0.06657, 0.78407),
        **{name: gamma for name in (b"rTRC", b"gTRC", b"bTRC")},
    }
    start = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        padded = value + bytes(-len(value) % 4)
        table += name + struct.pack(">II", start + len(data), len(padded))
        data += padded
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    return (head + bytes(12) + b"acsp").ljust(68, b"\0") + white.ljust(60, b"\0") + table + data


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("RGB", (200, 60, 40), (219, 37, 13)), ("RGBA", (200, 60, 40, 0), (255, 255, 255)), ("P", None, (219, 37, 13))],
)
def test_a_colour_profile_is_converted_to_srgb(tmp_path, mode, colour, expected):
    image = Image.new("RGB", (4, 4), (200, 60, 40)).convert("P") if mode == "P" else Image.new(mode, (4, 4), colour)
    if mode == "P":
        image.putpalette([200, 60, 40] * 256)
    image.save(tmp_path / "p.png", icc_profile=wide_gamut_profile())
    assert (init_tokens.read_image(tmp_path / "p.png", 4) == expected).all()


@pytest.mark.parametrize(
    "profile", [b"", b"not a profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_colours_without_another_profile_stay_as_they_are(tmp_path, profile):
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png", icc_profile=profile)
    np.testing.assert_array_equal(init_tokens.read_image(tmp_path / "p.png", 8), pixels)


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "p.tif")
    assert (init_tokens.read_image(tmp_path / "p.tif", 8) == (255, 0, 0)).all()
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "p.tif", icc_profile=wide_gamut_profile())  # of RGB
    assert (init_tokens.read_image(tmp_path / "p.tif", 8) == 0).all()


def png_bytes(size=(64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"not an image", png_bytes()[:200], b"GIF89a" + bytes(20)])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "p.png").write_bytes(content)
    with pytest.raises(UserError, match=r"p\.png") as raised:
        init_tokens.read_image(tmp_path / "p.png", 8)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"none\.png"):
        init_tokens.read_image(tmp_path / "none.png", 8)


def test_floating_point_pixels_are_refused(tmp_path):
    """They have no agreed range: those from 0 to 1 would all be black."""
    Image.new("F", (8, 8), 0.5).save(tmp_path / "p.tif")
    with pytest.raises(UserError, match=r"p\.tif.*floating-point"):
        init_tokens.read_image(tmp_path / "p.tif", 8)


@pytest.mark.parametrize("limit", [3000, 1000])  # of Pillow: it warns above, and refuses above twice as many
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, limit):
    (tmp_path / "p.png").write_bytes(png_bytes())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match=f"p.png.*{limit:,}"):
        init_tokens.read_image(tmp_path / "p.png", 8)


def test_encodes_as_the_original_did(codec):
    """Its pixels are rounded to bytes here, so tokens that were a close call may differ."""
    with np.load(GOLDEN_CODEC / "golden.npz") as arrays:
        pixels = (arrays["pixels"].clip(0, 1) * 255).round().astype(np.uint8)
        is_clear = arrays["argmin_margin"] > 0.05 * arrays["argmin_margin"].max()
        found = Encoder(codec).encode(pixels)
        assert found.dtype == np.uint16
        assert is_clear.mean() > 0.5
        np.testing.assert_array_equal(found[is_clear], arrays["indices"][is_clear])


@pytest.mark.e2e
def test_the_embedded_codec_decodes_what_it_encoded():
    """The tokens need not be the same, because many give nearly the same pixels."""
    embedded = load_checkpoint(None, "codec")
    decoder = Decoder.from_checkpoint(embedded, batch_size=1)
    pixels = smooth_image(decoder.image_size)[None]
    image = decoder.decode(Encoder(embedded).encode(pixels))
    assert np.abs(image.astype(int) - pixels).mean() < 12
    second = decoder.decode(Encoder(embedded).encode(image))
    assert np.abs(second.astype(int) - image).mean() < 6


def smooth_image(size: int) -> np.ndarray:
    """A red disc on white, (size, size, 3) uint8: what the codec was trained for."""
    rows, cols = np.indices((size, size)) - (size - 1) / 2
    is_inside = rows**2 + cols**2 < (size / 3) ** 2
    return np.where(is_inside[..., None], (220, 40, 40), (255, 255, 255)).astype(np.uint8)


def test_a_codec_without_an_encoder_is_refused(codec, tmp_path):
    parts = {name: codec.params[name] for name in ("decoder", "post_quant_conv", "quantize")}
    with pytest.raises(UserError, match=f"'{GOLDEN_CODEC.name}' has no encoder"):
        init_tokens.encode_image_file(
            tmp_path / "p.png", dataclasses.replace(codec, params=parts), codec.config.grid**2
        )


@pytest.mark.parametrize(("token_count", "expected"), [(64, 28), (256, 112), (1024, 448)])
def test_seven_sixteenths_are_the_default(token_count, expected):
    assert init_tokens.resolve_init_count(None, token_count) == expected
    assert init_tokens.resolve_init_count(token_count - 1, token_count) == token_count - 1


@pytest.mark.parametrize("count", [0, -1, 64, 65])
def test_counts_of_nothing_or_everything_are_refused(count):
    with pytest.raises(UserError, match=f"--init-count {count} .*63"):
        init_tokens.resolve_init_count(count, 64)


def test_the_md5_is_of_what_an_archive_would_store():
    expected = hashlib.md5(bytes([0, 0, 3, 0, 15, 0])).hexdigest()
    assert init_tokens.InitTokens(TOKENS, 3).md5 == init_tokens.InitTokens(TOKENS.astype(">u2"), 3).md5 == expected


def test_flags_together(codec, tmp_path):
    length = codec.config.grid**2
    path = saved(tmp_path / "t.npy", np.zeros(length, int))
    Image.new("RGB", (50, 40), "red").save(tmp_path / "p.png")
    sizes = codec, length, codec.config.codebook_size
    assert init_tokens.load_init_tokens(None, None, None, *sizes) is None
    found = init_tokens.load_init_tokens(None, path, 5, *sizes)
    assert found.count == 5
    assert found.tokens.tolist() == [0] * length
    found = init_tokens.load_init_tokens(tmp_path / "p.png", None, None, *sizes)
    assert found.count == init_tokens.resolve_init_count(None, length)
    assert found.tokens.shape == (length,)
    assert found.tokens.dtype == np.uint16
    with pytest.raises(UserError, match="--init-image and --init-tokens"):
        init_tokens.load_init_tokens(tmp_path / "p.png", path, None, *sizes)
    with pytest.raises(UserError, match="--init-count"):
        init_tokens.load_init_tokens(None, None, 5, *sizes)


@pytest.mark.e2e
def test_a_generator_continues_the_initial_tokens(models, tmp_path):
    """The whole way: an image, its tokens, the first of them used and the rest sampled."""
    codec = load_checkpoint(models.vqgan, "codec")
    generator = Generator.load(str(models.dalle_bart), batch_size=2)
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
