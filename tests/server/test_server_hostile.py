"""Requests of strangers and damaged archives: an answer in JSON or an image, no exception of the server."""

import contextlib
import json
import random
import sqlite3

import pytest
from helpers import time_limit

from dm_generations.errors import UserError

from .conftest import PROMPTS, TOKEN

pytestmark = pytest.mark.e2e

VALUES = (
    *("NaN", "inf", "-1", "1e999", "9" * 30, "9" * 5000, "٣", "", "\x00", "\ud800", "\x1b[31m", "[]", "[" * 20_000),
    *("1:1", '["1",2]', "[null,null]", "[1,2,3,4,5,6,7,8,9]", "9:[1]", "-1:[1]", "²:[1]"),
    '[1,5,1.0,1.0,10.0,1,"",1e999]',
)
PARAMETERS = {
    "prompts": ("id", "limit", "search", "offset"),
    "groups": ("prompt",),
    "images": ("group", "sort", "descending", "min", "max", "key", "limit", "offset"),
    "statistics": ("axis", "prompt", "top_k", "cond_scale", "extra_settings", "sc_prompt", "model", "archive"),
}
BODIES = [
    *(b"", b"NaN", b"[" * 10**6, b"\xff\xfe", b"{}", b"[null]", b'["x"]', b"[[]]", b'[{"images": null}]'),
    b'[{"kind": "\x00", "images": [{}], "time": 1e999}]',
    b'[{"id": "a", "kind": "tag", "value": NaN, "time": Infinity, "images": [{"md5": [], "archive": {}}]}]',
]


def check(answer) -> None:
    """Check that an answer is an image, a zip, or JSON that other programs read."""
    assert answer.status_code != 500, answer.text
    if answer.headers["content-type"] == "application/json":

        def refuse(name):
            raise AssertionError(f"{name} in an answer")

        json.loads(answer.content, parse_constant=refuse)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("route", PARAMETERS)
def test_values_of_parameters_that_are_none(route, count, make_client, path, archive_file):
    client = make_client(path=path if count == 1 else [path, archive_file])
    with time_limit(20):
        for name in PARAMETERS[route]:
            for value in VALUES:
                query = {"axis": "top_k"} if route == "statistics" else {}
                answer = client.get(f"/api/{route}", params=query | {name: value.encode("utf-8", "surrogatepass")})
                check(answer)
                assert answer.status_code < 500, (name, value)


@pytest.mark.parametrize("route", ["judgements", "zip"])
@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_bodies_that_are_none(route, body, client):
    answer = client.post(f"/api/{route}", content=body, headers={"X-Token": TOKEN})
    check(answer)
    assert 400 <= answer.status_code < 500


def ask_all(client) -> None:
    """Ask for all that the page asks for."""
    check(client.get("/api/summary"))
    check(client.get("/api/changes"))
    check(client.get("/api/judgements"))
    check(client.get("/api/prompts", params={"search": "a"}))
    groups = client.get("/api/groups", params={"prompt": [1, 2]})
    check(groups)
    for axis in ("top_k", "model", "sc_prompt"):
        check(client.get("/api/statistics", params={"axis": axis}))
    for group, *_ in groups.json().get("groups", ())[:3]:
        for sort in ("score", "seed", "time"):
            images = client.get("/api/images", params={"group": group, "sort": sort})
            check(images)
        for shown in images.json().get("groups", {}).values():
            md5s = [image[0] for image in shown["images"] if image and isinstance(image[0], str)]
            check(client.post("/api/zip", content=json.dumps(md5s[:2]), headers={"X-Token": TOKEN}))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE prompts SET desc = CAST(x'ff00fe' AS TEXT)",
        "UPDATE prompts SET desc = x'00'",
        "UPDATE images SET top_k = 9e999, temperature = -9e999",
        "UPDATE images SET clip_score_input = 9e999",
        "UPDATE images SET clip_score_input = 'NaN', time_end = x'00'",
        "UPDATE images SET time_end = 9e999, time_start = -9e999",
        "UPDATE images SET key0 = 'a', key1 = NULL",
        "UPDATE images SET quantvec = zeroblob(1), quantvec_md5 = 'x'",
        "UPDATE images SET generator_id = 99, codec_id = 99",
        "UPDATE models SET name = char(27, 0, 8238), config = '[[[['",
        "UPDATE images SET extra_settings = '{\"a\": [[['",
        "DELETE FROM sc_prompts",
        "DELETE FROM models",
    ],
)
def test_values_that_an_archive_may_not_have(statement, make_client, path):
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(statement.replace("UPDATE", "UPDATE OR IGNORE"))
    with contextlib.suppress(UserError), time_limit(20):
        ask_all(make_client())


def test_damaged_archives(make_client, path, archive_file, tmp_path):
    content, numbers = archive_file.read_bytes(), random.Random(0)
    assert PROMPTS[0].encode() in content
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(numbers.choice([1, 8, 40])):
            damaged[numbers.randrange(len(damaged))] ^= 1 << numbers.randrange(8)
        with open(path, "wb") as file:
            file.write(damaged)
        with contextlib.suppress(UserError), time_limit(20):
            ask_all(make_client())
