"""Configuration of DALLE-pytorch models, read from the `hparams` of their files."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from dm_generations.errors import UserError, short_repr
from dm_generations.models.base import LAYERS, POSITIONS, VOCABULARY, WIDTH, check_config, select_fields

ATTN_TYPES = ("full", "axial_row", "axial_col", "conv_like", "sparse")
CONV_LIKE = ("causal", "centred")
SAMPLING_ORDERS = ("temperature_first", "top_p_first")
SPARSE_BLOCK = 16  # positions a side of one block of the sparse layout
MAX_SEQUENCE = 1 << 13  # masks have a row and a column for each position
_BOUNDS = {
    "num_text_tokens": VOCABULARY,
    "text_seq_len": POSITIONS,
    "num_image_tokens": VOCABULARY,
    "image_fmap_size": POSITIONS,
    "dim": WIDTH,
    "depth": LAYERS,
    "heads": WIDTH,
    "dim_head": WIDTH,
}
_CHOICES = {"conv_like": CONV_LIKE, "sampling_order": SAMPLING_ORDERS}


@dataclasses.dataclass(frozen=True)
class DallePytorchConfig:
    """Sizes and options, named as the arguments of DALLE-pytorch's `DALLE` if it has them."""

    decodes_own_grid: ClassVar[bool] = True  # the DALL-3 fork samples 16 x 16 tokens for any codec

    num_text_tokens: int  # ids that the tokenizer gives, 0 for padding; the table has text_seq_len rows more
    text_seq_len: int
    num_image_tokens: int  # the codebook size
    image_fmap_size: int  # tokens a side of the image
    dim: int
    depth: int
    heads: int = 8
    dim_head: int = 64
    attn_types: tuple[str, ...] = ("full",)  # one per layer, repeated as often as needed
    reversible: bool = False
    stable: bool = False
    shift_tokens: bool = False
    rotary_emb: bool = False
    sandwich_norm: bool = False
    layer_scale: bool = True  # files of before April 2021 have none
    # Layers of one id share their attention; repeated like attn_types. DALLE-pytorch's own program saves texts, "0".
    shared_attn_ids: tuple[int | str, ...] | None = None
    shared_ff_ids: tuple[int | str, ...] | None = None
    share_input_output_emb: bool = False
    conv_like: str = "causal"  # "causal": 5x5 tokens up and left of the query; "centred": 5x5 around it, none later
    sparse_layout: tuple[str, ...] | None = None  # a row of blocks each, "1" where it sees the block of that column
    sampling_order: str = "temperature_first"  # see `sampling.filter_logits`
    guides_first_code_alone: bool = False  # as DALLE-pytorch's own program does with a condition scale, by mistake

    def __post_init__(self) -> None:
        for name in ("attn_types", "shared_attn_ids", "shared_ff_ids", "sparse_layout"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        check_config("DALLE-pytorch", self, _BOUNDS, _CHOICES)
        if self.sequence_length > MAX_SEQUENCE:
            raise UserError(
                f"DALLE-pytorch config: {self.sequence_length} positions (text_seq_len and image_fmap_size squared) "
                f"are more than {MAX_SEQUENCE}"
            )
        self._check_attention()

    def _check_attention(self) -> None:
        if not isinstance(self.attn_types, tuple) or not self.attn_types:
            raise UserError(f"DALLE-pytorch config: attn_types must be a list, not {short_repr(self.attn_types)}")
        for name in self.attn_types:
            if name == "mlp":
                raise UserError("DALLE-pytorch config: attn_types has mlp: gMLP layers are not supported")
            if name not in ATTN_TYPES:
                raise UserError(
                    f"DALLE-pytorch config: attn_types has {short_repr(name)}; known are {', '.join(ATTN_TYPES)}"
                )
        for name in ("shared_attn_ids", "shared_ff_ids"):
            ids = getattr(self, name)
            if ids is not None and not (ids and isinstance(ids, tuple) and all(type(i) in (int, str) for i in ids)):
                raise UserError(f"DALLE-pytorch config: {name} must be a list of ids, not {short_repr(ids)}")
        for layer, source in enumerate(self.attn_sources):
            if self.attn_type(layer) != self.attn_type(source):
                raise UserError(f"DALLE-pytorch config: layers {source} and {layer} share attention of different types")
        if "sparse" in self.attn_types:
            self._check_sparse_layout()

    def _check_sparse_layout(self) -> None:
        blocks, remainder = divmod(self.sequence_length, SPARSE_BLOCK)
        rows = self.sparse_layout
        row_ok = isinstance(rows, tuple) and all(
            isinstance(row, str) and len(row) == blocks and set(row) <= {"0", "1"} for row in rows
        )
        if remainder or rows is None or not row_ok or len(rows) != blocks:
            raise UserError(
                f"DALLE-pytorch config: sparse attention over {self.sequence_length} positions needs a layout of "
                f"{self.sequence_length / SPARSE_BLOCK:g} x {self.sequence_length / SPARSE_BLOCK:g} blocks"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DallePytorchConfig":
        """Return the configuration in a dict, as `dataclasses.asdict` or JSON gives it.

        Keys it does not know are ignored. None means "not set".

        Raises:
            UserError: A value is missing, bad or not supported.
        """
        known = {name: value for name, value in select_fields(cls, values).items() if value is not None}
        required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in known]:
            raise UserError(f"DALLE-pytorch config: {', '.join(missing)} missing")
        if isinstance(known.get("attn_types"), str):
            known["attn_types"] = tuple(known["attn_types"].split(","))
        return cls(**known)

    @property
    def image_length(self) -> int:
        """Tokens an image."""
        return self.image_fmap_size**2

    @property
    def codebook_size(self) -> int:
        """Image tokens are below it."""
        return self.num_image_tokens

    @property
    def max_text_length(self) -> int:
        """Text tokens that the network reads."""
        return self.text_seq_len

    @property
    def text_vocab_size(self) -> int:
        """Ids that a tokenizer may give; the padding ids after them are the network's own."""
        return self.num_text_tokens

    @property
    def start_token(self) -> int:
        """Not used: the first image token follows the last text token."""
        return 0

    @property
    def text_rows(self) -> int:
        """Rows of the text table and text columns of the logits: a padding id of its own for each position."""
        return self.num_text_tokens + self.text_seq_len

    @property
    def sequence_length(self) -> int:
        """Positions that the network sees: <bos>, the text, and all image tokens except the last."""
        return self.text_seq_len + self.image_length

    @property
    def rotary_width(self) -> int:
        """Channels of a head that rotary embedding turns: text index, row and column, each an even number."""
        return 3 * 2 * (self.dim_head // 3 // 2)

    def attn_type(self, layer: int) -> str:
        """The attention type of a layer, one of ATTN_TYPES."""
        return self.attn_types[layer % len(self.attn_types)]

    @property
    def attn_sources(self) -> tuple[int, ...]:
        """For each layer, the first layer that has the same attention weights."""
        return self._first_uses(self.shared_attn_ids)

    @property
    def ff_sources(self) -> tuple[int, ...]:
        """For each layer, the first layer that has the same feed-forward weights."""
        return self._first_uses(self.shared_ff_ids)

    def _first_uses(self, ids: tuple[int | str, ...] | None) -> tuple[int, ...]:
        if ids is None:
            return tuple(range(self.depth))
        by_layer = [ids[layer % len(ids)] for layer in range(self.depth)]
        return tuple(by_layer.index(shared) for shared in by_layer)

    def top_k_of(self, filter_thres: float) -> int:
        """The top_k that DALLE-pytorch's `filter_thres` stands for: a share of text and image tokens together.

        In Python's floats, as there: (1 - 0.9) * 100 is 9.99..., so 9.
        """
        return max(int((1 - filter_thres) * (self.text_rows + self.num_image_tokens)), 1)
