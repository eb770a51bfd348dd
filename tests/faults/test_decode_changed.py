"""Decodes again of an archive that has changed since: no name shows a picture that it does not belong to any more."""

import hashlib

import pytest
from decode_kit import all_files, change, random_tokens
from tiny import CODEBOOK_SIZE, GRID

MODES = {"images": (), "gallery": ("--mode", "gallery", "--gallery-cols", "2", "--gallery-rows", "2")}
ADD_BEST = """
INSERT INTO images (prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, key0, key1, quantvec, quantvec_md5,
    clip_score_input)
SELECT prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, 0, 99, ?, ?, 99.0 FROM images WHERE id = 1
"""


def add_best(archive):
    """One more picture, better than all others of its group."""
    tokens = random_tokens(7, GRID**2, CODEBOOK_SIZE)[-1].astype("<u2").tobytes()
    change(archive, ADD_BEST, tokens, hashlib.md5(tokens).hexdigest())


def rescore(archive):
    """The last picture is the best, the first one the worst."""
    change(archive, "UPDATE images SET clip_score_input = -clip_score_input")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change_archive", [add_best, rescore])
def test_files_show_the_pictures_of_their_rank(decode, archive, tmp_path, mode, change_archive):
    assert decode(*MODES[mode]) == (0, "")
    change_archive(archive)
    assert decode(*MODES[mode]) == (0, "")
    assert decode(*MODES[mode], out=tmp_path / "fresh") == (0, "")
    assert all_files(tmp_path / "out") == all_files(tmp_path / "fresh")


@pytest.mark.parametrize("content", [b"", b"window.DM_MANIFEST = {};", b"window.DM_MANIFEST = {", b"\xff", b"[]"])
def test_a_manifest_of_someone_else_is_no_news(decode, tmp_path, content):
    assert decode() == (0, "")
    expected = all_files(tmp_path / "out")
    (tmp_path / "out" / "manifest.js").write_bytes(content)
    assert decode() == (0, "")
    assert all_files(tmp_path / "out") == expected
