"""WebP, JPEG, rows inside images, and galleries with text; the flags that ask for them."""

import io
import json
import math

import numpy as np
import pytest
from decode_kit import all_files, change, random_tokens, read_images, write_archive_2022
from PIL import Image, ImageFont
from tiny import CODEBOOK_SIZE, GRID, IMAGE_SIZE, tiny_vqgan

from dm_generations.archive import ImageRow, ModelInfo
from dm_generations.cli import main
from dm_generations.export.captions import Strips, without_accents
from dm_generations.export.output_file import EXTENSIONS, Encoding, gallery_record, image_record
from dm_generations.sampling.params import SamplingParams

PIXELS = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(256, size=(4, 5, 3), dtype=np.uint8)).resize((80, 64))
)
ROW = ImageRow(
    *(7, 3, 1, SamplingParams(50, cond_scale=10.0), 0, 5, b"\1\0", "ab" * 16, 31.5, 30.25, 1, 2),
    1,
    -12.5,
    "bfloat16",
    7,
    "cd" * 16,
)
MODELS = {
    1: ModelInfo("generator", "mega", "0" * 64, {}),
    2: ModelInfo("codec", "f16", "1" * 64, {}, token_shape=(16, 16), codebook_size=16384, image_shape=(256, 256)),
}
PROMPTS = {
    "plain": "a boat on a lake",
    "latin": "une forêt enchantée",
    "other": "кот 猫 🐈 <b>&",
    "none": None,
    "control": "a\0b\nc\x7f",
    "surrogate": "a\ud800b",
    "long": "🐈" * 10_000,
}


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return tiny_vqgan(tmp_path_factory.mktemp("models") / "vqgan")


@pytest.fixture
def decode(codec, tmp_path):
    """Runs the command on five images of one prompt, into `out`; returns its exit status."""
    db = write_archive_2022(tmp_path / "archive.db", random_tokens(5, GRID**2, CODEBOOK_SIZE))

    def run(*flags, out=tmp_path / "out"):
        return main(["decode", "--db", str(db), "--codec", str(codec), "--out-dir", str(out), *map(str, flags)])

    run.db = db
    return run


def opened(data) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def embedded(image: Image.Image) -> tuple[str | None, str, dict]:
    """Description, software and record inside an image, as other programs read them."""
    if image.format == "PNG":
        return image.info.get("Description"), image.info["Software"], json.loads(image.info["Comment"])
    tags = image.getexif()
    description = tags.get(0x010E)
    comment = tags.get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"ASCII\0\0\0"
    return description, tags[0x0131], json.loads(comment[8:])


@pytest.mark.parametrize("encoding", [Encoding("webp"), Encoding("png", png="small")])
def test_lossless_formats_give_the_pixels_back(encoding):
    np.testing.assert_array_equal(np.asarray(opened(encoding.encode(PIXELS))), PIXELS)


@pytest.mark.parametrize(("name", "pillow"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_files_are_of_the_format_that_their_names_say(decode, tmp_path, name, pillow):
    assert decode("--format", name) == 0
    files = {path: data for path, data in all_files(tmp_path / "out").items() if "/" in path}
    assert len(files) == 5 and all(path.endswith(EXTENSIONS[name]) for path in files)
    assert {opened(data).format for data in files.values()} == {pillow}
    manifest = (tmp_path / "out" / "manifest.js").read_text()
    assert EXTENSIONS[name] in manifest


@pytest.mark.parametrize("name", ["webp", "jpeg"])
def test_quality_trades_size_for_likeness(name):
    sizes, errors = [], []
    for quality in (10, 60, 95):
        data = Encoding(name, quality).encode(PIXELS)
        sizes.append(len(data))
        errors.append(np.abs(np.asarray(opened(data)).astype(int) - PIXELS).mean())
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)


def test_jpeg_has_quality_90_by_default():
    assert bytes(Encoding("jpeg").encode(PIXELS)) == bytes(Encoding("jpeg", 90).encode(PIXELS))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", EXTENSIONS)
def test_an_image_carries_its_row(name, prompt):
    record = image_record(ROW, PROMPTS[prompt], None, 2, MODELS)
    data = Encoding(name).encode(PIXELS, record)
    image = opened(data)
    if name != "jpeg":
        np.testing.assert_array_equal(np.asarray(image), PIXELS)
    description, software, found = embedded(image)
    assert software.startswith("dm_generations ")
    expected = {
        "id": 7,
        "prompt_id": 3,
        "prompt": PROMPTS[prompt],
        "sc_prompt_id": 1,
        "sc_prompt": None,
        "top_k": 50,
        "top_p": 1.0,
        "temperature": 1.0,
        "cond_scale": 10.0,
        "rank": 2,
        "key0": 0,
        "key1": 5,
        "sampler_version": 1,
        "dtype": "bfloat16",
        "init_count": 7,
        "init_md5": "cd" * 16,
        "log_prob": -12.5,
        "clip_score_input": 31.5,
        "clip_score_tokenized": 30.25,
        "quantvec_md5": "ab" * 16,
        "generator": {"name": "mega", "sha256": "0" * 64},
        "codec": {"name": "f16", "sha256": "1" * 64},
    }
    if name == "jpeg" and prompt == "long":  # which has 64 KB for it
        expected["prompt"] = PROMPTS["long"][:2000]
    assert found == expected
    if name == "png" and prompt in ("plain", "latin", "other", "long"):
        assert description == PROMPTS[prompt]
    if prompt == "none":
        assert description is None


def test_a_gallery_carries_all_its_rows():
    rows = [image_record(ROW, "a boat", None, rank, MODELS) for rank in range(3)]
    found = embedded(opened(Encoding().encode(PIXELS, gallery_record(rows))))[2]
    assert found["prompt"] == "a boat" and [row["rank"] for row in found["images"]] == [0, 1, 2]
    assert "prompt" not in found["images"][0] and found["images"][0]["key1"] == 5


def test_a_jpeg_gallery_of_too_many_rows_leaves_out_the_list():
    rows = [image_record(ROW, "a boat", None, rank, MODELS) for rank in range(1000)]
    found = embedded(opened(Encoding("jpeg").encode(PIXELS, gallery_record(rows))))[2]
    assert found["prompt"] == "a boat" and "images" not in found


def test_whatever_a_2022_row_holds_becomes_json():
    row = ImageRow(1, 1, 1, SamplingParams(50), 0, 1, b"", b"\xff", math.nan, math.inf, None, None)
    record = image_record(row, "a", None, 0, {})
    assert (record["quantvec_md5"], record["clip_score_input"], record["codec"]) == ("\ufffd", None, None)
    Encoding().encode(PIXELS, record)


def test_metadata_on_request_only(decode, tmp_path):
    assert decode() == 0 and decode("--metadata", out=tmp_path / "with") == 0
    without, found = all_files(tmp_path / "out"), all_files(tmp_path / "with")
    assert without.keys() == found.keys()
    for rank, path in enumerate(sorted(path for path in found if path.endswith(".png"))):
        plain, image = opened(without[path]), opened(found[path])
        np.testing.assert_array_equal(np.asarray(image), np.asarray(plain))
        assert plain.info == {}
        record = embedded(image)[2]
        assert (record["prompt"], record["rank"], record["key1"], record["id"]) == ("a boat", rank, rank, rank + 1)


def gallery(folder) -> np.ndarray:
    (found,) = read_images(folder).values()
    return found


def test_strips_leave_the_images_of_a_gallery_as_they_are():
    size, strips = 64, Strips(True, True)
    sheet = np.random.default_rng(0).integers(1, 256, size=(2 * size, 3 * size, 3), dtype=np.uint8)
    found = strips.add(sheet, 3, 2, ("a boat", "k=50"), ["31.50", "30.25", "29.00", "28.00", ""])
    assert found.shape == (*strips.size(3, 2, size)[::-1], 3)
    label_height = Strips(score_labels=True).size(3, 2, size)[1] // 2 - size
    caption_height = Strips(captions=True).size(3, 2, size)[1] - 2 * size
    rows = found[caption_height:].reshape(2, size + label_height, 3 * size, 3)
    np.testing.assert_array_equal(rows[:, :size].reshape(sheet.shape), sheet)
    assert found[:caption_height].max() > 200
    labels = rows[:, size:].reshape(2, label_height, 3, size, 3).swapaxes(1, 2).reshape(6, -1).max(axis=1)
    assert (labels[:4] > 100).all() and (labels[4:] == 0).all()


def test_a_gallery_with_strips(decode, tmp_path):
    grid = ["--mode", "gallery", "--gallery-cols", "3", "--gallery-rows", "2"]
    assert decode(*grid, "--captions", "--score-labels") == 0
    width, height = Strips(True, True).size(3, 2, IMAGE_SIZE)
    assert gallery(tmp_path / "out").shape == (height, width, 3)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_any_prompt_can_be_a_caption(prompt):
    pixels = np.zeros((256, 512, 3), np.uint8)
    found = Strips(True, True).add(pixels, 2, 1, (prompt or "", prompt or ""), ["31.50", ""])
    assert found.shape[::-1][1:] == Strips(True, True).size(2, 1, 256)


def test_a_long_caption_is_cut_and_ends_in_dots():
    strips = Strips(captions=True)
    pixels = np.zeros((64, 512, 3), np.uint8)
    short, long = (strips.add(pixels, 8, 1, ("word " * count, ""), [])[:-64] for count in (200, 2000))
    np.testing.assert_array_equal(short, long)  # both are cut at the same place
    assert short[:, -4:].max() == 0  # and end before the edge


@pytest.mark.parametrize(("prompt", "drawn"), [("une forêt", "une foret"), ("pin\u0303ata", "pinata"), ("숲", "숲")])
def test_accents_are_left_out_where_the_font_has_none(prompt, drawn):
    assert without_accents(prompt) == drawn
    pixels = np.zeros((64, 512, 3), np.uint8)
    found, expected = (Strips(captions=True).add(pixels, 8, 1, (text, text), []) for text in (prompt, drawn))
    np.testing.assert_array_equal(found, expected)


def test_a_font_of_ones_own_is_asked_for_accents(tmp_path):
    (tmp_path / "font.ttf").write_bytes(ImageFont.load_default(12).font_bytes)
    strips = Strips(captions=True, font=str(tmp_path / "font.ttf"))
    pixels = np.zeros((64, 512, 3), np.uint8)
    with_accent, without = (strips.add(pixels, 8, 1, (text, ""), []) for text in ("forêt", "foret"))
    assert (with_accent != without).any()


def test_a_font_of_ones_own(tmp_path):
    data = ImageFont.load_default(12).font_bytes
    (tmp_path / "font.ttf").write_bytes(data)
    pixels = np.zeros((64, 512, 3), np.uint8)
    theirs = Strips(captions=True, font=str(tmp_path / "font.ttf")).add(pixels, 8, 1, ("a boat", ""), [])
    ours = Strips(captions=True).add(pixels, 8, 1, ("a boat", ""), [])
    assert theirs.max() > 200 and (theirs != ours).mean() < 0.01  # letters may be placed by another engine


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quality", "80"], "--quality has no effect here: png is lossless"),
        (["--format", "jpeg", "--png", "small"], "--png has no effect here: no png is written with --format jpeg"),
        (["--mode", "npy", "--format", "webp"], "--format has no effect here"),
        (["--output", "npy", "--metadata"], "--metadata has no effect here"),
        (["--captions"], "--captions has no effect here: it is for --mode gallery"),
        (["--mode", "tar", "--score-labels"], "--score-labels has no effect here"),
        (["--mode", "gallery", "--caption-font", "x.ttf"], "--caption-font has no effect here"),
        (["--mode", "zip", "--shard-size", "10"], "--shard-size has no effect here: it is for --mode tar"),
        (["--mode", "gallery", "--captions", "--caption-font", "no.ttf"], "no.ttf"),
        (["--mode", "gallery", "--format", "webp", "--gallery-cols", "3000"], "too many for memory or for webp"),
    ],
)
def test_flags_that_cannot_be_met_are_refused_by_name(decode, tmp_path, capsys, flags, message):
    assert decode(*flags) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags", [["--quality", "0"], ["--quality", "101"], ["--format", "gif"], ["--batch-size", "a"]]
)
def test_values_that_make_no_sense_are_refused(flags):
    with pytest.raises(SystemExit) as stopped:
        main(["decode", *flags])
    assert stopped.value.code == 2


def test_a_score_that_is_none_has_no_label(decode, tmp_path):
    change(decode.db, "UPDATE images SET clip_score_input = NULL")
    assert decode("--mode", "gallery", "--score-labels", "--gallery-cols", 3, "--gallery-rows", 2) == 0
    label_height = Strips(score_labels=True).size(1, 1, IMAGE_SIZE)[1] - IMAGE_SIZE
    rows = gallery(tmp_path / "out").reshape(2, IMAGE_SIZE + label_height, -1)
    assert rows[:, IMAGE_SIZE:].max() == 0
