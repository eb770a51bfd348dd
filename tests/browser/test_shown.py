"""What the lists beside pictures say, and that those of others are no lists."""

import pytest

from dm_generations.browser.manifest import Entry, build_manifest, write_manifest
from dm_generations.browser.shown import shown_before, shown_by, write_others

ENTRY = Entry("0001_a/0001_b.png", 1, "a", 1, None, 50, 1.0, 1.0, 3.0, 0, 21.5, 7, 9, "mine", 1)


def test_a_folder_tells_what_its_files_show(tmp_path):
    assert shown_before(tmp_path) == {}
    write_manifest(tmp_path, build_manifest("images", "a.db", [ENTRY]))
    write_others(tmp_path, {"0002_c/0001_d.png": (20.0, 1, 2)})
    assert shown_before(tmp_path) == {ENTRY.file: shown_by(ENTRY), "0002_c/0001_d.png": (20.0, 1, 2)}
    write_others(tmp_path, {})
    assert shown_before(tmp_path) == {ENTRY.file: shown_by(ENTRY)}


@pytest.mark.parametrize("start", ["", "window.DM_MANIFEST = "])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"groups": 1}', '{"a": 1}', "[" * 200_000])
def test_what_is_no_list_is_left_alone(tmp_path, start, text):
    for name in ("manifest.js", ".others.json"):
        (tmp_path / name).write_text(start + text)
    assert shown_before(tmp_path) == {}
