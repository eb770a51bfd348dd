"""What all trainers share: batches on the devices, gradients, and the update of the weights.

B: rows of a batch on all devices   K: batches whose gradients are added up
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dm_generations.errors import UserError
from dm_generations.models.loading import Checkpoint
from dm_generations.training import hosts
from dm_generations.training.optimizers import make_optimizer, make_schedule
from dm_generations.training.options import TrainOptions
from dm_generations.training.run import PARAMS, Metrics, State

AXIS: Final = "data"
EVALUATED_ROWS: Final = 256


class BaseTrainer(ABC):
    """The compiled step and the state of a run. A subclass makes batches and says what the loss is.

    Its state has the weights that are trained, under the name `_trained`; the optimiser's state `opt`; and `step`.

    Attributes:
        checkpoint: The model to start from.
    """

    _trained: str = PARAMS

    def __init__(self, checkpoint: Checkpoint, options: TrainOptions):
        """Make the optimiser.

        Raises:
            UserError: The devices do not divide the batch.
        """
        self.checkpoint, self._options = checkpoint, options
        self._mesh = Mesh(np.array(jax.devices()), (AXIS,))
        if options.batch_size % self._mesh.size:
            raise UserError(
                f"--batch-size {options.batch_size} is not divisible by {self._mesh.size}, the number of devices"
            )
        self._schedule = make_schedule(options.schedule, options.learning_rate, options.steps, options.warmup)
        self._optimizer = make_optimizer(options.optimizer, self._schedule, options.weight_decay, options.clip_norm)
        self._frozen: Any = None
        self._step = jax.jit(self._update, donate_argnums=0)

    @abstractmethod
    def init(self) -> State:
        """Make the state of step 0, on the host."""

    def init_state(self, trained: Any) -> State:
        """Make the state of step 0, on the host, of the weights that are trained."""
        opt = jax.tree.map(np.asarray, jax.jit(self._optimizer.init)(trained))
        return {**self._pack(trained), "opt": opt, "step": np.zeros((), np.int32)}

    def put(self, state: State) -> State:
        """Put a state on the devices."""
        return self._place(state)

    def params_of(self, state: State) -> dict:
        """Return the parameters of a state on the host."""
        return state[PARAMS]

    def step(self, state: State, step: int) -> tuple[State, Metrics]:
        """Take the step of this number; returns the new state and its metrics, which may still be computed."""
        return self._step(state, self._frozen, self.make_batch(step))

    @abstractmethod
    def make_batch(self, step: int) -> dict[str, jax.Array]:
        """Make the batch of a step, which depends on the seed and the step alone: arrays (K, B, ...)."""

    # For subclasses

    @abstractmethod
    def _loss(self, trained: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        """Return the loss of a batch (B, ...), and metrics."""

    def _trained_of(self, state: State) -> Any:
        """Return the weights of a state that are trained."""
        return state[self._trained]

    def _pack(self, trained: Any) -> State:
        """Return what a state has of weights that are trained."""
        return {self._trained: trained}

    def _put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Put arrays (K * B, ...) on the devices as (K, B, ...)."""
        count = self._options.accumulate
        shaped = {name: array.reshape(count, -1, *array.shape[1:]) for name, array in batch.items()}
        sharding = NamedSharding(self._mesh, PartitionSpec(None, AXIS))
        return {name: hosts.put(array, sharding) for name, array in shaped.items()}

    def _put_rows(self, rows: Any) -> Any:
        """Put arrays (B, ...) on the devices."""
        sharding = NamedSharding(self._mesh, PartitionSpec(AXIS))
        return jax.tree.map(lambda array: hosts.put(array, sharding), rows)

    def _place(self, tree: Any) -> Any:
        """Put arrays on the devices: whole on each, or in parts with --shard-params."""
        return jax.tree.map(lambda leaf: hosts.put(leaf, self._sharding(leaf)), tree)

    def _sharding(self, leaf: Any) -> NamedSharding:
        shape, size = np.shape(leaf), self._mesh.size
        axes = [axis for axis, length in enumerate(shape) if length % size == 0]
        if size == 1 or not self._options.shard_params or not axes:
            return NamedSharding(self._mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: shape[axis])
        return NamedSharding(self._mesh, PartitionSpec(*[None] * longest, AXIS))

    def _update(self, state: State, frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[State, Metrics]:
        trained = self._trained_of(state)
        key = jax.random.fold_in(jax.random.key(self._options.seed), state["step"])
        gradients_of = jax.value_and_grad(self._loss, has_aux=True)

        def add(total: Any, part: tuple[jax.Array, Any]) -> tuple[Any, None]:
            number, rows = part
            found = gradients_of(trained, frozen, rows, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, found), None

        count = self._options.accumulate
        numbers = jnp.arange(count)
        if count == 1:
            total = gradients_of(trained, frozen, {name: rows[0] for name, rows in batch.items()}, key)
        else:
            first = jax.eval_shape(gradients_of, trained, frozen, {name: rows[0] for name, rows in batch.items()}, key)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
            total, _ = lax.scan(add, zeros, (numbers, dict(batch)))
        (loss, metrics), gradients = jax.tree.map(lambda leaf: leaf / count, total)
        updates, opt = self._optimizer.update(gradients, state["opt"], trained)
        new = {**self._pack(optax.apply_updates(trained, updates)), "opt": opt, "step": state["step"] + 1}
        new = lax.with_sharding_constraint(new, jax.tree.map(self._sharding, new))
        rate = self._schedule(state["step"])
        metrics = {"loss": loss, **metrics, "gradient_norm": optax.tree.norm(gradients), "learning_rate": rate}
        return new, metrics
