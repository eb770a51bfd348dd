import numpy as np
import pytest
from PIL import Image

from training import data
from training.captions import STYLED, caption, list_names, train_tokenizer
from training.clip import top1_of_names
from training.evaluate import distance_to_nearest
from training.vqgan import kmeans, psnr

ROW = {
    "concept": "1f680",
    "style": "3d",
    "tone": "",
    "name": "rocket",
    "group": "Travel",
    "keywords": ["space", "nasa"],
}


def test_split_tone_strips_skin_tones_only():
    assert data.split_tone("1f44b-1f3fd") == ("1f44b", "medium")
    assert data.split_tone("1f680") == ("1f680", "")
    assert data.split_tone("1f469-1f3fb-200d-1f91d-200d-1f468-1f3ff")[1] is None


def test_one_pair_in_sixteen_is_held_out_and_always_the_same_ones():
    held_out = [data.is_held_out(f"{number:x}", style) for number in range(4000) for style in data.STYLES]
    assert np.mean(held_out) == pytest.approx(1 / 16, abs=0.01)
    assert data.is_held_out("1f680", "3d") == data.is_held_out("1f680", "3d")


def test_transparent_pixels_become_white_and_a_tall_picture_is_centred():
    image = Image.new("RGBA", (8, 16), (255, 0, 0, 255))
    pixels = data.on_white(image, 16)
    assert pixels.shape == (16, 16, 3)
    assert (pixels[:, 4:12] == [255, 0, 0]).all()
    assert (pixels[:, :4] == 255).all() and (pixels[:, 12:] == 255).all()


def test_without_npm_a_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="npm, which fetches the emoji, is not installed"):
        data.fetch(tmp_path / "downloads")
    (tmp_path / "npm").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(SystemExit, match=r"npm could not fetch .*\(exit status 3\)"):
        data.fetch(tmp_path / "downloads")


def test_a_tarball_of_another_hash_is_refused(tmp_path):
    name, version = next(iter(data.PACKAGES)).rsplit("@", 1)
    (tmp_path / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz").write_bytes(b"not it")
    with pytest.raises(SystemExit, match="SHA-256"):
        data.fetch(tmp_path)


def test_data_survives_saving(tmp_path):
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    data.save(tmp_path / "x.npz", pixels, [ROW, ROW])
    loaded, rows = data.load(tmp_path / "x.npz")
    assert (loaded == pixels).all() and rows == [ROW, ROW]


def test_skin_tones_are_left_out_where_they_are_not_wanted(tmp_path):
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    data.save(tmp_path / "x.npz", pixels, [ROW | {"tone": "dark"}, ROW])
    loaded, rows = data.load(tmp_path / "x.npz", tones=False)
    assert (loaded == pixels[1:]).all() and rows == [ROW]


def test_captions_name_the_picture_and_never_another_style():
    rng = np.random.default_rng(0)
    texts = [caption(ROW, rng) for _ in range(500)]
    assert all(any(word in text for word in ("rocket", "space", "nasa")) for text in texts)
    assert any("3d" in text for text in texts)
    assert not any("flat" in text or "noto" in text for text in texts)
    assert len(set(texts)) > 50
    assert set(STYLED) == set(data.STYLES)


def test_tokenizer_places_its_ends_as_asked_and_reads_back_what_it_was_given():
    for ends, last in ((("<s>", "</s>"), False), (("<|startoftext|>", "<|endoftext|>"), True)):
        tokenizer = train_tokenizer([ROW] * 4, 400, ends, last)
        ids = tokenizer.encode("A  Rocket_é").ids
        size = tokenizer.get_vocab_size()
        assert (ids[0], ids[-1]) == ((size - 2, size - 1) if last else (0, 2))
        assert tokenizer.decode(ids) == "a rocket é"


def test_each_name_is_listed_once_with_the_words_it_is_known_by():
    plain = {"style": "flat", "name": "acorn", "group": ROW["group"], "keywords": ["acorn"]}
    other = {"style": "flat", "name": "rocket stove", "group": "A", "keywords": ["camp"]}
    listed = list_names([ROW, ROW | {"style": "flat"}, plain, other])
    assert listed == f"# A\nrocket stove: camp\n\n# {ROW['group']}\nacorn\nrocket: space, nasa\n"


def test_kmeans_finds_separate_clusters():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], np.float32)
    points = (centres[rng.integers(4, size=400)] + rng.normal(0, 0.1, (400, 2))).astype(np.float32)
    found = kmeans(points, 16, rounds=10, seed=0)
    nearest = np.linalg.norm(found[:, None] - centres, axis=-1)
    assert nearest.min(0).max() < 0.5  # a centre near each cluster
    assert nearest.min(1).max() < 0.5  # and none elsewhere


def test_psnr_of_an_error_of_one_level():
    target = np.full((1, 4, 4, 3), 100, np.uint8)
    assert psnr(target + 1, target) == pytest.approx(20 * np.log10(255))


def test_top1_counts_only_its_own_name():
    features = np.eye(5)
    assert top1_of_names(features, features, np.arange(5), 5, seed=0) == 1.0
    assert top1_of_names(features, features, np.roll(np.arange(5), 1), 5, seed=0) == 0.0


def test_distance_to_the_nearest_picture_is_in_levels():
    known = np.random.default_rng(0).integers(0, 250, (3, 8, 8, 3), dtype=np.uint8)
    found = distance_to_nearest(np.stack([known[2], known[0] + 4]), known)
    np.testing.assert_allclose(found, [0, 4], atol=0.05)  # float32 sums of squares
