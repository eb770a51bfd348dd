"""The data set, captions and tokenizers, what CLIP sees, and the measures of the evaluation."""

import argparse

import numpy as np
import pytest
from PIL import Image

from recipes.emoji import data
from recipes.emoji.backgrounds import BACKGROUNDS, COLOURS
from recipes.emoji.captions import STYLE_PHRASES, list_names, sample_caption, train_tokenizer
from recipes.emoji.clip import SCENES_OF_EMOJI, Trainer, top1_accuracy
from recipes.emoji.evaluate import find_nearest, measure_pairwise, split_quarters
from recipes.emoji.layouts import join_quarters, list_small, sample_scene
from recipes.emoji.vqgan import compute_psnr, find_centres

EMOJI = {
    "key": "1f680",
    "concept": "1f680",
    "style": "3d",
    "tone": "",
    "held_out": False,
    "name": "rocket",
    "group": "Travel",
    "keywords": ["space", "nasa"],
}


def test_split_tone_strips_skin_tones_only():
    assert data.split_tone("1f44b-1f3fd") == ("1f44b", "medium")
    assert data.split_tone("1f680") == ("1f680", "")
    assert data.split_tone("1f469-1f3fb-200d-1f91d-200d-1f468-1f3ff")[1] is None


def test_one_pair_in_sixteen_is_held_out_and_always_the_same():
    held_out = [data.is_held_out(f"{number:x}", style) for number in range(4000) for style in data.STYLES]
    assert np.mean(held_out) == pytest.approx(1 / 16, abs=0.01)
    assert held_out[:3] == [data.is_held_out("0", style) for style in data.STYLES]


def test_every_concept_is_seen_in_a_style_and_skin_tones_share_its_split():
    concepts = {f"{i:x}": {"name": f"n{i}", "group": "g", "keywords": []} for i in range(400)}
    toned = {f"{concept}-1f3fd" for concept in concepts}
    keys = {"3d": set(concepts) | toned | {"unknown"}, "flat": set(concepts), "noto": {"1"}}
    emoji = data.list_emoji(keys, concepts)
    assert len(emoji) == 3 * 400 + 1
    assert {one["concept"] for one in emoji if not one["held_out"]} == set(concepts)
    splits = {(one["concept"], one["style"], one["held_out"]) for one in emoji}
    assert len(splits) == 2 * 400 + 1 and any(is_held_out for *_, is_held_out in splits)


def test_transparent_pixels_become_white_and_a_tall_image_is_centred():
    image = Image.new("RGBA", (8, 16), (255, 0, 0, 255))
    pixels = data.composite_on_white(image, 16)
    assert pixels.shape == (16, 16, 3)
    assert (pixels[:, 4:12] == [255, 0, 0]).all()
    assert (pixels[:, :4] == 255).all() and (pixels[:, 12:] == 255).all()


def test_without_npm_a_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="npm"):
        data.fetch_packages(tmp_path / "downloads")
    (tmp_path / "npm").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(SystemExit, match=r"npm .*3"):
        data.fetch_packages(tmp_path / "downloads")


def test_a_tarball_with_another_hash_is_refused(tmp_path):
    name, version = next(iter(data.PACKAGES)).rsplit("@", 1)
    file = f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    (tmp_path / file).write_bytes(b"not it")
    with pytest.raises(SystemExit, match=f"{file}.*SHA-256"):
        data.fetch_packages(tmp_path)


def test_data_survives_saving_and_skin_tones_are_left_out_on_demand(tmp_path):
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    emoji = [EMOJI | {"tone": "dark"}, EMOJI]
    data.save_dataset(tmp_path / "x.npz", pixels, emoji)
    loaded, found = data.load_dataset(tmp_path / "x.npz")
    assert (loaded == pixels).all() and found == emoji
    loaded, found = data.load_dataset(tmp_path / "x.npz", with_tones=False)
    assert (loaded == pixels[1:]).all() and found == [EMOJI]


def test_captions_name_the_image_and_never_another_style():
    rng = np.random.default_rng(0)
    texts = [sample_caption(EMOJI, rng) for _ in range(500)]
    assert all(any(word in text for word in ("rocket", "space", "nasa")) for text in texts)
    assert any("3d" in text for text in texts)
    assert not any("flat" in text or "noto" in text for text in texts)
    assert len(set(texts)) > 50
    assert set(STYLE_PHRASES) == set(data.STYLES)


@pytest.mark.parametrize(
    ("start", "end", "special_last"), [("<s>", "</s>", False), ("<|startoftext|>", "<|endoftext|>", True)]
)
def test_tokenizer_places_its_special_tokens_and_decodes_what_it_encodes(start, end, special_last):
    tokenizer = train_tokenizer([EMOJI] * 4, 400, start, end, special_last)
    ids = tokenizer.encode("A  Rocket_é").ids
    size = tokenizer.get_vocab_size()
    assert (ids[0], ids[-1]) == ((size - 2, size - 1) if special_last else (0, 2))
    assert tokenizer.decode(ids) == "a rocket é"


def test_each_name_is_listed_once_with_its_keywords():
    acorn = EMOJI | {"style": "flat", "name": "acorn", "keywords": ["acorn"]}
    stove = EMOJI | {"style": "flat", "name": "rocket stove", "group": "A", "keywords": ["camp"]}
    listed = list_names([EMOJI, EMOJI | {"style": "flat"}, acorn, stove])
    assert listed == "# A\nrocket stove: camp\n\n# Travel\nacorn\nrocket: space, nasa\n"


def test_kmeans_finds_separate_clusters():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], np.float32)
    points = (centres[rng.integers(4, size=400)] + rng.normal(0, 0.1, (400, 2))).astype(np.float32)
    found = find_centres(points, 16, rounds=10, seed=0)
    distances = np.linalg.norm(found[:, None] - centres, axis=-1)
    assert distances.min(0).max() < 0.5  # a centre near each cluster
    assert distances.min(1).max() < 0.5  # and none elsewhere


def test_psnr_of_an_error_of_one_level():
    target = np.full((1, 4, 4, 3), 100, np.uint8)
    assert compute_psnr(target + 1, target) == pytest.approx(20 * np.log10(255))


def test_top1_counts_only_the_right_name():
    features = np.eye(5)
    assert top1_accuracy(features, features, np.arange(5), 5, seed=0) == 1.0
    assert top1_accuracy(features, features, np.roll(np.arange(5), 1), 5, seed=0) == 0.0


def test_distance_to_the_nearest_image_is_in_levels():
    known = np.random.default_rng(0).integers(0, 250, (3, 8, 8, 3), dtype=np.uint8)
    found, distances = find_nearest(np.stack([known[2], known[0] + 4]), known)
    assert found.tolist() == [2, 0]
    np.testing.assert_allclose(distances, [0, 4], atol=0.05)  # float32 sums of squares


def test_pairwise_distance_is_that_of_every_two_images():
    images = np.zeros((3, 4, 4, 3), np.uint8)
    images[1:] = np.array([30, 60])[:, None, None, None]
    assert measure_pairwise(images) == pytest.approx((30 + 60 + 30) / 3)
    assert measure_pairwise(images[:2].repeat(2, axis=0)) == pytest.approx(30 * 4 / 6)


def test_clip_sees_emoji_alone_on_backgrounds_and_in_scenes():
    emoji = [
        {"key": name, "concept": name, "style": "3d", "name": name, "group": "Objects", "keywords": []}
        for name in ("drum", "key", "bell")
    ]
    pool = list_small(emoji)
    rng = np.random.default_rng(0)
    scenes = [sample_scene(pool, len(COLOURS), rng, first=i) for i in np.repeat(pool, SCENES_OF_EMOJI)]
    backgrounds = np.array([[1, 10], [2, 11], [3, 12]])

    def paint(values):
        return np.broadcast_to(np.asarray(values, np.uint8)[..., None, None, None], (*np.shape(values), 2, 2, 3))

    args = argparse.Namespace(seed=0, steps=10, learning_rate=1e-3)
    in_scenes = paint(np.arange(len(scenes)))
    trainer = Trainer(
        None, paint([100, 110, 120]), paint(100 + backgrounds), backgrounds, in_scenes, scenes, emoji, None, args
    )
    seen = {"scene": 0, "alone": 0, "background": 0}
    for _ in range(300):
        image, caption = trainer.sample(1, rng)
        value = int(image[0, 0, 0])
        if value < 100:
            scene = scenes[value]
            kind, background = "scene", BACKGROUNDS[scene.colour]
            assert 1 in scene.emoji and all(emoji[i]["name"] in caption for i in scene.emoji)
        else:
            kind, background = ("alone", BACKGROUNDS[0]) if value == 110 else ("background", BACKGROUNDS[value - 100])
            assert "key" in caption
        seen[kind] += 1
        others = {each.name for each in BACKGROUNDS} - {background.name}
        assert not any(caption.endswith((f" on {name}", f" {name} background")) for name in others)
    assert min(seen.values()) > 60


def test_images_are_split_into_quarters():
    quarters = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(split_quarters(join_quarters(quarters)), quarters)
