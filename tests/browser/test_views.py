"""Grid, compare, arena, scores, judgements and saving: in a real browser, over small folders of images."""

import functools
import hashlib
import http.server
import io
import json
import re
import threading
from pathlib import Path

import pytest
from decode_kit import build_manifest_1, write_manifest_1
from page_kit import HOSTILE, open_folder, state, texts
from PIL import Image

from dm_generations.export.manifest import GalleryEntry, build_manifest, write_manifest

pytestmark = pytest.mark.browser

VIEWS = ["strip", "grid", "compare", "arena", "scores"]
KEY = {"strip": "s", "grid": "g", "compare": "c", "arena": "a", "scores": "m"}


def sources(page, selector) -> list[str]:
    """Names of the image files, in the order of the page's elements."""
    return page.locator(selector).evaluate_all("(all) => all.map(({src}) => decodeURIComponent(src.split('/').at(-1)))")


def exported(page) -> list[dict]:
    page.locator("#judgements").click()
    with page.expect_download() as download:
        page.locator("#export").click()
    page.keyboard.press("Escape")
    content = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert (content["format"], content["version"]) == ("dm-generations-ratings", 1)
    return content["judgements"]


@pytest.fixture
def grid(page, sweep):
    open_folder(page, sweep, "#view=grid&prompt=1&p=1&rows=top_k&cols=cond_scale")
    page.locator(".cell .tile").first.wait_for()
    return page


def test_grid_has_a_cell_for_each_pair_of_values(grid):
    assert texts(grid, ".column-label") == ["1", "10"]
    assert texts(grid, ".row-label") == ["50", "256", "off"]
    assert texts(grid, ".cell > .number") == ["21.00", "30.00", "20.00", "29.00", "21.00"]
    assert grid.locator(".cell .none").count() == 1  # no images of this prompt with top k off and cond scale 10
    assert grid.locator("#axis-top_k").count() == 0 and grid.locator("#axis-top_p").is_visible()
    assert grid.evaluate("violations") == []


def test_each_cell_shows_the_same_seed_or_the_best_few(grid):
    best = sources(grid, ".cell img")
    grid.locator("#cell").select_option("seed")
    assert [name[-6:] for name in sources(grid, ".cell img")] == ["00.png"] * 5
    grid.locator("#seed").fill("1")
    grid.wait_for_function("() => document.querySelector('.cell img')?.src.endsWith('01.png')")
    assert [name[-6:] for name in sources(grid, ".cell img")] == ["01.png"] * 5
    assert state(grid)["seed"] == "2"
    grid.locator("#cell").select_option("4")
    grid.locator(".cell.of-4").first.wait_for()
    assert len(sources(grid, ".cell img")) == 2 * len(best)


def test_rows_columns_and_pages_are_any_axes_and_can_be_swapped(grid):
    grid.get_by_label("Swap rows and columns").click()
    assert texts(grid, ".column-label") == ["50", "256", "off"] and state(grid)["rows"] == "cond_scale"
    grid.locator("#rows").select_option("prompt")
    assert texts(grid, ".row-label") == ["rocket", "castle"] and grid.locator("#prompt").is_hidden()
    grid.locator("#page1").select_option("top_p")
    assert texts(grid, ".band") == ["top p 0.9", "top p off"]
    assert len(texts(grid, ".row-label")) == 4 and grid.locator("#axis-top_p").count() == 0
    grid.go_back()
    assert texts(grid, ".band") == []
    grid.locator("#cols").select_option("prompt")  # rows take what the columns had
    assert (state(grid)["rows"], state(grid)["cols"]) == ("top_k", "prompt")
    grid.locator("#rows").select_option("seed")
    assert texts(grid, ".row-label") == ["#1", "#2"]


def test_search_chooses_the_prompts_of_a_grid_and_is_in_the_address(grid):
    grid.locator("#rows").select_option("prompt")
    grid.get_by_label("Search prompts").fill("cas")
    grid.wait_for_function("() => document.querySelectorAll('.row-label').length === 1")
    assert texts(grid, ".row-label") == ["castle"] and state(grid)["find"] == "cas"
    open_folder(grid, page_folder(grid), "#" + grid.url.partition("#")[2])
    grid.locator(".row-label").wait_for()
    assert texts(grid, ".row-label") == texts(grid, "#prompts .text") == ["castle"]
    assert texts(grid, ".column-label") == ["1", "10"]


def test_keys_move_in_the_grid_and_open_and_leave_an_image(grid):
    grid.locator(".cell .tile").first.focus()
    for key in ("ArrowDown", "ArrowRight"):
        grid.keyboard.press(key)
        grid.wait_for_timeout(50)
    grid.keyboard.press("Enter")
    grid.locator("#large").wait_for()
    facts = dict(zip(texts(grid, "#facts dt"), texts(grid, "#facts dd"), strict=True))
    assert (facts["top k"], facts["cond scale"]) == ("256", "10")
    grid.keyboard.press("Escape")
    grid.locator("#large").wait_for(state="hidden")
    assert "image" not in state(grid)
    grid.keyboard.press("x")
    assert state(grid)["rows"] == "cond_scale"


def test_scores_can_be_colours(grid):
    for show in ("outline", "heat"):
        grid.locator("#show").select_option(show)
        grid.locator(f".cell .{show}, .cell.{show}").first.wait_for()
        colours = grid.locator(f".tile.{show}, .cell.{show}").evaluate_all(
            "(all) => all.map((one) => one.style.getPropertyValue('--heat'))"
        )
        assert len(colours) == 5 and colours[0] == colours[4] != colours[1]
        assert grid.locator("#legend").is_visible()


def test_only_cells_in_sight_are_elements_and_labels_stay(page, tmp_path, make_entry):
    def entries():
        for prompt_id in range(1, 401):
            for top_k in range(1, 41):
                group = dict(prompt_id=prompt_id, prompt=f"prompt {prompt_id}", top_k=top_k)
                yield make_entry(f"{prompt_id}/{top_k}.png", **group)

    write_manifest(tmp_path, build_manifest("images", "large.db", entries()))
    open_folder(page, tmp_path, "#view=grid&rows=prompt&cols=top_k")
    page.locator(".cell").first.wait_for()
    assert page.locator(".cell").count() < 150
    page.locator("#grid").evaluate("(box) => { box.scrollTop = box.scrollHeight; box.scrollLeft = box.scrollWidth; }")
    page.locator(".row-label", has_text=re.compile("^prompt 400$")).wait_for()
    page.locator(".column-label", has_text=re.compile("^40$")).wait_for()
    assert page.locator(".cell").count() < 150
    box, label = page.locator("#grid").bounding_box(), page.locator(".row-label").last.bounding_box()
    assert label["x"] - box["x"] < 4 and page.locator(".column-label").last.bounding_box()["y"] - box["y"] < 60


def test_large_view_keeps_the_seed_when_a_setting_changes(page, sweep):
    open_folder(page, sweep, "#prompt=1&k=50&p=1&c=10")
    page.locator("#images .tile").nth(1).click()
    page.locator("#large").wait_for()
    seed = state(page)["image"]
    page.locator("#large").get_by_label("top k").fill("1")
    page.locator("#facts dd", has_text=re.compile("^256$")).wait_for()
    assert state(page)["image"] == seed and state(page)["k"] == "256"
    page.keyboard.press("Escape")
    page.locator("#large").wait_for(state="hidden")
    page.wait_for_url(lambda url: "image" not in url and "k=256" in url)


def test_equal_images_are_one_with_their_number(page, tmp_path, make_entry, write_image):
    digests = [hashlib.md5(text).hexdigest() for text in (b"a", b"b", b"a", b"a")]
    entries = [make_entry(f"{i}.png", rank=i, score=9.0 - i, key1=i, md5=md5) for i, md5 in enumerate(digests)]
    for entry in entries:
        write_image(tmp_path / entry.file)
    write_manifest(tmp_path, build_manifest("images", "a.db", entries))
    open_folder(page, tmp_path)
    assert sources(page, "#images img") == ["0.png", "1.png"] and texts(page, "#images .same") == ["\u00d73"]
    page.locator("#images .tile").first.click()
    assert digests[0] in texts(page, "#facts dd")


def test_sorting_and_filtering(page, tmp_path, make_entry):
    scores, times = [9.0, 8.0, None], [3.0, 1.0, 2.0]
    rows = enumerate(zip(scores, times, strict=True))
    entries = [
        make_entry(f"{rank}.png", rank=rank, score=score, time=time, key1=rank, row_id=9 - rank)
        for rank, (score, time) in rows
    ]
    write_manifest(tmp_path, build_manifest("images", "a.db", entries))
    open_folder(page, tmp_path)
    orders = {"worst": [1, 0, 2], "newest": [0, 2, 1], "oldest": [1, 2, 0], "seed": [2, 1, 0], "best": [0, 1, 2]}
    for sort, order in orders.items():
        page.locator("#sort").select_option(sort)
        page.wait_for_timeout(50)
        assert sources(page, "#images img") == [f"{i}.png" for i in order], sort
    page.get_by_label("Score from").fill("8.5")
    page.keyboard.press("Enter")
    page.wait_for_timeout(50)
    assert sources(page, "#images img") == ["0.png"] and state(page)["min"] == "8.5"


def test_pinned_images_and_settings_are_compared(page, sweep):
    open_folder(page, sweep, "#prompt=1&k=50&p=1&c=10")
    page.locator("#images .tile").first.focus()
    page.keyboard.press("p")
    page.get_by_label("top k").fill("1")
    page.keyboard.press("c")
    page.get_by_role("button", name="Pin this setting").click()
    page.locator(".pinned article").nth(1).wait_for()
    different = set(texts(page, ".pinned dt.different"))
    assert different == {"top k", "seed", "CLIP score"}
    page.locator("#compare-mode").select_option("slider")
    page.get_by_label("How much of image A").fill("20")
    clip = page.locator(".stage .over").evaluate("(image) => getComputedStyle(image).clipPath")
    assert clip == "inset(0px 0px 0px 20%)"
    page.locator("#compare-mode").select_option("blink")
    page.get_by_role("button", name="Stop").click()
    before = page.locator(".stage .over").is_visible()
    page.locator("#compare .stage img").first.hover()
    page.get_by_role("button", name="Other image").click()
    assert page.locator(".stage .over").is_visible() != before
    link = page.url
    open_folder(page, page_folder(page), "#" + link.partition("#")[2])
    page.locator(".pinned article").nth(1).wait_for()
    assert state(page)["mode"] == "blink"
    page.get_by_role("button", name="Remove", exact=True).first.click()
    page.wait_for_timeout(100)
    assert page.locator(".pinned article").count() == 1


def page_folder(page) -> Path:
    return Path(page.evaluate("decodeURIComponent(location.pathname)")).parent


def test_favourites_tags_and_ratings_by_keyboard_stay_and_are_exported(page, sweep):
    open_folder(page, sweep, "#prompt=1&k=50&p=1&c=10")
    page.locator("#images .tile").first.focus()
    page.keyboard.press("f")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("0")
    page.keyboard.press("t")
    page.locator("#tag").fill("<b>round</b>")
    page.keyboard.press("Enter")
    assert texts(page, "#images .mark") == ["♥", "10 #"]
    open_folder(page, sweep, "#prompt=1&k=50&p=1&c=10")
    assert texts(page, "#images .mark") == ["♥", "10 #"]
    page.locator("#only").select_option("#<b>round</b>")
    page.wait_for_timeout(50)
    assert [name[-6:] for name in sources(page, "#images img")] == ["01.png"]
    assert page.locator("b").count() == 0
    judgements = exported(page)
    assert [one["kind"] for one in judgements] == ["favourite", "score", "tag"]
    assert [one["value"] for one in judgements] == [True, 10, {"name": "<b>round</b>", "on": True}]
    (image,) = judgements[0]["images"]
    expected = dict(prompt="rocket", sc_prompt=None, top_k=50, top_p=1, temperature=1, cond_scale=10)
    expected |= dict(key0=1, key1=4294967295, archive="tiny.db", sampler_version=1)
    assert expected.items() <= image.items()


def test_arena_hides_the_settings_and_records_what_was_shown(page, sweep):
    open_folder(page, sweep, "#view=arena&prompt=4&k=50")
    for key in ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"):
        page.locator(".contender img").nth(1).wait_for()
        assert set(state(page)) == {"view", "prompt"}
        assert not re.search(r"top k|cond scale", page.locator("#view-arena").inner_text())
        page.keyboard.press(key)
        page.wait_for_timeout(150)
    judgements = exported(page)
    assert [one["kind"] for one in judgements] == ["pair"] * 4
    left, right = ({"left": 0, "right": 1}[side] for side in ("left", "right"))
    names = ["first", "second"]
    assert judgements[0]["value"] == names[judgements[0]["order"][left]]
    assert judgements[1]["value"] == names[judgements[1]["order"][right]]
    assert [one["value"] for one in judgements[2:]] == ["tie", "bad"]
    assert all(sorted(one["order"]) == [0, 1] and len(one["images"]) == 2 for one in judgements)
    page.locator("#strengths-box summary").click()
    page.locator("#strengths table, #strengths p").first.wait_for()  # the box tells that it is open a moment later
    assert page.locator("#strengths table, #strengths p").count() == 1


def test_scores_say_which_value_wins_and_by_how_much(page, sweep):
    open_folder(page, sweep, "#view=scores&prompt=4&of=cond_scale")
    page.locator(".statistics").wait_for()
    assert texts(page, ".statistics tbody th") == ["10", "1"]
    rows = page.locator(".statistics tbody tr").all()
    assert "best" in rows[0].inner_text() and "9.00" in rows[1].inner_text()
    assert page.locator(".statistics svg rect").count() == 48
    page.locator("#scores-axis").select_option("setting")
    page.locator("#scores-scope").select_option("all")
    page.get_by_role("button", name="top k 50, top p off, cond scale 10").wait_for()
    open_folder(page, sweep, "#" + page.url.partition("#")[2])
    page.locator(".statistics").wait_for()
    assert page.locator(".statistics tbody tr").count() == 12  # of both prompts; one has two settings fewer
    images = sum(int(text) for text in texts(page, ".statistics tbody td:nth-child(4)"))
    assert images == sum(int(text) for text in texts(page, "#prompts .count"))
    assert page.locator(".statistics svg rect").count() == 12 * 24
    # Both have the best score at top k 50 and off; against 256 each pair differs by 1.
    row = page.locator(".statistics tbody tr", has_text="top k 256, top p off, cond scale 10").inner_text()
    assert "\u22121.00" in row
    page.get_by_role("button", name="top k 50, top p off, cond scale 10").click()
    page.locator("#view-strip:not([hidden])").wait_for()
    assert {"k": "50", "p": "1", "c": "10"}.items() <= state(page).items()


@pytest.fixture
def served(sweep):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=sweep)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/samplebrowser.html"
        server.shutdown()


def saved(page, format="image/png") -> list[Image.Image]:
    """Save the view; return the images of the downloads."""
    downloads = []
    page.on("download", lambda one: downloads.append(one))
    page.locator("#sheet-body select").select_option(format)
    page.locator("#save-now").click()
    page.locator("#sheet-body [role=status]", has_text="saved").wait_for()
    page.wait_for_timeout(300)
    images = [Image.open(io.BytesIO(Path(one.path()).read_bytes())) for one in downloads]
    assert all(image.format == format.partition("/")[2].upper() for image in images)
    return images


def has_colour(image, colour) -> bool:
    colours = [pixel for _, pixel in image.convert("RGB").getcolors(1 << 24)]
    return any(sum(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 12 for pixel in colours)


@pytest.mark.parametrize("view", ["strip", "grid", "compare"])
def test_a_view_is_saved_with_its_images(page, served, view):
    page.goto(f"{served}#view={view}&prompt=1&k=50&p=1&c=10&pin=1~50~1~1~10~1~~~tiny.db~")
    page.locator(f"[data-view={view}] .tile").first.wait_for()
    page.locator("#save").click()
    (image,) = saved(page, "image/webp" if view == "grid" else "image/png")
    assert has_colour(image, (0, 90, 160)) or has_colour(image, (40, 90, 160))


def test_a_page_from_disk_saves_after_its_folder_was_chosen(page, sweep):
    open_folder(page, sweep, "#view=grid&prompt=1&rows=top_k&cols=cond_scale")
    page.locator(".cell .tile").first.wait_for()
    page.locator("#save").click()
    assert page.locator("#save-now").is_disabled()
    page.locator("#folder").set_input_files(sweep)
    (image,) = saved(page)
    assert has_colour(image, (0, 90, 160))


def test_a_large_view_is_saved_in_parts(page, tmp_path, make_entry):
    entries = [make_entry(f"{k}.png", top_k=k, temperature=t) for k in range(1, 61) for t in (0.5, 1.0)]
    write_manifest(tmp_path, build_manifest("images", "a.db", entries))
    open_folder(page, tmp_path, "#view=grid&rows=temperature&cols=top_k&cell=9")
    page.locator(".cell").first.wait_for()
    page.get_by_label("Size").fill("256")
    page.locator("#save").click()
    page.locator("#folder").set_input_files(tmp_path)
    images = saved(page)
    assert len(images) > 1 and all(max(image.size) <= 8192 for image in images)


@pytest.mark.parametrize("mode", ["images", "gallery"])
def test_manifests_of_version_1_still_open(page, tmp_path, make_entry, write_image, mode):
    settings = dict(prompt_id=1, prompt="rocket", sc_prompt_id=1, sc_prompt=None, top_p=1.0, temperature=1.0)
    entries = [make_entry(f"a/{k}.png", **settings, top_k=k, cond_scale=3.0, dtype="float16") for k in (50, 0)]
    if mode == "gallery":
        entries = [GalleryEntry(f"a/{k}.png", **settings, top_k=k, cond_scale=3.0, scores=(2.5, None)) for k in (50, 0)]
    for entry in entries:
        write_image(tmp_path / entry.file)
    write_manifest(tmp_path, build_manifest(mode, "a.db", entries))
    write_manifest_1(tmp_path, build_manifest_1(mode, "a.db", entries))
    open_folder(page, tmp_path, "#k=50")
    assert sources(page, "#images img") == ["50.png"]
    page.get_by_label("top k").fill("1")
    page.locator("#images .tile").click()
    page.locator("#large").wait_for()
    assert "a/0.png" in texts(page, "#facts dd")
    if mode == "images":
        assert page.locator("#command").text_content().count("--dtype float16") == 1


def test_10_000_prompts_are_searched_and_few_are_elements(page, tmp_path, make_entry):
    entries = (make_entry(f"{i}.png", prompt_id=i, prompt=f"prompt {i} of many") for i in range(1, 10_001))
    write_manifest(tmp_path, build_manifest("images", "a.db", entries))
    open_folder(page, tmp_path)
    assert page.locator("#prompts li").count() < 60
    page.get_by_label("Search prompts").fill("many 9999")
    page.locator("#found", has_text="1 prompt found").wait_for()
    page.keyboard.press("Enter")
    assert page.locator("#prompt").inner_text() == "prompt 9999 of many"
    page.get_by_label("Search prompts").fill("")
    page.locator("#prompts-scroll").evaluate("(box) => { box.scrollTop = box.scrollHeight; }")
    page.locator("#prompts li", has_text="prompt 10000 of many").wait_for()
    assert page.locator("#prompts li").count() < 60


def test_hostile_text_is_only_text_in_every_view(page, tmp_path, make_entry, write_image):
    entries = []
    for number, (name, text) in enumerate(HOSTILE.items(), start=1):
        for top_k in (50, 0):
            file = f"{name}{top_k}.png"
            write_image(tmp_path / file)
            texts_of = dict(prompt=text, sc_prompt=text, model=text or "x")
            entries.append(make_entry(file, prompt_id=number, sc_prompt_id=number, top_k=top_k, **texts_of))
    write_manifest(tmp_path, build_manifest("images", HOSTILE["markup"], entries))
    open_folder(page, tmp_path)
    count = "document.querySelectorAll('script, style, iframe, a, b, img[src=x]').length"
    elements = page.evaluate(count)
    page.locator("#images .tile").first.focus()
    page.keyboard.press("p")
    grids = ["grid&rows=prompt&cols=sc_prompt", "grid&rows=model&cols=prompt&page1=sc_prompt"]
    for view in [*VIEWS, *grids, "strip&only=%23<b>x"]:
        page.evaluate("(v) => { location.hash = location.hash.replace(/view=\\w+&?/, '') + `&view=${v}`; }", view)
        page.wait_for_timeout(250)
        assert page.evaluate(count) == elements
        assert page.evaluate("document.documentElement.scrollWidth") <= 1100
    assert page.evaluate("'pwned' in window") is False
    assert page.evaluate("violations") == []


@pytest.mark.parametrize("width", [400, 1100])
def test_each_view_fits_has_names_for_its_controls_and_opens_by_key(page, sweep, width):
    page.set_viewport_size({"width": width, "height": 700})
    open_folder(page, sweep, "#prompt=1&pin=1~50~1~1~10~1~~~tiny.db~&pin=1~256~1~1~10~1~~~tiny.db~&mode=slider")
    for view in VIEWS:
        page.keyboard.press(KEY[view])
        page.locator(f"#browser[data-view={view}]").wait_for()
        page.wait_for_timeout(150)
        assert page.locator(f"#tab-{view}").get_attribute("aria-selected") == "true"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("input, select, button")]
                .filter((node) => node.checkVisibility() && !(node.labels?.length || node.ariaLabel
                    || node.textContent.trim() || node.querySelector("img[alt]"))).map((node) => node.outerHTML)"""
        )
        assert unnamed == []
    page.keyboard.press("?")
    assert page.locator("#sheet kbd").count() > 10
