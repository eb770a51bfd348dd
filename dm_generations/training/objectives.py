"""Losses: the next token of images and prompts, and preferences between two images of a prompt.

B: rows   L: image tokens   N: text tokens that are predicted   V: columns of logits
"""

from typing import Any, Final

import jax
import jax.numpy as jnp

from dm_generations.models.base import TrainingLogits

# Share of the text in the loss of models that predict both: DALL-E (Ramesh et al., "Zero-Shot Text-to-Image
# Generation", 2021) and DALLE-pytorch weigh the image seven times as much.
TEXT_WEIGHT: Final = 1 / 8


def cross_entropy(logits: jax.Array, targets: jax.Array, smoothing: jax.Array | float = 0.0) -> jax.Array:
    """Compute the cross-entropy of targets.

    Args:
        logits: (B, L, V) float32.
        targets: (B, L) int32.
        smoothing: Share of the target that all V columns have in equal parts; broadcasts to (B, L).

    Returns:
        (B, L) float32, in nats.
    """
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen
    # The rest is 0 without smoothing, and no logit is -inf.
    return nats + smoothing * (chosen - logits.mean(axis=-1))


def next_token_loss(
    logits: TrainingLogits, tokens: jax.Array, smoothing: jax.Array, text_weight: float
) -> tuple[jax.Array, jax.Array]:
    """Compute the loss of each row.

    Args:
        logits: See `TrainingLogits`.
        tokens: (B, L) int32.
        smoothing: (B,) of the image tokens, see `cross_entropy`.
        text_weight: Share of the text, if the model predicts it.

    Returns:
        The loss and the mean nats of an image token, both (B,) float32.
    """
    image = cross_entropy(logits.image, tokens, smoothing[:, None]).mean(axis=-1)
    nats = cross_entropy(logits.image, tokens).mean(axis=-1)
    if logits.text is None or logits.text_targets is None:
        return image, nats
    text = cross_entropy(logits.text, logits.text_targets).mean(axis=-1)
    return text_weight * text + (1 - text_weight) * image, nats


def image_log_probs(logits: TrainingLogits, tokens: jax.Array) -> jax.Array:
    """Compute the log-probability (B,) float32 of the tokens (B, L) of each image, in nats."""
    return -cross_entropy(logits.image, tokens).sum(axis=-1)


def preference_loss(
    better: jax.Array, worse: jax.Array, reference_better: jax.Array, reference_worse: jax.Array, beta: float
) -> tuple[jax.Array, dict[str, Any]]:
    """Compute the loss of pairs by direct preference optimisation.

    Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", 2023,
    https://arxiv.org/abs/2305.18290.

    Args:
        better: (B,) log-probability of the better image of each pair.
        worse: (B,) of the worse one.
        reference_better: (B,) of the better one by the model before training.
        reference_worse: (B,) of the worse one.
        beta: How much moving away from that model costs.

    Returns:
        The loss of each pair (B,), and the share of pairs (B,) whose order the model has right.
    """
    margins = beta * ((better - reference_better) - (worse - reference_worse))
    return -jax.nn.log_sigmoid(margins), {"accuracy": (margins > 0).astype(jnp.float32)}
