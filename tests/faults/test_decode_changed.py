"""Decodes again of an archive that has changed since: no name shows a picture that it does not belong to any more."""

import hashlib

import pytest
from decode_kit import all_files, change, random_tokens, write_archive_2022
from tiny import CODEBOOK_SIZE, GRID

from dm_generations.archive import merge

MODES = {
    "images": (),
    "gallery": ("--mode", "gallery", "--gallery-cols", "2", "--gallery-rows", "2"),
    "npy": ("--mode", "npy"),
}
ADD_BEST = """
INSERT INTO images (prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, key0, key1, quantvec, quantvec_md5,
    clip_score_input)
SELECT prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, 0, 99, ?, ?, 99.0 FROM images WHERE id = 1
"""


def add_best(archive):
    """One more picture, better than all others of its group."""
    tokens = random_tokens(7, GRID**2, CODEBOOK_SIZE)[-1].astype("<u2").tobytes()
    change(archive, ADD_BEST, tokens, hashlib.md5(tokens).hexdigest())


def add_twin(archive):
    """One more picture, better than all others, with the key of the first: it goes on from given codes, say."""
    add_best(archive)
    change(archive, "UPDATE images SET (key0, key1) = (SELECT key0, key1 FROM images WHERE id = 1) WHERE key1 = 99")


def rescore(archive):
    """The last picture is the best, the first one the worst."""
    change(archive, "UPDATE images SET clip_score_input = -clip_score_input")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change_archive", [add_best, add_twin, rescore])
def test_files_show_the_pictures_of_their_rank(decode, archive, tmp_path, mode, change_archive):
    assert decode(*MODES[mode]) == (0, "")
    change_archive(archive)
    assert decode(*MODES[mode]) == (0, "")
    assert decode(*MODES[mode], out=tmp_path / "fresh") == (0, "")
    assert all_files(tmp_path / "out") == all_files(tmp_path / "fresh")


OTHER_DECODES = {"prompt": ("--prompt-ids", "2"), "best": ("--n-best", "1"), "format": ("--format", "webp")}


@pytest.mark.parametrize("other", [*OTHER_DECODES.values(), MODES["gallery"]], ids=[*OTHER_DECODES, "gallery"])
def test_a_decode_of_others_into_the_folder_forgets_nothing(decode, tmp_path, other):
    tokens = random_tokens(6, GRID**2, CODEBOOK_SIZE)
    archive = write_archive_2022(tmp_path / "two.db", tokens, ("a boat", "a ship"))
    assert decode(db=archive) == (0, "") and decode(*other, db=archive) == (0, "")
    add_best(archive)
    assert decode(db=archive) == (0, "") and decode(db=archive, out=tmp_path / "fresh") == (0, "")
    fresh, found = all_files(tmp_path / "fresh"), all_files(tmp_path / "out")
    assert {path for path in fresh if found[path] != fresh[path]} == set()


@pytest.mark.parametrize("mode", MODES)
def test_pictures_that_take_more_than_their_key_to_draw_again_are_decoded_once(decode, archive, tmp_path, mode):
    native = tmp_path / "native.db"
    merge([archive], native)
    change(native, "UPDATE images SET dtype = 'bfloat16' WHERE id <= 3")
    assert decode(*MODES[mode], db=native) == (0, "")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("0001*/*")}
    assert times and decode(*MODES[mode], db=native) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize("content", [b"", b"window.DM_MANIFEST = {};", b"window.DM_MANIFEST = {", b"\xff", b"[]"])
def test_a_manifest_of_someone_else_is_no_news(decode, tmp_path, content):
    assert decode() == (0, "")
    expected = all_files(tmp_path / "out")
    (tmp_path / "out" / "manifest.js").write_bytes(content)
    assert decode() == (0, "")
    assert all_files(tmp_path / "out") == expected
