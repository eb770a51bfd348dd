"""Low-rank changes: they change nothing at first, and merged they change what they changed beside the weights."""

import jax
import numpy as np
import pytest

from dm_generations.errors import UserError
from dm_generations.models.loading import load_checkpoint
from dm_generations.training.lora import DEFAULT_LAYERS, find_layers, make_adapters, merge_adapters, use_adapters
from dm_generations.weights.native import flatten

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def loaded(models):
    checkpoint = load_checkpoint(models.dalle_bart, "generator")
    model = checkpoint.network_class(checkpoint.config)
    ids, tokens = np.ones((2, 5), np.int32), np.arange(32).reshape(2, 16)

    def logits_of(params):  # traced anew each time, so that adapters count
        apply = jax.jit(lambda params: model.apply({"params": params}, ids, ids, tokens, method="training_logits"))
        return apply(params).image

    return model, checkpoint.params, logits_of


def test_merged_adapters_equal_those_beside_the_weights(loaded):
    model, params, logits_of = loaded
    adapters = make_adapters(find_layers(model, params, DEFAULT_LAYERS), rank=2, seed=0)
    plain = logits_of(params)
    with use_adapters(adapters, 0.5):
        np.testing.assert_array_equal(logits_of(params), plain)
    rng = np.random.default_rng(0)
    changed = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.3, adapters)
    with use_adapters(changed, 0.5):
        beside = logits_of(params)
    assert np.abs(beside - plain).max() > 0.01
    merged = merge_adapters(params, changed, 0.5)
    np.testing.assert_allclose(logits_of(merged), beside, atol=1e-4)
    differing = {path for path, leaf in flatten(merged).items() if (leaf != flatten(params)[path]).any()}
    assert differing == {f"{path}/kernel" for path in changed}


def test_layers_are_chosen_by_regular_expressions(loaded):
    model, params, _ = loaded
    paths = find_layers(model, params, ["decoder/.*q_proj$"])
    assert paths and all("decoder" in path and path.endswith("q_proj") for path in paths)
    for patterns, match in ((["no such layer"], "match none"), (["("], "regular expression")):
        with pytest.raises(UserError, match=match):
            find_layers(model, params, patterns)
