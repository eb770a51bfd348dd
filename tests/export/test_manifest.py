import base64
import hashlib
import json
import math
import os
import random
import re

import pytest
from decode_kit import listed_paths

from dm_generations.export.manifest import PAGE, GalleryEntry, build_manifest, write_manifest
from dm_generations.paths import shipped
from dm_generations.pipelines.generate import SAMPLER_VERSIONS


def read(out_dir):
    text = (out_dir / "manifest.js").read_text(encoding="ascii")
    return json.loads(text.removeprefix("window.DM_MANIFEST = ").removesuffix(";\n"))


def test_prompts_and_groups_are_listed_once_and_images_best_first(make_entry):
    names = [f"0001_rocket/0001_k=50_{rank:02d}_None.png" for rank in range(3)]
    entries = [make_entry(name, rank=rank, score=30.0 - rank, key1=rank) for rank, name in enumerate(names)]
    random.Random(0).shuffle(entries)
    other = make_entry("0002_castle/x.png", prompt_id=2, prompt="castle", top_k=0, score=None, key1=0)
    manifest = build_manifest("images", "a.db", [*entries, other])

    assert manifest["prompts"] == [[1, "rocket"], [2, "castle"]]
    assert manifest["sc_prompts"] == [[1, None]]
    groups, images = manifest["groups"], manifest["images"]
    assert (groups["prompt"], groups["sc_prompt"], groups["top_k"]) == ([0, 1], [0, 0], [50, 0])
    assert (groups["count"], groups["top_p"], groups["temperature"]) == ([3, 1], [0.9, 0.9], [1.0, 1.0])
    assert listed_paths(manifest) == [*names, "0002_castle/x.png"]
    assert images["position"] == [0, 1, 2, 0]
    assert images["score"] == [30.0, 29.0, 28.0, None]
    assert [manifest["seeds"][seed] for seed in images["seed"]] == [[1, 0], [1, 1], [1, 2], [1, 0]]


def test_what_an_image_needs_besides_its_key_is_listed_once(make_entry):
    kinds = [{}, {"dtype": "float32"}, {"dtype": "float16"}, {"init_count": 28, "dtype": "float32"}]
    kinds += [
        {"model": "mega"},
        {"sampler_version": 1001},
        {"model": None, "sampler_version": None},
        {"codec": "0123456789abcdef", "codec_name": "f8"},
    ]
    entries = [make_entry(f"{rank}.png", rank=rank, **kind) for rank, kind in enumerate(kinds)]
    manifest = build_manifest("images", "a.db", entries)
    listed, positions = manifest["provenances"], manifest["images"]["provenance"]
    assert len(listed) == len(kinds)
    expected = [["", 1, 0, None], ["", 1, 0, "float32"], ["", 1, 0, "float16"], ["", 1, 28, "float32"]]
    expected += [["mega", 1, 0, None], ["", 1001, 0, None], [None, None, 0, None], ["", 1, 0, None]]
    expected = [[*one, None, None] for one in expected[:-1]] + [["", 1, 0, None, "0123456789abcdef", "f8"]]
    assert [listed[position] for position in positions] == expected


def test_keys_are_numbered_in_the_order_of_sampling_and_times_count_from_the_first(make_entry):
    rows = [(0, 9, 1_700_000_002.9), (1, 4, 1_700_000_000.2), (2, 7, None)]
    entries = [make_entry(f"{r}.png", rank=r, row_id=row, key0=row, time=time) for r, row, time in rows]
    manifest = build_manifest("images", "a.db", entries)
    assert [key0 for key0, _ in manifest["seeds"]] == [4, 7, 9]
    assert manifest["images"]["seed"] == [2, 0, 1]
    assert manifest["images"]["time"] == {"start": 1_700_000_000, "seconds": [2, 0, None]}


def test_md5_of_tokens_come_back(make_entry):
    digests = [hashlib.md5(bytes([number])).hexdigest() for number in range(3)]
    entries = [make_entry(f"{rank}.png", rank=rank, md5=md5) for rank, md5 in enumerate(digests)]
    text = build_manifest("images", "a.db", entries)["images"]["md5"]
    assert [base64.b64decode(text[i : i + 22] + "==").hex() for i in range(0, len(text), 22)] == digests
    entries.append(make_entry("3.png", rank=3))
    assert build_manifest("images", "a.db", entries)["images"]["md5"] is None


def test_the_page_knows_every_sampler():
    (listed,) = re.findall(r"const SAMPLERS = new Map\((.*)\);", shipped(PAGE).read_text(encoding="utf-8"))
    assert {name: version for version, name in json.loads(listed)} == SAMPLER_VERSIONS


@pytest.mark.parametrize("names", [["a"], ["aa.png", "aaa.png"], ["p/x", "q/y"], ["x1x.png", "x1x1x.png"]])
def test_prefix_and_suffix_give_back_every_name(make_entry, names):
    entries = [make_entry(name, rank=rank) for rank, name in enumerate(names)]
    assert listed_paths(build_manifest("images", "a.db", entries)) == names


def test_gallery_keeps_the_scores_of_its_images(make_entry):
    settings = dict(prompt_id=1, prompt="rocket", sc_prompt_id=2, sc_prompt="blur", top_k=0, top_p=1.0)
    settings |= dict(temperature=1.0, cond_scale=3.0)
    entries = [GalleryEntry(f"g{page}.png", **settings, scores=(3.14159, None), page=page) for page in (1, 0)]
    manifest = build_manifest("gallery", "a.db", entries)
    assert listed_paths(manifest) == ["g0.png", "g1.png"]
    assert manifest["images"]["position"] == [0, 1]
    assert manifest["images"]["score"] == [[3.142, None], [3.142, None]]


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode is 'webp'"):
        build_manifest("webp", "a.db", [])


def test_hostile_text_is_escaped_and_comes_back_unchanged(tmp_path, make_entry):
    text = "</script><!--<script>\u2028\u2029\x00\ud800\u202e" + "x" * 10_000
    write_manifest(tmp_path, build_manifest("images", text, [make_entry(prompt=text, sc_prompt=text)]))
    source = (tmp_path / "manifest.js").read_bytes()
    assert source.isascii() and b"<" not in source
    manifest = read(tmp_path)
    assert manifest["archives"][0] == manifest["prompts"][0][1] == manifest["sc_prompts"][0][1] == text


def test_numbers_that_json_lacks_become_null(tmp_path, make_entry):
    entry = make_entry(temperature=math.inf, cond_scale=math.nan, score=math.nan)
    write_manifest(tmp_path, build_manifest("images", "a.db", [entry]))
    manifest = read(tmp_path)
    assert (manifest["groups"]["temperature"], manifest["groups"]["cond_scale"]) == ([None], [None])
    assert manifest["images"]["score"] == [None]


def test_page_lies_beside_the_manifest_and_nothing_else(tmp_path, make_entry):
    manifest = build_manifest("images", "a.db", [make_entry()])
    assert write_manifest(tmp_path, manifest) == tmp_path / "samplebrowser.html"
    write_manifest(tmp_path, manifest)
    assert sorted(os.listdir(tmp_path)) == ["manifest.js", "samplebrowser.html"]
    assert "manifest.js" in (tmp_path / "samplebrowser.html").read_text(encoding="utf-8")


def test_a_write_that_fails_leaves_the_old_manifest_and_no_scraps(tmp_path, make_entry, monkeypatch):
    write_manifest(tmp_path, build_manifest("images", "old.db", [make_entry()]))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_manifest(tmp_path, build_manifest("images", "new.db", [make_entry()]))
    assert read(tmp_path)["archives"] == ["old.db"]
    assert sorted(os.listdir(tmp_path)) == ["manifest.js", "samplebrowser.html"]
