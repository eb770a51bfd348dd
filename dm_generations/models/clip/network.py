"""CLIP (OpenAI's ViT kind): images and texts to vectors of one space, with the names of FlaxCLIPModel.

B: batch   H, W: pixels   T: text positions   N: patches and one class token   D: width   P: projection width
K: attention heads   d: width of one head

Written after transformers' `CLIPModel` (4.57) and "Learning Transferable Visual Models From Natural Language
Supervision" (Radford et al., 2021), whose initialisers it uses. Dropout is left out: no public CLIP has any.

Which position a text is read at is a trap. transformers takes the first `eos_token_id`, except when that id
is 2: then the highest id of the row, because OpenAI's configs say 2 while the end token is the last of the
vocabulary. A model whose end token really is 2 must say `"pool_at_highest_id": false` in its text config.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dm_generations.errors import UserError, short_repr
from dm_generations.models.base import (
    ANY_ID,
    LAYERS,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    Bounds,
    check_config,
    example_ids,
    example_images,
    select_fields,
)

ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,  # by tanh, as the two below
    "gelu_fast": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}

_TOWER_BOUNDS: Bounds = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": WIDTH,
    "max_position_embeddings": POSITIONS,
    "num_channels": (3, 3),  # RGB
    "image_size": POSITIONS,
    "patch_size": POSITIONS,
    "layer_norm_eps": (0.0, 1.0),
    "pad_token_id": ANY_ID,
    "bos_token_id": ANY_ID,
    "eos_token_id": ANY_ID,
}
_BOUNDS: Bounds = {"projection_dim": WIDTH, "logit_scale_init_value": (-100.0, 100.0)}


def _check_tower(name: str, config: "CLIPTextConfig | CLIPVisionConfig") -> None:
    check_config(f"CLIP {name}", config, _TOWER_BOUNDS, {"hidden_act": ACTIVATIONS})
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"CLIP {name} config: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of the text tower; the defaults are transformers' (openai/clip-vit-base-patch32)."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    pool_at_highest_id: bool | None = None  # ours; None = transformers' rule, see the top of this file

    def __post_init__(self) -> None:
        """Raise UserError for a value that no CLIP can have."""
        _check_tower("text", self)

    @property
    def pools_at_highest_id(self) -> bool:
        """Whether a text is read at the highest id of its row."""
        return self.eos_token_id == 2 if self.pool_at_highest_id is None else self.pool_at_highest_id


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of the image tower; the defaults are transformers' (openai/clip-vit-base-patch32)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Raise UserError for a value that no CLIP can have."""
        _check_tower("vision", self)


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers and of their common space."""

    text_config: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592  # log(1 / 0.07)

    def __post_init__(self) -> None:
        """Raise UserError for a value that no CLIP can have."""
        check_config("CLIP", self, _BOUNDS)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CLIPConfig":
        """Return the config of a Hugging Face `config.json`; unknown keys are ignored, missing ones get defaults.

        Raises:
            UserError: No CLIP can have this value.
        """
        own = select_fields(cls, values)
        for name, tower in (("text_config", CLIPTextConfig), ("vision_config", CLIPVisionConfig)):
            # Older files carry `text_config_dict` too; transformers then builds the tower from that one, even if empty.
            older = values.get(f"{name}_dict")
            found = (values.get(name) or {}) if older is None else older
            if not isinstance(found, Mapping):
                raise UserError(f"CLIP config: {name} must be an object, not {short_repr(found)}")
            own[name] = tower(**select_fields(tower, found))
        return cls(**own)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, ready for JSON."""
        values = dataclasses.asdict(self)
        if values["text_config"]["pool_at_highest_id"] is None:
            del values["text_config"]["pool_at_highest_id"]
        return {"architectures": ["CLIPModel"], "model_type": "clip"} | values


class Attention(nn.Module):
    """Multi-head attention of a tower."""

    config: CLIPTextConfig | CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Map x (B, T, D) to (B, T, D); mask (B or 1, 1, T, T) is true where a query may look."""
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        inward = nn.initializers.normal(width**-0.5 * (2 * self.config.num_hidden_layers) ** -0.5)
        outward = nn.initializers.normal(width**-0.5)

        def project(name: str) -> jax.Array:
            y = nn.Dense(width, dtype=self.dtype, kernel_init=inward, name=name)(x)
            return y.reshape(*y.shape[:2], heads, width // heads)  # (B, T, K, d)

        query = project("q_proj") * (width // heads) ** -0.5
        key, value = project("k_proj"), project("v_proj")
        logits = jnp.einsum("bqkd,bskd->bkqs", query, key).astype(jnp.float32)
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        weights = nn.softmax(logits).astype(self.dtype)
        mixed = jnp.einsum("bkqs,bskd->bqkd", weights, value).reshape(x.shape)
        return nn.Dense(width, dtype=self.dtype, kernel_init=outward, name="out_proj")(mixed)


class MLP(nn.Module):
    """Two dense layers with the tower's activation between them."""

    config: CLIPTextConfig | CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, T, D) to (B, T, D)."""
        config, normal = self.config, nn.initializers.normal
        widen = normal((2 * config.hidden_size) ** -0.5)
        narrow = normal(config.hidden_size**-0.5 * (2 * config.num_hidden_layers) ** -0.5)
        x = nn.Dense(config.intermediate_size, dtype=self.dtype, kernel_init=widen, name="fc1")(x)
        x = ACTIVATIONS[config.hidden_act](x)
        return nn.Dense(config.hidden_size, dtype=self.dtype, kernel_init=narrow, name="fc2")(x)


class Layer(nn.Module):
    """Attention, then an MLP, each with a norm before it and a shortcut around it."""

    config: CLIPTextConfig | CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Map x (B, T, D) to (B, T, D); mask as in `Attention`."""
        config, dtype = self.config, self.dtype
        y = nn.LayerNorm(config.layer_norm_eps, dtype=dtype, name="layer_norm1")(x)
        x = x + Attention(config, dtype, name="self_attn")(y, mask)
        y = nn.LayerNorm(config.layer_norm_eps, dtype=dtype, name="layer_norm2")(x)
        return x + MLP(config, dtype, name="mlp")(y)


class Layers(nn.Module):
    """The blocks of a tower, in order."""

    config: CLIPTextConfig | CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Map x (B, T, D) to what the last block gives and what it reads, both (B, T, D); mask as in `Attention`."""
        before = x
        for index in range(self.config.num_hidden_layers):
            before, x = x, Layer(self.config, self.dtype, name=str(index))(x, mask)
        return x, before


class Encoder(nn.Module):
    """The stack of blocks; a level of its own because the parameters are named `encoder/layers/0/...`."""

    config: CLIPTextConfig | CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """See `Layers`."""
        return Layers(self.config, self.dtype, name="layers")(x, mask)


class TextEmbeddings(nn.Module):
    """Token and position embeddings of a text."""

    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Map input_ids (B, T) to (B, T, D)."""
        config, init = self.config, nn.initializers.normal(0.02)
        token = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            embedding_init=init,
            name="token_embedding",
        )
        position = nn.Embed(
            config.max_position_embeddings,
            config.hidden_size,
            dtype=self.dtype,
            embedding_init=init,
            name="position_embedding",
        )
        return token(input_ids) + position(jnp.arange(input_ids.shape[1])[None])  # (B, T, D)


class VisionEmbeddings(nn.Module):
    """Embeddings of the class token and of an image's patches."""

    config: CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Map pixel_values (B, H, W, 3) to (B, N, D)."""
        config, normal = self.config, nn.initializers.normal
        patch, width = config.patch_size, config.hidden_size
        x = nn.Conv(
            width,
            (patch, patch),
            strides=(patch, patch),
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            kernel_init=normal(0.02),
            name="patch_embedding",
        )(pixel_values.astype(self.dtype))
        x = x.reshape(x.shape[0], -1, width)  # (B, N - 1, D), row-major
        first = self.param("class_embedding", normal(width**-0.5), (width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, width)), x], axis=1)  # (B, N, D)
        count = (config.image_size // patch) ** 2 + 1
        position = nn.Embed(count, width, dtype=self.dtype, embedding_init=normal(0.02), name="position_embedding")
        return x + position(jnp.arange(count)[None])


class TextTransformer(nn.Module):
    """The text tower."""

    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Encode texts.

        Args:
            input_ids: (B, T) int32.
            attention_mask: (B, T) int32.

        Returns:
            All positions, normed (B, T, D); the pooled one (B, D); and what the last block reads (B, T, D).
        """
        config, length = self.config, input_ids.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        mask = causal & (attention_mask != 0)[:, None, None, :]
        x = TextEmbeddings(config, self.dtype, name="embeddings")(input_ids)
        x, before_last = Encoder(config, self.dtype, name="encoder")(x, mask)
        x = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")(x)
        scored = input_ids if config.pools_at_highest_id else input_ids == config.eos_token_id
        end = jnp.argmax(scored, axis=1)  # the first of equals
        return x, jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0], before_last


class VisionTransformer(nn.Module):
    """The image tower."""

    config: CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> tuple[jax.Array, jax.Array]:
        """pixel_values (B, H, W, 3) -> all positions (B, N, D), and the class token, normed (B, D)."""
        config = self.config
        x = VisionEmbeddings(config, self.dtype, name="embeddings")(pixel_values)
        x = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="pre_layrnorm")(x)  # (sic)
        x, _ = Encoder(config, self.dtype, name="encoder")(x)
        pooled = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="post_layernorm")(x[:, 0])
        return x, pooled


class CLIP(nn.Module):
    """Both towers and their projections. `dtype` is that of the computation; parameters are float32."""

    config: CLIPConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Make the submodules."""
        config = self.config

        def projection(width: int) -> nn.Dense:
            init = nn.initializers.normal(width**-0.5)
            return nn.Dense(config.projection_dim, use_bias=False, dtype=self.dtype, kernel_init=init)

        self.text_model = TextTransformer(config.text_config, self.dtype)
        self.vision_model = VisionTransformer(config.vision_config, self.dtype)
        self.text_projection = projection(config.text_config.hidden_size)
        self.visual_projection = projection(config.vision_config.hidden_size)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(config.logit_scale_init_value), ())

    def get_image_features(self, pixel_values: jax.Array) -> jax.Array:
        """Projections (B, P), not of unit length, of normalised pixels (B, H, W, 3), H = W = image_size."""
        return self.visual_projection(self.vision_model(pixel_values)[1])

    def get_text_features(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Projections (B, P) of token ids and mask, both (B, T) with T up to max_position_embeddings."""
        return self.text_projection(self.text_model(input_ids, attention_mask)[1])

    def logits_per_image(self, pixel_values: jax.Array, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Cosine times exp(logit_scale) of every image with every text, (images, texts) float32."""
        image = unit(self.get_image_features(pixel_values))
        text = unit(self.get_text_features(input_ids, attention_mask))
        return jnp.exp(self.logit_scale) * image @ text.T

    @staticmethod
    def example_inputs(config: CLIPConfig) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""
        text = example_ids(config.text_config.max_position_embeddings)
        return [example_images(config.vision_config.image_size), text, text]

    def __call__(self, pixel_values: jax.Array, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """See `logits_per_image`."""
        return self.logits_per_image(pixel_values, input_ids, attention_mask)


def unit(features: jax.Array) -> jax.Array:
    """Rows of `features` (B, P) at unit length, in float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
