"""Train a diffusion decoder on pairs of tokens and images: the noise in an image, and how sure a step can be of it.

B: rows of a batch on all devices   S: pixels a side   L: image tokens   T: steps of the diffusion
"""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dm_generations.errors import UserError
from dm_generations.inference.diffusion import read_codebook
from dm_generations.models.base import prefix_errors, recompute_layers, token_grid
from dm_generations.models.diffusion_decoder.network import DiffusionDecoderConfig, UNet
from dm_generations.models.diffusion_decoder.samplers import DDPM, Schedule
from dm_generations.models.loading import Checkpoint, load_checkpoint
from dm_generations.training.options import TrainOptions
from dm_generations.training.pairs import PairsTrainer
from dm_generations.training.run import PARAMS, Metrics, State
from dm_generations.weights import native

KIND = "diffusion_decoder"
RAW = "raw"  # of a state: the weights that are trained; its `params` are their average
_CHANNELS = 64  # of full resolution, unless a config says otherwise
_ATTENTION_SIDES = (32, 16, 8)
_MIN_PROBABILITY = 1e-12

logger = logging.getLogger(__name__)


class Tables(NamedTuple):
    """Numbers of all T steps, (T,) float32 each."""

    image: np.ndarray  # factor of the image in x
    noise: np.ndarray  # factor of the noise in x
    coef1: np.ndarray  # these as in `samplers.DDPM.tables`
    coef2: np.ndarray
    smallest: np.ndarray
    largest: np.ndarray

    @classmethod
    def of(cls, config: DiffusionDecoderConfig) -> "Tables":
        """Return those of a decoder."""
        schedule = Schedule.of(config, list(range(config.diffusion_steps)))
        image = schedule.alphas_cumprod
        found = {"image": np.sqrt(image), "noise": np.sqrt(1 - image), **DDPM().tables(schedule, config.learn_sigma)}
        return cls(**{name: value.astype(np.float32) for name, value in found.items()})


def hybrid_loss(
    network: Callable[[jax.Array, jax.Array], jax.Array],
    config: DiffusionDecoderConfig,
    images: jax.Array,
    steps: jax.Array,
    noise: jax.Array,
) -> dict[str, jax.Array]:
    """Compute the loss of Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021.

    Args:
        network: x and times to what `UNet` gives.
        config: Of the network.
        images: (B, S, S, 3), -1 is black and 1 is white.
        steps: (B,) int32, 0 to T - 1.
        noise: (B, S, S, 3), of a normal distribution.

    Returns:
        "loss", its part "mse" of the noise and, of a decoder with a learned variance, its part "vb", which only the
        variance lowers: all (B,) float32.
    """
    row = {name: jnp.asarray(table)[steps, None, None, None] for name, table in Tables.of(config)._asdict().items()}
    x = row["image"] * images + row["noise"] * noise
    scale = 1000 / config.diffusion_steps if config.rescale_timesteps else 1.0
    found = network(x, steps.astype(jnp.float32) * scale)
    mse = _mean((noise - found[..., :3]) ** 2)
    if not config.learn_sigma:
        return {"loss": mse, "mse": mse}
    predicted = (x - row["noise"] * jax.lax.stop_gradient(found[..., :3])) / row["image"]
    share = (found[..., 3:] + 1) / 2
    log_variance = share * row["largest"] + (1 - share) * row["smallest"]
    mean, true_mean = (row["coef1"] * x0 + row["coef2"] * x for x0 in (predicted, images))
    nats = jnp.where(
        steps == 0,
        -_mean(_log_probability(images, mean, log_variance / 2)),
        _mean(_divergence(true_mean, row["smallest"], mean, log_variance)),
    )
    # In bits. The bound is T times the mean of all steps, and a thousandth of it counts.
    vb = nats / math.log(2) * (config.diffusion_steps / 1000)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def _mean(values: jax.Array) -> jax.Array:
    return values.mean((1, 2, 3))


def _divergence(mean: Any, log_variance: Any, other_mean: Any, other_log_variance: Any) -> jax.Array:
    """Kullback-Leibler divergence of normal distributions, the first from the other, in nats."""
    return (
        other_log_variance
        - log_variance
        - 1
        + jnp.exp(log_variance - other_log_variance)
        + (mean - other_mean) ** 2 * jnp.exp(-other_log_variance)
    ) / 2


def _log_probability(images: jax.Array, mean: jax.Array, log_deviation: jax.Array) -> jax.Array:
    """Logarithm of a normal distribution's probability of the level, of 256, that each pixel has."""

    def cumulative(distance: jax.Array) -> jax.Array:  # by the original's approximation
        z = distance * jnp.exp(-log_deviation)
        return (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2

    upper, lower = cumulative(images - mean + 1 / 255), cumulative(images - mean - 1 / 255)
    probability = jnp.where(images < -0.999, upper, jnp.where(images > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(probability, _MIN_PROBABILITY))


class DecoderTrainer(PairsTrainer):
    """Trains a diffusion decoder. Its state has `params`, the average of the weights, and `raw`, the weights.

    The codec is not trained; the network reads its codebook.
    """

    _trained = RAW

    def __init__(self, checkpoint: Checkpoint, codec: Checkpoint, options: TrainOptions):
        """Put the codebook on the devices.

        Raises:
            UserError: An option, or the codec, does not fit the decoder or the devices.
        """
        super().__init__(checkpoint, options)
        self._config: DiffusionDecoderConfig = checkpoint.config
        self._network: Any = UNet(self._config, jnp.dtype(options.dtype))
        self._frozen = self._place(np.array(read_codebook(codec, self._config.emb_input_dims), np.float32))

    def init(self) -> State:
        """Make the state of step 0, on the host."""
        params = jax.tree.map(lambda leaf: np.array(leaf, np.float32), self.checkpoint.params)
        return {**self.init_state(params), PARAMS: jax.tree.map(np.copy, params)}

    # Private

    def _compute_losses(self, params: Any, codebook: jax.Array, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        images = batch["pixels"].astype(jnp.float32) / 127.5 - 1
        vectors = codebook[token_grid(batch["tokens"].astype(jnp.int32))]
        of_steps, of_noise = jax.random.split(key)
        steps = jax.random.randint(of_steps, (len(images),), 0, self._config.diffusion_steps)
        noise = jax.random.normal(of_noise, images.shape)

        def network(x: jax.Array, times: jax.Array) -> jax.Array:
            with recompute_layers(self._options.recompute):
                return self._network.apply({"params": params}, x, times, vectors)

        return hybrid_loss(network, self._config, images, steps, noise)

    def _loss(self, trained: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        losses = {name: values.mean() for name, values in self._compute_losses(trained, frozen, batch, key).items()}
        return losses.pop("loss"), losses

    def _update(self, state: State, frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[State, Metrics]:
        new, metrics = super()._update(state, frozen, batch)
        done = state["step"].astype(jnp.float32)
        decay = jnp.minimum(self._options.ema, (1 + done) / (10 + done))  # the first weights are soon forgotten
        average = jax.tree.map(lambda old, leaf: old * decay + leaf * (1 - decay), state[PARAMS], new[RAW])
        return {**new, PARAMS: average}, metrics


def make_decoder(options: TrainOptions, codec: Checkpoint) -> Checkpoint:
    """Load the decoder to start from, or make one with random weights.

    Raises:
        UserError: It is missing or broken, or its images are not those of the codec's tokens.
    """
    if options.model is not None:
        found = load_checkpoint(options.model, "decoder")
        _check_sizes(found.config, codec)
    else:
        config = _make_config(options, codec)
        _check_sizes(config, codec)
        inputs = [np.zeros(each.shape, each.dtype) for each in UNet.example_inputs(config)]
        params = jax.device_get(jax.jit(UNet(config).init)(jax.random.key(options.seed), *inputs)["params"])
        name = "random" if options.config is None else options.config.stem
        found = Checkpoint(KIND, config, params, name, native.digest(params), options.run)
    return found


def _check_sizes(config: DiffusionDecoderConfig, codec: Checkpoint) -> None:
    """Raise UserError for a decoder that does not read the codec's codebook, or makes images of another size."""
    read_codebook(codec, config.emb_input_dims)
    grid = codec.config.grid
    if config.image_side(grid) != config.image_size:
        raise UserError(
            f"this decoder makes {config.image_side(grid)} pixels of {grid}x{grid} tokens, and its image_size is "
            f"{config.image_size}: give level_channels another number of levels"
        )


def _make_config(options: TrainOptions, codec: Checkpoint) -> DiffusionDecoderConfig:
    """The config in a file; what it does not say suits the codec."""
    values = {} if options.config is None else native.read_json_object(options.config)
    with prefix_errors(options.config or Path("decoder")):
        if values.get("kind", KIND) != KIND:
            raise UserError(f"kind {values['kind']!r:.60} is not a diffusion decoder: use {KIND!r}")
        size = values.get("image_size", codec.config.image_size)
        width = values.get("num_channels", _CHANNELS)
        for name, value in (("image_size", size), ("num_channels", width)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} {value!r:.60} is not a whole number above 0")
        levels = max(1, 1 + round(math.log2(size / -(-codec.config.grid // 2))))
        channels = [width * min(4, 2 ** (level // 2)) for level in range(levels)]
        default = {
            "image_size": size,
            "num_channels": width,
            "level_channels": channels,
            "attention_levels": [level for level in range(levels) if size >> level in _ATTENTION_SIDES],
            "emb_input_dims": read_codebook(codec).shape[1],
            "emb_output_dims": 2 * channels[-1],
            "num_head_channels": 32,
        }
        return DiffusionDecoderConfig.from_dict(default | values)
