"""A live site in a real browser: the pixels are those of `decode`, and every view works without a server's help."""

import base64
import functools
import http.server
import io
import threading

import numpy as np
import pytest
from decode_kit import random_tokens, write_archive_2022
from page_kit import HOSTILE, texts
from PIL import Image
from tiny import CODEBOOK_SIZE, GRID

from dm_generations.archive.selection import ALL
from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore")]

COUNT = 5
# The images of the strip as PNG files, read as the page shows them.
READ_IMAGES = """
async () => Promise.all([...document.querySelectorAll("#images img")].map(async (image) => {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, {width: image.naturalWidth, height: image.naturalHeight});
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL("image/png").split(",")[1];
}))"""


@pytest.fixture(scope="module")
def site(tmp_path_factory, models):
    """A site of two archives: the second has one prompt of the first, with the same tokens in the opposite order."""
    pytest.importorskip("jax2onnx")
    from dm_generations.export.live_site import export_live_site

    folder = tmp_path_factory.mktemp("site")
    tokens = random_tokens(COUNT, GRID**2, CODEBOOK_SIZE)
    archive = write_archive_2022(folder / "a.db", tokens, ("a boat", HOSTILE["markup"], HOSTILE["separators"]))
    other = write_archive_2022(folder / "b.db", tokens[::-1], (HOSTILE["markup"],))
    try:
        export_live_site([archive, other], folder / "site", ALL, str(models.vqgan), None)
    except UserError as error:
        if "npm" not in str(error):
            raise
        pytest.skip(str(error))
    return folder / "site"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def opened(page, site):
    page.set_default_timeout(60_000)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        page.locator("#browser[data-view]").wait_for()
        page.wait_for_function(f"() => document.querySelectorAll('#images img').length === {COUNT}")
        wait_for_images(page, "#images img")
        yield page
        server.shutdown()


def wait_for_images(page, selector: str):
    page.wait_for_function(f"() => [...document.querySelectorAll('{selector}')].every((one) => one.naturalWidth > 1)")


def test_pixels_are_those_of_decode(opened, models):
    shown = [Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB") for image in opened.evaluate(READ_IMAGES)]
    expected = Decoder.load(models.vqgan)(random_tokens(COUNT, GRID**2, CODEBOOK_SIZE))
    assert expected.std() > 10
    np.testing.assert_allclose(np.stack(shown).astype(int), expected, atol=1)
    assert opened.evaluate("violations") == []


def test_views_and_prompts(opened):
    assert texts(opened, "#prompts .count") == [str(COUNT), str(2 * COUNT), str(COUNT)]
    opened.keyboard.press("g")
    opened.locator("#rows").select_option("prompt")
    opened.locator("#cols").select_option("seed")
    opened.locator(".cell .tile img").first.wait_for()
    opened.wait_for_function("() => document.querySelector('.cell .tile img').naturalWidth > 1")
    opened.locator(".cell .tile").first.click()
    wait_for_images(opened, "#large-image")
    opened.keyboard.press("Escape")
    opened.keyboard.press("a")
    wait_for_images(opened, "#arena img")
    assert opened.evaluate("window.pwned") is None and opened.evaluate("violations") == []


def test_archives_are_an_axis(opened):
    opened.set_viewport_size({"width": 1600, "height": 900})  # all columns are in sight: others are not decoded
    opened.evaluate("location.hash = '#view=grid&prompt=2&rows=archive&cols=seed'")
    opened.locator(".cell .tile img").first.wait_for()
    wait_for_images(opened, ".cell img")
    assert texts(opened, ".row-label") == ["a.db", "b.db"]
    # The same tokens stand in the opposite order in the other archive.
    rows = opened.locator("#grid").evaluate(
        """(grid) => {
          const read = (image) => {
            const canvas = document.createElement("canvas");
            Object.assign(canvas, {width: image.naturalWidth, height: image.naturalHeight});
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL();
          };
          const rows = [[], []];
          for (const {place: [row, column], firstChild} of grid.querySelectorAll(".cell")) {
            rows[row][column] = read(firstChild.querySelector("img"));
          }
          return rows;
        }"""
    )
    assert len(rows[0]) == COUNT and rows[0] == rows[1][::-1] != rows[1]


def test_from_disk_it_says_that_it_needs_a_server(page, site):
    page.goto((site / "index.html").as_uri())
    page.locator("#message:not([hidden]) pre", has_text="http.server").wait_for()


def test_a_file_that_is_missing_is_told(page, site, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.route("**/archive-2.db", lambda route: route.fulfill(status=404))
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        page.locator("#message-text", has_text="archive-2.db").wait_for()
        server.shutdown()
