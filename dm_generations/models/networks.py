"""The networks by kind: what reads a config, what computes, and on what inputs. Nothing is imported until asked for."""

from importlib import import_module
from typing import Any, NamedTuple

ROLES = {
    "generator": ("dalle_bart", "mindalle", "dalle_pytorch"),
    "codec": ("vqgan", "discrete_vae", "openai_vae"),
    "clip": ("clip",),
}


class Network(NamedTuple):
    module: str  # below this package
    network: str  # the Linen class
    config: str  # its config's class


NETWORKS = {
    "dalle_bart": Network("dalle_bart", "DalleBart", "DalleBartConfig"),
    "mindalle": Network("mindalle", "MinDalle", "MinDalleConfig"),
    "dalle_pytorch": Network("dalle_pytorch", "DallePytorch", "DallePytorchConfig"),
    "vqgan": Network("vqgan", "VQGAN", "VQGANConfig"),
    "discrete_vae": Network("discrete_vae", "DiscreteVAE", "DiscreteVAEConfig"),
    "openai_vae": Network("openai_vae", "OpenAIVAE", "OpenAIVAEConfig"),
    "clip": Network("clip", "CLIP", "CLIPConfig"),
}


def config_class(kind: str) -> type:
    return getattr(_module(kind), NETWORKS[kind].config)


def network_class(kind: str) -> type:
    return getattr(_module(kind), NETWORKS[kind].network)


def _module(kind: str) -> Any:
    return import_module(f"dm_generations.models.{NETWORKS[kind].module}")


def parameter_shapes(kind: str, config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter that the network asks for, by its path ("a/b/kernel"); nothing is computed."""
    import jax

    network = network_class(kind)(config)
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in _example_inputs(kind, config)]
    tree = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _example_inputs(kind: str, config: Any) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of what `__call__` of the network takes."""
    if kind == "clip":
        size = config.vision_config.image_size
        text = ((1, config.text_config.max_position_embeddings), "int32")
        return [((1, size, size, 3), "float32"), text, text]
    if kind in ROLES["codec"]:
        return [((1, config.image_size, config.image_size, 3), "float32")]
    text, image = ((1, config.max_text_length), "int32"), ((1, config.image_length), "int32")
    return [text, text, image] if kind == "dalle_bart" else [text, image]
