"""The page in a real browser, from disk, over small folders of images."""

import base64
import functools
import hashlib
import http.server
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading

import pytest
from helpers import ROOT
from page_kit import HOSTILE, open_folder, state, texts

from dm_generations.cli import build_parser
from dm_generations.export.manifest import GalleryEntry, build_manifest, write_manifest
from dm_generations.paths import shipped
from dm_generations.pipelines.sweep import parse_key

pytestmark = pytest.mark.browser


def count_broken(page) -> int:
    """Images of the grid that did not load, after asking for all of them."""
    return page.evaluate(
        """async () => {
          const images = [...document.querySelectorAll("#images img")];
          images.forEach((image) => { image.loading = "eager"; });
          await Promise.allSettled(images.map((image) => image.decode()));
          return images.filter((image) => !image.naturalWidth).length;
        }"""
    )


def test_policy_names_the_script_and_the_style_that_the_page_has():
    source = shipped("samplebrowser.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', source)[1]
    assert policy.startswith("default-src 'none';") and "http" not in policy and "unsafe" not in policy
    for tag in ("script", "style"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy, f"<{tag}> was edited; its hash is now sha256-{digest}"


def test_page_is_what_its_parts_make():
    build = runpy.run_path(str(ROOT / "browser" / "build.py"))["build"]
    page = (ROOT / "samplebrowser.html").read_text(encoding="utf-8")
    assert page == build(), "browser/ was edited: run python browser/build.py"


def test_page_is_one_file_without_remote_assets():
    source = shipped("samplebrowser.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//cdn|@import|\burl\([^)]", source)


def test_opens_on_the_best_settings_with_images_best_first(page, sweep):
    open_folder(page, sweep)
    assert texts(page, "#prompts .text") == ["rocket", "castle"]
    assert state(page) == {"prompt": "1", "k": "50", "p": "0.9", "t": "1", "c": "10", "sc": "1"}
    assert texts(page, "#images .score") == ["30.00", "29.00"]
    assert count_broken(page) == 0
    assert page.evaluate("violations") == []


def test_sliders_hold_only_values_that_exist_and_say_off(page, sweep):
    open_folder(page, sweep)
    assert texts(page, ".axis label") == ["top k", "top p", "cond scale"]
    assert texts(page, ".axis:has(#axis-top_k) .ticks span") == ["50", "256", "off"]
    assert texts(page, ".axis:has(#axis-top_p) .ticks span") == ["0.9", "off"]
    assert texts(page, "#fixed > span") == ["temperature 1", "unconditional prompt none"]


def test_arrow_keys_move_a_slider_and_back_and_forward_return(page, sweep):
    open_folder(page, sweep)
    page.get_by_label("top k").focus()
    page.keyboard.press("ArrowRight")
    assert state(page)["k"] == "256"
    assert page.get_by_label("top k").get_attribute("aria-valuetext") == "256"
    assert texts(page, "#images .score") == ["29.00", "28.00"]
    page.get_by_label("top p").focus()
    page.keyboard.press("ArrowRight")
    assert (state(page)["k"], state(page)["p"]) == ("256", "1")
    page.go_back()
    assert (state(page)["k"], state(page)["p"]) == ("256", "0.9")
    assert page.get_by_label("top p").input_value() == "0"
    page.go_back()
    assert state(page)["k"] == "50"
    page.go_forward()
    assert texts(page, "#images .score") == ["29.00", "28.00"]


def test_missing_combination_goes_to_the_nearest_and_says_so(page, sweep):
    open_folder(page, sweep)
    page.get_by_label("top k").fill("2")
    assert (state(page)["k"], state(page)["c"]) == ("0", "1")
    notice = page.locator("#notice")
    assert notice.inner_text() == "No images with exactly these settings; nearest: cond scale 1."
    page.get_by_label("top p").fill("1")
    assert notice.inner_text() == ""


@pytest.mark.parametrize(
    ("hash", "expected"),
    [
        ("#prompt=4&k=0&p=1&t=1&c=10&sc=1", {"prompt": "4", "k": "0", "p": "1", "c": "10"}),
        ("#prompt=4&k=200&c=9", {"prompt": "4", "k": "256", "c": "10"}),
        ("#prompt=99&k=<script>&p=NaN&sc=-1&image=9e9", {"prompt": "1"}),
        ("#%E0%A4%A&&==&prompt=%00", {"prompt": "1"}),
    ],
)
def test_address_restores_the_state_or_the_nearest_there_is(page, sweep, hash, expected):
    open_folder(page, sweep, hash)
    assert expected.items() <= state(page).items()
    assert page.locator("#images li").count() == 2


def test_search_narrows_the_prompts_and_choosing_one_keeps_the_settings(page, sweep):
    open_folder(page, sweep, "#prompt=1&k=256&p=1&t=1&c=1&sc=1")
    page.get_by_label("Search prompts").fill("CAST")
    assert texts(page, "#prompts .text") == ["castle"]
    page.get_by_role("button", name="castle").click()
    assert state(page) == {"prompt": "4", "k": "256", "p": "1", "t": "1", "c": "1", "sc": "1", "find": "CAST"}
    assert page.locator("#prompt").inner_text() == "castle"
    page.get_by_label("Search prompts").fill("nothing like it")
    assert page.locator("#prompts li").count() == 0
    assert page.locator("#found").inner_text()


def test_dialog_shows_the_row_and_back_or_escape_leaves_it(page, sweep):
    open_folder(page, sweep)
    page.locator("#images button").first.click()
    dialog = page.locator("#large")
    dialog.wait_for()
    assert state(page)["image"] == "1.4294967295"
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**image=1.4294967294*")
    facts = dict(zip(texts(page, "#facts dt"), texts(page, "#facts dd"), strict=True))
    assert facts["key"] == "1 4294967294" and facts["CLIP score"] == "29.00" and facts["archive"] == "tiny.db"
    assert facts["file"] == "0001_rocket/k=50,p=0.9,c=10.0_01.png"
    assert facts["SHA-256 of the codec"] == "0123456789abcdef…"
    assert facts["score of the prompt's tokens"] == "26.50" and facts["log-probability"] == "-3.50"
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    page.wait_for_url(lambda url: "image" not in url)
    page.go_forward()
    dialog.wait_for()
    page.go_back()
    dialog.wait_for(state="hidden")


def test_size_and_sharp_pixels_change_the_images(page, sweep):
    open_folder(page, sweep)
    image = page.locator("#images img").first
    page.get_by_label("Size").fill("320")
    assert round(image.bounding_box()["width"]) in range(316, 321)
    page.get_by_label("Sharp pixels").check()
    assert image.evaluate("(image) => getComputedStyle(image).imageRendering") == "pixelated"


def test_every_control_has_a_name_and_every_image_a_text(page, sweep):
    open_folder(page, sweep)
    page.locator("#images button").first.click()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, button")].filter((node) => !(node.labels?.length
            || node.ariaLabel || node.textContent.trim() || node.querySelector("img[alt]")))
            .map((node) => node.outerHTML)"""
    )
    assert unnamed == []
    assert page.locator("#images img").first.get_attribute("alt") == "Image 1, score 30.00: rocket"


@pytest.mark.parametrize("width", [400, 1100])
def test_nothing_sticks_out_sideways(page, sweep, width):
    page.set_viewport_size({"width": width, "height": 700})
    open_folder(page, sweep)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 400:
        assert not page.get_by_label("Search prompts").is_visible()
        page.get_by_role("button", name="Choose a prompt").click()
        page.get_by_role("button", name="castle").click()
        assert page.locator("#prompt").inner_text() == "castle"


@pytest.fixture
def hostile(tmp_path, make_entry, write_image):
    """One image for each hostile text, which is prompt, unconditional prompt and archive name at once."""
    entries = []
    for number, (name, text) in enumerate(HOSTILE.items(), start=1):
        write_image(tmp_path / f"{name}.png")
        settings = dict(prompt_id=number, prompt=text, sc_prompt_id=number, sc_prompt=text)
        entries.append(make_entry(f"{name}.png", **settings))
    write_manifest(tmp_path, build_manifest("images", HOSTILE["markup"], entries))
    return tmp_path


def show_image(page, number: int, name: str):
    page.evaluate("(number) => { location.hash = `prompt=${number}&image=1.2`; }", number)
    page.locator("#facts bdi", has_text=f"{name}.png").wait_for()


def test_hostile_text_is_only_text(page, hostile):
    open_folder(page, hostile)
    elements = page.evaluate("document.querySelectorAll('script, style, svg, iframe, a, b').length")
    for number, (name, text) in enumerate(HOSTILE.items(), start=1):
        show_image(page, number, name)
        shown = page.locator("#prompt").text_content()
        if text and text.isprintable():
            assert shown == text
        assert not re.search("[\x00-\x1f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
        assert count_broken(page) == 0
    assert page.evaluate("document.querySelectorAll('script, style, svg, iframe, a, b').length") == elements
    assert page.evaluate("'pwned' in window") is False
    assert page.evaluate("violations") == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 1100


def test_a_note_of_other_settings_stays_on_the_page_whatever_they_are(page, hostile):
    open_folder(page, hostile)
    page.locator("#prompts button").nth(list(HOSTILE).index("long")).click()
    assert page.locator("#notice").inner_text().startswith("No images with exactly these settings")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1100


def test_policy_stops_markup_that_did_get_in(page, sweep, trouble):
    failures = []
    page.on("requestfailed", lambda request: failures.append((request.url, request.failure)))
    open_folder(page, sweep)
    page.evaluate(
        """async () => {
          document.body.insertAdjacentHTML("beforeend",
            `<img src="missing.png" onerror="window.pwned = 1"><img src="https://example.invalid/x.png">`);
          const script = Object.assign(document.createElement("script"), {textContent: "window.pwned = 2"});
          document.body.append(script);
          await fetch("https://example.invalid/").catch(() => 0);
        }"""
    )
    page.locator("img[src='missing.png']").wait_for()
    assert page.evaluate("'pwned' in window") is False
    assert ("https://example.invalid/x.png", "csp") in failures
    trouble.remove("request: https://example.invalid/x.png")  # begun, and stopped before it left
    assert sorted(page.evaluate("violations")) == [
        "connect-src https://example.invalid/",
        "img-src https://example.invalid/x.png",
        "script-src-attr inline",
        "script-src-elem inline",
    ]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_command_means_exactly_the_prompt_to_a_shell(page, hostile, tmp_path):
    open_folder(page, hostile)
    for number, (name, text) in enumerate(HOSTILE.items(), start=1):
        show_image(page, number, name)
        command = page.locator("#command").text_content()
        if name in ("nul", "surrogate"):
            assert command == "" and page.locator("#copy").is_hidden()
            continue
        assert not re.search("[\x00-\x09\x0b-\x1f\u2028\u202e]", command)
        echo = 'python() { printf "%s\\0" "$@" ""; }; set -H\n' + command
        environment = os.environ | {"LC_ALL": "C.UTF-8"}
        printed = subprocess.check_output(["bash", "-c", echo], env=environment, cwd=tmp_path)
        printed_words = printed.decode().removesuffix("\0\0").split("\0\0-m\0")
        one, generate, decode = (words.removeprefix("-m\0").split("\0") for words in printed_words)
        assert [words[:2] for words in (one, generate, decode)] == [
            ["dm_generations", command] for command in ("decode", "generate", "decode")
        ]
        alone = build_parser().parse_args(one[1:])
        assert (alone.prompt_texts, alone.sc_prompt_texts) == ([text], [text])
        args = build_parser().parse_args(generate[1:])
        assert build_parser().parse_args(decode[1:]).db == args.db
        assert (args.prompts, args.sc_prompts, args.db.name) == ([text], [text], "regenerated.db")
        settings = (args.top_k, args.top_p, args.temperature, args.cond_scale)
        assert settings == ([50], [0.9], [1.0], [3.0])
        facts = dict(zip(texts(page, "#facts dt"), texts(page, "#facts dd"), strict=True))
        assert [parse_key(text) for text in args.keys] == [tuple(map(int, facts["key"].split()))]
        assert alone.where == [f"key={args.keys[0]}", "top_k=50", "top_p=0.9", "temperature=1", "cond_scale=3"]
    assert not (tmp_path / "pwned").exists()


def test_command_decodes_with_the_codec_and_the_decoder_of_the_image(page, tmp_path, make_entry, write_image):
    entry = make_entry("a.png", codec_name="my codec", decoder="x", decoding=1)
    write_image(tmp_path / entry.file)
    decoder = {"name": "sharp", "sha256": "0" * 64, "steps": "ddim50", "eta": 0.5, "clip_denoised": True, "seed": 3}
    write_manifest(tmp_path, build_manifest("images", "a.db", [entry], decoder))
    open_folder(page, tmp_path)
    page.locator("#images button").first.click()
    command = page.locator("#command").text_content().partition("\n\n")[0]
    args = build_parser().parse_args(shlex.split(command.replace("\\\n", ""))[3:])
    assert (args.codec, args.decoder, args.decoder_steps, args.eta) == ("my codec", "sharp", "ddim50", 0.5)
    assert (args.clip_denoised, args.decoder_seed, args.decoder_n) == (True, 3, 2)
    assert "sharp, ddim50 steps, seed 3" in texts(page, "#facts dd")


def test_command_draws_as_the_image_was_drawn_and_none_is_shown_where_none_can(page, tmp_path, make_entry, write_image):
    entries = [
        make_entry("a.png", rank=0, dtype="bfloat16"),
        make_entry("b.png", rank=1, dtype="float32", init_count=7),
        make_entry("c.png", rank=2, dtype="float32"),
        make_entry("d.png", rank=3, model="my mega", sampler_version=1001, dtype="float16"),
        make_entry("e.png", rank=4, model=None, sampler_version=None),
        make_entry("f.png", rank=5, sampler_version=7),
    ]
    for entry in entries:
        write_image(tmp_path / entry.file)
    write_manifest(tmp_path, build_manifest("images", "a.db", entries))
    open_folder(page, tmp_path)
    commands, given = [], []
    # An image is named by its model and key; those of one key are numbered.
    names = [
        "m=&image=1.2",
        "m=&image=1.2.1",
        "m=&image=1.2.2",
        "m=my+mega&image=1.2",
        "m=%3F&image=1.2",
        "m=&image=1.2.3",
    ]
    for name, entry in zip(names, entries, strict=True):
        page.evaluate("(name) => { location.hash = `prompt=1&${name}`; }", name)
        page.locator("#facts bdi", has_text=entry.file).wait_for()
        decode, _, generate = page.locator("#command").text_content().partition("\n\n")
        assert decode.startswith("python -m dm_generations decode") and ("my mega" in decode) == ("mega" in name)
        commands.append(generate.partition("\npython")[0])
        given.append("initial tokens" in texts(page, "#facts dt"))
    assert commands[0].endswith("--dtype bfloat16") and commands[1] == "" and commands[2].endswith("--keys 1:2")
    words = shlex.split(commands[3].replace("\\\n", ""))
    assert words[-6:] == ["--model", "my mega", "--rng", "dalle-mini", "--dtype", "float16"]
    assert commands[4:] == ["", ""]
    assert given == [False, True, *[False] * 4]


def test_special_names_load_and_paths_outside_do_not(page, tmp_path, make_entry, write_image):
    folder = tmp_path / "out"
    names = [
        "100% #1?a=b&c;d+e'f~.png",
        "a%20b.png",
        "日本 🚀\u202e.png",
        "..dots..png",
        '"><img src=x>/b.png',
    ]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"not-utf8-\xff.png"))
    if os.name == "nt":
        names = names[1:4]
    outside = ["../outside.png", "/etc/x.png", "//host/share/x.png", "a/../../outside.png", "..\\outside.png"]
    for name in names:
        write_image(folder / name)
    write_image(tmp_path / "outside.png")
    entries = [make_entry(name, rank=rank) for rank, name in enumerate([*names, *outside])]
    write_manifest(folder, build_manifest("images", "a.db", entries))
    open_folder(page, folder)
    assert page.locator("#images li").count() == len(entries)
    assert page.locator("#images img[src]").count() == len(names)
    assert page.locator("#images .missing").count() == len(outside)
    assert count_broken(page) == len(outside)


def test_gallery_shows_pages_with_their_scores(page, tmp_path, write_image):
    settings = dict(prompt_id=1, prompt="rocket", sc_prompt_id=1, sc_prompt=None, top_k=0, top_p=1.0)
    settings |= dict(temperature=1.0, cond_scale=3.0)
    entries = []
    for number, scores in enumerate([(30.0, 20.0), (None,)]):
        write_image(tmp_path / f"g{number}.png")
        entries.append(GalleryEntry(f"g{number}.png", **settings, scores=scores, page=number))
    write_manifest(tmp_path, build_manifest("gallery", "a.db", entries))
    open_folder(page, tmp_path, "#image=page+1")
    assert texts(page, "#images .score") == ["scores 30.00 to 20.00", "no scores"]
    assert page.locator("#large-title").inner_text() == "Gallery, page 1"
    assert page.locator("#command").text_content().endswith("--n 3")
    assert count_broken(page) == 0


def test_without_a_manifest_the_page_says_how_to_make_one(page, tmp_path):
    shutil.copy(shipped("samplebrowser.html"), tmp_path)
    open_folder(page, tmp_path)
    assert page.locator("#message-title").inner_text() == "No images here yet"
    assert page.locator("#message-command").inner_text() == "python -m dm_generations decode"


def test_page_finds_the_folder_that_decode_makes_beside_it(page, sweep, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(sweep, folder / "images")
    shutil.copy(shipped("samplebrowser.html"), folder)
    open_folder(page, folder)
    assert texts(page, "#prompts .text") == ["rocket", "castle"]
    assert count_broken(page) == 0


@pytest.mark.parametrize(
    ("manifest", "title"),
    [
        ("{", "The list of images cannot be read"),
        ("{version: 1, mode: 'images'}", "The list of images cannot be read"),
        ("{version: 3, mode: 'images'}", "This page is older than the images"),
        ("{version: 1, mode: 'images', prompts: [], sc_prompts: [], groups: []}", "No images"),
    ],
)
def test_manifest_that_cannot_be_shown_gets_a_message(browser, tmp_path, manifest, title):
    # Not the silent page: a manifest that breaks off is a script error.
    page = browser.new_page()
    shutil.copy(shipped("samplebrowser.html"), tmp_path)
    (tmp_path / "manifest.js").write_text(f"window.DM_MANIFEST = {manifest};")
    open_folder(page, tmp_path)
    assert page.locator("#message-title").inner_text() == title
    page.close()


def test_page_works_from_a_server_too(page, sweep):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=sweep)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.goto(f"http://127.0.0.1:{server.server_port}/samplebrowser.html#prompt=4")
        page.locator("#browser:not([hidden])").wait_for()
        assert count_broken(page) == 0
        assert page.evaluate("violations") == []
        server.shutdown()


def test_72_000_images_load_and_a_large_group_comes_in_parts(page, tmp_path, make_entry):
    def entries():
        for group in range(720):
            prompt_id, top_k = group // 48, group % 48 + 1
            settings = dict(prompt_id=prompt_id, prompt=f"prompt {prompt_id}", top_k=top_k)
            for rank in range(100 if group else 1_000):
                file = f"{prompt_id:04d}_prompt/0001_k={top_k},p=0.9,t=1.0,c=3.0_{rank:02d}_None.png"
                row = dict(rank=rank, score=30.123456 - rank / 100, key0=2**32 - 1 - rank, key1=2**32 - 1)
                yield make_entry(file, **settings, **row)

    write_manifest(tmp_path, build_manifest("images", "big.db", entries()))
    size = (tmp_path / "manifest.js").stat().st_size
    assert size < 4_000_000, f"72,900 images take {size:,} bytes of manifest"
    open_folder(page, tmp_path, "#prompt=0&k=1")
    assert page.locator("#totals").inner_text() == "72,900 images, 15 prompts"
    assert page.locator("#images li").count() == 240
    page.get_by_role("button", name="Show 240 of 760 more").click()
    assert page.locator("#images li").count() == 480
