"""What notebooks use: the form, images while they grow, grids, exported folders and the page."""

import base64
import io
import re
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image
from tiny import GRID

from dm_generations import Archive, Generator, Scorer
from dm_generations.api.notebook import Demo, serve_page, show_page
from dm_generations.errors import UserError

COUNT = GRID**2


@pytest.fixture(scope="module")
def generator(models):
    return Generator.load(models.dalle_bart, batch_size=4, codec=models.vqgan)


@pytest.fixture(scope="module")
def scorer(models):
    return Scorer.load(models.clip, batch_size=4)


def images_of(page):
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
        for content in re.findall(r"data:image/png;base64,([\w+/=]+)", page)
    ]


def test_images_are_given_out_while_they_grow(generator):
    seen = []
    results = generator("a boat", n=3, cond_scale=[1, 3], every=5, on_unfinished=lambda images: seen.append(images))
    np.testing.assert_array_equal(results.tokens, generator("a boat", n=3, cond_scale=[1, 3]).tokens)
    assert len(seen) >= -(-COUNT // 5)
    for images in seen:
        for image, whole in zip(images, results, strict=False):
            assert (image.prompt, image.settings, image.key) == (whole.prompt, whole.settings, whole.key)
            count = next(count for count in (5, 10, 15, COUNT) if (image.tokens[count:] == image.tokens[0]).all())
            np.testing.assert_array_equal(image.tokens[:count], whole.tokens[:count])
    np.testing.assert_array_equal([image.tokens for image in seen[-1]], results.tokens)
    assert (seen[0][0].tokens[5:] == seen[0][0].tokens[0]).all() and len(seen[0][:1]) == 1
    np.testing.assert_array_equal(images_of(seen[0]._repr_html_())[0], np.asarray(seen[0][0].image()))
    with pytest.raises(UserError, match="every"):
        generator("a boat", every=0, on_unfinished=seen.append)


def test_a_grid_has_a_row_and_a_column_for_each_value(generator):
    results = generator(["a boat", "<b>\x1b"], n=2, temperature=[0.5, 1], cond_scale=[1, 3])
    page = results.grid("temperature", "cond_scale")._repr_html_()
    header, *rows = page.split("<tr>")[1:]
    assert re.findall(r"<th>(.*?)</th>", header) == ["", "cond_scale 1.0", "cond_scale 3.0"]
    assert [re.findall(r"<th>(.*?)</th>", row) for row in rows] == [["temperature 0.5"], ["temperature 1.0"]]
    pixels = {(image.key, image.prompt, image.settings): np.asarray(image.image()) for image in results}
    for row, temperature in zip(rows, (0.5, 1.0), strict=True):
        for cell, scale in zip(row.split("<td>")[1:], (1.0, 3.0), strict=True):
            wanted = [
                pixels[(image.key, image.prompt, image.settings)]
                for image in results
                if (image.settings.temperature, image.settings.cond_scale) == (temperature, scale)
            ]
            np.testing.assert_array_equal(images_of(cell), wanted)
    by_prompt = results.grid("prompt", "cond_scale")._repr_html_()
    assert "<b>" not in page + by_prompt and "\x1b" not in page + by_prompt and "prompt &lt;b&gt;" in by_prompt
    with pytest.raises(UserError, match="colour"):
        results.grid("colour")


@pytest.mark.e2e
def test_an_archive_is_exported_as_files_with_a_page(generator, models, tmp_path):
    results = generator(["a boat", "a cat"], n=2)
    results.save(tmp_path / "a.db")
    with Archive.open(tmp_path / "a.db") as archive:
        report = archive.export(tmp_path / "images", models.vqgan, prompt="a cat")
        (first, second) = archive.images(prompt="a cat")
    assert (report.written, report.problems, report.page.parent) == (2, [], tmp_path / "images")
    files = sorted((tmp_path / "images").rglob("*.png"))
    np.testing.assert_array_equal(
        [np.asarray(Image.open(file)) for file in files], [np.asarray(each) for each in generator.decoder.decode(
            np.array([first.tokens, second.tokens]))]
    )  # fmt: skip


@pytest.mark.e2e
def test_the_form_generates_scores_and_shows_the_best(generator, scorer):
    demo = Demo(generator, scorer, prompt="a boat", n=5, best=2)
    *fields, button, output = demo.form.children
    by_name = {field.description: field for field in fields}
    by_name["prompt"].value, by_name["cond scale"].value, by_name["seed"].value = "a cat", 5.0, 3
    button.click()
    expected = generator("a cat", n=5, seed=3, cond_scale=5, scorer=scorer).best(2)
    np.testing.assert_array_equal(demo.results.tokens, expected.tokens)
    np.testing.assert_array_equal(images_of(output.value), [np.asarray(image) for image in expected.images()])
    by_name["prompt"].value = ""
    button.click()
    assert "prompt" in output.value and not images_of(output.value) and not button.disabled


@pytest.mark.e2e
def test_without_widgets_there_are_images(generator, scorer, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    demo = Demo(generator, scorer, prompt="a boat", n=3, best=1)
    demo._ipython_display_()
    assert demo.form is None and shown == [demo.results] and len(demo.results) == 1
    assert demo.generate(prompt="a cat", n=2)[0].prompt == "a cat"
    with pytest.raises(UserError, match="colour"):
        demo.generate(colour=1)


def status(address):
    try:
        with urllib.request.urlopen(address, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_only_the_files_of_the_folder_are_served_and_only_below_the_secret(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    (folder / "0001_a cat").mkdir(parents=True)
    for path in ("page.html", "0001_a cat/1.png", "../secret.txt"):
        (folder / path).write_bytes(b"content")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    port, path = serve_page(folder / "page.html")
    base = f"http://127.0.0.1:{port}{path.rpartition('/')[0]}"
    with urllib.request.urlopen(f"{base}/page.html", timeout=20) as answer:
        assert answer.read() == b"content"
    assert status(f"{base}/0001_a%20cat/1.png") == 200
    for outside in ("/", "/0001_a%20cat/", "/../secret.txt", "/%2e%2e/secret.txt", "/link.txt", "/nothing"):
        assert status(f"{base}{outside}") == 404
    assert status(f"http://127.0.0.1:{port}/page.html") == status(f"http://127.0.0.1:{port}/") == 404
    assert serve_page(folder / "page.html") == (port, path)
    with pytest.raises(UserError, match="missing"):
        serve_page(folder / "missing.html")
    shown = []
    monkeypatch.setitem(sys.modules, "google.colab", None)
    monkeypatch.setattr("IPython.display.display", shown.append)
    show_page(folder / "page.html", 300)
    assert shown[0].src == f"{base}/page.html" and shown[0].height == 300
