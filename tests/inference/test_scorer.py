"""The scorer, on the small CLIP of tests/golden/clip and a tokenizer of letters."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import ROOT
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from dm_generations.errors import UserError
from dm_generations.inference.scorer import TEXT_BATCH, Scorer
from dm_generations.models.clip.checkpoint import flax_from_torch
from dm_generations.models.clip.network import CLIP, CLIPConfig, unit
from dm_generations.models.clip.preprocessing import Preprocessing
from dm_generations.models.tokenization import PromptTokenizer

MODEL = ROOT / "tests" / "golden" / "clip" / "model"
BOS, EOS = 62, 63  # as in the model's config
PROMPTS = ["a cat", "A <end> b", "moon", "a cat", "\0\ud800"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    ids = {piece: index for index, piece in enumerate(letters + [c + "</w>" for c in letters])}
    ids |= {"<start>": BOS, "<end>": EOS}
    tokenizer = Tokenizer(models.BPE(ids, [], end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.RobertaProcessing(("<end>", EOS), ("<start>", BOS))
    tokenizer.add_special_tokens(["<start>", "<end>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return PromptTokenizer(folder, vocab_size=64)


@pytest.fixture(scope="module")
def checkpoint():
    config = CLIPConfig.from_dict(json.loads((MODEL / "config.json").read_text()))
    params = flax_from_torch(load_file(MODEL / "model.safetensors"))
    return SimpleNamespace(config=config, params=params, folder=MODEL)


@pytest.fixture(scope="module")
def scorer(checkpoint, tokenizer):
    return Scorer(checkpoint, tokenizer, batch_size=4)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 48, 40, 3), np.uint8)


@pytest.mark.e2e
def test_score_is_the_logit_of_image_and_prompt(scorer, checkpoint, tokenizer, images):
    score_input, score_tokenized = scorer.score(images, PROMPTS)
    texts = [*PROMPTS, *(tokenizer.round_trip(prompt, 14) for prompt in PROMPTS)]
    logits = CLIP(checkpoint.config).apply(
        {"params": checkpoint.params}, Preprocessing(32).apply(images), *tokenizer.encode(texts, 14)
    )
    assert score_input.shape == score_tokenized.shape == (5,) and score_input.dtype == np.float32
    np.testing.assert_allclose(score_input, np.diagonal(logits[:, :5]), atol=1e-4)
    np.testing.assert_allclose(score_tokenized, np.diagonal(logits[:, 5:]), atol=1e-4)
    assert abs(score_input[1] - score_tokenized[1]) > 0.01  # an end token typed in the middle is not read back


def test_scores_are_batch_invariant(scorer, images):
    together = scorer.score(images, PROMPTS)
    alone = [scorer.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)]
    np.testing.assert_allclose(np.concatenate(alone, axis=1), together, atol=1e-5)


def test_each_tower_is_traced_once(checkpoint, tokenizer, images, monkeypatch):
    traced = []

    def counted(features):
        traced.append(features.shape)
        return unit(features)

    monkeypatch.setattr("dm_generations.inference.scorer.unit", counted)
    scorer = Scorer(checkpoint, tokenizer, batch_size=4)
    scorer.score(images, PROMPTS)
    with jax.transfer_guard("disallow"):  # every copy to the device is an explicit one
        scorer.score(images[:3], ["new", "words", "a cat"])
    assert sorted(traced) == [(4, 24), (TEXT_BATCH, 24)]


def test_features_of_recent_texts_are_cached(scorer, tokenizer, monkeypatch):
    encoded, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda texts, length: encoded.extend(texts) or encode(texts, length))
    monkeypatch.setattr("dm_generations.inference.scorer.MAX_CACHED_TEXTS", 3)
    texts = [c * 2 for c in "abcdefghijk"]
    assert scorer.text_features(texts + texts).shape == (22, 24)
    assert encoded == texts
    scorer.text_features(texts[-3:])
    assert encoded == texts
    scorer.text_features(texts[:1])
    assert encoded == [*texts, texts[0]]


def test_nothing_to_score(scorer, images):
    assert [scores.shape for scores in scorer.score(images[:0], [])] == [(0,), (0,)]


def test_callers_mistakes_raise(scorer, images):
    with pytest.raises(ValueError, match="5 images do not match 1 prompts"):
        scorer.score(images, ["a"])
    with pytest.raises(ValueError, match="images must be uint8"):
        scorer.image_features(images / 255)


def test_preprocessing_is_read_from_beside_the_model(checkpoint, tmp_path):
    assert Preprocessing.from_folder(tmp_path, 32) == Preprocessing(32)
    values = {
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [1, 1, 2],
        "resample": 2,
        "size": {"shortest_edge": 32},
    }
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(values | {"crop_size": {"height": 32, "width": 32}}))
    assert Preprocessing.from_folder(tmp_path, 32) == Preprocessing(32, (0.5, 0.4, 0.3), (1, 1, 2), 2)
    path.unlink()
    newer = tmp_path / "processor_config.json"  # of transformers 5; older ones write it without an image processor
    newer.write_text(json.dumps({"processor_class": "CLIPProcessor", "image_processor": values}))
    assert Preprocessing.from_folder(tmp_path, 32) == Preprocessing(32, (0.5, 0.4, 0.3), (1, 1, 2), 2)
    newer.write_text('{"processor_class": "CLIPProcessor"}')
    assert Preprocessing.from_folder(tmp_path, 32) == Preprocessing(32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "preprocessor_config.json is not JSON"),
        ("[" * 200_000, "preprocessor_config.json is not JSON"),
        ("[]", "preprocessor_config.json must hold a JSON object"),
        ('{"size": 1e999}', "not a CLIP preprocessor config"),
        ('{"image_mean": "no"}', "not a CLIP preprocessor config"),
        ('{"size": {}}', "not a CLIP preprocessor config"),
        ('{"resample": 99}', "not a CLIP preprocessor config"),
        ('{"image_std": [1, 1, 0]}', "above 0"),
        ('{"image_mean": [1, NaN, 0]}', "3 numbers"),
        ('{"do_normalize": false}', "do_normalize is false, which this program does not support"),
        ('{"do_resize": false}', "do_resize is false"),
        ('{"rescale_factor": 1}', "rescale_factor is 1.0 and not 1/255"),
        ('{"rescale_factor": null}', "not a CLIP preprocessor config"),
        ('{"size": 224}', "\\[224\\] pixels, but the model reads 32"),
    ],
)
def test_bad_preprocessor_config_is_refused(checkpoint, tmp_path, text, message):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Preprocessing.from_folder(tmp_path, 32)
