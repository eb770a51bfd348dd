"""From noise to an image: the steps of a diffusion, and the samplers that take them.

A sampler is a value: its `tables` say what each step needs, as numbers, and its `step` goes from one noisy image to
the next. One loop runs them all: for each row of the tables, `denoise`. Tables are computed in float64 and rounded to
float32, as the original does it.

S: steps   B: batch   H, W: pixels   x: a noisy image   x0: the image that is predicted from it
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.diffusion_decoder.network import DiffusionDecoderConfig
from dm_generations.sampling.prng import threefry2x32

_STEPS = re.compile(r"(?P<sampler>ddim|dpm)?(?P<counts>\d{1,6}(?:,\d{1,6}){0,15})")
_MAX_BETA = 0.999
_DECODER = 1 << 31

Row = Mapping[str, Any]  # of the tables of a step: float32 numbers by name
Network = Callable[[jax.Array, jax.Array], jax.Array]  # x and times (B,) to what `UNet` gives
Loss = Callable[[jax.Array, jax.Array], jax.Array]  # a mixture of x and x0, and x0, to the number that guidance lowers


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The noise of the steps that are taken, in the order of time: the last one is taken first.

    Attributes:
        timesteps: (S,) int, of those that the network was trained on.
        alphas_cumprod: (S,) float64, the share of the image in the variance of x.
        diffusion_steps: How many the network was trained on.
    """

    timesteps: np.ndarray
    alphas_cumprod: np.ndarray
    diffusion_steps: int

    @classmethod
    def of(cls, config: DiffusionDecoderConfig, timesteps: list[int]) -> "Schedule":
        """Return the schedule of some of the steps that a network was trained on."""
        betas = make_betas(config.noise_schedule, config.diffusion_steps)
        return cls(np.array(timesteps), np.cumprod(1 - betas)[timesteps], config.diffusion_steps)

    @property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """(S,), of the step that is taken next; 1 after the last."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def betas(self) -> np.ndarray:
        """(S,), the share of noise that each step adds to the one before it."""
        return 1 - self.alphas_cumprod / self.alphas_cumprod_prev

    @property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """(S,), the smallest variance that a learned one can have; the first, which is 0, is the second one's."""
        variance = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        return np.log(np.append(variance[1], variance[1:]))

    @property
    def posterior_mean_coef1(self) -> np.ndarray:
        """(S,), the factor of x0 in the mean of a step."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_mean_coef2(self) -> np.ndarray:
        """(S,), the factor of x in the mean of a step."""
        return (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)


def make_betas(schedule: str, count: int) -> np.ndarray:
    """Return the noise (count,) float64 that each step adds: "linear" or "cosine"."""
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, count, dtype=np.float64) * (1000 / count)
    remaining = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - remaining[1:] / remaining[:-1], _MAX_BETA)


class Prediction(NamedTuple):
    """What is known at a step, (B, H, W, 3) float32 each.

    Attributes:
        x0: Predicted at this step.
        last_x0: Predicted at the step before; anything at the first.
        variance: What the network says of it, -1 to 1 for the smallest to the largest.
        noise: Of a normal distribution.
        gradient: Of what guides, at x; 0 for nothing.
    """

    x: jax.Array
    x0: jax.Array
    last_x0: jax.Array
    variance: jax.Array | float
    noise: jax.Array
    gradient: jax.Array | float = 0.0


class Sampler(Protocol):
    """How a step is taken."""

    def tables(self, schedule: Schedule, learn_sigma: bool) -> dict[str, np.ndarray]:
        """Numbers (S,) by name that `step` needs, in the order of time."""

    def step(self, row: Row, found: Prediction) -> tuple[jax.Array, jax.Array]:
        """Return the next x, and x0 as it is after guidance."""


@dataclasses.dataclass(frozen=True)
class DDPM:
    """Ancestral sampling with the learned variance: Nichol & Dhariwal, 2021, https://arxiv.org/abs/2102.09672."""

    def tables(self, schedule: Schedule, learn_sigma: bool) -> dict[str, np.ndarray]:
        """See `Sampler`."""
        smallest, betas = schedule.posterior_log_variance_clipped, schedule.betas
        largest = np.log(betas) if learn_sigma else np.append(smallest[0], np.log(betas[1:]))
        return {
            "coef1": schedule.posterior_mean_coef1,
            "coef2": schedule.posterior_mean_coef2,
            "smallest": smallest if learn_sigma else largest,
            "largest": largest,
        }

    def distribution(self, row: Row, found: Prediction) -> tuple[jax.Array, jax.Array]:
        """Return mean and log-variance of the next x."""
        share = (found.variance + 1) / 2
        log_variance = share * row["largest"] + (1 - share) * row["smallest"]
        mean = row["coef1"] * found.x0 + row["coef2"] * found.x
        return mean + jnp.exp(log_variance) * found.gradient, log_variance

    def step(self, row: Row, found: Prediction) -> tuple[jax.Array, jax.Array]:
        """See `Sampler`."""
        mean, log_variance = self.distribution(row, found)
        return mean + row["noise"] * jnp.exp(0.5 * log_variance) * found.noise, found.x0


@dataclasses.dataclass(frozen=True)
class DDIM:
    """Song, Meng & Ermon, 2020, https://arxiv.org/abs/2010.02502.

    Attributes:
        eta: The noise of a step: 0 is none, 1 that of DDPM.
    """

    eta: float = 0.0

    def tables(self, schedule: Schedule, learn_sigma: bool) -> dict[str, np.ndarray]:
        """See `Sampler`."""
        now, then = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
        sigma = self.eta * np.sqrt((1 - then) / (1 - now)) * np.sqrt(1 - now / then)
        return {"image": np.sqrt(then), "eps": np.sqrt(np.maximum(1 - then - sigma**2, 0)), "sigma": sigma}

    def step(self, row: Row, found: Prediction) -> tuple[jax.Array, jax.Array]:
        """See `Sampler`."""
        x0 = _guided_x0(row, found)
        eps = (row["recip"] * found.x - x0) / row["recipm1"]
        return row["image"] * x0 + row["eps"] * eps + row["noise"] * row["sigma"] * found.noise, x0


@dataclasses.dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++ of second order, in steps that read the last one: Lu et al., 2022, https://arxiv.org/abs/2211.01095.

    It adds no noise. The first step and the last two are of first order.
    """

    def tables(self, schedule: Schedule, learn_sigma: bool) -> dict[str, np.ndarray]:
        """See `Sampler`."""
        now, then = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
        half_log_snr = np.log(now / (1 - now)) / 2
        step = np.append(np.inf, half_log_snr[:-1]) - half_log_snr  # to the next; the last goes to no noise
        last_step = np.append(half_log_snr[:-1] - half_log_snr[1:], np.inf)  # from the one before; the first has none
        share = step / last_step / 2
        share[:2] = 0.0  # a step that is far longer than the one before it must not read it
        size = np.sqrt(then) * -np.expm1(-step)
        return {
            "x": np.sqrt((1 - then) / (1 - now)),
            "x0": size * (1 + share),
            "last_x0": -size * share,
        }

    def step(self, row: Row, found: Prediction) -> tuple[jax.Array, jax.Array]:
        """See `Sampler`."""
        x0 = _guided_x0(row, found)
        # A first step has nothing before it, which may be any number.
        last = jnp.where(row["last_x0"] == 0, 0.0, row["last_x0"] * found.last_x0)
        return row["x"] * found.x + row["x0"] * x0 + last, x0


def _guided_x0(row: Row, found: Prediction) -> jax.Array:
    """X0 of the noise after guidance: less noise along the gradient."""
    return found.x0 + row["recipm1"] * row["deviation"] * found.gradient


@dataclasses.dataclass(frozen=True)
class Steps:
    """Which steps are taken, and by which sampler: `parse` reads it from a flag."""

    text: str
    sampler: Sampler
    timesteps: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, eta: float | None, total: int) -> "Steps":
        """Read "25" (DDPM), "ddim25" or "dpm25" (DPM-Solver++).

        Args:
            text: "25" takes 25 steps, spread evenly from the first to the last; "10,15,20" takes so many in each third.
                "ddim25" takes every 40th of 1,000. "dpm25" takes 25, closer to each other where there is less noise.
            eta: Of DDIM; None is 0.
            total: Steps that the network was trained on.

        Raises:
            UserError: There are no such steps, or `eta` is given for another sampler.
        """
        match = _STEPS.fullmatch("".join(text.split()))
        if match is None:
            raise UserError(f"{text!r:.60} is not a number of steps: give 25, ddim25 or dpm25, for instance")
        name, counts = match["sampler"], [int(count) for count in match["counts"].split(",")]
        if eta is not None and name != "ddim":
            raise UserError(f"eta has no effect with {text!r:.60} steps: it is for ddim25, for instance")
        if name is not None and len(counts) > 1:
            raise UserError(f"{text!r:.60}: only DDPM takes several numbers of steps, as 10,15,20")
        if name == "ddim":
            sampler: Sampler = DDIM(eta or 0.0)
            timesteps = _stride(counts[0], total, text)
        elif name == "dpm":
            sampler, timesteps = DPMSolver(), _squares(counts[0], total, text)
        else:
            sampler, timesteps = DDPM(), _sections(counts, total, text)
        if len(timesteps) < 2:
            raise UserError(f"{text!r:.60} is one step: at least 2 are needed")
        return cls("".join(text.split()), sampler, tuple(timesteps))

    def rows(self, config: DiffusionDecoderConfig) -> list[dict[str, np.float32]]:
        """Return the tables of a network for these steps, in the order in which they are taken."""
        schedule = Schedule.of(config, list(self.timesteps))
        scale = 1000 / schedule.diffusion_steps if config.rescale_timesteps else 1.0
        tables = self.sampler.tables(schedule, config.learn_sigma) | {
            "time": schedule.timesteps.astype(np.float32) * scale,
            "recip": np.sqrt(1 / schedule.alphas_cumprod),
            "recipm1": np.sqrt(1 / schedule.alphas_cumprod - 1),
            "deviation": np.sqrt(1 - schedule.alphas_cumprod),
            "noise": np.append(0.0, np.ones(len(schedule.timesteps) - 1)),  # none at the last step
        }
        order = reversed(range(len(schedule.timesteps)))
        return [{name: np.float32(table[i]) for name, table in tables.items()} for i in order]


def _sections(counts: list[int], total: int, text: str) -> list[int]:
    """Steps spread evenly over equal parts of all, so many in each."""
    found: set[int] = set()
    start = 0
    for number, count in enumerate(counts):
        size = total // len(counts) + (number < total % len(counts))
        if count > size:
            what = f"{size:,} steps" if len(counts) == 1 else f"{size:,} steps in each of {len(counts)} parts"
            raise UserError(f"{text!r:.60} takes {count:,} steps, and the decoder was trained on {what}: give fewer")
        stride, place = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            found.add(start + round(place))  # half to even; the sum is that of the original, with its rounding
            place += stride
        start += size
    return sorted(found)


def _squares(count: int, total: int, text: str) -> list[int]:
    """Steps whose square roots are spread evenly, from the first to the last."""
    if count > total:
        raise UserError(f"{text!r:.60} takes {count:,} steps, and the decoder was trained on {total:,}: give fewer")
    found: list[int] = []
    for place in np.linspace(0, math.sqrt(total - 1), max(count, 1)) ** 2:
        found.append(max(round(place), found[-1] + 1 if found else 0))
    return found


def _stride(count: int, total: int, text: str) -> list[int]:
    """Steps at a whole distance, from the first."""
    stride = next((stride for stride in range(1, total) if -(-total // stride) == count), None)
    if stride is None:
        raise UserError(
            f"{text!r:.60}: no distance between {total:,} steps leaves so many of them; give another number, ddim25 "
            "for instance"
        )
    return list(range(0, total, stride))


def predict(network: Network, row: Row, x: jax.Array) -> tuple[jax.Array, jax.Array | float]:
    """Return x0, not clipped, and the variance as the network says it."""
    found = network(x, jnp.full(len(x), row["time"], jnp.float32))
    x0 = row["recip"] * x - row["recipm1"] * found[..., :3]
    return x0, found[..., 3:] if found.shape[-1] > 3 else 0.0


def denoise(
    network: Network,
    sampler: Sampler,
    row: Row,
    x: jax.Array,
    last_x0: jax.Array,
    noise: jax.Array,
    clips: bool = False,
    loss: Loss | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Take one step.

    Args:
        network: The UNet and its tokens.
        sampler: How to take it.
        row: Of `Steps.rows`.
        x: (B, H, W, 3) float32, as all; noise before the first step.
        last_x0: What the step before predicted; anything before the first.
        noise: Of a normal distribution; not used by each sampler and not at the last step.
        clips: Whether predictions are clipped to the range of images.
        loss: What guides; None is nothing.

    Returns:
        The next x, and the image x0 that is predicted, which at the last step is the result; -1 is black, 1 is white.
    """
    gradient: jax.Array | float = 0.0
    if loss is None:
        x0, variance = predict(network, row, x)
    else:
        x0, variance, gradient = guide(network, row, x, loss)
    if clips:
        x0 = jnp.clip(x0, -1.0, 1.0)
    return sampler.step(row, Prediction(x, x0, last_x0, variance, noise, gradient))


def guide(network: Network, row: Row, x: jax.Array, loss: Loss) -> tuple[jax.Array, jax.Array | float, jax.Array]:
    """Predict as `predict` does, and differentiate through the network.

    Args:
        network: The UNet and its tokens.
        row: Of `Steps.rows`.
        x: (B, H, W, 3).
        loss: What guides.

    Returns:
        x0, the variance as the network says it, and the gradient that lowers the loss.
    """

    def of_x(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array | float]]:
        x0, variance = predict(network, row, x)
        share = row["deviation"]
        return loss(x0 * share + x * (1 - share), x0), (x0, variance)

    gradient, (x0, variance) = jax.grad(of_x, has_aux=True)(x)
    return x0, variance, -gradient


def to_uint8(x0: jax.Array) -> jax.Array:
    """Return images uint8 of x0, truncated, not rounded."""
    return (jnp.clip((x0 + 1) / 2, 0.0, 1.0) * jnp.float32(255)).astype(jnp.uint8)


# Noise.


def noise_keys(keys: np.ndarray, numbers: np.ndarray, seed: int) -> np.ndarray:
    """Return the keys of the noise that images are decoded with, which differ from those that sampled their tokens.

    Args:
        keys: (n, 2) uint32, of the images' rows.
        numbers: (n,) of the decodings of a row, from 0.
        seed: Of the decoder, 0 to 2^32 - 1.

    Returns:
        (n, 2) uint32.
    """
    keys = keys.astype(np.uint32)
    counter = numbers.astype(np.uint32) | np.uint32(_DECODER)  # no step of a token's noise has this bit
    return np.stack(threefry2x32(keys[:, 0], keys[:, 1], counter, np.uint32(seed)), axis=1)


def normal(keys: jax.Array, draw: Any, shape: tuple[int, ...]) -> jax.Array:
    """Draw from a normal distribution, the same numbers for a key whatever else is in the batch.

    Args:
        keys: (B, 2) uint32.
        draw: Which of the draws of a key.
        shape: Of one draw.

    Returns:
        (B, *shape) float32.
    """
    count = math.prod(shape)
    counter = jnp.arange(-(-count // 2), dtype=jnp.uint32)
    words = threefry2x32(keys[:, :1], keys[:, 1:], jnp.asarray(draw, jnp.uint32), counter)
    scaled = (word.astype(jnp.float32) * jnp.float32(2.0**-32) + jnp.float32(2.0**-33) for word in words)
    first, second = (jnp.minimum(uniform, jnp.float32(1 - 2.0**-24)) for uniform in scaled)
    radius = jnp.sqrt(-2 * jnp.log(first))  # Box & Muller
    angle = jnp.float32(2 * math.pi) * second
    values = jnp.concatenate([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=1)
    return values[:, :count].reshape(-1, *shape)
