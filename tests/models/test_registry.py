"""Every kind of model fulfils the protocol of its role."""

import pytest
import tiny

from dm_generations.models.base import ImageCodec, TextToImageModel
from dm_generations.models.registry import KINDS, ROLES, find_kind, kinds_of_role

PROTOCOLS = {"generator": TextToImageModel, "codec": ImageCodec, "decoder": object, "clip": object, "scorer": object}
CONFIG_NAMES = {
    "generator": (
        *("image_length", "codebook_size", "max_text_length", "text_vocab_size", "start_token", "sampling_order"),
        "decodes_own_grid",
    ),
    "codec": ("grid", "codebook_size", "image_size"),
    "decoder": ("image_size", "diffusion_steps"),
    "clip": (),
    "scorer": ("widths",),
}
CONFIGS = {
    "dalle_bart": tiny.DALLE_BART_CONFIG,
    "dalle_pytorch": dict.fromkeys(
        ("num_text_tokens", "text_seq_len", "num_image_tokens", "image_fmap_size", "dim", "depth"), 4
    ),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_network_and_config_have_what_the_role_needs(kind):
    config = kind.config_class.from_dict(CONFIGS.get(kind.name, {}))
    assert isinstance(kind.network_class(config), PROTOCOLS[kind.role])
    assert kind.network_class.example_inputs(config)
    assert all(hasattr(config, name) for name in CONFIG_NAMES[kind.role])
    assert all(map(callable, kind.read_functions))


def test_kinds_have_names_of_their_own_and_known_roles():
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert [kind for role in ROLES for kind in kinds_of_role(role)] == list(KINDS)
    assert find_kind(["vqgan"]) is None  # what a config.json may hold
    with pytest.raises(ValueError, match="role"):
        kinds_of_role("critic")
