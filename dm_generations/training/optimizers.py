"""Optimisers by name, from optax, with a schedule by step."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import optax

MUON_RMS: Final = 0.2  # root mean square of an update before the learning rate, about that of AdamW
SCHEDULES: Final = ("constant", "cosine", "linear")
# Prefixes of the names of embeddings, positions and logits, in all models.
_ENDS: Final = (
    *("embed", "lm_head", "tok_emb", "pos_emb", "head_"),
    *("text_emb", "text_pos", "image_emb", "image_pos", "to_logits"),
)
# What checkpoints hold among the parameters that no original trains.
_FIXED: Final = frozenset({"rotary_cos", "rotary_sin", "uncond_embedding", "t5"})


def make_schedule(name: str, learning_rate: float, steps: int, warmup: int) -> optax.Schedule:
    """Return the learning rate by step: a linear warm-up, then constant, or a cosine or a line to zero.

    Args:
        name: One of SCHEDULES.
        learning_rate: The peak.
        steps: Length of the whole schedule.
        warmup: Steps of the warm-up, 0 for none.
    """
    rest = max(1, steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, rest),
    }[name]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), after], [warmup])


def make_muon(rate: optax.Schedule, adam_rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Make a Muon optimiser for hidden kernels, with Adam for embeddings, logits and vectors.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon; updates scaled as in Liu et al., "Muon is Scalable for LLM Training",
    2025, https://arxiv.org/abs/2502.16982.

    Args:
        rate: Of Muon.
        adam_rate: Of Adam.
        weight_decay: Decay of hidden kernels, multiplied with the learning rate.
    """
    muon = optax.contrib.muon(
        rate,
        weight_decay=weight_decay,
        adam_b2=0.98,
        adam_learning_rate=adam_rate,
        muon_weight_dimension_numbers=_muon_dimensions,
        consistent_rms=MUON_RMS,
    )
    # With fewer bits, Newton-Schulz meets negative eigenvalues, which grow.
    update = jax.default_matmul_precision("float32")(muon.update)
    return optax.GradientTransformation(muon.init, update)


def _muon_dimensions(params: Any) -> Any:
    """Choose the hidden kernels: (I, O) and (height, width, I, O), except embeddings, logits and RGB convolutions."""

    def choose(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        is_end = any(str(key.key).startswith(_ENDS) for key in path)
        is_rgb = leaf.ndim == 4 and 3 in leaf.shape[2:]
        if leaf.ndim not in (2, 4) or is_end or is_rgb:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(choose, params)


def _is_matrix(params: Any) -> Any:
    """What decays: matrices, but not norms and biases."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _adafactor(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax.adafactor(rate, weight_decay_rate=decay or None, weight_decay_mask=_is_matrix)


_MAKERS: Final[Mapping[str, Callable[[optax.Schedule, float], optax.GradientTransformation]]] = {
    "adafactor": _adafactor,
    "adamw": lambda rate, decay: optax.adamw(rate, weight_decay=decay, mask=_is_matrix),
    "lamb": lambda rate, decay: optax.lamb(rate, weight_decay=decay, mask=_is_matrix),
    "lion": lambda rate, decay: optax.lion(rate, weight_decay=decay, mask=_is_matrix),
    "muon": lambda rate, decay: make_muon(rate, rate, decay),
    "sgd": lambda rate, decay: optax.chain(optax.add_decayed_weights(decay, _is_matrix), optax.sgd(rate, 0.9)),
}
OPTIMIZERS: Final = tuple(_MAKERS)


def make_optimizer(
    name: str, schedule: optax.Schedule, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Make an optimiser.

    Args:
        name: One of OPTIMIZERS.
        schedule: See `make_schedule`.
        weight_decay: Of matrices.
        clip_norm: Gradients are scaled down to this norm; 0 for no limit.
    """
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    optimizer = optax.chain(*clip, _MAKERS[name](schedule, weight_decay))
    return optax.partition({"trained": optimizer, "fixed": optax.set_to_zero()}, _label)


def _label(params: Any) -> Any:
    def label(path: tuple, leaf: Any) -> str:
        return "fixed" if any(str(key.key) in _FIXED for key in path) else "trained"

    return jax.tree_util.tree_map_with_path(label, params)
