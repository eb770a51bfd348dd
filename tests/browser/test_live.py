"""The page over a server: what `browser/source.js` says of its routes, answered here from a list of rows."""

import functools
import http.server
import io
import json
import threading
from itertools import groupby
from urllib.parse import parse_qs, urlsplit

import pytest
from helpers import ROOT
from page_kit import state, texts
from PIL import Image

pytestmark = pytest.mark.browser

TOKEN = "secret-token"
CODEC = "0123456789abcdef"
VALUES = ("top_k", "top_p", "temperature", "cond_scale", "sc_prompt", "extra_settings", "model", "archive")


class Server(http.server.BaseHTTPRequestHandler):
    """Two prompts, three values of top k, two images each; the first has a fourth."""

    def __init__(self, *args, log):
        self.log = log
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def rows(self):
        count = 3 if self.log["grown"] else 2
        for prompt in (1, 2):
            for top_k in (0, 50, 256, 999)[: 4 if prompt == 1 else 3]:
                for rank in range(count):
                    values = [top_k, 1.0, 1.0, 3.0, 1, "", 0, 0]
                    md5 = f"{prompt:02x}{top_k:04x}{rank:026x}"
                    name = f"7.{rank}"
                    group = f"{prompt}-{top_k}"
                    score = 20.0 - rank + top_k / 100
                    image = [name, group, rank, score, 7, rank, rank, md5, 1.7e9, CODEC, 1, 0, "float32", -3.5, 19.5]
                    yield prompt, group, values, [*image, 1, None]

    def do_GET(self):
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        route = url.path.strip("/").split("/")
        self.log["gets"].append(self.path)
        if route == [""]:
            page = (ROOT / "samplebrowser.html").read_text(encoding="utf-8")
            page = page.replace('<meta name="live" content="">', f'<meta name="live" content="{TOKEN}">')
            self.answer(page.encode(), "text/html; charset=utf-8")
        elif route[0] == "image":
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), (int(route[2][-2:], 16) * 40, 90, 160)).save(buffer, "png")
            self.answer(buffer.getvalue(), "image/png")
        else:
            self.answer_json(getattr(self, route[1])(query))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/zip":
            self.log["zips"].append((self.headers["X-Token"], body))
            self.answer(b"a zip", "application/zip")
            return
        self.log["posts"].append((self.headers["X-Token"], body))
        if self.log["refuses"]:
            self.answer_json({"error": "the archive is locked; try again"}, 503)
        else:
            self.answer_json({"stored": len(body)})

    def answer(self, content, kind, status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer_json(self, value, status=200):
        self.answer(json.dumps(value).encode(), "application/json", status)

    def summary(self, _):
        seeds = [[7, rank] for rank in range(3)]
        first = {"prompt": 2, "values": dict(zip(VALUES, [256, 1.0, 1.0, 3.0, 1, "", 0, 0], strict=True))}
        return {
            **dict(version=2, mode="images", archives=["live.db"], models=[""], sc_prompts=[[1, None]], seeds=seeds),
            **dict(images=14, prompts=2, score_range=[18.0, 22.56], first=first, revision=self.log["grown"]),
        }

    def values(self, _):
        return {"values": dict(zip(VALUES, [[0, 256, 50, 999], [1.0], [1.0], [3.0], [1], [""], [0], [0]], strict=True))}

    def prompts(self, query):
        texts_of = {1: "rocket", 2: "castle <b>"}
        ids = [int(one) for one in query.get("id", texts_of)]
        words = query.get("search", [""])[0].split()
        found = [number for number in ids if all(word in texts_of[number] for word in words)]
        best = {prompt: image for prompt, group, _, image in self.rows() if group.endswith("256") and image[2] == 0}
        return {"total": len(found), "prompts": [[number, texts_of[number], 6, best[number]] for number in found]}

    def groups(self, query):
        found = []
        for (prompt, group), rows in groupby(self.rows(), key=lambda row: row[:2]):
            if str(prompt) in query["prompt"]:
                rows = list(rows)
                scores = [row[3][3] for row in rows]
                mean = sum(scores) / len(scores)
                found.append([group, prompt, *rows[0][2], len(rows), len(rows), mean, 0.5, max(scores)])
        return {"groups": found}

    def images(self, query):
        found = {}
        for group in query["group"]:
            rows = [image for _, own, _, image in self.rows() if own == group]
            if "seed" in query:
                rows = [row for row in rows if f"{row[4]}.{row[5]}" == query["seed"][0]]
            offset, limit = int(query.get("offset", ["0"])[0]), int(query.get("limit", ["1000"])[0])
            found[group] = {"total": len(rows), "images": rows[offset : offset + limit]}
        return {"groups": found}

    def statistics(self, _):
        counts = [1] * 24
        return {"values": [[256, 8, 22.0, 0.5, counts, None], [0, 8, 19.0, 0.5, counts, [8, -3.0, 0.1]]]}

    def judgements(self, _):
        return [judgement for _, body in self.log["posts"] for judgement in body]

    def changes(self, _):
        return {"revision": self.log["grown"]}


@pytest.fixture
def server():
    log = {"gets": [], "posts": [], "zips": [], "grown": 0, "refuses": False}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, log=log)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        log["address"] = f"http://127.0.0.1:{server.server_port}/"
        yield log
        server.shutdown()


@pytest.fixture
def live(page, server):
    page.goto(server["address"])
    page.locator("#browser[data-view] .tile").first.wait_for()
    return page


def test_first_view_is_the_best_and_only_what_is_in_sight_is_asked_for(live, server):
    assert live.locator("#prompt").inner_text() == "castle <b>" and state(live)["k"] == "256"
    assert texts(live, "#images .score") == ["22.56", "21.56"]
    live.wait_for_function("() => [...document.images].filter((one) => one.src).every((one) => one.naturalWidth)")
    assert [path for path in server["gets"] if path.startswith("/api/groups")] == ["/api/groups?prompt=2"]
    assert live.evaluate("violations") == []


def test_every_view_works(live):
    live.keyboard.press("g")
    live.locator(".cell .tile").first.wait_for()
    live.locator("#rows").select_option("prompt")
    live.locator("#cols").select_option("top_k")
    live.locator("#cell").select_option("seed")
    live.wait_for_function(
        "() => document.querySelectorAll('.cell .tile').length === 7"
        " && document.querySelectorAll('.row-label').length === 2"
        " && document.querySelectorAll('.column-label').length === 4"
    )
    assert texts(live, ".row-label") == ["rocket", "castle <b>"]
    assert texts(live, ".column-label") == ["50", "256", "999", "off"]  # the second prompt has no 999
    live.locator(".cell .tile").first.focus()
    live.keyboard.press("p")
    live.keyboard.press("c")
    live.locator(".pinned article .tile").wait_for()
    live.keyboard.press("m")
    live.locator(".statistics").wait_for()
    assert texts(live, ".statistics tbody th") == ["256", "off"]
    live.keyboard.press("s")
    live.locator("#images .tile").first.click()
    live.locator("#large").wait_for()
    facts = dict(zip(texts(live, "#facts dt"), texts(live, "#facts dd"), strict=True))
    assert facts["log-probability"] == "-3.50" and "file" not in facts
    assert facts["score of the prompt's tokens"] == "19.50" and facts["SHA-256 of the codec"] == f"{CODEC}…"


def test_judgements_are_sent_with_the_token_and_a_refusal_is_told(live, server):
    live.locator("#images .tile").first.focus()
    live.keyboard.press("f")
    live.locator("#images .mark").wait_for()
    live.wait_for_timeout(200)
    ((token, (judgement,)),) = server["posts"]
    assert token == TOKEN and (judgement["kind"], judgement["value"]) == ("favourite", True)
    assert judgement["images"][0]["prompt"] == "castle <b>" and len(judgement["images"][0]["md5"]) == 32
    server["refuses"] = True
    live.keyboard.press("8")
    live.locator(".toast", has_text="the archive is locked").wait_for()
    assert "8" not in live.locator("#images .mark").inner_text()


def test_images_of_the_view_favourites_and_tags_are_saved_as_a_zip(live, server):
    def save(choice: str):
        live.locator("#save").click()
        live.locator("#save-as").select_option(choice)
        with live.expect_download() as download:
            live.locator("#save-now").click()
        live.locator("#sheet-close").click()
        assert download.value.path().read_bytes() == b"a zip"
        return server["zips"][-1]

    token, shown = save("zip")
    assert token == TOKEN and len(shown) == 2 and all(len(md5) == 32 for md5 in shown)
    live.locator("#images .tile").nth(1).focus()
    live.keyboard.press("f")
    live.locator("#images .mark").wait_for()
    assert save("zip favourite")[1] == [shown[1]]


def test_new_images_are_shown_without_a_reload(live, server):
    server["grown"] = 1
    live.wait_for_function("() => document.querySelectorAll('#images .tile').length === 3")


def test_a_server_that_is_gone_is_told(live, server):
    live.route("**/api/**", lambda route: route.abort())
    live.locator("#prompts button").first.click()
    live.locator("#notice:not(:empty)").wait_for()
