"""Time the page in a headless Chromium, from disk: 71,680 images, of 28 prompts, in grids of 16 x 20 cells.

    python benchmarks/browser.py      # a minute on 2 cores; needs Playwright and Chromium

Prints what a person waits for: the page usable, a step of a slider, another grid, frames while scrolling, and memory.
"Shown" is when all images in sight are loaded and the frame that shows them is drawn.
"""

import os
import shutil
import statistics
import tempfile
from itertools import product
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from dm_generations.export.manifest import ImageEntry, build_manifest, write_manifest

PROMPTS, TEMPERATURES, COND_SCALES, SEEDS = 28, 16, 20, 8
IMAGE_SIZE, IMAGE_FILES = 256, 320
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

# Resolves with the milliseconds from a change until all images in sight are loaded and drawn.
SHOWN = """
async (change) => {
  const started = performance.now();
  if (change) new Function("$", change)((id) => document.getElementById(id));
  const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
  for (;;) {
    await frame();
    const box = document.getElementById("browser").dataset.view === "grid" ? "#grid .tile img" : "#images img";
    const images = [...document.querySelectorAll(box)].filter((image) => {
      const {top, bottom} = image.getBoundingClientRect();
      return bottom > 0 && top < innerHeight;
    });
    if (images.length && images.every((image) => image.complete && image.naturalWidth)) break;
  }
  await frame();
  return performance.now() - (change ? started : 0);
}
"""
SCROLL = """
async () => {
  const box = document.getElementById("grid");
  const started = performance.now();
  let frames = 0, y = 0, direction = 1;
  while (performance.now() - started < 4000) {
    await new Promise((resolve) => requestAnimationFrame(resolve));
    y += direction * 24;
    if (y <= 0 || y >= box.scrollHeight - box.clientHeight) direction = -direction;
    box.scrollTop = y;
    box.scrollLeft = y / 2;
    frames += 1;
  }
  return frames / 4;
}
"""


def write_folder(folder: Path) -> None:
    """Write the manifest, some different images, and a link to one of them for each other file."""
    for number in range(IMAGE_FILES):
        noise = Image.effect_noise((IMAGE_SIZE // 4, IMAGE_SIZE // 4), 60 + number % 40).resize((IMAGE_SIZE,) * 2)
        noise.convert("RGB").save(folder / f"image{number}.png", compress_level=1)
    entries = []
    settings = product(range(PROMPTS), range(TEMPERATURES), range(COND_SCALES))
    for number, (prompt, temperature, cond_scale) in enumerate(settings):
        group = f"{prompt:04d}_prompt/k=0,t={temperature},c={cond_scale}"
        (folder / group).parent.mkdir(exist_ok=True)
        for rank in range(SEEDS):
            file = f"{group}_{rank:02d}.png"
            os.link(folder / f"image{(number * SEEDS + rank) % IMAGE_FILES}.png", folder / file)
            values = (prompt, f"prompt {prompt}", 1, None, 0, 1.0, 0.1 + temperature, 1.0 + cond_scale)
            score = 30 - rank + (temperature - cond_scale) % 7 / 3
            known = dict(row_id=rank, md5=f"{number * SEEDS + rank:032x}", time=1_700_000_000.0 + number)
            entries.append(ImageEntry(file, *values, rank, score, rank, 7 * rank, "embedded/x", 1, **known))
    write_manifest(folder, build_manifest("images", "large.db", entries))


def shown(page: Page, change: str = "") -> float:
    """Return the milliseconds until a change is shown; without one, since the page was opened."""
    return page.evaluate(SHOWN, change)


def memory_of(page: Page) -> tuple[float, float]:
    """Return MB of the page's script, and of its whole process, shared memory counted in part."""
    heap = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
    session = page.context.browser.new_browser_cdp_session()  # type: ignore[union-attr]
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    largest = 0.0
    for process in processes:
        if process["type"] == "renderer":
            text = Path(f"/proc/{process['id']}/smaps_rollup").read_text()
            largest = max(largest, int(text.split("Pss:")[1].split()[0]) / 1e3)
    return heap, largest


def step(name: str, value: int) -> str:
    return f"$('{name}').value = {value}; $('{name}').dispatchEvent(new Event('input'))"


def choose(name: str, value: str) -> str:
    return f"$('{name}').value = '{value}'; $('{name}').dispatchEvent(new Event('change'))"


def report(what: str, milliseconds: list[float]) -> None:
    print(f"{what:56} {statistics.median(milliseconds):6.0f} ms (slowest {max(milliseconds):.0f})", flush=True)


def measure(page: Page, address: str) -> None:
    opened = []
    for _ in range(3):
        page.goto("about:blank")
        page.goto(address)
        opened.append(shown(page))
    report("manifest of 71,680 images: page usable", opened)
    report("strip: a step of a slider", [shown(page, step("axis-cond_scale", value)) for value in range(2, 12)])
    report("grid of 16 x 20: opened", [shown(page, "$('tab-grid').click()")])
    changes = [choose("cell", value) for value in ("seed", "4", "1", "seed")]
    report("grid: other images in each cell", [shown(page, change) for change in changes])
    report("grid: another seed", [shown(page, step("seed", value)) for value in range(1, 8)])
    report("grid: rows and columns swapped", [shown(page, "$('swap').click()") for _ in range(4)])
    print(f"{'grid of 16 x 20: frames a second while it scrolls':56} {page.evaluate(SCROLL):6.1f}", flush=True)
    rows = [choose("rows", "prompt"), choose("page1", "temperature")]
    report("grid of 28 prompts, 16 pages: all 71,680 within reach", [shown(page, change) for change in rows])
    print(f"{'that grid: frames a second while it scrolls':56} {page.evaluate(SCROLL):6.1f}", flush=True)
    heap, process = memory_of(page)
    print(f"{'memory: script, and the whole process of the page':56} {heap:6.0f} MB, {process:.0f} MB")


def main() -> None:
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        write_folder(folder)
        size = (folder / "manifest.js").stat().st_size
        print(f"{'manifest.js':56} {size / 1e6:6.1f} MB")
        flags = ["--no-sandbox", "--disable-gpu"]
        with playwright.chromium.launch(executable_path=CHROMIUM, args=flags) as browser:
            page = browser.new_page(viewport={"width": 1600, "height": 900})
            measure(page, (folder / "samplebrowser.html").as_uri())


if __name__ == "__main__":
    main()
