"""Fine-tune a VQGAN on images, by the losses of taming-transformers: reconstruction, perceptual and adversarial.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021, https://arxiv.org/abs/2012.09841.
In all losses -1 is black and 1 is white, whatever the codec has inside.

B: images of a batch on all devices   S: pixels a side   h, w: token grid   D: codebook width
"""

import logging
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.lax import stop_gradient

from dm_generations.errors import UserError
from dm_generations.inference.encoder import check_encoder
from dm_generations.models.base import recompute_layers
from dm_generations.models.loading import Checkpoint
from dm_generations.models.vqgan.network import VQGAN
from dm_generations.training import perceptual
from dm_generations.training.options import TrainOptions
from dm_generations.training.pairs import PairsTrainer
from dm_generations.training.run import PARAMS, Metrics, State

KIND: Final = "vqgan"
DISCRIMINATOR: Final = "discriminator"
BETA: Final = 0.25
ADVERSARIAL_WEIGHT: Final = 0.8
_MAX_ADAPTIVE: Final = 1e4
_EPSILON: Final = 1e-4
_BETAS: Final = (0.5, 0.9)  # of Adam, for the discriminator
_MIN_SIZE: Final = 24  # pixels a side, of which the discriminator sees one patch
_LAYERS: Final = 3
_WIDTH: Final = 64

logger = logging.getLogger(__name__)


class Discriminator(nn.Module):
    """A PatchGAN: how real each patch of an image looks.

    Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017,
    https://arxiv.org/abs/1611.07004. Its batch norms use the statistics of the batch. Biases begin at 0.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map (B, S, S, 3) to logits of patches (B, S / 8 - 2, S / 8 - 2, 1)."""
        normal, x = nn.initializers.normal(0.02), images
        for number in range(_LAYERS + 1):
            width, stride = _WIDTH * min(2**number, 8), 2 if number < _LAYERS else 1
            is_normed = number > 0
            x = nn.Conv(width, (4, 4), stride, 1, use_bias=not is_normed, kernel_init=normal, name=f"conv_{number}")(x)
            if is_normed:
                x = nn.BatchNorm(False, scale_init=_near_one, use_fast_variance=False, name=f"norm_{number}")(x)
            x = nn.leaky_relu(x, 0.2)
        return nn.Conv(1, (4, 4), padding=1, kernel_init=normal, name="conv_out")(x)


def _near_one(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return 1 + 0.02 * jax.random.normal(key, shape, dtype)


def discriminate(params: Any, images: jax.Array) -> jax.Array:
    """Return the logits of the patches of images (B, S, S, 3)."""
    return Discriminator().apply({"params": params}, images, mutable=["batch_stats"])[0]


def hinge_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Compute the loss of a discriminator of its logits of real images and of reconstructions."""
    return (nn.relu(1 - real).mean() + nn.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction: jax.Array, adversarial: jax.Array) -> jax.Array:
    """Weigh the adversarial loss, so that the decoder's last layer follows it as much as the reconstruction.

    Args:
        reconstruction: Gradient of reconstruction and perceptual loss, of the last layer's kernel.
        adversarial: Gradient of the adversarial loss, of the same.
    """
    ratio = jnp.linalg.norm(reconstruction.ravel()) / (jnp.linalg.norm(adversarial.ravel()) + _EPSILON)
    return ADVERSARIAL_WEIGHT * jnp.clip(ratio, 0, _MAX_ADAPTIVE)


def straight_through(vectors: jax.Array, rows: jax.Array) -> jax.Array:
    """Return the codebook rows of vectors; the gradient is that of the vectors."""
    return vectors + stop_gradient(rows - vectors)


def codebook_loss(vectors: jax.Array, rows: jax.Array) -> jax.Array:
    """Compute how far vectors are from their codebook rows, both (B, h, w, D).

    The vectors move towards the rows with weight 1, the rows towards the vectors with BETA. The paper has it the other
    way round; the published VQGANs were trained like this.

    Returns:
        (B,) float32.
    """
    moves_vectors, moves_rows = (stop_gradient(rows) - vectors) ** 2, (rows - stop_gradient(vectors)) ** 2
    return (moves_vectors + BETA * moves_rows).mean((1, 2, 3))


class CodecTrainer(PairsTrainer):
    """Trains a VQGAN. With `adversarial_from` its state has the weights of a `discriminator` too."""

    def __init__(self, codec: Checkpoint, options: TrainOptions):
        """Put the weights of the perceptual loss on the devices.

        Raises:
            UserError: The codec cannot be trained, an option does not fit it or the devices, or a file is broken.
        """
        _check_codec(codec, options)
        super().__init__(codec, options)
        self._model: Any = VQGAN(codec.config, jnp.dtype(options.dtype))
        if options.perceptual:
            self._frozen = self._place(perceptual.read_perceptual(options.perceptual))
        else:
            logger.warning("without --perceptual the loss is of pixels alone, which blurs fine detail")
        self._optimizers = {PARAMS: self._optimizer}
        if options.adversarial_from is not None:
            self._optimizers[DISCRIMINATOR] = optax.adam(self._schedule, *_BETAS)
        self._optimizer = optax.partition(self._optimizers, {name: name for name in self._optimizers})

    def init(self) -> State:
        """Make the state of step 0, on the host."""
        trained = {PARAMS: jax.tree.map(lambda leaf: np.array(leaf, np.float32), self.checkpoint.params)}
        if DISCRIMINATOR in self._optimizers:
            images = np.zeros((1, _MIN_SIZE, _MIN_SIZE, 3), np.float32)
            init = jax.jit(lambda key: Discriminator().init(key, images)["params"])
            trained[DISCRIMINATOR] = jax.device_get(init(jax.random.key(self._options.seed)))
        return self.init_state(trained)

    # Private

    def _trained_of(self, state: State) -> Any:
        return {name: state[name] for name in self._optimizers}

    def _pack(self, trained: Any) -> State:
        return trained

    def _update(self, state: State, frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[State, Metrics]:
        return super()._update(state, (frozen, state["step"]), batch)

    def _compute_losses(self, params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        images = _signed(batch["pixels"])
        states, codebook = self._encode(params, images)
        losses = _compare(frozen, images, self._decode(params, states))
        return {"loss": sum(losses.values()) + codebook, **losses, "codebook": codebook}

    def _loss(self, trained: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        stages, step = frozen
        params, images = trained[PARAMS], _signed(batch["pixels"])
        states, codebook = self._encode(params, images)
        output = self._decode(params, states)
        metrics = {name: values.mean() for name, values in _compare(stages, images, output).items()}
        loss = sum(metrics.values()) + codebook.mean()
        metrics["codebook"] = codebook.mean()
        if DISCRIMINATOR not in trained:
            return loss, metrics
        judge = trained[DISCRIMINATOR]

        def reconstruction(output: jax.Array) -> Any:
            return sum(values.mean() for values in _compare(stages, images, output).values())

        def adversarial(output: jax.Array) -> jax.Array:
            return -discriminate(stop_gradient(judge), output).mean()

        weight = adaptive_weight(*self._last_gradients(*stop_gradient((params, states)), reconstruction, adversarial))
        of_judge = hinge_loss(discriminate(judge, images), discriminate(judge, stop_gradient(output)))
        of_codec = adversarial(output)
        is_on = step >= self._options.adversarial_from
        metrics |= {"adversarial": of_codec, "adversarial_weight": is_on * weight, "discriminator": of_judge}
        # The last term is 0, and has the gradient of the discriminator's own loss.
        return loss + is_on * (weight * of_codec + of_judge - stop_gradient(of_judge)), metrics

    def _encode(self, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Codebook rows (B, h, w, D) with the gradient of the vectors before them, and the loss of both (B,)."""

        def encode(model: VQGAN, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
            vectors = model.encode_continuous(pixels)
            return vectors, model.quantize.lookup(model.quantize(vectors))

        with recompute_layers(self._options.recompute):
            found = self._model.apply({"params": params}, (images + 1) / 2, method=encode)
        vectors, rows = (each.astype(jnp.float32) for each in found)
        return straight_through(vectors, rows), codebook_loss(vectors, rows)

    def _decode(self, params: Any, states: jax.Array) -> jax.Array:
        """Images (B, S, S, 3) of codebook rows."""
        with recompute_layers(self._options.recompute):
            return 2 * self._model.apply({"params": params}, states, method="decode") - 1

    def _last_gradients(self, params: Any, states: jax.Array, *losses: Any) -> list[jax.Array]:
        """Gradients of losses of the output, of the kernel of the decoder's last layer."""
        decoder = params["decoder"]

        def decode(kernel: jax.Array) -> jax.Array:
            last = {**decoder["conv_out"], "kernel": kernel}
            return self._decode({**params, "decoder": {**decoder, "conv_out": last}}, states)

        output, pull_back = jax.vjp(decode, decoder["conv_out"]["kernel"])
        return [pull_back(jax.grad(loss)(output))[0] for loss in losses]


def _signed(pixels: jax.Array) -> jax.Array:
    return pixels.astype(jnp.float32) / 127.5 - 1


def _compare(stages: perceptual.Stages | None, images: jax.Array, output: jax.Array) -> dict[str, jax.Array]:
    """The parts of the reconstruction loss of each image, (B,): "l1", and "perceptual" if there are its weights."""
    losses = {"l1": jnp.abs(images - output).mean((1, 2, 3))}
    if stages is not None:
        losses["perceptual"] = perceptual.perceptual_distance(stages, images, output)
    return losses


def _check_codec(codec: Checkpoint, options: TrainOptions) -> None:
    """Raise UserError for a codec that cannot be trained, or not with these options."""
    config = codec.config
    if codec.kind != KIND or config.is_gumbel or config.is_dot_product or config.is_normalized:
        raise UserError(
            f"codec {codec.name!r:.100} is not a VQGAN whose tokens are the nearest codebook rows; --train-codec needs "
            "one, give it as --codec"
        )
    check_encoder(codec)
    for flag, is_given, smallest in (
        ("perceptual", bool(options.perceptual), perceptual.MIN_SIZE),
        ("adversarial-from", options.adversarial_from is not None, _MIN_SIZE),
    ):
        if is_given and config.image_size < smallest:
            raise UserError(
                f"--{flag} needs images of {smallest} pixels or more, those of codec {codec.name!r:.100} have "
                f"{config.image_size}: leave it out"
            )
