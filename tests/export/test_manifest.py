import json
import math
import os
import random
import re

import pytest

from dm_generations.export.manifest import PAGE, GalleryEntry, build_manifest, write_manifest
from dm_generations.paths import shipped
from dm_generations.pipelines.generate import SAMPLER_VERSIONS
from dm_generations.sampling.logits import SAMPLER_VERSION


def read(out_dir):
    text = (out_dir / "manifest.js").read_text(encoding="ascii")
    return json.loads(text.removeprefix("window.DM_MANIFEST = ").removesuffix(";\n"))


def files_of(group):
    prefix, suffix, files = group[6:]
    return [prefix + file[0] + suffix for file in files]


def test_prompts_and_groups_are_listed_once_and_images_best_first(make_entry):
    names = [f"0001_rocket/0001_k=50_{rank:02d}_None.png" for rank in range(3)]
    entries = [make_entry(name, rank=rank, score=30.0 - rank, key1=rank) for rank, name in enumerate(names)]
    random.Random(0).shuffle(entries)
    other = make_entry("0002_castle/x.png", prompt_id=2, prompt="castle", top_k=0, score=None)
    manifest = build_manifest("images", "a.db", [*entries, other])

    assert manifest["prompts"] == [[1, "rocket"], [2, "castle"]]
    assert manifest["sc_prompts"] == [[1, None]]
    first, second = manifest["groups"]
    assert first[:6] == [0, 0, 50, 0.9, 1.0, 3.0]
    assert files_of(first) == names
    assert [file[1:] for file in first[8]] == [[0, 30.0, 1, 0], [1, 29.0, 1, 1], [2, 28.0, 1, 2]]
    assert second[:3] == [1, 0, 0] and files_of(second) == ["0002_castle/x.png"] and second[8][0][2] is None


def test_what_an_image_needs_besides_its_key_is_listed_where_it_is_needed(make_entry):
    kinds = [{}, {"dtype": "float32"}, {"dtype": "float16"}, {"init_count": 28, "dtype": "float32"}]
    kinds += [{"model": "mega"}, {"sampler_version": 1001}, {"model": None, "sampler_version": None}]
    entries = [make_entry(f"{rank}.png", rank=rank, **kind) for rank, kind in enumerate(kinds)]
    (group,) = build_manifest("images", "a.db", entries)["groups"]
    needs = [[], [], ["", 1, 0, "float16"], ["", 1, 28], ["mega"], ["", 1001], [None]]
    assert [file[5:] for file in group[8]] == needs


def test_the_page_knows_every_sampler_and_which_is_usual(make_entry):
    (listed,) = re.findall(r"const SAMPLERS = new Map\((.*)\);", shipped(PAGE).read_text())
    assert {name: version for version, name in json.loads(listed)} == SAMPLER_VERSIONS
    entry = make_entry(sampler_version=SAMPLER_VERSION)
    assert entry.facts() == [entry.score, entry.key0, entry.key1]


@pytest.mark.parametrize("names", [["a"], ["aa.png", "aaa.png"], ["p/x", "q/y"], ["x1x.png", "x1x1x.png"]])
def test_prefix_and_suffix_give_back_every_name(make_entry, names):
    entries = [make_entry(name, rank=rank) for rank, name in enumerate(names)]
    assert files_of(build_manifest("images", "a.db", entries)["groups"][0]) == names


def test_gallery_keeps_the_scores_of_its_images(make_entry):
    settings = dict(prompt_id=1, prompt="rocket", sc_prompt_id=2, sc_prompt="blur", top_k=0, top_p=1.0)
    settings |= dict(temperature=1.0, cond_scale=3.0)
    entries = [GalleryEntry(f"g{page}.png", **settings, scores=(3.14159, None), page=page) for page in (1, 0)]
    group = build_manifest("gallery", "a.db", entries)["groups"][0]
    assert files_of(group) == ["g0.png", "g1.png"]
    assert group[8][0][1:] == [0, [3.142, None]]


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode is 'webp'"):
        build_manifest("webp", "a.db", [])


def test_hostile_text_is_escaped_and_comes_back_unchanged(tmp_path, make_entry):
    text = "</script><!--<script>\u2028\u2029\x00\ud800\u202e" + "x" * 10_000
    write_manifest(tmp_path, build_manifest("images", text, [make_entry(prompt=text, sc_prompt=text)]))
    source = (tmp_path / "manifest.js").read_bytes()
    assert source.isascii() and b"<" not in source
    manifest = read(tmp_path)
    assert manifest["archive"] == manifest["prompts"][0][1] == manifest["sc_prompts"][0][1] == text


def test_numbers_that_json_lacks_become_null(tmp_path, make_entry):
    entry = make_entry(temperature=math.inf, cond_scale=math.nan, score=math.nan)
    write_manifest(tmp_path, build_manifest("images", "a.db", [entry]))
    group = read(tmp_path)["groups"][0]
    assert group[4:6] == [None, None] and group[8][0][2] is None


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
    assert read(tmp_path)["archive"] == "old.db"
    assert sorted(os.listdir(tmp_path)) == ["manifest.js", "samplebrowser.html"]
