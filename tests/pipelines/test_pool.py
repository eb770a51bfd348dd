"""Images that other processes sample and score: the same rows in the same archive."""

import contextlib
import dataclasses
import sqlite3

import numpy as np
import pytest
from amused_kit import small
from diffusion_kit import TINY, tiny_decoder
from helpers import first_of
from ray_kit import PickledPool

from dm_generations.archive import Archive, verify
from dm_generations.inference.diffusion import Diffusion, Guidance
from dm_generations.models.loading import load_checkpoint
from dm_generations.pipelines.generate import GenerateOptions, generate
from dm_generations.pipelines.rescore import Judges, score_archive
from dm_generations.pipelines.sweep import Sweep

pytestmark = pytest.mark.e2e

TOKENS = "desc, cond_scale, key0, key1, quantvec"
SCORES = "clip_score_input, clip_score_tokenized, log_prob"


def rows_of(db, columns):
    query = f"SELECT {columns} FROM images JOIN prompts ON prompts.id = prompt_id ORDER BY {TOKENS}"
    with contextlib.closing(sqlite3.connect(db)) as connection:
        return connection.execute(query).fetchall()


@pytest.fixture
def fill(models, tmp_path):
    """Generates 24 images."""
    sweep = Sweep(["a boat", "a cat"], cond_scale=[1, 3], count=6)

    def fill(name, pool=None, **changes):
        seen = []
        options = dict(db=tmp_path / name, model=str(models.dalle_bart), codec=str(models.vqgan), batch_size=2)
        options |= dict(clip=str(models.clip)) | changes
        report = generate(sweep, GenerateOptions(**options), lambda *counts: seen.append(counts), pool)
        return tmp_path / name, report, seen

    return fill


def test_a_pool_samples_what_one_process_samples(fill):
    expected, _, _ = fill("alone.db")
    found, report, seen = fill("pool.db", PickledPool())
    assert rows_of(found, TOKENS) == rows_of(expected, TOKENS)
    np.testing.assert_allclose(rows_of(found, SCORES), rows_of(expected, SCORES), rtol=1e-5, atol=1e-5)
    assert (report.added_count, report.existing_count) == (24, 0)
    assert seen[0] == (0, 24)
    assert seen[-1] == (24, 24)
    with Archive.open(found) as archive:
        assert not list(verify(archive))
        assert [model.name for model in archive.models().values()] == ["dalle_bart", "vqgan", "clip"]


def test_a_pool_continues_the_first_tokens_of_an_image(fill, tmp_path):
    np.save(tmp_path / "init.npy", np.arange(16))
    options = dict(init_tokens=tmp_path / "init.npy", init_count=8, is_scored=False, clip=None)
    expected, _, _ = fill("alone.db", **options)
    found, _, _ = fill("pool.db", PickledPool(), **options)
    assert rows_of(found, TOKENS) == rows_of(expected, TOKENS)


def test_a_pool_samples_with_settings_that_only_some_models_have(tmp_path):
    model = small(tmp_path / "model")
    sweep = Sweep(["a red cat"], extra_settings=['{"steps":2}', '{"steps":3}'], count=2)
    found = []
    for name, pool in (("alone.db", None), ("pool.db", PickledPool())):
        options = GenerateOptions(db=tmp_path / name, model=str(model), is_scored=False, batch_size=2)
        assert generate(sweep, options, pool=pool).added_count == 4
        found.append(rows_of(tmp_path / name, f"extra_settings, {TOKENS}"))
    assert found[1] == found[0]
    assert len({settings for settings, *_ in found[0]}) == 2


@pytest.mark.parametrize("is_guided", first_of([True, False]))
def test_a_pool_scores_what_a_diffusion_decoder_makes(fill, models, tmp_path, is_guided):
    codec, clip = load_checkpoint(models.vqgan, "codec"), load_checkpoint(models.clip, "clip")
    network = dataclasses.replace(TINY, image_size=2, level_channels=(32,), attention_levels=())  # quick to compile
    guidance = Guidance(clip, 1e3, cutouts=2) if is_guided else None
    diffusion = Diffusion.load(tiny_decoder(tmp_path / "decoder", network), "ddim3", guidance=guidance)
    judges = Judges(clip, adds=True, diffusion=diffusion, decoding=1)
    found, scores = [], []
    for name, pool in (("alone.db", None), ("pool.db", PickledPool())):
        db, _, _ = fill(name, is_scored=False, clip=None)
        with Archive.open(db, "w") as archive:
            assert score_archive(archive, codec, judges, 4, pool=pool).scored_count == 24
            found.append([(model.name, model.sha256) for model in archive.models().values()])
            assert not archive.count_to_score(False, archive.find_model(judges.judge.model_info()))
        with contextlib.closing(sqlite3.connect(db)) as connection:
            scores.append(connection.execute(f"SELECT {SCORES} FROM images ORDER BY key0, key1, prompt_id").fetchall())
    assert found[1] == found[0]
    assert scores[1] == scores[0]
    assert None not in {score for score, *_ in scores[0]}


@pytest.mark.parametrize("vectors", first_of([True, False]))
def test_a_pool_scores_as_one_process_does(fill, models, vectors):
    codec, clip = load_checkpoint(models.vqgan, "codec"), load_checkpoint(models.clip, "clip")
    judges, found = Judges(clip, vectors=vectors), []
    seen: list[tuple[int, int]] = []
    for name, pool in (("alone.db", None), ("pool.db", PickledPool())):
        db, _, _ = fill(name, is_scored=False, clip=None)
        with Archive.open(db, "w") as archive:
            report = score_archive(archive, codec, judges, 4, lambda *counts: seen.append(counts), pool=pool)
            found.append((report, list(archive.scan(("image_id", "vector"), table="vectors")) if vectors else []))
        assert (report.due_count, report.scored_count, report.bad_rows) == (24, 24, [])
        with Archive.open(db) as archive:
            assert not list(verify(archive))
    (_, alone), (_, pooled) = found
    assert pooled == alone
    assert len(alone) == 24 * vectors
    assert seen == 2 * [(0, 24), (8, 24), (16, 24), (24, 24)]
