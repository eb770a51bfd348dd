"""Configuration of DalleBart, read from dalle-mini's config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from dm_generations.errors import UserError
from dm_generations.models.base import (
    ANY_ID,
    LAYERS,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    Bounds,
    check_config,
    select_fields,
)
from dm_generations.sampling.params import SamplingParams

ACTIVATION_FUNCTIONS = ("gelu", "gelu_new", "quick_gelu", "relu", "silu", "swish")
LN_TYPES = ("layernorm", "rmsnorm")


class NormPlacement(NamedTuple):
    """Where a block (attention or feed-forward) has norms."""

    after_attention: bool
    inside_ffn: bool  # between activation and the last dense layer
    after_ffn: bool


# Every supported placement also has a norm before each block.
NORM_PLACEMENTS = {
    "preln": NormPlacement(after_attention=False, inside_ffn=False, after_ffn=False),
    "normformer": NormPlacement(after_attention=True, inside_ffn=True, after_ffn=False),
    "cogview": NormPlacement(after_attention=True, inside_ffn=False, after_ffn=True),
}

# Options of dalle-mini that no published model uses, with the only value that is supported. `use_subln_init` and
# `tau_init` are not among them: alone, they change no trained network.
UNSUPPORTED_UNLESS = {
    "sinkhorn_iters": 1,
    "tie_word_embeddings": False,
    "use_absolute_position_embeddings": True,
    "use_alibi": False,
    "use_cosine_attention": False,
    "use_deepnet_scaling": False,
    "use_swin_position_embeddings": False,
}

_RATE = (0.0, 0.99)
_BOUNDS: Bounds = {
    "encoder_vocab_size": VOCABULARY,
    "image_vocab_size": VOCABULARY,
    "image_length": POSITIONS,
    "max_text_length": POSITIONS,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "encoder_ffn_dim": WIDTH,
    "encoder_attention_heads": WIDTH,
    "decoder_layers": LAYERS,
    "decoder_ffn_dim": WIDTH,
    "decoder_attention_heads": WIDTH,
    "dropout": _RATE,
    "attention_dropout": _RATE,
    "activation_dropout": _RATE,
    "init_std": _RATE,
    "decoder_start_token_id": VOCABULARY,
    "eos_token_id": ANY_ID,
    "pad_token_id": ANY_ID,
    "top_k": ANY_ID,
    "top_p": (0.0, 1.0),
    "temperature": (1e-9, 1e9),
    "cond_scale": (0.0, 1e9),
    "image_code_count": VOCABULARY,
}
_CHOICES = {"activation_function": ACTIVATION_FUNCTIONS, "ln_type": LN_TYPES, "ln_positions": tuple(NORM_PLACEMENTS)}


@dataclasses.dataclass(frozen=True)
class DalleBartConfig:
    """Sizes and options, named as in dalle-mini's config.json and with its defaults."""

    decodes_own_grid: ClassVar[bool] = False

    encoder_vocab_size: int = 50264
    image_vocab_size: int = 16384  # the embedding and the logits have one row more
    image_length: int = 256
    max_text_length: int = 64
    d_model: int = 1024
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = False
    use_scan: bool = True  # one stacked subtree for all layers; see `config_for_params`
    use_bias: bool = False
    ln_type: str = "layernorm"
    ln_positions: str = "normformer"
    use_head_scale: bool = False
    use_glu: bool = True
    use_final_ln_encoder: bool = True
    use_final_ln_decoder: bool = True
    force_ln_scale: bool = False  # a scale also in norms that a dense layer follows
    normalize_text: bool = False  # prompts pass dalle-mini's text normalizer first
    decoder_start_token_id: int | None = None  # None: image_vocab_size
    # What dalle-mini's own `generate` reads; None: an id that cannot be sampled, and transformers' 50.
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    top_k: int | None = None  # 0: all
    top_p: float = 1.0
    temperature: float = 1.0
    # Not dalle-mini's: given, it and the three above are what the model's maker draws with. None: no such settings.
    cond_scale: float | None = None
    image_code_count: int | None = None  # the codebook size; None: the start token

    def __post_init__(self) -> None:
        check_config("DalleBart", self, _BOUNDS, _CHOICES)
        start = self.image_vocab_size if self.decoder_start_token_id is None else self.decoder_start_token_id
        defaults = {
            "decoder_start_token_id": start,
            "image_code_count": start,
            "eos_token_id": self.image_vocab_size + 1,
            "pad_token_id": self.image_vocab_size + 1,
            "top_k": 50,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            heads = getattr(self, name)
            if self.d_model % heads:
                raise UserError(f"DalleBart config: d_model {self.d_model} is not divisible by {name} {heads}")
        if self.start_token > self.image_vocab_size:
            raise UserError(
                f"DalleBart config: decoder_start_token_id {self.start_token} is above "
                f"image_vocab_size {self.image_vocab_size}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DalleBartConfig":
        """Return the configuration in a parsed config.json; keys it does not know are ignored.

        Raises:
            UserError: An option changes the network and is not supported, or a value is bad.
        """
        values = {name: value for name, value in values.items() if value is not None}  # null: not set
        for name, supported in UNSUPPORTED_UNLESS.items():
            if values.get(name, supported) != supported:
                raise UserError(f"DalleBart config: {name} {values[name]!r:.80} is not supported, only {supported!r}")
        return cls(**select_fields(cls, values))

    @property
    def codebook_size(self) -> int:
        """Tokens below it are image content; ids from it on (start token, padding rows) are not."""
        assert self.image_code_count is not None  # set by __post_init__
        return self.image_code_count

    @property
    def start_token(self) -> int:
        """What the decoder reads before the first image token."""
        assert self.decoder_start_token_id is not None  # set by __post_init__
        return self.decoder_start_token_id

    @property
    def default_params(self) -> SamplingParams | None:
        """Settings that the model's maker draws with, if its config says so."""
        if self.cond_scale is None:
            return None
        assert self.top_k is not None  # set by __post_init__
        return SamplingParams(self.top_k, self.top_p, self.temperature, self.cond_scale)

    @property
    def text_vocab_size(self) -> int:
        """Rows of the table that the prompt's ids index."""
        return self.encoder_vocab_size

    @property
    def sampling_order(self) -> str:
        """See `sampling.filter_logits`."""
        return "temperature_first"


def config_for_params(config: DalleBartConfig, params: Mapping[str, Any]) -> DalleBartConfig:
    """`config` with `use_scan` as the parameter tree has it.

    Old checkpoints have one subtree per layer although the config's default is now one stacked subtree.

    Raises:
        UserError: if these are not the parameters of a DalleBart.
    """
    try:
        layers = params["model"]["encoder"]["layers"]
    except (KeyError, TypeError) as error:
        raise UserError("not the weights of a DalleBart: model/encoder/layers is missing") from error
    return dataclasses.replace(config, use_scan="FlaxBartEncoderLayers" in layers)


def unscan(config: DalleBartConfig, params: dict) -> tuple[DalleBartConfig, dict]:
    """The same network with layers apart: views of the stacked arrays, named as layers apart are."""
    if not config.use_scan:
        return config, params
    model = dict(params["model"])
    for part, layer, count in (
        ("encoder", "FlaxBartEncoderLayer", config.encoder_layers),
        ("decoder", "FlaxBartDecoderLayer", config.decoder_layers),
    ):
        stacked = model[part]["layers"][f"{layer}s"]
        layers = {f"{layer}_{index}": _rows(stacked, index) for index in range(count)}
        model[part] = {**model[part], "layers": layers}
    return dataclasses.replace(config, use_scan=False), {**params, "model": model}


def _rows(tree: dict, index: int) -> dict:
    """Row `index` of every array of a nested dict."""
    return {name: _rows(leaf, index) if isinstance(leaf, dict) else leaf[index] for name, leaf in tree.items()}
