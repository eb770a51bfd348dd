"""Model folders with a few thousand random weights, which fit each other: for tests of the pipeline."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from dm_generations.models.clip.network import CLIP, CLIPConfig
from dm_generations.models.dalle_mini.network import DalleBart, DalleBartConfig
from dm_generations.models.vqgan.network import VQGAN, VQGANConfig
from dm_generations.weights import native
from dm_generations.weights.native import flatten, unflatten

GRID = 4  # a side: 16 tokens an image
CODEBOOK_SIZE = 32
IMAGE_SIZE = 8  # pixels a side
TEXT_VOCAB = 260  # bytes and 4 special tokens

VQGAN_CONFIG = {
    "ch": 4,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "resolution": IMAGE_SIZE,
    "z_channels": 4,
    "n_embed": CODEBOOK_SIZE,
    "embed_dim": 4,
    "num_groups": 2,
}
DALLE_BART_CONFIG = {
    "encoder_vocab_size": TEXT_VOCAB,
    "image_vocab_size": CODEBOOK_SIZE,
    "image_length": GRID**2,
    "max_text_length": 12,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_start_token_id": CODEBOOK_SIZE,
    "use_scan": False,
}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP_CONFIG = {
    "projection_dim": 8,
    "text_config": TOWER
    | {"vocab_size": TEXT_VOCAB, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 259},
    "vision_config": TOWER | {"image_size": IMAGE_SIZE, "patch_size": 4},
}


@dataclasses.dataclass(frozen=True)
class TinyModels:
    """Folders, ready for `load_checkpoint` and for the flags --codec, --model and --clip."""

    vqgan: Path
    dalle_bart: Path
    clip: Path


def tiny_models(folder: Path, seed: int = 0) -> TinyModels:
    """Write the three models under `folder`. The same seed gives the same weights, another seed others."""
    made = TinyModels(folder / "vqgan", folder / "dalle_bart", folder / "clip")
    tiny_vqgan(made.vqgan, seed=seed)
    tiny_dalle_bart(made.dalle_bart, seed=seed)
    tiny_clip(made.clip, seed=seed)
    return made


def tiny_vqgan(folder: Path, seed: int = 0, **changes) -> Path:
    """A codec; `changes` replace entries of its config."""
    config = VQGAN_CONFIG | changes
    model = VQGAN(VQGANConfig.from_dict(config))
    pixels = jnp.zeros((1, config["resolution"], config["resolution"], 3))
    return _write(folder, "vqgan", config, lambda key: model.init(key, pixels), seed)


def tiny_dalle_bart(folder: Path, seed: int = 0, **changes) -> Path:
    """A generator with its tokenizer; `changes` replace entries of its config."""
    config = DALLE_BART_CONFIG | changes
    model = DalleBart(DalleBartConfig.from_dict(config))
    ids = jnp.zeros((1, 4), jnp.int32)
    _write_tokenizer(folder, end_is_last=False)
    return _write(folder, "dalle_bart", config, lambda key: model.init(key, ids, ids, ids), seed)


def tiny_clip(folder: Path, seed: int = 0, **changes) -> Path:
    """A CLIP with its tokenizer; `changes` replace entries of its config."""
    config = CLIP_CONFIG | changes
    model = CLIP(CLIPConfig.from_dict(config))
    pixels = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    ids = jnp.zeros((1, 4), jnp.int32)
    _write_tokenizer(folder, end_is_last=True)
    return _write(folder, "clip", config, lambda key: model.init(key, pixels, ids, ids), seed)


def _write(folder: Path, kind: str, config: dict, init: Callable, seed: int) -> Path:
    shapes = jax.eval_shape(init, jax.random.key(0))["params"]  # shapes alone: nothing is compiled
    random = np.random.default_rng(seed)
    flat = flatten(shapes)
    params = {path: _weights(random, path, flat[path].shape) for path in sorted(flat)}
    native.save(folder, kind, config, unflatten(params))
    return folder


def _weights(random: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    name = path.rsplit("/", 1)[-1]
    if name == "scale":
        return np.ones(shape, np.float32)
    if name in ("bias", "logit_scale"):
        return np.full(shape, 0.0 if name == "bias" else 3.0, np.float32)
    fan_in = int(np.prod(shape[:-1])) if name == "kernel" else 1
    return (random.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)


def _write_tokenizer(folder: Path, end_is_last: bool) -> None:
    """A `tokenizer.json` that reads single bytes; its end token is the last id (CLIP) or 2 (BART)."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = ["<s>", "<pad>", "<unk>", *characters, "</s>"] if end_is_last else [*specials, *characters]
    ids = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=False
    )
    tokenizer.add_special_tokens(specials)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
