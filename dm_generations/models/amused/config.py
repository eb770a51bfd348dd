"""The config of aMUSEd: sizes of its text encoder and of its transformer, its schedule, and its own settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from dm_generations.errors import UserError, short_repr
from dm_generations.models.base import (
    LAYERS,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    Bounds,
    check_config,
    select_fields,
)
from dm_generations.models.clip.network import CLIPTextConfig
from dm_generations.sampling.params import MAX_STEPS, ExtraSetting, SamplingParams

MASKING_SCHEDULES = ("cosine", "linear")
MAX_GRID = 256  # tokens a side: an archive holds 65,536 a row
MICRO_CONDITIONS = 5  # width and height in pixels, two coordinates of a crop, and an aesthetic score
_BOUNDS: Bounds = {
    "hidden_size": WIDTH,
    "in_channels": WIDTH,
    "block_out_channels": WIDTH,
    "num_res_blocks": (1, 16),
    "block_num_heads": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": WIDTH,
    "intermediate_size": WIDTH,
    "cond_embed_dim": WIDTH,
    "micro_cond_encode_dim": WIDTH,
    "vocab_size": VOCABULARY,
    "codebook_size": VOCABULARY,
    "sample_size": (1, MAX_GRID),
    "layer_norm_eps": (0.0, 1.0),
    "mask_token_id": (0, VOCABULARY[1]),
    "text_length": (2, POSITIONS[1]),
    "image_size": POSITIONS,
}


@dataclasses.dataclass(frozen=True)
class AmusedConfig:
    """Sizes under the names of `UVit2DModel` and `AmusedScheduler` of diffusers; the defaults are amused-256's."""

    decodes_own_grid: ClassVar[bool] = True
    default_params: ClassVar[SamplingParams] = SamplingParams(cond_scale=10.0)
    # What diffusers calls num_inference_steps, temperature, micro_conditioning_aesthetic_score and ..._crop_coord.
    # The sampler reads the first three, the network the others.
    extra_settings: ClassVar[Mapping[str, ExtraSetting]] = {
        "steps": ExtraSetting(12, 1, MAX_STEPS),
        "mask_temperature": ExtraSetting(2.0, 0, 1000),
        "mask_temperature_end": ExtraSetting(0.0, 0, 1000),
        "crop_top": ExtraSetting(0.0, 0, 1e6),
        "crop_left": ExtraSetting(0.0, 0, 1e6),
        "aesthetic_score": ExtraSetting(6.0, -1000, 1000),
    }

    hidden_size: int = 1024  # of the middle
    in_channels: int = 768  # of embedded tokens
    block_out_channels: int = 768  # of the stages of convolutions, before and after the middle
    num_res_blocks: int = 3  # of each stage, with as many blocks of attention
    downsample: bool = False  # the first stage halves the grid, and the last one doubles it
    block_num_heads: int = 12
    num_hidden_layers: int = 22
    num_attention_heads: int = 16
    intermediate_size: int = 2816
    cond_embed_dim: int = 768  # of the pooled text
    micro_cond_encode_dim: int = 256  # of each micro-condition
    vocab_size: int = 8256
    codebook_size: int = 8192
    sample_size: int = 16  # tokens a side
    layer_norm_eps: float = 1e-6
    mask_token_id: int = 8255
    masking_schedule: str = "cosine"
    text_length: int = 77  # tokens of a prompt, padding included
    image_size: int = 256  # pixels a side
    text_config: CLIPTextConfig = dataclasses.field(
        default_factory=lambda: CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    )

    def __post_init__(self) -> None:
        """Raise UserError for a value that no aMUSEd can have."""
        check_config("aMUSEd", self, _BOUNDS, {"masking_schedule": MASKING_SCHEDULES})
        for name, heads in (("hidden_size", self.num_attention_heads), ("block_out_channels", self.block_num_heads)):
            if getattr(self, name) % heads:
                raise UserError(f"aMUSEd config: {name} {getattr(self, name)} is not divisible by its {heads} heads")
        if self.downsample and self.sample_size % 2:
            raise UserError(f"aMUSEd config: sample_size {self.sample_size} is odd, so it cannot be halved")
        if self.micro_cond_encode_dim % 2:
            raise UserError(f"aMUSEd config: micro_cond_encode_dim {self.micro_cond_encode_dim} is odd")
        if not self.codebook_size <= self.mask_token_id < self.vocab_size:
            raise UserError(
                f"aMUSEd config: mask_token_id {self.mask_token_id} is not from codebook_size {self.codebook_size} to "
                f"below vocab_size {self.vocab_size}: take the scheduler of the same model"
            )
        if self.text_length > self.text_config.max_position_embeddings:
            raise UserError(
                f"aMUSEd config: text_length {self.text_length} is more than the text encoder's "
                f"{self.text_config.max_position_embeddings} positions"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AmusedConfig":
        """Return the config of these values; keys it does not know are ignored.

        Raises:
            UserError: A value is bad.
        """
        own = select_fields(cls, values)
        text = own.get("text_config", {})
        if not isinstance(text, Mapping):
            raise UserError(f"aMUSEd config: text_config must be an object, not {short_repr(text)}")
        return cls(**own | ({"text_config": CLIPTextConfig(**select_fields(CLIPTextConfig, text))} if text else {}))

    @property
    def image_length(self) -> int:
        """Tokens an image."""
        return self.sample_size**2

    @property
    def max_text_length(self) -> int:
        """Text tokens that the network reads."""
        return self.text_length

    @property
    def text_vocab_size(self) -> int:
        """Rows of the table that the prompt's ids index."""
        return self.text_config.vocab_size

    @property
    def start_token(self) -> int:
        """What every position holds before the first step."""
        return self.mask_token_id

    @property
    def sampling_order(self) -> str:
        """See `sampling.filter_logits`."""
        return "temperature_first"
