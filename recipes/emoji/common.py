"""What the three trainers share: the optimiser, bfloat16 products, a training loop that resumes, image grids.

All randomness comes from (seed, step), and every schedule counts steps. A run that was stopped and resumed therefore
sees the same batches as a run that was not.

N, B: rows of a batch   I, O: input and output width of a kernel   H, W, S: pixels
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from dm_generations.atomic_io import write_atomic

MUON_RMS = 0.2  # root mean square of an update before the learning rate, about that of AdamW


def _sharding(spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), spec)


def replicate(tree: Any) -> Any:
    """Copy every array of a tree to every local device."""
    return jax.device_put(tree, _sharding(PartitionSpec()))


def shard_batch(batch: Any) -> Any:
    """Divide the first axis of every array of a tree among the local devices.

    Raises:
        ValueError: The number of devices does not divide the batch size.
    """
    return jax.device_put(batch, _sharding(PartitionSpec("batch")))


def _muon_dimensions(params: Any) -> Any:
    """Choose the hidden kernels: (I, O) and (height, width, I, O), except embeddings, logits and RGB convolutions."""

    def choose(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        is_end = any(str(key.key).startswith(("embed", "lm_head")) for key in path)
        is_rgb = leaf.ndim == 4 and 3 in leaf.shape[2:]
        if leaf.ndim not in (2, 4) or is_end or is_rgb:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(choose, params)


def make_optimizer(
    learning_rate: float, steps: int, warmup: int, weight_decay: float = 0.01, adam_share: float = 0.4
) -> optax.GradientTransformation:
    """Make a Muon optimiser for hidden kernels, with Adam for embeddings, logits and vectors.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon; updates scaled as in Liu et al., "Muon is Scalable for LLM Training",
    2025, https://arxiv.org/abs/2502.16982. Gradients are clipped to norm 1.

    Args:
        learning_rate: Peak rate of Muon, after a linear warm-up; a cosine takes it to zero.
        steps: Length of the schedule.
        warmup: Steps of the linear warm-up.
        weight_decay: Decay of hidden kernels, multiplied with the learning rate.
        adam_share: Rate of Adam as a share of Muon's.
    """
    muon_rate, adam_rate = (
        optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)
        for peak in (learning_rate, adam_share * learning_rate)
    )
    muon = optax.contrib.muon(
        muon_rate,
        weight_decay=weight_decay,
        adam_b2=0.98,
        adam_learning_rate=adam_rate,
        muon_weight_dimension_numbers=_muon_dimensions,
        consistent_rms=MUON_RMS,
    )
    # With fewer bits, Newton-Schulz meets negative eigenvalues, which grow.
    update = jax.default_matmul_precision("float32")(muon.update)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.GradientTransformation(muon.init, update))


def has_bfloat16_units() -> bool:
    """Tell whether the first device multiplies bfloat16 matrices faster than float32: accelerators, CPUs with AMX."""
    if jax.default_backend() != "cpu":
        return True
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(errors="replace").split()
    except OSError:
        return False


@jax.custom_vjp
def bfloat16_matmul(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply in bfloat16 and sum in float32, in the gradients too.

    JAX would derive gradients that multiply float32 by bfloat16.

    Args:
        rows: float32 (N, I).
        kernel: float32 (I, O).

    Returns:
        float32 (N, O).
    """
    return _round_and_multiply(rows, kernel, ((1,), (0,)))[0]


def _round_and_multiply(
    left: jax.Array, right: jax.Array, contracted: tuple[tuple[int], tuple[int]]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    rounded = left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)
    return lax.dot_general(*rounded, (contracted, ((), ())), preferred_element_type=jnp.float32), rounded


def _bfloat16_matmul_gradients(
    rounded: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows, kernel = rounded
    return (
        _round_and_multiply(gradient, kernel, ((1,), (1,)))[0],
        _round_and_multiply(rows, gradient, ((0,), (0,)))[0],
    )


bfloat16_matmul.defvjp(lambda rows, kernel: _round_and_multiply(rows, kernel, ((1,), (0,))), _bfloat16_matmul_gradients)


def use_bfloat16_dense(
    call: Callable[..., jax.Array], args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext
) -> jax.Array:
    """Intercept dense layers without bias and multiply them in bfloat16, for `flax.linen.intercept_methods`.

    Weights and activations stay float32, as in Micikevicius et al., "Mixed Precision Training", 2018,
    https://arxiv.org/abs/1710.03740.
    """
    layer = context.module
    if not isinstance(layer, nn.Dense) or layer.use_bias or layer.is_initializing():
        return call(*args, **kwargs)
    (x,) = args
    return bfloat16_matmul(x.reshape(-1, x.shape[-1]), layer.variables["params"]["kernel"]).reshape(*x.shape[:-1], -1)


def to_float32(params: Any) -> Any:
    """Convert weights to float32. In float16, as models are saved, the optimiser's squares would overflow."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)


class Run:
    """A training run in a folder: `state.msgpack` to resume from and the curve in `log.jsonl`.

    Attributes:
        state: The trainer's state, on every device.
        step: Steps done.
        seconds: Time of the steps done, evaluation included.
    """

    def __init__(self, folder: Path, state: Any, save_every: int, args: argparse.Namespace) -> None:
        """Open a run and resume it if the folder has a state.

        Args:
            folder: Folder of the run, made if it is missing.
            state: State to start from, a tree of arrays.
            save_every: Steps between saved states.
            args: Flags of the trainer. A run is resumed only with the same numbers and switches.

        Raises:
            SystemExit: The run was begun with other numbers or switches.
        """
        self.folder, self.save_every = folder, save_every
        self.settings = {name: value for name, value in vars(args).items() if isinstance(value, int | float)}
        self.state, self.step, self.seconds = replicate(state), 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "state.msgpack"
        if path.exists():
            self._resume(flax.serialization.msgpack_restore(path.read_bytes()), state)

    def _resume(self, stored: dict[str, Any], state: Any) -> None:
        for name, value in stored["settings"].items():
            if self.settings[name] != value:
                flag = name.replace("_", "-")
                flag = {True: flag, False: f"no-{flag}"}[value] if isinstance(value, bool) else f"{flag} {value}"
                raise SystemExit(f"{self.folder} was begun with --{flag}: use the same flag or another --run")
        self.step, self.seconds = int(stored["step"]), float(stored["seconds"])
        self.state = replicate(flax.serialization.from_state_dict(state, stored["state"]))
        print(f"resuming {self.folder} at step {self.step}", flush=True)
        # Lines logged after the last saved state will be logged again.
        log = self.folder / "log.jsonl"
        lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= self.step]
        write_atomic(log, "".join(line + "\n" for line in lines).encode())

    def save(self) -> None:
        """Write the state, replacing the one before."""
        state = flax.serialization.to_state_dict(jax.device_get(self.state))
        stored = {"settings": self.settings, "step": self.step, "seconds": self.seconds, "state": state}
        write_atomic(self.folder / "state.msgpack", flax.serialization.msgpack_serialize(stored))

    def log(self, **values: float) -> None:
        """Append a line to the curve and print it."""
        line = {"step": self.step, "seconds": round(self.seconds)} | {
            key: round(float(value), 5) for key, value in values.items()
        }
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print("  ".join(f"{key} {value:g}" for key, value in line.items()), flush=True)

    def train(
        self,
        steps: int,
        train_step: Callable[[Any, int], tuple[Any, dict[str, Any]]],
        log_every: int,
        evaluate: Callable[[Any], dict[str, Any]] | None = None,
        evaluate_every: int = 0,
    ) -> None:
        """Call `state, metrics = train_step(state, step)` until `steps` are done, saving and logging on the way."""
        started = time.perf_counter() - self.seconds
        while self.step < steps:
            self.state, metrics = train_step(self.state, self.step)
            self.step += 1
            is_last = self.step == steps
            if self.step % log_every == 0 or is_last:
                metrics = jax.device_get(metrics)
                self.seconds = time.perf_counter() - started
                if evaluate and (is_last or self.step % evaluate_every == 0):
                    metrics = metrics | evaluate(self.state)
                self.log(**metrics)
            if self.step % self.save_every == 0 or is_last:
                self.seconds = time.perf_counter() - started
                self.save()


def make_grid(images: np.ndarray, columns: int) -> Image.Image:
    """Lay images, uint8 (N, S, S, 3), out in rows of `columns`."""
    size = images.shape[1]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * size, columns * size, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * size, i % columns * size
        sheet[y : y + size, x : x + size] = image
    return Image.fromarray(sheet)
