"""A checkpoint goes to another process as a path, which has to hold the same weights there."""

import dataclasses
import pickle
import shutil

import pytest
from tiny import tiny_vqgan

from dm_generations.errors import UserError
from dm_generations.models.loading import load_checkpoint


def test_weights_that_are_missing_or_others_are_an_error(tmp_path):
    folder = tiny_vqgan(tmp_path / "codec")
    checkpoint = load_checkpoint(folder, "codec")
    pickled = pickle.dumps(checkpoint)
    assert pickle.loads(pickled).sha256 == checkpoint.sha256
    tiny_vqgan(folder, seed=1)
    with pytest.raises(UserError, match=str(folder)):
        pickle.loads(pickled)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=str(folder)):
        pickle.loads(pickled)


def test_what_was_chosen_for_a_model_goes_along(models, monkeypatch, tmp_path):
    tokenizer = shutil.copy(models.dalle_bart / "tokenizer.json", tmp_path)
    monkeypatch.chdir(models.dalle_bart.parent)
    found = load_checkpoint(models.dalle_bart.name, "generator")
    config = dataclasses.replace(found.config, top_k=7)
    monkeypatch.chdir(tmp_path)
    chosen = dataclasses.replace(found, config=config, tokenizer=type(tmp_path)("tokenizer.json"))
    pickled = pickle.dumps(chosen)
    assert len(pickled) < 10_000
    own, pickled_own = found.tokenizer.name, pickle.dumps(found)
    monkeypatch.chdir("/")
    again = pickle.loads(pickled)
    assert (again.config, again.sha256, str(again.tokenizer)) == (config, found.sha256, str(tokenizer))
    assert pickle.loads(pickled_own).tokenizer == models.dalle_bart.parent / own


def test_corrections_of_a_config_go_along(models):
    found = load_checkpoint(models.dalle_bart, "generator", {"top_k": 7})
    again = pickle.loads(pickle.dumps(found))
    assert again.config == found.config
    assert again.config.top_k == 7


def test_the_embedded_models_need_no_path():
    assert pickle.loads(pickle.dumps(load_checkpoint(None, "codec"))).source is None
