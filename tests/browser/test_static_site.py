"""A site of several archives, from disk: one more axis, and thumbnails where they are large enough."""

import pytest
from page_kit import state, texts

from dm_generations.export.manifest import build_manifest, thumbnail_path
from dm_generations.export.site import write_joint_page

pytestmark = pytest.mark.browser

SIDE = 40  # of a thumbnail


@pytest.fixture
def site(tmp_path, make_entry, write_image):
    """Two archives with one prompt in common, whose images have the same key."""
    manifests = {}
    for number, prompts in enumerate((("rocket", "castle"), ("<b>boat", "rocket")), 1):
        entries = []
        for prompt_id, prompt in enumerate(prompts, 1):
            file = f"{prompt_id:04d}_x/a.webp"
            for path in (file, thumbnail_path(file)):
                write_image(tmp_path / f"{number}_x" / path, shade=100 * number)
            entries.append(make_entry(file, prompt_id=prompt_id, prompt=prompt, score=20.0 + number, key1=7))
        manifests[f"{number}_x"] = build_manifest("images", "x.db", entries)
        manifests[f"{number}_x"]["thumbnails"] = {"folder": "thumbs", "side": SIDE}
    write_joint_page(tmp_path, manifests, ["a.db", "b.db"])
    return tmp_path


@pytest.fixture
def opened(page, site):
    page.goto((site / "index.html").as_uri())
    page.locator("#browser[data-view] .tile").first.wait_for()
    return page


def test_archives_are_an_axis(opened):
    assert texts(opened, "#archive") == ["a.db, b.db"] and texts(opened, "#prompts .text") == [
        "rocket",
        "castle",
        "<b>boat",
    ]
    assert texts(opened, "#images .score") == ["22.00"] and state(opened)["a"] == "b.db"
    opened.get_by_label("archive").fill("0")
    opened.locator("#images .score", has_text="21.00").wait_for()
    assert state(opened)["a"] == "a.db"
    opened.keyboard.press("Escape")
    opened.goto(opened.url.partition("#")[0] + "#view=grid&prompt=1&rows=archive&cols=seed")
    opened.reload()
    opened.locator(".cell .tile img").nth(1).wait_for()
    assert texts(opened, ".row-label") == ["a.db", "b.db"] and opened.locator(".cell .tile img").count() == 2
    assert opened.evaluate("violations") == []


def test_thumbnails_are_taken_for_small_images(opened):
    image = "document.querySelector('#images img').currentSrc"
    opened.wait_for_function(f"() => {image} && !{image}.includes('thumbs')")
    opened.locator(
        "#prompts img[src*='2_x/0002_x/thumbs/a.webp'], #prompts img[src*='1_x/0001_x/thumbs/a.webp']"
    ).wait_for()
    opened.locator("#size").fill("32")
    opened.reload()
    opened.wait_for_function(f"() => {image}.includes('thumbs')")
    assert opened.evaluate("violations") == []
