"""Flax folders of vqgan-jax and dalle-mini: `config.json` and `flax_model.msgpack`, names as our networks have them."""

from pathlib import Path

from dm_generations.errors import UserError
from dm_generations.models.checkpoints.flax_msgpack import read_flax_msgpack
from dm_generations.models.checkpoints.own import FORMAT, read_config
from dm_generations.models.checkpoints.source import Source
from dm_generations.models.dalle_bart_config import DalleBartConfig, config_for_params
from dm_generations.models.vqgan import VQGANConfig

WEIGHTS_FILE = "flax_model.msgpack"


def generator(path: Path) -> Source | None:
    """A DALL-E mini or mega."""
    values = read_config(path)
    if values is None or values.get("model_type") != "dallebart" or values.get("format") == FORMAT:
        return None
    weights = _weights(path)
    params = read_flax_msgpack(weights)
    config = config_for_params(DalleBartConfig.from_dict(values), params)
    style = "dalle_mini" if config.normalize_text else "dalle_bart"
    return Source("dalle_bart", config, params, (weights,), path, style)


def codec(path: Path) -> Source | None:
    """A VQGAN of vqgan-jax."""
    values = read_config(path)
    if values is None or "n_embed" not in values or "ch_mult" not in values or values.get("format") == FORMAT:
        return None
    for name in ("double_z", "give_pre_end"):  # they change the network, and no published model has them on
        if values.get(name):
            raise UserError(f"{path / 'config.json'}: {name} is {values[name]!r:.80}, which is not supported")
    weights = _weights(path)
    try:
        config = VQGANConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path / 'config.json'} does not describe a vqgan: {error}") from error
    return Source("vqgan", config, read_flax_msgpack(weights), (weights,))


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{folder} lacks its weights: {WEIGHTS_FILE}")
    return path
