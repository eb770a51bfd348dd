"""Several archives side by side: what the page is told of them is that of one archive with one more axis."""

import io

import numpy as np
import pytest
from PIL import Image

from dm_generations.archive import Archive
from dm_generations.archive.ratings import read_ratings

from .conftest import GENERATOR, OTHER_GENERATOR, PROMPTS, TOKEN, add, new_images
from .test_server_routes import IMAGE, VALUES, change, decoded, groups, images, is_an_error, judge, judgement

ARCHIVE, PROMPT, COUNT = 2 + VALUES.index("archive"), 1, 2 + len(VALUES)


@pytest.fixture
def other(tmp_path, codec):
    """Its prompts have other ids, its only model too; the images of two prompts have the keys of the first archive."""
    with Archive.create(tmp_path / "b.db") as archive:
        info = codec.model_info()
        add(archive, info, new_images("only here", range(1), 700), OTHER_GENERATOR)
        add(archive, info, new_images(PROMPTS[1], range(2), 400), OTHER_GENERATOR)
        add(archive, info, new_images(PROMPTS[0], range(2), 500, top_k=9), OTHER_GENERATOR)
    change(archive.path, "UPDATE images SET clip_score_input = clip_score_input + 10 WHERE prompt_id = 3")
    return archive.path


@pytest.fixture
def both(make_client, path, other):
    return make_client(path=[path, other])


def test_summary_and_prompts(both):
    summary = both.get("/api/summary").json()
    assert (summary["archives"], summary["images"], summary["prompts"]) == (["a.db", "b.db"], 17, 3)
    assert sorted(map(str, summary["models"])) == ["", OTHER_GENERATOR.name, "None"]
    assert summary["score_range"] == [17.0, 30.0]
    texts = {text: (row_id, count) for row_id, text, count, _ in both.get("/api/prompts").json()["prompts"]}
    assert {text: count for text, (_, count) in texts.items()} == {PROMPTS[0]: 10, PROMPTS[1]: 6, "only here": 1}
    assert summary["first"]["values"]["archive"] == 1
    assert summary["first"]["prompt"] == texts[PROMPTS[0]][0]
    found = both.get("/api/prompts", params={"search": "BLUE ball"}).json()
    assert (found["total"], [row[1] for row in found["prompts"]]) == (1, [PROMPTS[1]])
    page = both.get("/api/prompts?offset=1&limit=1").json()
    assert page["total"] == 3 and len(page["prompts"]) == 1


def test_values_of_both(both):
    found = both.get("/api/values").json()["values"]
    shown = [dict(zip(VALUES, group[2:], strict=False)) for prompt in (1, 2, 3) for group in groups(both, prompt)]
    assert set(found["archive"]) == {0, 1}
    assert found.keys() == set(VALUES)
    for name, values in found.items():
        assert len(values) == len(set(values)) and set(values) == {group[name] for group in shown}


def test_groups_and_images_of_both(both, codec):
    found = groups(both, 1)
    assert [(row[ARCHIVE], row[COUNT]) for row in found] == [(0, 4), (0, 4), (1, 2)]
    assert {row[PROMPT] for row in found} == {1}
    rows = images(both, found[2][0])["images"]
    assert [row[IMAGE.index("score")] for row in rows] == [30.0, 29.0]
    answer = both.get(f"/image/{rows[0][IMAGE.index('codec')]}/{rows[0][IMAGE.index('md5')]}")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), decoded(codec, 500)[0])
    seeds = both.get("/api/summary").json()["seeds"]
    assert [seeds[row[IMAGE.index("seed")]] for row in rows] == [row[4:6] for row in rows]
    for wrong in ("", "0", "2:[]", "-1:[]", "x:[]", "0:{}", "99999999999:[]"):
        assert is_an_error(both.get("/api/images", params={"group": wrong}), 400)


def test_scores_by_archive_and_by_other_axes(both):
    def ask(axis, **query):
        rows = both.get("/api/statistics", params={"axis": axis, **query}).json()["values"]
        assert all(sum(counts) == n for _, n, _, _, counts, _ in rows)
        return {value: (n, pytest.approx(mean), difference) for value, n, mean, _, _, difference in rows}

    assert {value: n for value, (n, *_) in ask("archive").items()} == {0: 12, 1: 5}
    by_top_k = ask("top_k", prompt=1)
    assert by_top_k[5][:2] == (4, 18.5)
    assert by_top_k[9][:2] == (6, (20 + 19 + 18 + 17 + 30 + 29) / 6)
    assert {value: n for value, (n, *_) in ask("top_k", prompt=1, archive=0).items()} == {5: 4, 9: 4}
    assert ask("top_k", archive=7) == {}
    models = both.get("/api/summary").json()["models"]
    assert {models[value]: n for value, (n, *_) in ask("model").items()} == {"": 10, OTHER_GENERATOR.name: 7}


def test_a_judgement_goes_to_the_archive_of_its_image(both, path, other):
    rows = [images(both, group[0])["images"][0] for group in groups(both, 1)]
    given = [judgement([row[0], row[1].partition(":")[2], *row[2:]]) for row in rows]
    for one, name in zip(given, ("a.db", "a.db", "b.db"), strict=True):
        one["images"][0]["archive"] = name
    given[2]["images"][0]["model"] = OTHER_GENERATOR.name
    assert judge(both, given[0]).json() == {"stored": 1}
    assert judge(both, given[2]).json() == {"stored": 1}
    with Archive.open(path) as first, Archive.open(other) as second:
        assert len(list(read_ratings(first))) == len(list(read_ratings(second))) == 1
    assert [one["images"][0]["archive"] for one in both.get("/api/judgements").json()] == ["a.db", "b.db"]
    pair = {**given[0], "kind": "pair", "images": [given[0]["images"][0], given[2]["images"][0]]}
    for wrong in ([pair | {"order": [0, 1], "value": "tie"}], [given[0], given[2]], [], ["x"], [{"images": 7}]):
        assert is_an_error(judge(both, *wrong), 400)
    given[0]["images"][0]["archive"] = "c.db"
    assert is_an_error(judge(both, given[0]), 400)


def test_new_images_and_an_archive_that_vanishes(both, other, codec):
    before = both.get("/api/summary").json()
    with Archive.open(other, "w") as archive:
        add(archive, codec.model_info(), new_images("new", range(3), 800), GENERATOR)
    assert both.get("/api/changes").json()["revision"] > before["revision"]
    after = both.get("/api/summary").json()
    assert after["images"] == before["images"] + 3
    (row,) = both.get("/api/prompts?search=new").json()["prompts"]
    assert row[0] == 4 and row[2] == 3
    other.unlink()
    assert is_an_error(both.get("/api/summary"), 503)


def test_a_zip_of_both(both):
    md5s = [images(both, group[0])["images"][0][IMAGE.index("md5")] for group in groups(both, 1)]
    answer = both.post("/api/zip", json=md5s, headers={"X-Token": TOKEN, "Origin": "http://127.0.0.1:8765"})
    assert answer.status_code == 200 and answer.content.count(b"PK\x01\x02") == 3
