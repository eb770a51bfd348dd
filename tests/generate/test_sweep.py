"""Combinations, their order and keys, and what an archive lacks of them; no model is needed."""

import hashlib
import subprocess
import sys

import pytest

from dm_generations.archive import Archive, ModelInfo, NewImage
from dm_generations.errors import UserError
from dm_generations.generate.sweep import Combination, Sweep, plan
from dm_generations.threefry import row_key

MODEL = ModelInfo("generator", "model", "0" * 64, {})


def store(archive, combination, keys, sampler_version=1):
    images = [
        NewImage(
            combination.prompt,
            combination.sc_prompt,
            combination.top_k,
            combination.top_p,
            combination.temperature,
            combination.cond_scale,
            *key,
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
    found = [(c.prompt, c.top_k, c.cond_scale) for c in sweep.combinations()]
    assert found == [(prompt, k, scale) for prompt in "ba" for k in (0, 5) for scale in (1.0, 3.5)]
    assert sweep.combination_count == 8 and sweep.picture_count == 16


def test_repeated_values_are_dropped():
    sweep = Sweep(["a", "a"], sc_prompts=["", None, "x", "x"], temperature=[1, 1.0], cond_scale=[0.0, -0.0])
    assert list(sweep.combinations()) == [
        Combination("a", None, 256, 1.0, 1.0, 0.0),
        Combination("a", "x", 256, 1.0, 1.0, 0.0),
    ]
    assert str(sweep.cond_scale) == "(0.0,)"


def test_every_combination_has_the_same_keys():
    work = plan(Sweep(["a", "b"], count=3, seed=9), None, None, 1)
    keys = [(draw.key0, draw.key1) for draw in work.draws()]
    assert keys == [row_key(9, index) for index in range(3)] * 2


def test_combinations_can_have_keys_of_their_own_which_the_rest_of_the_sweep_does_not_change():
    sweep = Sweep(["a", "b"], cond_scale=[1, 3.0], count=3, seed=9, same_seeds=False)
    keys = {combination: sweep.keys(combination) for combination in sweep.combinations()}
    assert len({key for of_one in keys.values() for key in of_one}) == 12
    wider = Sweep(["c", "b"], top_k=[7, 256], cond_scale=[3], count=2, seed=9, same_seeds=False)
    shared = Combination("b", None, 256, 1.0, 1.0, 3.0)
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
        store(archive, third, sweep.keys(third), sampler_version=0)  # drawn in another way: not the same pictures
        work = plan(sweep, archive, 1, sampler_version=1)
        assert plan(sweep, archive, 1, 1, init_md5="0" * 32).missing_count == 18  # after codes that were given
        assert plan(sweep, archive, 2, sampler_version=1).missing_count == 18  # another model
    expected = [(second, [0, 2]), (third, [0, 1, 2]), *((other, [0, 1, 2]) for other in rest)]
    assert [(combination, list(indices)) for combination, indices in work.missing] == expected
    assert (work.existing_count, work.missing_count) == (4, 14)


@pytest.mark.parametrize("axis", ["prompts", "sc_prompts", "top_k", "top_p", "temperature", "cond_scale"])
def test_an_axis_without_values_is_refused(axis):
    with pytest.raises(UserError, match=f"{axis} needs at least one value"):
        Sweep(**({"prompts": ["a"]} | {axis: []}))


def test_planning_needs_neither_jax_nor_numpy():
    code = (
        "import sys; from dm_generations.generate.sweep import Sweep, plan;"
        "plan(Sweep(['a']), None, None, 1);"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
