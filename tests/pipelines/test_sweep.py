"""Combinations, their order and keys, and what an archive lacks of them; no model is needed."""

import hashlib
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from dm_generations.archive import Archive, ModelInfo, NewImage
from dm_generations.errors import UserError
from dm_generations.pipelines.sweep import Combination, Shard, Sweep, plan_sweep
from dm_generations.sampling.params import SamplingParams
from dm_generations.sampling.prng import row_key

MODEL = ModelInfo("generator", "model", "0" * 64, {})


def store(archive, combination, keys, sampler_version=1):
    images = [
        NewImage(
            combination.prompt,
            combination.sc_prompt,
            combination.params,
            key0=key[0],
            key1=key[1],
            quantvec=b"\0\0",
            time_start=0.0,
            time_end=1.0,
        )
        for key in keys
    ]
    with archive.transaction():
        archive.add_images(images, archive.model_id(MODEL), None, None, sampler_version)


def test_every_combination_once_in_the_order_of_groups():
    sweep = Sweep(["b", "a"], top_k=[0, 5], cond_scale=[1, 3.5], count=2)
    found = [(c.prompt, c.params.top_k, c.params.cond_scale) for c in sweep.combinations()]
    assert found == [(prompt, k, scale) for prompt in "ba" for k in (0, 5) for scale in (1.0, 3.5)]
    assert sweep.combination_count == 8 and sweep.image_count == 16


def test_repeated_values_are_dropped():
    sweep = Sweep(["a", "a"], sc_prompts=["", None, "x", "x"], temperature=[1, 1.0], cond_scale=[0.0, -0.0])
    assert list(sweep.combinations()) == [
        Combination("a", None, SamplingParams(256, 1.0, 1.0, 0.0)),
        Combination("a", "x", SamplingParams(256, 1.0, 1.0, 0.0)),
    ]
    assert str(sweep.cond_scale) == "(0.0,)"


def test_every_combination_has_the_same_keys():
    work = plan_sweep(Sweep(["a", "b"], count=3, seed=9), None, None, 1)
    keys = [(sample.key0, sample.key1) for sample in work.samples()]
    assert keys == [row_key(9, index) for index in range(3)] * 2


def test_combinations_can_have_keys_of_their_own_which_the_rest_of_the_sweep_does_not_change():
    sweep = Sweep(["a", "b"], cond_scale=[1, 3.0], count=3, seed=9, same_seeds=False)
    keys = {combination: sweep.keys(combination) for combination in sweep.combinations()}
    assert len({key for of_one in keys.values() for key in of_one}) == 12
    wider = Sweep(["c", "b"], top_k=[7, 256], cond_scale=[3], count=2, seed=9, same_seeds=False)
    shared = Combination("b", None, SamplingParams(256, 1.0, 1.0, 3.0))
    assert wider.keys(shared) == keys[shared][:2]
    assert Sweep(["b"], count=2, seed=8, same_seeds=False).keys(shared) != wider.keys(shared)
    # as schema/sampling.md says
    text = b'[9,"b",null,256,1.0,1.0,3.0]'
    seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
    assert keys[shared] == tuple(row_key(seed, index) for index in range(3))


def test_only_what_is_missing_is_planned(tmp_path):
    sweep = Sweep(["a", "b", "c"], top_p=[0.9, 1.0], count=3)
    first, second, third, *rest = sweep.combinations()
    with Archive.create(tmp_path / "a.db") as archive:
        store(archive, first, sweep.keys(first))
        store(archive, second, sweep.keys(second)[1:2])
        store(archive, third, sweep.keys(third), sampler_version=0)  # sampled in another way: other images
        work = plan_sweep(sweep, archive, 1, sampler_version=1)
        assert plan_sweep(sweep, archive, 1, 1, init_md5="0" * 32).missing_count == 18  # they continue initial tokens
        assert plan_sweep(sweep, archive, 2, sampler_version=1).missing_count == 18  # another model
    expected = [(second, [0, 2]), (third, [0, 1, 2]), *((other, [0, 1, 2]) for other in rest)]
    assert [(combination, list(indices)) for combination, indices in work.missing] == expected
    assert (work.existing_count, work.missing_count) == (4, 14)


def positions(sweep, samples):
    """Where samples stand in the whole sweep."""
    everything = list(plan_sweep(sweep, None, None, 1).samples())
    return [everything.index(sample) for sample in samples]


def test_shards_divide_a_sweep():
    sweep = Sweep(["a", "b", "c"], top_k=[1, 2], count=3)
    for index in (1, 2, 3, 4):
        work = plan_sweep(sweep, None, None, 1, shard=Shard(index, 4))
        assert positions(sweep, work.samples()) == list(range(index - 1, 18, 4))
        assert (work.existing_count, work.missing_count) == (0, len(range(index - 1, 18, 4)))
    one_each = plan_sweep(Sweep(["a", "b"], count=1), None, None, 1, shard=Shard(2, 3))
    assert [combination.prompt for combination, _ in one_each.missing] == ["b"]


def test_a_shard_is_the_same_whatever_is_stored(tmp_path):
    sweep = Sweep(["a", "b"], count=4)
    first, _ = sweep.combinations()
    with Archive.create(tmp_path / "a.db") as archive:
        store(archive, first, sweep.keys(first)[:3])
        work = plan_sweep(sweep, archive, 1, 1, shard=Shard(2, 2))
    assert positions(sweep, work.samples()) == [3, 5, 7]
    assert (work.existing_count, work.missing_count) == (1, 3)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1.0/2"])
def test_a_bad_shard_is_refused(text):
    with pytest.raises(UserError, match="--shard") as error:
        Shard.parse(text)
    assert repr(text) in str(error.value)
    assert Shard.parse("2/3") == Shard(2, 3)


def test_open_settings_take_the_defaults_of_a_model():
    sweep = Sweep(["a"], top_k=[5, 6], unset=frozenset({"top_p", "cond_scale"}))
    changed = sweep.with_defaults(SamplingParams(1, 0.5, 0.5, 2.0))
    assert (changed.top_k, changed.top_p, changed.temperature, changed.cond_scale) == ((5, 6), (0.5,), (1.0,), (2.0,))


@pytest.mark.parametrize("axis", ["prompts", "sc_prompts", "top_k", "top_p", "temperature", "cond_scale"])
def test_an_axis_without_values_is_refused(axis):
    with pytest.raises(UserError, match=axis):
        Sweep(**({"prompts": ["a"]} | {axis: []}))


def test_planning_needs_neither_jax_nor_numpy():
    program = ROOT / "tests" / "programs" / "plan_without_jax.py"
    subprocess.run([sys.executable, program], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
