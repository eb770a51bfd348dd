"""How an archive knows the models that made its images."""

import dataclasses
import json

from dm_generations.archive import Archive, ModelInfo
from dm_generations.models.loading import Checkpoint


def model_info(checkpoint: Checkpoint, grid: int | None = None) -> ModelInfo:
    """What an archive stores about a model.

    Args:
        checkpoint: the model.
        grid: of a codec, tokens a side, if it decodes another grid than its own.
    """
    config = json.loads(json.dumps(dataclasses.asdict(checkpoint.config)))  # tuples come back as lists
    if checkpoint.role != "codec":
        return ModelInfo(checkpoint.role, checkpoint.name, checkpoint.sha256, config)
    sizes = checkpoint.config.grid, checkpoint.config.codebook_size, checkpoint.config.image_size
    if grid is not None and grid != checkpoint.config.grid:
        config["grid"] = grid
        sizes = grid, checkpoint.config.codebook_size, checkpoint.config.image_size // checkpoint.config.grid * grid
    return ModelInfo(checkpoint.role, checkpoint.name, checkpoint.sha256, config, *sizes)


def find_model_id(archive: Archive, model: ModelInfo) -> int | None:
    """The archive's id of a model, None if it is new there.

    The same weights are the same model if no option has another value. Options that only one of both has do not count,
    so that an archive of an older version of this program can be filled further.

    Args:
        archive: where to look.
        model: a codec without a grid matches one with any.
    """
    for row_id, stored in archive.models().items():
        if (stored.kind, stored.sha256) != (model.kind, model.sha256) or not isinstance(stored.config, dict):
            continue
        if model.grid not in (None, stored.grid):
            continue
        common = stored.config.keys() & model.config.keys()
        if all(stored.config[name] == model.config[name] for name in common):
            return row_id
    return None


def add_model(archive: Archive, model: ModelInfo) -> int:
    """The archive's id of a model, which is added if it is new there. Call it inside a transaction."""
    row_id = find_model_id(archive, model)
    return archive.model_id(model) if row_id is None else row_id
