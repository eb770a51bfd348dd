"""The kinds of models. Another model is another folder here and another entry of `KINDS`.

Nothing of a model is imported before it is asked for.
"""

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.base import ImageDecoder, NetworkDecoder, RawCheckpoint, Tokenizer
from dm_generations.weights.state_dict import Shape

ROLES = ("generator", "codec", "decoder", "clip", "scorer")


@dataclasses.dataclass(frozen=True)
class ModelKind:
    """A kind of network, and the public formats that it is read from. Names are "module:attribute" in this package.

    Our own folders (`weights.native`) are read for every kind, before these formats.
    """

    name: str  # as in `config.json` of our own folders
    role: str  # one of ROLES
    config: str  # a frozen dataclass with `from_dict`
    network: str  # a Linen module, called with the config and a dtype
    readers: tuple[str, ...] = ()  # a path to a RawCheckpoint, or to None for what is not of the reader's format
    files: str = ""  # what these formats consist of, for messages
    # Patterns of the names of weight files on the hub, a group for each format; the first that a repository has counts.
    hub_files: tuple[tuple[str, ...], ...] = ()
    decoder: str | None = None  # codecs: an ImageDecoder, if not the network as it is
    tokenizers: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # by text style: a path and a vocab_size to a Tokenizer

    @property
    def config_class(self) -> Any:
        """The class of its config."""
        return _load_attribute(self.config)

    @property
    def network_class(self) -> Any:
        """The class of its network."""
        return _load_attribute(self.network)

    @property
    def read_functions(self) -> list[Callable[[Path], RawCheckpoint | None]]:
        """Its readers, to be tried in this order."""
        return [_load_attribute(name) for name in self.readers]

    def make_decoder(self, config: Any, dtype: np.dtype, platform: str) -> ImageDecoder:
        """Make the decoder of a codec.

        Args:
            config: The codec's config.
            dtype: Of activations.
            platform: Of the device, "cpu", "gpu" or "tpu".
        """
        if self.decoder is None:
            return NetworkDecoder(self.network_class(config, dtype))
        return _load_attribute(self.decoder)(config, dtype, platform)


_TRANSFORMERS_FILES = (
    ("model.safetensors",),
    ("model-*-of-*.safetensors",),
    ("pytorch_model.bin",),
    ("pytorch_model-*-of-*.bin",),
)
KINDS = (
    ModelKind(
        name="dalle_bart",
        role="generator",
        config="dalle_mini.config:DalleBartConfig",
        network="dalle_mini.network:DalleBart",
        readers=("dalle_mini.checkpoint:read_flax", "dalle_mini.checkpoint:read_min_dalle"),
        files="config.json with flax_model.msgpack, encoder.pt and decoder.pt",
        hub_files=(("flax_model.msgpack",), ("encoder.pt", "decoder.pt")),
        tokenizers={
            "dalle_bart": "dalle_mini.tokenizer:load_bart_tokenizer",
            "dalle_mini": "dalle_mini.tokenizer:load_normalizing_tokenizer",
            "min_dalle": "dalle_mini.tokenizer:MinDalleTokenizer",
        },
    ),
    ModelKind(
        name="mindalle",
        role="generator",
        config="kakao_mindalle.network:KakaoMinDalleConfig",
        network="kakao_mindalle.network:KakaoMinDalle",
        readers=("kakao_mindalle.checkpoint:read_generator",),
        files="stage2_last.ckpt",
        hub_files=(("stage2_last.ckpt",),),
        tokenizers={"mindalle": "kakao_mindalle.tokenizer:KakaoTokenizer"},
    ),
    ModelKind(
        name="dalle_pytorch",
        role="generator",
        config="dalle_pytorch.config:DallePytorchConfig",
        network="dalle_pytorch.network:DallePytorch",
        readers=("dalle_pytorch.checkpoint:read_generator",),
        files="dalle.pt",
        hub_files=(("dalle.pt",), ("*.pt", "*.pth")),
        tokenizers={"dalle_pytorch": "dalle_pytorch.tokenizer:DallePytorchTokenizer"},
    ),
    ModelKind(
        name="llamagen",
        role="generator",
        config="llamagen.network:LlamaGenConfig",
        network="llamagen.network:LlamaGen",
        readers=("llamagen.checkpoint:read_generator",),
        files="c2i_*.pt or t2i_*.pt",
        tokenizers={
            "llamagen_class": "llamagen.tokenizer:ClassTokenizer",
            "llamagen_caption": "llamagen.tokenizer:CaptionTokenizer",
        },
    ),
    ModelKind(
        name="amused",
        role="generator",
        config="amused.config:AmusedConfig",
        network="amused.network:Amused",
        readers=("amused.checkpoint:read_generator",),
        files="the folders of aMUSEd's pipeline in diffusers, transformer/ among them",
        hub_files=(
            ("diffusion_pytorch_model.safetensors", "model.safetensors"),
            ("diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"),
        ),
        tokenizers={"amused": "amused.tokenizer:load_amused_tokenizer"},
    ),
    ModelKind(
        name="janus",
        role="generator",
        config="janus.network:JanusConfig",
        network="janus.network:Janus",
        readers=("janus.checkpoint:read_generator",),
        files="config.json with model.safetensors or pytorch_model.bin",
        hub_files=_TRANSFORMERS_FILES,
        tokenizers={"janus": "janus.tokenizer:JanusTokenizer"},
    ),
    ModelKind(
        name="vqgan",
        role="codec",
        config="vqgan.network:VQGANConfig",
        network="vqgan.network:VQGAN",
        readers=(
            "vqgan.checkpoint:read_flax",
            "vqgan.checkpoint:read_detoker",
            "kakao_mindalle.checkpoint:read_codec",
            "dalle_pytorch.checkpoint:read_codec",  # of any kind that a dalle.pt can hold
            "amused.checkpoint:read_codec",
            "vqgan.checkpoint:read_taming",
            "llamagen.checkpoint:read_codec",
            "janus.checkpoint:read_codec",
        ),
        files="config.json with flax_model.msgpack, detoker.pt, a .ckpt with its .yaml, dalle.pt, vqvae/ of diffusers, "
        "vq_ds16_*.pt",
        hub_files=(
            *(("flax_model.msgpack",), ("detoker.pt",), ("stage1_last.ckpt",), ("dalle.pt",), ("*.ckpt",)),
            ("diffusion_pytorch_model.safetensors",),
            ("diffusion_pytorch_model.fp16.safetensors",),
            *_TRANSFORMERS_FILES,
        ),
        decoder="vqgan.fast_decoder:VQGANDecoder",
    ),
    ModelKind(
        name="open_magvit2",
        role="codec",
        config="open_magvit2.network:OpenMagvit2Config",
        network="open_magvit2.network:OpenMagvit2",
        readers=("open_magvit2.checkpoint:read_tokenizer",),
        files="a .ckpt with its .yaml",
        hub_files=(("*.ckpt",),),
    ),
    ModelKind(
        name="discrete_vae",
        role="codec",
        config="dvae.discrete:DiscreteVAEConfig",
        network="dvae.discrete:DiscreteVAE",
        readers=("dvae.checkpoint:read_discrete_vae",),
        files="vae.pt",
        hub_files=(("vae.pt",),),
    ),
    ModelKind(
        name="openai_vae",
        role="codec",
        config="dvae.openai:OpenAIVAEConfig",
        network="dvae.openai:OpenAIVAE",
        readers=("dvae.checkpoint:read_openai_vae",),
        files="encoder.pkl and decoder.pkl",
        hub_files=(("encoder.pkl", "decoder.pkl"), ("*.pt", "*.pth")),
    ),
    ModelKind(
        name="diffusion_decoder",
        role="decoder",
        config="diffusion_decoder.network:DiffusionDecoderConfig",
        network="diffusion_decoder.network:UNet",
        readers=("diffusion_decoder.checkpoint:read_guided_diffusion",),
        files="model-latest.pt or another file of guided-diffusion's trainer",
        hub_files=(("model-latest.pt",), ("ema_*.pt",)),
    ),
    ModelKind(
        name="clip",
        role="clip",
        config="clip.network:CLIPConfig",
        network="clip.network:CLIP",
        readers=("clip.checkpoint:read_transformers",),
        files="config.json with model.safetensors or pytorch_model.bin, whole or in several files",
        hub_files=_TRANSFORMERS_FILES,
        tokenizers={"clip": "clip.tokenizer:load_clip_tokenizer"},
    ),
    ModelKind(
        name="aesthetic",
        role="scorer",
        config="aesthetic.network:AestheticConfig",
        network="aesthetic.network:AestheticHead",
        readers=("aesthetic.checkpoint:read_head",),
        files="a .pth, .pt, .bin or .safetensors file with weight and bias, or layers.0.weight and so on",
    ),
)


def find_kind(name: object) -> ModelKind | None:
    """Return the kind of this name, None if there is none."""
    return next((kind for kind in KINDS if kind.name == name), None)


def get_kind(name: str) -> ModelKind:
    """Return the kind of this name.

    Raises:
        KeyError: There is none.
    """
    kind = find_kind(name)
    if kind is None:
        raise KeyError(name)
    return kind


def kinds_of_role(role: str) -> list[ModelKind]:
    """Return the kinds that serve as a generator, a codec, a CLIP, or another scorer of images.

    Raises:
        ValueError: There is no such role.
    """
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, not {role!r:.100}")
    return [kind for kind in KINDS if kind.role == role]


def hub_files(role: str) -> list[tuple[str, ...]]:
    """Return the patterns of weight files on the hub that serve a role, a group for each format, the best first."""
    return list(dict.fromkeys(group for kind in kinds_of_role(role) for group in kind.hub_files))


def parameter_shapes(name: str, config: Any) -> dict[str, Shape]:
    """Compute the shape of each parameter of a network by its path ("a/b/kernel"). Nothing is computed.

    Args:
        name: Of the kind.
        config: Of the network.
    """
    network_class = get_kind(name).network_class
    network = network_class(config)
    tree = jax.eval_shape(network.init, jax.random.key(0), *network_class.example_inputs(config))["params"]
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def load_tokenizer(path: str | Path, style: str | None, vocab_size: int, *, lower: bool = False) -> Tokenizer:
    """Load a tokenizer and set it up as a kind of model was trained with it.

    Args:
        path: The tokenizer's folder, or one of its files.
        style: A key of `ModelKind.tokenizers`.
        vocab_size: Rows of the model's text embedding.
        lower: For "dalle_pytorch": put prompts in lower case, as the DALL-3 fork does.

    Raises:
        UserError: A file is missing, broken or not of this style, or needs a library that is not installed.
        ValueError: The style is unknown.
    """
    name = next((kind.tokenizers[style] for kind in KINDS if style is not None and style in kind.tokenizers), None)
    if name is None:
        raise ValueError(f"unknown style {style!r}")
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; the prompts need the model's tokenizer")
    return _load_attribute(name)(path, vocab_size, **({"lower": True} if lower else {}))


def _load_attribute(name: str) -> Any:
    module, attribute = name.split(":")
    return getattr(import_module(f"dm_generations.models.{module}"), attribute)
