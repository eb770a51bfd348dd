"""What the page asks the server, and what it gets: the shapes that browser/source.js describes."""

import io
import json
import os
import sqlite3
import zipfile

import numpy as np
import pytest
from archive_kit import archive_v1
from decode_kit import write_archive_2022
from PIL import Image

from dm_generations.archive import Archive, verify
from dm_generations.archive.ratings import read_ratings
from dm_generations.inference.decoder import Decoder
from dm_generations.server.app import MAX_ZIPPED
from dm_generations.server.data import BadRequestError, ServedArchive

from .conftest import GENERATOR, OTHER_GENERATOR, PROMPTS, TOKEN, add, new_images, tokens_of

IMAGE = [
    *(
        "name",
        "group",
        "rank",
        "score",
        "key0",
        "key1",
        "seed",
        "md5",
        "time",
        "codec",
        "sampler_version",
        "init_count",
    ),
    *("dtype", "log_prob", "score_tokenized", "same", "problem", "codec_name"),
]
VALUES = ("top_k", "top_p", "temperature", "cond_scale", "sc_prompt", "extra_settings", "model", "archive")
PROBLEM = IMAGE.index("problem")


def change(path, statement: str, *values) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    with connection:
        connection.execute(statement, values)
    connection.close()


def is_an_error(response, status) -> bool:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error and len(error.splitlines()) == 1
    return True


def groups(client, *prompts) -> list[list]:
    return client.get("/api/groups", params={"prompt": prompts}).json()["groups"]


def images(client, group: str, **query) -> dict:
    response = client.get("/api/images", params={"group": group, **query})
    assert response.status_code == 200, response.text
    return response.json()["groups"][group]


def decoded(codec, *numbers: int) -> np.ndarray:
    tokens = np.stack([np.frombuffer(tokens_of(number), "<u2") for number in numbers])
    return Decoder.from_checkpoint(codec, len(numbers)).decode(tokens)


def test_the_page_has_its_token_once(reader):
    page = reader.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert page.text.count(TOKEN) == 1 and f'name="live" content="{TOKEN}"' in page.text


def test_summary(reader):
    summary = reader.get("/api/summary").json()
    assert (summary["version"], summary["mode"], summary["archives"]) == (2, "images", ["a.db"])
    assert summary["models"] == ["", OTHER_GENERATOR.name, None]
    assert summary["sc_prompts"] == [[1, None]]
    assert summary["decoder"] is None
    assert summary["seeds"] == [[7, key] for key in range(4)]
    assert (summary["images"], summary["prompts"], summary["score_range"]) == (12, 2, [17.0, 20.0])
    assert summary["first"]["prompt"] == 1 and list(summary["first"]["values"]) == list(VALUES)
    assert summary["revision"] == reader.get("/api/changes").json()["revision"]


def test_values_are_those_of_all_prompts(reader):
    found = reader.get("/api/values").json()["values"]
    shown = [dict(zip(VALUES, group[2:], strict=False)) for prompt in (1, 2) for group in groups(reader, prompt)]
    assert list(found) == list(VALUES)
    for name, values in found.items():
        assert len(values) == len(set(values)) and set(values) == {group[name] for group in shown}


def test_prompts_are_paged_and_searched(reader):
    def ask(**parameters):
        found = reader.get("/api/prompts", params=parameters).json()
        return found["total"], [row[0] for row in found["prompts"]]

    assert ask() == (2, [1, 2])
    assert ask(limit=1, offset=1) == (2, [2])
    assert ask(search="BLUE a") == (1, [2])
    assert ask(search="2") == (1, [2])
    assert ask(search="blue red") == (0, [])
    assert ask(search="a", offset=1, limit=5) == (2, [2])
    assert ask(id=[2, 1, 77]) == (2, [2, 1])
    (row,) = reader.get("/api/prompts?id=2").json()["prompts"]
    assert row[1:3] == [PROMPTS[1], 4]
    best = dict(zip(IMAGE, row[3], strict=True))
    assert (best["name"], best["score"], best["rank"], best["problem"]) == ("7.0", 20.0, 0, None)
    assert best["group"] in [group[0] for group in groups(reader, 2)]


def test_groups_have_their_settings_and_statistics(reader):
    found = groups(reader, 1, 2)
    assert len(found) == 4
    first = dict(zip(("id", "prompt", *VALUES, "count", "scored", "mean", "sd", "best"), found[0], strict=True))
    assert (first["prompt"], first["top_k"], first["extra_settings"], first["model"]) == (1, 5, "", 0)
    assert (first["count"], first["scored"], first["mean"], first["best"]) == (4, 4, 18.5, 20.0)
    assert first["sd"] == pytest.approx(np.std([17, 18, 19, 20], ddof=1))
    assert [row[1] for row in found] == [1, 1, 2, 2] and [row[8] for row in found] == [0, 0, 0, 1]
    assert groups(reader) == groups(reader, 99) == []


def test_images_of_a_group(reader, codec):
    first, second = (row[0] for row in groups(reader, 1))
    found = images(reader, first)
    assert found["total"] == 4
    rows = [dict(zip(IMAGE, row, strict=True)) for row in found["images"]]
    assert [row["name"] for row in rows] == ["7.0", "7.1", "7.2", "7.3"]
    assert [row["rank"] for row in rows] == [row["seed"] for row in rows] == [0, 1, 2, 3]
    assert {row["codec"] for row in rows} == {codec.sha256[:16]} and {row["problem"] for row in rows} == {None}

    def names(**query):
        return [row[0] for row in images(reader, first, **query)["images"]]

    assert names(descending=0) == names(sort="time") == names(sort="seed") == ["7.3", "7.2", "7.1", "7.0"]
    assert names(sort="seed", descending=0) == ["7.0", "7.1", "7.2", "7.3"]
    assert names(limit=2, offset=1) == ["7.1", "7.2"]
    assert names(min=18, max=19) == ["7.1", "7.2"]
    assert names(seed="7.2") == ["7.2"] and names(seed="7.99") == names(seed="") == []
    assert images(reader, first, offset=50)["total"] == 4
    both = reader.get("/api/images", params={"group": [first, second], "limit": 1}).json()["groups"]
    assert list(both) == [first, second] and [len(one["images"]) for one in both.values()] == [1, 1]


def test_equal_images_are_one(make_client, path, codec):
    with Archive.open(path, "w") as archive:
        add(archive, codec.model_info(), new_images(PROMPTS[0], [0, 1], top_p=0.5))
        add(archive, codec.model_info(), new_images(PROMPTS[0], [2], -2, top_p=0.5))  # the tokens of 0
    client = make_client()
    group = next(row[0] for row in groups(client, 1) if row[3] == 0.5)
    found = images(client, group)
    assert found["total"] == 2
    assert [(row[0], row[IMAGE.index("same")]) for row in found["images"]] == [("7.0", 2), ("7.1", 1)]


def test_the_image_is_what_decode_gives(client, codec, listed):
    for number, row in enumerate(listed):
        image = dict(zip(IMAGE, row, strict=True))
        for _ in range(2):  # decoded, then from the cache
            answer = client.get(f"/image/{image['codec']}/{image['md5']}")
            assert answer.status_code == 200 and answer.headers["content-type"] == "image/webp"
            assert "immutable" in answer.headers["cache-control"]
            pixels = np.asarray(Image.open(io.BytesIO(answer.content)))
            np.testing.assert_array_equal(pixels, decoded(codec, number)[0])


def test_statistics(reader):
    found = reader.get("/api/statistics?axis=top_k&prompt=1").json()
    assert found["range"] == [17.0, 20.0]
    rows = {row[0]: row[1:] for row in found["values"]}
    assert set(rows) == {5, 9}
    for n, mean, sd, counts, _ in rows.values():
        assert (n, mean, sum(counts), len(counts)) == (4, 18.5, 4, 24) and sd > 0
        assert counts[0] == counts[-1] == 1
    assert sorted(row[-1] is None for row in rows.values()) == [False, True]
    assert [row[-1] for row in rows.values() if row[-1]] == [[4, 0.0, 0.0]]
    assert reader.get("/api/statistics?axis=top_k&prompt=1&temperature=2").json()["values"] == []
    assert [row[1] for row in reader.get("/api/statistics?axis=model").json()["values"]] == [10, 2]
    one = reader.get("/api/statistics?axis=top_k&model=1&extra_settings=&archive=0&sc_prompt=1").json()["values"]
    assert [(row[0], row[1]) for row in one] == [(5, 2)]
    assert [row[1] for row in reader.get("/api/statistics?axis=archive").json()["values"]] == [12]


def test_statistics_of_each_setting(reader):
    found = reader.get("/api/statistics?axis=setting").json()["values"]
    rows = {(row[0][VALUES.index("top_k")], row[0][VALUES.index("model")]): row[1:] for row in found}
    assert all(len(row[0]) == len(VALUES) for row in found)
    assert {key: row[0] for key, row in rows.items()} == {(5, 0): 6, (9, 0): 4, (5, 1): 2}
    assert [sum(row[3]) for row in rows.values()] == [row[0] for row in rows.values()]
    # Of the best one, (5, 1), one other has images with the same prompt and keys.
    assert {key: row[4] for key, row in rows.items()} == {(5, 0): [2, 0.0, 0.0], (9, 0): None, (5, 1): None}
    of_one = reader.get("/api/statistics?axis=setting&prompt=1").json()["values"]
    assert sorted((row[0][VALUES.index("top_k")], row[1]) for row in of_one) == [(5, 4), (9, 4)]


@pytest.mark.parametrize(
    "address",
    [
        "statistics?axis=sql",
        "statistics",
        "statistics?axis=top_k&prompt=x",
        "statistics?axis=top_k&top_p=nan",
        "prompts?limit=9999999",
        "prompts?limit=-1",
        "prompts?offset=1e3",
        "prompts?id=x",
        "prompts?offset=99999999999999999999",
        "groups?prompt=1%00",
        "images?group=x",
        "images?group=[1]",
        "images?group=" + "[" * 3000,
        "images?group=[[1],1,1,1,1,1,1,1]",
        "images?group=[1,1,1,1,1,1,1,%22x%22]",
        "images?sort=id;drop",
        "images?min=inf",
        "images?" + "&".join(["group=1"] * 3000),
        "groups?" + "&".join(["prompt=1"] * 3000),
    ],
    ids=lambda text: text[:40],
)
def test_a_wrong_question_is_refused(reader, address):
    assert is_an_error(reader.get(f"/api/{address}"), 400)


def test_a_strange_group_is_empty(reader):
    for group in ('[1,1,1e308,1,1,1,"",0]', "[null,null,null,null,null,null,null,0]", '["x",1,5,1,1,1,"",-1]'):
        assert images(reader, group) == {"total": 0, "images": []}
    assert is_an_error(reader.get("/api/images", params={"group": f'[{2**80},1,5,1,1,1,"",0]'}), 503)


def judgement(image: list, text: str = PROMPTS[0], **changes) -> dict:
    row = dict(zip(IMAGE, image, strict=True))
    settings = dict(
        zip(["prompt_id", "sc", "top_k", "top_p", "temperature", "cond_scale"], json.loads(row["group"]), strict=False)
    )
    names = {name: settings[name] for name in ("top_k", "top_p", "temperature", "cond_scale")}
    key = {"key0": row["key0"], "key1": row["key1"], "md5": row["md5"], "sampler_version": row["sampler_version"]}
    identity = {**key, **names, "archive": "a.db", "prompt": text, "sc_prompt": None, "extra_settings": "", "model": ""}
    return {"kind": "score", "images": [identity], "value": 7, "order": None, "rater": "", "time": 5.5, **changes}


def judge(client, *judgements, **headers):
    headers = {"X-Token": TOKEN, "Origin": "http://127.0.0.1:8765", **headers}
    return client.post("/api/judgements", content=json.dumps(list(judgements)), headers=headers)


def stored(path) -> list:
    with Archive.open(path) as archive:
        return list(read_ratings(archive))


def test_judgements_are_stored_and_told(client, path, listed):
    first, second = judgement(listed[0]), judgement(listed[1])
    pair = {**first, "kind": "pair", "images": [*first["images"], *second["images"]], "order": [1, 0], "value": "first"}
    tag = {**second, "kind": "tag", "value": {"name": "<b>", "on": True}, "rater": "ann"}
    revision = client.get("/api/changes").json()
    assert judge(client, first, pair).json() == {"stored": 2}
    assert judge(client, tag, tag).json() == {"stored": 1}
    assert stored(path) == [
        ("anonymous", "score", 1, None, 7, 5.5),
        ("anonymous", "pair", 2, 1, "second", 5.5),
        ("ann", "tag", 2, None, "<b>", 5.5),
    ]
    told = client.get("/api/judgements").json()
    assert [one["kind"] for one in told] == ["score", "pair", "tag"]
    assert [image["md5"] for image in told[1]["images"]] == [row[IMAGE.index("md5")] for row in (listed[1], listed[0])]
    assert (told[1]["order"], told[1]["value"], told[2]["value"]) == ([0, 1], "second", tag["value"])
    assert client.get("/api/changes").json() == revision  # no image was added
    with Archive.open(path) as archive:
        assert list(verify(archive)) == []


def test_a_wrong_judgement_stores_nothing(client, path, listed):
    good = judgement(listed[0])
    missing = judgement(listed[1])
    missing["images"][0]["md5"] = "0" * 32
    for bad in (missing, 5, None, {**good, "value": 11}, {**good, "kind": "drop"}):
        assert is_an_error(judge(client, good, bad), 400)
    for body in (b"", b"{", b"{}", b"7", b"[" * 100_000, b"\xff\xfe"):
        headers = {"X-Token": TOKEN, "Origin": "http://127.0.0.1:8765"}
        assert is_an_error(client.post("/api/judgements", content=body, headers=headers), 400)
    assert stored(path) == []


def test_new_images_and_scores_are_noticed(client, path, codec):
    before = client.get("/api/summary").json()
    with Archive.open(path, "w") as archive:
        add(archive, codec.model_info(), new_images("new", range(3), 500), GENERATOR)
    assert client.get("/api/changes").json()["revision"] > before["revision"]
    assert client.get("/api/summary").json()["images"] == before["images"] + 3
    assert client.get("/api/prompts?search=new").json()["total"] == 1


def test_an_archive_that_vanishes_and_comes_back(client, path, listed):
    os.rename(path, path.with_name("away.db"))
    for address in ("/api/summary", "/api/groups?prompt=1", "/api/changes"):
        assert is_an_error(client.get(address), 503)
    codec, md5 = listed[0][IMAGE.index("codec")], listed[0][IMAGE.index("md5")]
    assert is_an_error(client.get(f"/image/{codec}/{md5}"), 503)
    assert is_an_error(judge(client, judgement(listed[0])), 503)
    assert not path.exists()
    os.rename(path.with_name("away.db"), path)
    assert client.get("/api/summary").json()["images"] == 12
    assert client.get(f"/image/{codec}/{md5}").status_code == 200


def test_an_archive_that_is_replaced(client, path, tmp_path, codec):
    client.get("/api/summary")
    with Archive.create(tmp_path / "new.db") as archive:
        add(archive, codec.model_info(), new_images("another", range(5)))
    os.replace(tmp_path / "new.db", path)
    assert client.get("/api/summary").json()["images"] == 5
    path.write_bytes(b"not an archive")
    assert is_an_error(client.get("/api/summary"), 503)


def test_a_damaged_archive(client, path, listed):
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    for address in ("/api/summary", "/api/groups?prompt=1", "/api/prompts", "/api/statistics?axis=top_k"):
        assert client.get(address).status_code in (200, 503)


def test_a_locked_archive(client, path, listed, monkeypatch):
    monkeypatch.setattr("dm_generations.server.data.LOCK_TIMEOUT", 0.1)
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert client.get("/api/summary").status_code == 200  # others may read
    assert is_an_error(judge(client, judgement(listed[0])), 503)
    writer.execute("ROLLBACK")
    writer.close()
    assert judge(client, judgement(listed[0])).json() == {"stored": 1}


def test_images_that_cannot_be_decoded_say_why(make_client, path, codec, models, tmp_path):
    other = codec.model_info()
    with Archive.open(path, "w") as archive:
        add(
            archive,
            type(other)(**{**vars(other), "sha256": "f" * 64, "name": "another"}),
            new_images("other", [0], 900),
        )
    change(path, "UPDATE images SET quantvec_md5 = ? WHERE id = 1", "0" * 32)
    change(path, "UPDATE images SET quantvec = ? WHERE id = 2", b"\1\0")
    change(path, "UPDATE images SET quantvec = 7, quantvec_md5 = x'00' WHERE id = 3")
    client = make_client()
    (first, _) = groups(client, 1)
    rows = images(client, first[0])["images"]
    assert [bool(row[PROBLEM]) for row in rows] == [True, True, True, False]
    group = groups(client, 3)[0][0]
    (row,) = images(client, group)["images"]
    assert "another" in row[PROBLEM] and row[IMAGE.index("codec")] == "f" * 16
    assert is_an_error(client.get(f"/image/{'f' * 16}/{row[IMAGE.index('md5')]}"), 404)
    for row in rows[:2]:  # an image that says why
        answer = client.get(f"/image/{codec.sha256[:16]}/{row[IMAGE.index('md5')]}")
        assert (answer.status_code, answer.headers["cache-control"]) == (422, "no-store")
        assert len(Image.open(io.BytesIO(answer.content)).convert("RGB").getcolors()) > 1
    good = rows[3]
    assert client.get(f"/image/{good[IMAGE.index('codec')]}/{good[IMAGE.index('md5')]}").status_code == 200


def zipped(client, *md5s, **headers):
    own = {"X-Token": TOKEN, "Origin": "http://127.0.0.1:8765"}
    return client.post("/api/zip", json=list(md5s), headers=own | headers)


def test_images_as_a_zip(client, path, codec, listed):
    change(path, "UPDATE images SET quantvec = ? WHERE id = 2", b"\1\0")
    change(path, "UPDATE prompts SET desc = '../<b>/' || desc")
    md5s = [row[IMAGE.index("md5")] for row in listed]
    answer = zipped(client, *md5s, md5s[0], "0" * 32)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as file:
        *names, problems = file.namelist()
        assert len(names) == len(set(names)) == 3 and all(name.count("/") == 1 and name[0] == "0" for name in names)
        lines = file.read(problems).decode().splitlines()
        assert [line[:32] for line in lines] == ["0" * 32, md5s[1]]
        for name, number in zip(names, (0, 2, 3), strict=True):
            shown = np.asarray(Image.open(io.BytesIO(file.read(name))))
            np.testing.assert_array_equal(shown, decoded(codec, number)[0])


def test_a_zip_is_only_for_the_page_and_has_a_limit(client, listed):
    md5 = listed[0][IMAGE.index("md5")]
    assert is_an_error(zipped(client, md5, **{"X-Token": "wrong"}), 403)
    assert is_an_error(zipped(client, md5, Origin="http://another.example"), 403)
    for wrong in ([], [7], ["../" + md5], [md5] * (MAX_ZIPPED + 1)):
        assert is_an_error(zipped(client, *wrong), 400)


def test_an_image_that_no_one_was_told_of_is_found(make_client, codec, listed):
    another = make_client()  # a server that was started anew
    md5 = listed[0][IMAGE.index("md5")]
    assert another.get(f"/image/{codec.sha256[:16]}/{md5}").status_code == 200
    assert is_an_error(another.get(f"/image/{codec.sha256[:16]}/{'0' * 32}"), 404)


def test_an_empty_archive(make_client, tmp_path):
    Archive.create(tmp_path / "empty.db").close()
    client = make_client(path=tmp_path / "empty.db")
    summary = client.get("/api/summary").json()
    assert (summary["images"], summary["prompts"], summary["score_range"], summary["first"]) == (0, 0, None, None)
    assert client.get("/api/prompts").json() == {"total": 0, "prompts": []}
    assert client.get("/api/statistics?axis=top_k").json()["values"] == []


@pytest.mark.parametrize("version", [1, 2])
def test_an_archive_of_an_older_version(make_client, tmp_path, version):
    client = make_client(path=archive_v1(tmp_path / "old.db", keys=range(3), version=version))
    assert client.get("/api/summary").json()["images"] == 3
    ((group, *_),) = groups(client, 1)
    found = images(client, group)["images"]
    assert [row[0] for row in found] == ["1.0", "1.1", "1.2"] and all(row[PROBLEM] for row in found)  # another codec
    given = judgement(found[1], "a red cube")
    given["images"][0]["model"] = None
    assert judge(client, given).json() == {"stored": 1}  # it has the newest version now
    assert images(client, group)["images"] == found
    assert len(client.get("/api/judgements").json()) == 1


def test_an_archive_of_2022(make_client, tmp_path, codec):
    path = write_archive_2022(tmp_path / "old.db", np.stack([np.frombuffer(tokens_of(i), "<u2") for i in range(3)]))
    before = path.read_bytes()
    client = make_client(path=path)
    ((group, *_),) = groups(client, 1)
    found = images(client, group)["images"]
    assert [row[PROBLEM] for row in found] == [None] * 3
    answer = client.get(f"/image/{found[2][IMAGE.index('codec')]}/{found[2][IMAGE.index('md5')]}")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), decoded(codec, 2)[0])
    assert client.get("/api/judgements").json() == []
    assert is_an_error(judge(client, judgement(found[0], "a boat")), 503)
    assert path.read_bytes() == before


def test_judgements_of_a_download_are_refused(path, codec):
    before = path.read_bytes()
    served = ServedArchive(path, codec, is_writable=False)
    with pytest.raises(BadRequestError):
        served.add_judgements([])
    served.close()
    assert path.read_bytes() == before
