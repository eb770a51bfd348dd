"""LlamaGen learns classes and captions: its loss, and `train` on the original's tiny checkpoints."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import golden
from tiny import tiny_vqgan
from training_kit import read_log

from dm_generations.archive import Archive, NewImage
from dm_generations.archive.records import ClassLabel
from dm_generations.cli import main
from dm_generations.models.llamagen.network import LlamaGen
from dm_generations.models.loading import load_checkpoint
from dm_generations.pipelines.convert import write_checkpoint
from dm_generations.sampling.params import SamplingParams
from dm_generations.training.lora import DEFAULT_LAYERS, find_layers
from dm_generations.training.objectives import TEXT_WEIGHT, next_token_loss
from dm_generations.training.optimizers import make_optimizer
from dm_generations.weights.native import flatten, read_params

CASES = sorted(path.parent for path in golden("llamagen").glob("**/settings.json"))
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@functools.cache
def loaded(case):
    sizes = json.loads((case / "settings.json").read_text())["gpt"]
    return load_checkpoint(case, "generator", {name: sizes[name] for name in ("n_head", "block_size")})


def conditions(arrays, config, count):
    if config.num_classes:
        ids = arrays["class_ids"][:count, None]
        return ids, np.ones_like(ids)
    return arrays["input_ids"][:count], arrays["attention_mask"][:count]


@pytest.mark.e2e
@every_case
def test_the_loss_is_the_cross_entropy_of_the_logits_of_the_original(case):
    checkpoint = loaded(case)
    with np.load(case / "gpt_golden.npz") as arrays:
        codes, recorded = arrays["codes"], arrays["logits"].astype(np.float64)
        ids, mask = conditions(arrays, checkpoint.config, len(codes))
    shifted = recorded - recorded.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, codes[..., None].astype(int), -1)[..., 0]
    expected = (np.log(np.exp(shifted).sum(-1)) - chosen).mean(-1)

    model = LlamaGen(checkpoint.config)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), checkpoint.params)

    @jax.jit
    def losses_of(params, **options):
        logits = model.apply({"params": params}, ids, mask, codes, not options, method="training_logits", **options)
        return next_token_loss(logits, jnp.asarray(codes, jnp.int32), jnp.zeros(len(codes)), TEXT_WEIGHT)[0]

    losses = losses_of(params)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    dropped = losses_of(params, rngs={"dropout": jax.random.key(0)})
    assert np.isfinite(dropped).all() and not np.allclose(dropped, losses)


def test_what_the_original_does_not_train_stays_as_it_is():
    params = {name: {"kernel": jnp.ones((2, 2))} for name in ("t5", "transformer")} | {
        "captions": {"uncond_embedding": jnp.ones((2, 2)), "fc1": jnp.ones((2, 2))}
    }
    optimizer = make_optimizer("adamw", optax.constant_schedule(0.1), 0.1, 1.0)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert {path for path, leaf in flatten(updates).items() if not np.any(leaf)} == {
        "t5/kernel",
        "captions/uncond_embedding",
    }


def write_archive(path, case, codec):
    """Random tokens, of classes or captions as the model reads them."""
    config, rng = loaded(case).config, np.random.default_rng(0)
    labels = [f"thing {number}" for number in range(config.num_classes)]
    prompts = [ClassLabel("things", label) for label in range(6)] if labels else ["a cat", "a dog", "the sea", "trees"]
    with Archive.create(path) as archive, archive.transaction():
        if labels:
            archive.add_vocabulary("things", labels)
        codec_id = archive.add_model(codec.model_info())
        tokens = rng.integers(config.vocab_size, size=(24, config.image_length)).astype("<u2")
        images = [
            NewImage(prompts[n % len(prompts)], None, SamplingParams(), 0, n, row.tobytes(), 1.0, 2.0, float(n))
            for n, row in enumerate(tokens)
        ]
        archive.add_images(images, None, codec_id, None, None)
    return path


@pytest.mark.e2e
@every_case
def test_train_makes_a_model_that_draws(case, tmp_path):
    config = loaded(case).config
    folder = tiny_vqgan(tmp_path / "codec", n_embed=config.vocab_size, resolution=2 * config.grid)
    archive = write_archive(tmp_path / "a.db", case, load_checkpoint(folder, "codec"))
    write_checkpoint(loaded(case), tmp_path / "base")
    words = ["train", archive, "--run", tmp_path / "run", "--model", tmp_path / "base", "--codec", folder]
    words += ["--steps", 2, "--batch-size", 4, "--held-out", 0.2, "--log-every", 1, "--sample-every", 2]
    words += ["--sample-count", 1, "--learning-rate", 0.01, "--warmup", 0]
    assert main([*map(str, words)]) == 0
    before, after = (flatten(read_params(tmp_path / name)) for name in ("base", "run/model"))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    fixed = {path for path in before if path.startswith("t5/") or path.endswith("uncond_embedding")}
    assert moved and not moved & fixed and bool(fixed) == (config.t5 is not None)
    lines = (tmp_path / "run" / "held_out.txt").read_text().split("\n")[:-1]
    words = ["--classes", *lines] if config.num_classes else ["--prompts", *lines]
    words += ["--n", "1", "--no-score", "--model", str(tmp_path / "run" / "model")]
    assert main(["generate", "--db", str(tmp_path / "b.db"), *words]) == 0
    with Archive.open(tmp_path / "b.db") as drawn, Archive.open(tmp_path / "run" / "samples.db") as samples:
        for each in (drawn, samples):
            assert each.count() == len(lines)
            (model,) = [model for model in each.models().values() if model.kind == "generator"]
            assert model.config["lineage"]["base"]["sha256"] == loaded(case).sha256


LOW_RANK = ("--lora-rank", 4, "--learning-rate", 0.03)
DPO = ("--objective", "dpo")


@every_case
@pytest.mark.parametrize(
    "words",
    [
        pytest.param((*LOW_RANK, "--recompute", "--caption-dropout", 0), marks=pytest.mark.e2e),
        pytest.param((*DPO, "--recompute", "--learning-rate", 0.003), marks=pytest.mark.e2e),
        pytest.param((*DPO, *LOW_RANK, "--dtype", "bfloat16"), marks=pytest.mark.slow),
    ],
    ids=["low-rank", "preferences", "both"],
)
def test_changes_of_low_rank_and_preferences_are_learnt(words, case, tmp_path):
    config = loaded(case).config
    folder = tiny_vqgan(tmp_path / "codec", n_embed=config.vocab_size, resolution=2 * config.grid)
    archive = write_archive(tmp_path / "a.db", case, load_checkpoint(folder, "codec"))
    write_checkpoint(loaded(case), tmp_path / "base")
    command = ["train", archive, "--run", tmp_path / "run", "--model", tmp_path / "base", "--codec", folder]
    command += ["--steps", 12, "--batch-size", 8, "--held-out", 0, "--log-every", 1, "--warmup", 0, *words]
    assert main([*map(str, command)]) == 0
    losses = [line["loss"] for line in read_log(tmp_path / "run")]
    assert np.mean(losses[-3:]) < 0.95 * losses[0], losses
    if "dpo" in words:
        assert losses[0] == pytest.approx(np.log(2), abs=1e-3)  # model and reference are the same yet
    before, after = (flatten(read_params(tmp_path / name)) for name in ("base", "run/model"))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved
    if "--lora-rank" in words:
        chosen = find_layers(LlamaGen(config), read_params(tmp_path / "base"), DEFAULT_LAYERS)
        assert moved == {f"{path}/kernel" for path in chosen} and len(moved) == 2 * config.n_layer
    assert load_checkpoint(tmp_path / "run" / "model", "generator").lineage["base"]["sha256"] == loaded(case).sha256
