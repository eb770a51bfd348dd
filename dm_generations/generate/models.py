"""The models of a run: loaded to fit each other, and how an archive knows them."""

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
MAX_CODES = 65536  # tokens are uint16


@dataclasses.dataclass(frozen=True)
class Models:
    """The checkpoints of a run, known to fit each other."""

    generator: Checkpoint
    codec: Checkpoint
    clip: Checkpoint | None  # None: pictures are not scored
    codec_from: str | None = None  # folder, file or hub name that has the codec; None: it is the embedded one

    @property
    def grid(self) -> int:
        """Codes a side of the generator's pictures; the codec can be made for pictures of another size."""
        return math.isqrt(self.generator.config.image_length)


def load_generator(model: str | None, tokenizer: Path | None, overrides: Mapping[str, Any]) -> Checkpoint:
    """The text model; the arguments are those of `load_models`, and so are the errors."""
    checkpoint = checkpoints.load(model, "generator")
    if tokenizer is not None:
        checkpoint = dataclasses.replace(checkpoint, tokenizer=tokenizer)
    if not overrides:
        return checkpoint
    if checkpoint.kind != "dalle_pytorch":
        raise UserError(
            f"--conv-like and --cond-scale-of are about DALLE-pytorch's models; {checkpoint.name!r} is none"
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
    """Checkpoints from folders, files or the hub, which fit each other.

    None is the embedded one, and for the codec the model's own if it lies with the model. `tokenizer` takes the place
    of the generator's, `overrides` of what the config of a DALLE-pytorch file tells. Raises UserError: missing, broken,
    not fitting.
    """
    generator_checkpoint = load_generator(model, tokenizer, overrides)
    codec_checkpoint = checkpoints.find(model, "codec") if codec is None and model is not None else None
    codec_from = codec if codec_checkpoint is None else model
    codec_checkpoint = codec_checkpoint or checkpoints.load(codec, "codec")
    _check_fit(generator_checkpoint, codec_checkpoint)
    clip_checkpoint = checkpoints.load(clip, "clip") if is_scored else None
    return Models(generator_checkpoint, codec_checkpoint, clip_checkpoint, codec_from)


def _check_fit(generator: Checkpoint, codec: Checkpoint) -> None:
    token_count, codebook_size = generator.config.image_length, generator.config.codebook_size
    grid = codec.config.grid
    if generator.kind == "dalle_pytorch":  # the DALL-3 fork draws 16 x 16 codes, whatever its codec was trained at
        grid = math.isqrt(token_count)
    if grid**2 != token_count:
        raise UserError(
            f"model {generator.name!r} draws {token_count} codes a picture, codec {codec.name!r} takes "
            f"{grid}x{grid}: give the model's own codec with --codec"
        )
    if codec.config.codebook_size < codebook_size:
        raise UserError(
            f"model {generator.name!r} draws codes below {codebook_size:,}, codec {codec.name!r} has "
            f"{codec.config.codebook_size:,}: give the model's own codec with --codec"
        )
    if codebook_size > MAX_CODES:
        raise UserError(f"model {generator.name!r} has {codebook_size:,} codes, archives hold {MAX_CODES:,}")


def model_info(checkpoint: Checkpoint, grid: int | None = None) -> ModelInfo:
    """What the archive keeps about a model; `grid`: codes a side, of a codec that decodes other than its own."""
    config = json.loads(json.dumps(dataclasses.asdict(checkpoint.config)))  # tuples come back as lists
    role = ROLE_OF_KIND[checkpoint.kind]
    if role != "codec":
        return ModelInfo(role, checkpoint.name, checkpoint.sha256, config)
    sizes = checkpoint.config.grid, checkpoint.config.codebook_size, checkpoint.config.image_size
    if grid not in (None, checkpoint.config.grid):
        config["grid"] = grid
        sizes = grid, checkpoint.config.codebook_size, checkpoint.config.image_size // checkpoint.config.grid * grid
    return ModelInfo(role, checkpoint.name, checkpoint.sha256, config, *sizes)


def known_model(archive: Archive, model: ModelInfo) -> int | None:
    """The archive's id of this model, None if it is new there; a codec without a grid is known with any.

    The same weights are the same model if no option has another value; options that only one of both lists do
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


def record_model(archive: Archive, model: ModelInfo) -> int:
    """The archive's id of this model, added if it is new there. Inside a transaction."""
    row_id = known_model(archive, model)
    return archive.model_id(model) if row_id is None else row_id
