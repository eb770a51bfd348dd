"""A headless Chromium for the page; tests skip where there is none, and fail instead where CI is set."""

import os
import shutil
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from dm_generations.export.manifest import build_manifest, write_manifest

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]


def missing(what: str):
    if os.environ.get("CI"):
        pytest.fail(f"{what}; CI must test the page")
    pytest.skip(what)


@pytest.fixture(scope="session")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: pip install playwright")
    executable = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if executable is None:
        missing("no Chromium found: apt-get install chromium")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS) as browser,
    ):
        yield browser


@pytest.fixture
def trouble() -> list[str]:
    """What `page` did and should not have: script errors, dialogs, requests beyond the disk and localhost."""
    return []


@pytest.fixture
def page(browser, trouble):
    """A page that must cause no trouble; it notes in `violations` what its own policy stopped."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: note_request(request.url, trouble))
    page.add_init_script(
        "window.violations = []; addEventListener('securitypolicyviolation',"
        " (event) => violations.push(event.effectiveDirective + ' ' + event.blockedURI));"
    )
    page.set_default_timeout(30_000)
    yield page
    context.close()
    assert trouble == []


def note_request(url: str, trouble: list[str]):
    if not url.startswith(("file:///", "data:,", "http://127.0.0.1:", "blob:http://127.0.0.1:")):
        trouble.append(f"request: {url}")


@pytest.fixture(scope="session")
def write_image():
    def write_image(path: Path, shade: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (shade % 256, 90, 160)).save(path)

    return write_image


@pytest.fixture
def sweep(tmp_path, make_entry, write_image) -> Path:
    """A folder with two prompts, three axes of two or three values with a hole, and two images for each."""
    entries = []
    prompts = {1: "rocket", 4: "castle"}
    for prompt_id, top_k, top_p, cond_scale in product(prompts, (50, 256, 0), (0.9, 1.0), (1.0, 10.0)):
        if (prompt_id, top_k, cond_scale) == (1, 0, 10.0):
            continue
        group = dict(prompt_id=prompt_id, prompt=prompts[prompt_id])
        group |= dict(top_k=top_k, top_p=top_p, cond_scale=cond_scale)
        for rank in range(2):
            file = f"{prompt_id:04d}_{prompts[prompt_id]}/k={top_k},p={top_p},c={cond_scale}_{rank:02d}.png"
            write_image(tmp_path / file, shade=40 * rank)
            score = 20.0 + cond_scale - rank - (top_k == 256)
            key = dict(key0=prompt_id, key1=4294967295 - rank)
            known = dict(codec="0123456789abcdef", tokenized_score=score - 2.5, log_prob=-3.5)
            entries.append(make_entry(file, **group, rank=rank, score=score, **key, **known))
    write_manifest(tmp_path, build_manifest("images", "tiny.db", entries))
    return tmp_path
