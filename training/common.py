"""What the three trainers share: batches fixed by step, a loop that resumes, curves, pictures.

Everything random is drawn from (seed, step), and every schedule counts steps, so a run that was killed and resumed
makes the batches of an undisturbed one.
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

from dm_generations.files import write_atomic
from dm_generations.runtime.compile_cache import cpu_features


def _sharding(spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), spec)


def on_every_device(tree: Any) -> Any:
    """Arrays of any shape, a copy on each device: weights, and whatever all rows of a batch read."""
    return jax.device_put(tree, _sharding(PartitionSpec()))


def shared_out(batch: Any) -> Any:
    """Arrays (B, ...), their rows shared out among the devices. ValueError unless these divide B."""
    return jax.device_put(batch, _sharding(PartitionSpec("batch")))


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of a step, of which MUON_STEPS are taken
MUON_STEPS = 5
MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # of an update, before the learning rate: about that of AdamW's


@jax.default_matmul_precision("float32")  # rounded more, a Gram matrix has negative eigenvalues, which grow
def orthogonalised(matrices: jax.Array) -> jax.Array:
    """(N, I, O) to what has nearly their singular vectors, and singular values of 0.7 to 1.2. Devices share out N.

    Newton-Schulz as in `muon`, on Gram matrices: X X^T, of the shorter side, is all that an iteration reads, so the
    longer side is multiplied twice in place of ten times.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    count = len(x)
    x = jnp.concatenate([x, jnp.zeros((-count % jax.device_count(), *x.shape[1:]))])
    x = lax.with_sharding_constraint(x, _sharding(PartitionSpec("batch")))
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)
    gram = x @ x.mT
    a, b, c = NEWTON_SCHULZ
    total = None
    for step in range(MUON_STEPS):
        factor = a * jnp.eye(gram.shape[1]) + b * gram + c * gram @ gram
        total = factor if total is None else factor @ total
        if step + 1 < MUON_STEPS:
            gram = factor @ (factor @ gram)  # factors commute with it
    x = lax.with_sharding_constraint(total @ x, _sharding(PartitionSpec()))[:count]
    return x.mT if is_tall else x


def _muon_updates(updates: Any, params: Any = None) -> Any:
    """Each leaf (..., I, O) as a matrix, orthogonalised, together with those of its shape."""
    leaves, structure = jax.tree.flatten(updates)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, leaf in enumerate(leaves):
        by_shape.setdefault((leaf.size // leaf.shape[-1], leaf.shape[-1]), []).append(i)
    for shape, places in by_shape.items():
        stack = orthogonalised(jnp.stack([leaves[i].reshape(shape) for i in places]))
        for i, update in zip(places, stack, strict=True):
            leaves[i] = MUON_RMS * max(shape) ** 0.5 * update.reshape(leaves[i].shape)
    return jax.tree.unflatten(structure, leaves)


def muon(
    peak: float, steps: int, warmup: int, weight_decay: float = 0.01, adam_share: float = 0.4
) -> optax.GradientTransformation:
    """Muon for matrices and kernels between hidden layers; for embeddings, logits and vectors Adam, at `adam_share` of
    its rate.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon; updates scaled to AdamW's size as in Liu et al., "Muon is Scalable for
    LLM Training", 2025, https://arxiv.org/abs/2502.16982. Linear warm-up, cosine to zero, gradients clipped to norm 1.
    It does what `optax.contrib.muon` does, but for the correction of the momentum's bias in the first steps; it shares
    its work out among devices and multiplies less.
    """
    schedule, slower = (
        optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps) for rate in (peak, adam_share * peak)
    )

    def kinds(params):
        def of_leaf(path, leaf):
            at_an_end = any(str(key.key).startswith(("embed", "lm_head")) for key in path)
            is_rgb = leaf.ndim == 4 and 3 in leaf.shape[2:]
            return "hidden" if leaf.ndim in (2, 4) and not at_an_end and not is_rgb else "other"

        return jax.tree_util.tree_map_with_path(of_leaf, params)

    hidden = optax.chain(
        optax.trace(MUON_MOMENTUM, nesterov=True),
        optax.stateless(_muon_updates),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    other = optax.adam(slower, b2=0.98, nesterov=True)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition({"hidden": hidden, "other": other}, kinds))


def multiplies_bfloat16() -> bool:
    """Whether the first device has units for products in bfloat16; of CPUs, those with AMX.

    Others take longer for them than in float32, by a fifth of a step of DalleBart (AVX2).
    """
    return jax.default_backend() != "cpu" or "amx_bf16" in cpu_features().split()


@jax.custom_vjp
def bfloat16_product(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """Rows (N, I) times a kernel (I, O), both rounded to bfloat16, summed in float32: float32 (N, O).

    Its gradients are such products too; derived by JAX, they would be products of float32 with bfloat16.
    """
    return _rounded_product(rows, kernel, ((1,), (0,)))[0]


def _rounded_product(left, right, contracted) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    rounded = left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)
    return lax.dot_general(*rounded, (contracted, ((), ())), preferred_element_type=jnp.float32), rounded


def _bfloat16_product_gradients(rounded, gradient):
    rows, kernel = rounded
    return (
        _rounded_product(gradient, kernel, ((1,), (1,)))[0],
        _rounded_product(rows, gradient, ((0,), (0,)))[0],
    )


bfloat16_product.defvjp(lambda rows, kernel: _rounded_product(rows, kernel, ((1,), (0,))), _bfloat16_product_gradients)


def dense_in_bfloat16(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> jax.Array:
    """For `nn.intercept_methods`: multiplies matrices of dense layers without bias in bfloat16, all else as it was.

    Weights and what lies between products stay float32, as in Micikevicius et al., "Mixed Precision Training", 2018,
    https://arxiv.org/abs/1710.03740.
    """
    layer = context.module
    if not isinstance(layer, nn.Dense) or layer.use_bias or layer.is_initializing():
        return call(*args, **kwargs)
    (x,) = args
    return bfloat16_product(x.reshape(-1, x.shape[-1]), layer.variables["params"]["kernel"]).reshape(*x.shape[:-1], -1)


def in_float32(params: dict) -> dict:
    """Weights to train on: a model on disk has float16, in which the squares that an optimiser keeps overflow."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)


class Run:
    """A training run in a folder: `state.msgpack` to resume from, `log.jsonl` with the curve.

    `args`: what the trainer was called with. SystemExit where a run is resumed with another number or switch, such as
    `steps`: what comes out would be the result of neither schedule.
    """

    def __init__(self, folder: Path, state: Any, save_every: int, args: argparse.Namespace):
        self.folder, self.save_every = folder, save_every
        self.settings = {name: value for name, value in vars(args).items() if isinstance(value, int | float)}
        self.state, self.step, self.seconds = on_every_device(state), 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "state.msgpack"
        if path.exists():
            stored = flax.serialization.msgpack_restore(path.read_bytes())
            for name, value in stored["settings"].items():
                if self.settings[name] != value:
                    flag = name.replace("_", "-")
                    flag = {True: flag, False: f"no-{flag}"}[value] if isinstance(value, bool) else f"{flag} {value}"
                    raise SystemExit(f"{folder} was begun with --{flag}: do so again, or give another --run")
            self.step, self.seconds = int(stored["step"]), float(stored["seconds"])
            self.state = on_every_device(flax.serialization.from_state_dict(state, stored["state"]))
            print(f"resuming {folder} at step {self.step}", flush=True)
            # Lines logged after the last saved state will be logged again.
            log = folder / "log.jsonl"
            kept = [x for x in log.read_text().splitlines() if json.loads(x)["step"] <= self.step]
            write_atomic(log, "".join(x + "\n" for x in kept).encode())

    def save(self) -> None:
        state = flax.serialization.to_state_dict(jax.device_get(self.state))
        stored = {"settings": self.settings, "step": self.step, "seconds": self.seconds, "state": state}
        write_atomic(self.folder / "state.msgpack", flax.serialization.msgpack_serialize(stored))

    def log(self, **values: float) -> None:
        line = {"step": self.step, "seconds": round(self.seconds)} | {
            key: round(float(value), 5) for key, value in values.items()
        }
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print("  ".join(f"{key} {value:g}" for key, value in line.items()), flush=True)

    def loop(
        self,
        steps: int,
        train_step: Callable[[Any, int], tuple[Any, dict]],
        log_every: int,
        evaluate: Callable[[Any], dict] | None = None,
        evaluate_every: int = 0,
    ) -> None:
        """Call `state, metrics = train_step(state, step)` until `steps` are done."""
        started = time.perf_counter() - self.seconds
        while self.step < steps:
            self.state, metrics = train_step(self.state, self.step)
            self.step += 1
            last = self.step == steps
            if self.step % log_every == 0 or last:
                metrics = jax.device_get(metrics)
                self.seconds = time.perf_counter() - started
                if evaluate and (last or self.step % evaluate_every == 0):
                    metrics = metrics | evaluate(self.state)
                self.log(**metrics)
            if self.step % self.save_every == 0 or last:
                self.seconds = time.perf_counter() - started
                self.save()


def picture_grid(pictures: np.ndarray, columns: int, zoom: int = 1) -> Image.Image:
    """uint8 (N, S, S, 3) side by side, `columns` a row."""
    size = pictures.shape[1]
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * size, columns * size, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * size, i % columns * size
        sheet[y : y + size, x : x + size] = picture
    return Image.fromarray(sheet).resize((columns * size * zoom, rows * size * zoom), Image.Resampling.NEAREST)
