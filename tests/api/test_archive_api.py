"""`Archive` of the Python API: records, tables, and what notebooks show."""

import html.parser
import io
import subprocess
import sys

import numpy as np
import pytest
from archive_kit import CODEC, archive_2022, execute, fill, new_image
from helpers import ROOT
from PIL import Image
from tiny import CODEBOOK_SIZE, GRID, IMAGE_SIZE

from dm_generations import Archive, Decoder
from dm_generations.errors import UserError
from dm_generations.models.loading import load_checkpoint

HOSTILE = "<img src=x onerror=alert(1)>'\"&\x1b[31m\u202e" + "x" * 5000
EMOJI = ROOT / "archive" / "emoji.db"


class Tags(html.parser.HTMLParser):
    """The tags of a page, whose text is thrown away."""

    def __init__(self, text):
        super().__init__()
        self.found, self.sources, self.text = set(), [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.sources += [value for name, value in attrs if name == "src"]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def tiny_archive(tmp_path):
    """Six images of a codec that is not at hand, with hostile prompts among them."""
    with Archive.create(tmp_path / "a.db") as archive:
        fill(
            archive,
            *(new_image(i, clip_score_input=float(i), cond_scale=1.0 + i % 2) for i in range(4)),
            new_image(4, prompt=HOSTILE, clip_score_tokenized=2.5),
            new_image(5, prompt=HOSTILE, sc_prompt="blurry"),
        )
        yield archive


def test_images_are_records_best_first(tiny_archive):
    images = tiny_archive.images(prompt="a red cube", best=1)
    assert [image.id for image in images] == [3, 4] and len(images) == 2
    (image,) = tiny_archive.images(key="1:4")
    assert (image.prompt, image.sc_prompt, image.key) == (HOSTILE, None, (1, 4))
    assert (image.settings.top_k, image.scores) == (50, {"clip_score_tokenized": 2.5})
    assert image.codec == CODEC and image.model.name == "tiny"
    assert image.tokens.dtype == np.uint16
    np.testing.assert_array_equal(image.tokens, [4, 2, 3, 4])
    assert [each.id for each in tiny_archive.images()[2:4]] == [each.id for each in tiny_archive.images()][2:4]
    assert tiny_archive.images()[-1].sc_prompt == "blurry"


def test_wrong_filters_and_missing_images_are_errors_of_one_line(tiny_archive):
    with pytest.raises(UserError, match="a red cube"):
        tiny_archive.images(prompt="a red cub")
    with pytest.raises(UserError, match="colour"):
        tiny_archive.images(colour=3)
    assert list(tiny_archive.images(score="99..")) == []
    images = tiny_archive.images(key="1:5")
    with tiny_archive.transaction():
        tiny_archive.connection.execute("DELETE FROM images WHERE key1 = 5")
    assert list(images) == []
    with pytest.raises(UserError, match="6"):
        images[0]
    with pytest.raises(IndexError):
        tiny_archive.images()[99]


def test_damaged_tokens_are_named(tmp_path, tiny_archive):
    execute(tiny_archive.path, "UPDATE images SET quantvec_md5 = ? WHERE id = 2", "0" * 32)
    with pytest.raises(UserError, match=r"image 2\b"):
        _ = next(image for image in tiny_archive.images() if image.id == 2).tokens


def test_reprs_say_what_they_hold_on_one_line(tiny_archive):
    images = tiny_archive.images()
    for thing in (tiny_archive, images, images[0], tiny_archive.images(key="1:4")[0]):
        assert "\n" not in repr(thing) and "\x1b" not in repr(thing) and "\u202e" not in repr(thing)
        assert len(repr(thing)) < 300
    assert "a.db" in repr(tiny_archive) and "6" in repr(tiny_archive) and "6" in repr(images)
    tiny_archive.close()
    assert "closed" in repr(tiny_archive) and tiny_archive._repr_html_() and images._repr_html_()


def test_any_text_in_place_of_numbers_is_escaped(tmp_path):
    path = archive_2022(tmp_path / "2022.db")
    evil = "\x1b[31m<b>"
    execute(path, "INSERT INTO images VALUES (1, 3, 1, ?, 1.0, 1.0, 3.0, ?, 0, ?, NULL, NULL, NULL)", evil, evil, evil)
    with Archive.open(path) as archive:
        (image,) = archive.images()
        assert "\x1b" not in repr(image) and "<b>" not in archive.images()._repr_html_()
        with pytest.raises(UserError, match="1"):
            _ = image.tokens
        assert "top_k" in Tags(archive._repr_html_()).text


def test_notebooks_show_hostile_prompts_as_text(tiny_archive):
    page = Tags(tiny_archive._repr_html_())
    assert page.found == {"p", "table", "tr", "th", "td"} and "<img src=x" in page.text
    page = Tags(tiny_archive.images()._repr_html_())  # its codec is not at hand
    assert page.found <= {"p", "div", "figure", "figcaption"} and "<img src=x" in page.text
    assert not {"\x1b", "\u202e"} & set(page.text)
    assert tiny_archive.images()[0]._repr_png_() is None


def test_an_archive_shows_counts_by_prompt_and_setting(tiny_archive):
    page = tiny_archive._repr_html_()
    header, cube, *_ = page.split("</tr>")
    assert "c=1.0" in header and "c=2.0" in header and "k=" not in header
    assert cube.count("<td>2</td>") == 2
    with Archive.create(tiny_archive.path.with_name("empty.db")) as empty:
        assert "0 images" in Tags(empty._repr_html_()).text
        assert "0 images" in Tags(empty.images()._repr_html_()).text


def test_large_archives_show_a_part(tmp_path):
    with Archive.create(tmp_path / "a.db") as archive:
        fill(archive, *(new_image(i, prompt=f"prompt {i}", cond_scale=float(i % 100)) for i in range(300)))
        assert len(archive._repr_html_()) < 100_000 and "more prompts" in archive._repr_html_()
        assert "more" in archive.images()._repr_html_()


def test_images_are_decoded_by_the_decoder_that_is_given(models, tmp_path):
    decoder = Decoder.load(models.vqgan, batch_size=4)
    tokens = np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (6, GRID**2), np.uint16)
    path = archive_2022(tmp_path / "2022.db")
    for key, row in enumerate(tokens):
        execute(path, "INSERT INTO images VALUES (?, 3, 1, 50, 1.0, 1.0, 3.0, 0, ?, ?, NULL, NULL, NULL)",
                key + 1, key, row.tobytes())  # fmt: skip
    expected = decoder(tokens)
    with Archive.open(path) as archive:
        images = archive.images()
        np.testing.assert_array_equal(np.array([np.asarray(each) for each in images.images(decoder)]), expected)
        np.testing.assert_array_equal(np.asarray(images[5].image(decoder)), expected[5])
        batches = list(decoder.decode_batches(images))
        assert [len(records) for records, _ in batches] == [4, 2]
        np.testing.assert_array_equal(np.concatenate([pixels for _, pixels in batches]), expected)
        assert images[0].image(decoder).size == (IMAGE_SIZE, IMAGE_SIZE)
        with pytest.raises(UserError, match="Decoder"):
            images[0].image()


def test_a_contact_sheet_shows_decoded_images_unchanged(models, tmp_path):
    decoder = Decoder.load(models.vqgan, batch_size=4)
    tokens = np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (6, GRID**2), np.uint16)
    path = archive_2022(tmp_path / "2022.db")
    for key, row in enumerate(tokens):
        execute(path, "INSERT INTO images VALUES (?, 3, 1, 50, 1.0, ?, ?, 0, 7, ?, NULL, NULL, NULL)",
                key + 1, 1.0 + key % 2, key // 2, row.tobytes())  # fmt: skip
    with Archive.open(path) as archive:
        (page,) = archive.contact_sheet("temperature", "cond_scale", cell="same-seed", decoder=decoder)
        size = (IMAGE_SIZE, IMAGE_SIZE, 3)
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(page), size)[:, :, 0]
        places = []
        for pixels in decoder(tokens):
            ((y, x),) = np.argwhere((windows == pixels).all(axis=(2, 3, 4)))
            places.append((int(y), int(x)))
        assert len({y for y, _ in places[::2]}) == len({y for y, _ in places[1::2]}) == 1
        assert [x for _, x in places[::2]] == sorted(x for _, x in places[1::2])
        with pytest.raises(UserError, match="cond_scale"):
            archive.contact_sheet("temperature", "prompt", decoder=decoder)
        with pytest.raises(UserError, match="Decoder"):
            archive.contact_sheet("temperature", "cond_scale")
        assert len(archive.contact_sheet("temperature", "prompt", cond_scale=2, decoder=decoder)) == 1


def test_what_a_decoder_cannot_decode_is_refused(models):
    decoder = Decoder.load(models.vqgan, batch_size=2)
    assert decoder([0] * GRID**2).shape == (1, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert decoder(np.empty((0, GRID**2), int)).shape == (0, IMAGE_SIZE, IMAGE_SIZE, 3)
    for wrong in ([0] * 3, [[0.5] * GRID**2], [[CODEBOOK_SIZE] * GRID**2], [[-1] * GRID**2], [70_000] * GRID**2):
        with pytest.raises(UserError):
            decoder(wrong)


@pytest.mark.e2e
def test_the_archive_that_ships_shows_its_images():
    with Archive.open(EMOJI) as archive:
        images = archive.images(prompt="a rocket", top_k=256, top_p=1, temperature=1, cond_scale=3)
        png = Image.open(io.BytesIO(images[0]._repr_png_()))
        embedded = load_checkpoint(None, "codec")
        assert png.size == (embedded.config.image_size,) * 2
        expected = Decoder.from_checkpoint(embedded, 1)(images[0].tokens)[0]
        np.testing.assert_array_equal(np.asarray(png), expected)
        page = Tags(images._repr_html_())
        assert len(page.sources) == len(images)
        assert all(source.startswith("data:image/png;base64,") for source in page.sources)


def test_tables_have_the_columns_of_list(tiny_archive):
    pandas = pytest.importorskip("pandas")
    table = tiny_archive.to_pandas(prompt="a red cube")
    assert isinstance(table, pandas.DataFrame) and len(table) == 4
    assert list(table["clip_score_input"]) == [2.0, 0.0, 3.0, 1.0] and set(table["model"]) == {"tiny"}
    np.testing.assert_array_equal(table["tokens"][0], [2, 2, 3, 4])
    assert len(tiny_archive.to_pandas(score="99..")) == 0


def test_arrow_tables_have_types(tiny_archive):
    pyarrow = pytest.importorskip("pyarrow")
    table = tiny_archive.to_arrow()
    assert table.num_rows == 6 and table.schema.field("tokens").type == pyarrow.list_(pyarrow.uint16())
    assert table["prompt"].to_pylist().count(HOSTILE) == 2
    assert tiny_archive.to_arrow(score="99..").schema == table.schema


def test_reading_an_archive_imports_neither_jax_nor_numpy():
    program = ROOT / "tests" / "programs" / "read_archive_lazily.py"
    done = subprocess.run([sys.executable, program], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr
