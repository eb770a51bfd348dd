"""The models of a run: loaded, checked to be compatible, and found or added in an archive."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dm_generations.archive import Archive, ModelInfo
from dm_generations.errors import UserError
from dm_generations.models import checkpoints
from dm_generations.models.checkpoints import Checkpoint
from dm_generations.models.networks import ROLES

ROLE_OF_KIND = {kind: role for role, kinds in ROLES.items() for kind in kinds}
MAX_CODEBOOK_SIZE = 65536  # tokens are uint16


@dataclasses.dataclass(frozen=True)
class Models:
    """The checkpoints of a run, which are compatible."""

    generator: Checkpoint
    codec: Checkpoint
    clip: Checkpoint | None  # None: images are not scored
    codec_from: str | None = None  # folder, file or hub name that has the codec; None: it is the embedded one

    @property
    def grid(self) -> int:
        """Tokens a side of the generator's images; the codec can be trained for images of another size."""
        return math.isqrt(self.generator.config.image_length)


def load_generator(model: str | None, tokenizer: Path | None, overrides: Mapping[str, Any]) -> Checkpoint:
    """Load the text model; arguments and errors are those of `load_models`."""
    checkpoint = checkpoints.load(model, "generator")
    if tokenizer is not None:
        checkpoint = dataclasses.replace(checkpoint, tokenizer=tokenizer)
    if not overrides:
        return checkpoint
    if checkpoint.kind != "dalle_pytorch":
        raise UserError(
            f"--conv-like and --cond-scale-of are for DALLE-pytorch's models; {checkpoint.name!r} is another kind"
        )
    return dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, **overrides))


def load_models(
    model: str | None,
    codec: str | None,
    clip: str | None,
    is_scored: bool,
    tokenizer: Path | None = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> Models:
    """Load the models of a run and check that they are compatible.

    Args:
        model: Folder, file or name on the hub; None is the embedded model.
        codec: The same; None is the model's own codec if it lies with the model, else the embedded one.
        clip: The same; None is the embedded one.
        is_scored: Whether CLIP is loaded.
        tokenizer: File or folder that replaces the text model's tokenizer.
        overrides: Entries that replace those in the config of a DALLE-pytorch file.

    Raises:
        UserError: A model is missing, broken or incompatible with another.
    """
    generator_checkpoint = load_generator(model, tokenizer, overrides)
    codec_checkpoint = checkpoints.find(model, "codec") if codec is None and model is not None else None
    codec_from = codec if codec_checkpoint is None else model
    codec_checkpoint = codec_checkpoint or checkpoints.load(codec, "codec")
    _check_compatible(generator_checkpoint, codec_checkpoint)
    clip_checkpoint = checkpoints.load(clip, "clip") if is_scored else None
    return Models(generator_checkpoint, codec_checkpoint, clip_checkpoint, codec_from)


def _check_compatible(generator: Checkpoint, codec: Checkpoint) -> None:
    token_count, codebook_size = generator.config.image_length, generator.config.codebook_size
    grid = codec.config.grid
    if generator.kind == "dalle_pytorch":  # the DALL-3 fork samples 16 x 16 tokens, whatever its codec was trained at
        grid = math.isqrt(token_count)
    if grid**2 != token_count:
        raise UserError(
            f"model {generator.name!r} samples {token_count} tokens an image, codec {codec.name!r} takes "
            f"{grid}x{grid}: give the model's own codec with --codec"
        )
    if codec.config.codebook_size < codebook_size:
        raise UserError(
            f"model {generator.name!r} samples tokens below {codebook_size:,}, codec {codec.name!r} has "
            f"{codec.config.codebook_size:,}: give the model's own codec with --codec"
        )
    if codebook_size > MAX_CODEBOOK_SIZE:
        raise UserError(
            f"model {generator.name!r} has a codebook of {codebook_size:,} tokens, archives hold {MAX_CODEBOOK_SIZE:,}"
        )


def model_info(checkpoint: Checkpoint, grid: int | None = None) -> ModelInfo:
    """Describe a model as the archive stores it.

    Args:
        grid: Tokens a side, for a codec that decodes another grid than its own.
    """
    config = json.loads(json.dumps(dataclasses.asdict(checkpoint.config)))  # tuples come back as lists
    role = ROLE_OF_KIND[checkpoint.kind]
    if role != "codec":
        return ModelInfo(role, checkpoint.name, checkpoint.sha256, config)
    sizes = checkpoint.config.grid, checkpoint.config.codebook_size, checkpoint.config.image_size
    if grid not in (None, checkpoint.config.grid):
        config["grid"] = grid
        sizes = grid, checkpoint.config.codebook_size, checkpoint.config.image_size // checkpoint.config.grid * grid
    return ModelInfo(role, checkpoint.name, checkpoint.sha256, config, *sizes)


def find_model_id(archive: Archive, model: ModelInfo) -> int | None:
    """Return the archive's id of a model, or None; a codec without a grid is found with any.

    The same weights are the same model if no option has another value. Options that only one of the two configs has do
    not count, so that an archive of an older version of this program can be filled further.
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
    """Return the archive's id of a model, which is added if it is new. Inside a transaction."""
    row_id = find_model_id(archive, model)
    return archive.model_id(model) if row_id is None else row_id
