"""Time the page in a headless Chromium, from disk and from `browse`.

    python benchmarks/browser.py         # a minute on 2 cores; needs Playwright and Chromium
    python benchmarks/browser.py live    # two minutes, and 1 GB in the folder for temporary files

From disk: 71,680 images of 28 prompts, in grids of 16 x 20 cells. Live: the shipped archive, and one of a million rows,
its rows with other keys, for which four clients scroll at a time.

Prints what a person waits for: the page usable, a step of a slider, another grid, frames while scrolling, and memory.
"Shown" is when all images in sight are loaded and the frame that shows them is drawn.
"""

import argparse
import contextlib
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Final

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from dm_generations.export.manifest import ImageEntry, build_manifest, write_manifest

PROMPTS, TEMPERATURES, COND_SCALES, SEEDS = 28, 16, 20, 8
IMAGE_SIZE, IMAGE_FILES = 256, 320
ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "archive" / "emoji.db"
VIEWPORT: Final[Any] = {"width": 1600, "height": 900}
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


def write_large_archive(path: Path, row_count: int) -> None:
    """Write the rows of the shipped archive again and again, with other keys."""
    shutil.copy(SHIPPED, path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        columns = [row[1] for row in connection.execute("PRAGMA table_info(images)") if row[1] != "id"]
        values = ", ".join("key0 + :copy" if name == "key0" else name for name in columns)
        count = connection.execute("SELECT count(*) FROM images").fetchone()[0]
        connection.execute("BEGIN")
        for copy in range(1, row_count // count):
            sql = (
                f"INSERT INTO images ({', '.join(columns)}) SELECT {values} FROM images WHERE id <= :count ORDER BY id"
            )
            connection.execute(sql, {"copy": copy, "count": count})
        connection.execute("COMMIT")


@contextlib.contextmanager
def served(archive: Path, caches: Path) -> Iterator[tuple[str, int]]:
    """Yield the address of a server, and its process."""
    command = [sys.executable, "-m", "dm_generations", "browse", str(archive), "--port", "0", "--no-open"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(caches)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            yield next(word for word in line.split() if word.startswith("http")), process.pid
        finally:
            process.terminate()


def memory_of_server(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1e3


def time_first_screen(browser: Browser, address: str) -> float:
    """Return the milliseconds from the request of the page until the images of the first screen are drawn."""
    with contextlib.closing(browser.new_page(viewport=VIEWPORT)) as page:
        started = time.perf_counter()
        page.goto(address)
        shown(page)
        return (time.perf_counter() - started) * 1e3


def measure_live(browser: Browser, folder: Path) -> None:
    caches, large = folder / "caches", folder / "large.db"
    with served(SHIPPED, caches) as (address, _):
        time_first_screen(browser, address)
    for what, seconds in (("as the server starts", 0), ("10 s later", 10)):
        firsts = []
        for _ in range(3):
            shutil.rmtree(caches / "dm-generations" / "images", ignore_errors=True)  # the compiled programs stay
            with served(SHIPPED, caches) as (address, _):
                time.sleep(seconds)
                firsts.append(time_first_screen(browser, address))
        report(f"browse, shipped archive: first screen, {what}", firsts)
    write_large_archive(large, 1_000_000)
    started = time.perf_counter()
    with served(large, caches) as (address, pid):
        report("browse, 1,000,000 rows: the server answers", [(time.perf_counter() - started) * 1e3])
        with contextlib.closing(browser.new_page(viewport=VIEWPORT)) as page:
            started = time.perf_counter()
            page.goto(address)
            page.locator("#images .tile").first.wait_for()
            report("browse, 1,000,000 rows: page usable", [(time.perf_counter() - started) * 1e3])
            shown(page)
            report("browse, 1,000,000 rows: page opened again", [time_first_screen(browser, address) for _ in range(3)])
            page.locator("#tab-grid").click()
            report("browse, 1,000,000 rows: grid of all prompts", [shown(page, choose("rows", "prompt"))])
        scroll_together(browser, address, pid)


def scroll_together(browser: Browser, address: str, pid: int) -> None:
    """Let four clients scroll through grids, a minute in all; print what failed, and the memory of the server."""
    failed: list[str] = []
    answered = 0

    def note(response: object) -> None:
        nonlocal answered
        answered += 1
        if response.status >= 400:  # type: ignore[attr-defined]
            failed.append(f"{response.status} {response.url}")  # type: ignore[attr-defined]

    pages = [browser.new_page(viewport=VIEWPORT) for _ in range(4)]
    for number, page in enumerate(pages):
        page.on("response", note)
        page.goto(f"{address}#view=grid&rows=prompt&cols=seed&k={(50, 256)[number % 2]}&t={(1, 3)[number // 2]}")
    memory = []
    for _ in range(6):
        for page in pages:
            page.evaluate(f"window.scrolling = ({SCROLL})()")
        for page in pages:
            page.evaluate("window.scrolling")
            page.evaluate("document.getElementById('grid').scrollTop = 0")
        memory.append(memory_of_server(pid))
    print(
        f"{'4 clients that scroll: answers, and those that failed':56} {answered:6,}, {len(failed)} {failed[:1] or ''}"
    )
    print(
        f"{'4 clients that scroll: memory of the server, begin to end':56} {', '.join(f'{mb:.0f}' for mb in memory)} MB"
    )
    for page in pages:
        page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("disk", "live"), default="disk", help="(default: disk)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        flags = ["--no-sandbox", "--disable-gpu"]
        with playwright.chromium.launch(executable_path=CHROMIUM, args=flags) as browser:
            if args.what == "live":
                measure_live(browser, folder)
                return
            write_folder(folder)
            print(f"{'manifest.js':56} {(folder / 'manifest.js').stat().st_size / 1e6:6.1f} MB")
            measure(browser.new_page(viewport=VIEWPORT), (folder / "samplebrowser.html").as_uri())


if __name__ == "__main__":
    main()
