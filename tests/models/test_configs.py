"""Configs are checked before anything is built from them, whatever file they come from."""

import dataclasses
import typing

import pytest
import tiny
import torch_files
from codec_kit import random_params, saved, taming_state

from dm_generations.errors import UserError
from dm_generations.models.clip.network import CLIPTextConfig, CLIPVisionConfig
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.registry import KINDS
from dm_generations.models.vqgan.network import VQGANConfig

REQUIRED = dict.fromkeys(
    ("num_text_tokens", "text_seq_len", "num_image_tokens", "image_fmap_size", "dim", "depth", "heads", "dim_head"), 4
)
CLASSES = [kind.config_class for kind in KINDS] + [CLIPTextConfig, CLIPVisionConfig]


def fields(*types):
    """Pairs of a config's class and the name of a field of these types, None aside."""
    found = [(cls, field) for cls in CLASSES for field in dataclasses.fields(cls)]
    return [
        pytest.param(cls, field.name, id=f"{cls.__name__}-{field.name}")
        for cls, field in found
        if {field.type, *typing.get_args(field.type)}.intersection(types)
    ]


def build(cls, **changes):
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in REQUIRED.items() if name in names} | changes)


@pytest.mark.parametrize(("cls", "name"), fields(int, float, bool, tuple[int, ...]))
@pytest.mark.parametrize("value", [2**70, -(10**9), "4", float("nan"), [[]], {}])
def test_a_value_of_another_type_or_range_is_named(cls, name, value):
    with pytest.raises(UserError, match=rf"{name}") as caught:
        build(cls, **{name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(("cls", "name"), fields(int))
def test_no_size_of_a_billion_is_taken(cls, name):
    if name in ("top_k", "bos_token_id", "eos_token_id", "pad_token_id"):
        build(cls, **{name: 10**9})  # a number that nothing is built from
        return
    with pytest.raises(UserError, match=name):
        build(cls, **{name: 10**9})


@pytest.mark.parametrize(("cls", "name"), fields(str))
@pytest.mark.parametrize("value", ["other", 1, ["gelu"]])
def test_an_unknown_choice_is_named(cls, name, value):
    with pytest.raises(UserError, match=name):
        build(cls, **{name: value})


def test_names_that_are_no_texts_are_refused(tmp_path):
    """In a state dict, whose keys come from a pickle."""
    clip = tiny.tiny_clip(tmp_path / "clip")
    (clip / "model.safetensors").unlink()
    (clip / "config.json").write_text('{"model_type": "clip"}')
    torch_files.save(clip / "pytorch_model.bin", {1: 2, None: 4})
    with pytest.raises(UserError, match=r"pytorch_model\.bin: '1' is not a tensor"):
        load_checkpoint(clip, "clip")
    config = VQGANConfig(ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), resolution=8, n_embed=4)
    state = taming_state(random_params("vqgan", config))
    state = {name.removeprefix("quantize."): array for name, array in state.items()}
    with pytest.raises(UserError, match=r"detoker\.pt.*5"):
        load_checkpoint(saved(tmp_path / "detoker.pt", state | {5: state["embedding.weight"]}), "codec")
