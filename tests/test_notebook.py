"""The notebook: text and calls, without definitions. It is run, and what it shows is compared with what it asks for."""

import ast
import base64
import html.parser
import io
import itertools
import json
import os
import re
import zipfile
from dataclasses import astuple
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

from dm_generations import Archive, Decoder, Generator
from dm_generations.archive import verify
from dm_generations.sampling.prng import row_key

PATH = Path(__file__).resolve().parent.parent / "dm_generations_decode.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CODE = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"}
PARAM = re.compile(r"^(\w+) = (.+?)  # @param (.+)$", re.MULTILINE)
pytestmark = pytest.mark.timeout(900)  # of the notebook and its models, on a busy machine

MAX_DIFFERENCE = 1  # of a pixel: batches of other sizes are other programs


def python(code: str) -> ast.Module:
    lines = [re.sub(r"^(\s*)%.*", r"\1pass", line) for line in code.splitlines()]
    return ast.parse("\n".join(lines))


def form_values(cell: str) -> dict:
    return {name: ast.literal_eval(value) for name, value, _ in PARAM.findall(CODE[cell])}


def test_it_is_a_notebook_without_outputs():
    assert NOTEBOOK["nbformat"] == 4
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, f"{cell['id']}: clear its output"


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in CODE.items()])
def test_cells_are_python_and_define_nothing(code):
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not any(isinstance(node, definitions) for node in ast.walk(python(code)))
    assert code.count("@param") == len(PARAM.findall(code))
    for name, value, form in PARAM.findall(code):
        kind = re.search(r'type:"(\w+)"', form)[1]
        expected = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "slider": (int, float)}
        assert isinstance(ast.literal_eval(value), expected[kind]), name


class Shown(html.parser.HTMLParser):
    """The images of a cell's output, in order; those of a table with the headings of their row and column."""

    def __init__(self, page: str):
        super().__init__()
        self.pixels: list[np.ndarray] = []
        self.places: list[tuple[str, str]] = []
        self._columns: list[str] = []
        self._row, self._column, self._is_heading, self._is_first_row = "", 0, False, True
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self._is_heading = tag == "th"
        if tag == "tr":
            self._column = -1
        elif tag in ("td", "th"):
            self._column += 1
            if self._is_first_row and tag == "th":
                self._columns.append("")
            elif tag == "th":
                self._row = ""
        elif tag == "img":
            kind, content = dict(attrs)["src"].split(",")
            assert kind == "data:image/png;base64"
            self.pixels.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(content))), int))
            self.places.append((self._row, self._columns[self._column] if self._columns else ""))

    def handle_endtag(self, tag):
        self._is_heading = False
        if tag == "tr":
            self._is_first_row = False

    def handle_data(self, data):
        if self._is_heading and self._is_first_row:
            self._columns[-1] += data
        elif self._is_heading:
            self._row += data


def outputs(notebook, cell: str) -> list:
    return next(each for each in notebook.cells if each["id"] == cell)["outputs"]


def shown(notebook, cell: str) -> list[Shown]:
    pages = [output["data"]["text/html"] for output in outputs(notebook, cell) if "text/html" in output.get("data", {})]
    return [Shown(page) for page in pages]


def assert_pixels(found, expected):
    assert len(found) == len(expected) > 0
    assert np.abs(np.array(found, int) - np.array(expected, int)).max() <= MAX_DIFFERENCE


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after all its cells were run in a folder without a checkout, and that folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{PATH.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("PIP_NO_INDEX", "1")  # nothing is to be installed
        notebook = nbformat.read(PATH, as_version=4)
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    (run,) = (folder / "dm_generations_notebook").iterdir()
    return notebook, run


@pytest.mark.e2e
def test_it_shows_the_images_of_the_archive_that_are_asked_for(executed):
    notebook, _ = executed
    values = form_values("decode")
    settings = {name: values[name.upper()] for name in ("top_k", "top_p", "temperature", "cond_scale")}
    decoder, wanted = Decoder.load(batch_size=8), []
    (grid,) = shown(notebook, "decode")
    with Archive.load() as archive:
        for prompt in (text.strip() for text in values["PROMPTS"].split(";")):
            images = list(archive.images(prompt=prompt, best=values["BEST"], **settings))
            scales = settings["cond_scale"].split(",")
            assert len(images) == values["BEST"] * len(scales)
            wanted += [(prompt, image.settings.cond_scale, decoder(image.tokens)[0]) for image in images]
    found = {
        (*place, index): pixels for index, (place, pixels) in enumerate(zip(grid.places, grid.pixels, strict=True))
    }
    assert len(found) == len(wanted)
    assert {(row, column) for row, column, _ in found} == {
        (f"prompt {prompt}", f"cond_scale {scale}") for prompt, scale, _ in wanted
    }
    assert_pixels(grid.pixels, [pixels for _, _, pixels in wanted])
    (record,) = (output["data"] for output in outputs(notebook, "record") if "image/png" in output.get("data", {}))
    assert_pixels([Image.open(io.BytesIO(base64.b64decode(record["image/png"])))], [wanted[0][2]])


@pytest.mark.e2e
def test_it_generates_what_its_forms_say_and_stores_it(executed):
    notebook, run = executed
    values, sweep_values, demo_values = form_values("generate"), form_values("sweep"), ("a cat", 8)
    temperatures, scales = (
        [float(value) for value in sweep_values[name].split(",")] for name in ("TEMPERATURES", "COND_SCALES")
    )
    generator = Generator.load(batch_size=8)
    drawn = generator(
        values["PROMPT"],
        n=values["IMAGES"],
        seed=values["SEED"],
        cond_scale=values["COND_SCALE"],
        temperature=values["TEMPERATURE"],
    )
    (growing,) = shown(notebook, "generate")  # updated in place: at the end it shows the finished images
    assert_pixels(growing.pixels, generator.decoder(drawn.tokens))

    with Archive.open(run / "mine" / "mine.db") as archive:
        assert list(verify(archive)) == []
        assert {image.quantvec for image in drawn} <= {image.quantvec for image in archive.images()}
        assert {image.prompt for image in archive.images()} == {values["PROMPT"], sweep_values["SWEEP_PROMPT"], "a cat"}
        sweep = [
            image
            for temperature, scale in itertools.product(temperatures, scales)
            for image in archive.images(
                prompt=sweep_values["SWEEP_PROMPT"],
                temperature=temperature,
                cond_scale=scale,
                key=[row_key(0, i) for i in range(sweep_values["IMAGES_PER_CELL"])],
            )
        ]
        (grid,) = shown(notebook, "sweep")
        order = {row_key(0, i): i for i in range(sweep_values["IMAGES_PER_CELL"])}
        assert len(sweep) == len(temperatures) * len(scales) * len(order)
        sweep.sort(key=lambda image: (astuple(image.settings)[2:], order[image.key]))
        assert grid.places == [
            (f"temperature {image.settings.temperature}", f"cond_scale {image.settings.cond_scale}") for image in sweep
        ]
        assert_pixels(grid.pixels, [generator.decoder(image.tokens)[0] for image in sweep])
        (best,) = shown(notebook, "score")
        ranked = sorted(
            archive.images(prompt=sweep_values["SWEEP_PROMPT"]), key=lambda image: -image.scores["clip_score_input"]
        )
        assert_pixels(best.pixels, [generator.decoder(image.tokens)[0] for image in ranked[:4]])
        of_demo = archive.images(prompt=demo_values[0])
        pages = [
            state["state"]["value"] for state in widget_states(notebook) if "<img" in state["state"].get("value", "")
        ]
        by_score = sorted(of_demo, key=lambda image: -image.scores["clip_score_input"])
        assert_pixels(Shown(pages[-1]).pixels, [generator.decoder(image.tokens)[0] for image in by_score])


def widget_states(notebook) -> list[dict]:
    states = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    return [state for state in states if isinstance(state["state"].get("value"), str)]


@pytest.mark.e2e
def test_it_leaves_an_archive_a_folder_of_images_and_a_zip(executed):
    notebook, run = executed
    with Archive.open(run / "mine" / "mine.db") as archive:
        count = archive.count()
    files = {path.relative_to(run / "mine" / "images").as_posix() for path in (run / "mine" / "images").rglob("*.png")}
    assert len(files) == count
    with zipfile.ZipFile(run / "mine" / "images.zip") as packed:
        assert files <= set(packed.namelist()) and "samplebrowser.html" in packed.namelist()
    assert any(
        "iframe" in output["data"].get("text/html", "") for output in outputs(notebook, "page") if "data" in output
    )
    assert {path.name for path in run.iterdir()} == {"archive", "mine"}
