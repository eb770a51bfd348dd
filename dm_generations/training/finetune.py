"""Train a text-to-image model on what archives hold: the whole model or low-rank changes of it.

B: rows of a batch on all devices   K: batches whose gradients are added up   T: text tokens   L: image tokens
"""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dm_generations.models.base import Tokenizer, check_prompt_kinds, class_count_of, recompute_layers
from dm_generations.models.loading import Checkpoint
from dm_generations.runtime.device import put_params
from dm_generations.sampling.params import Unconditional
from dm_generations.training import hosts, lora, objectives
from dm_generations.training.data import Examples, choose_rows
from dm_generations.training.options import TrainOptions
from dm_generations.training.run import PARAMS, Metrics, State
from dm_generations.training.trainer import EVALUATED_ROWS, BaseTrainer

ADAPTERS: Final = "lora"
# On a CPU, generation splits kernels for few rows; training has many rows, and saves whole kernels.
_PLATFORM: Final = "gpu"

logger = logging.getLogger(__name__)


class Trainer(BaseTrainer):
    """Trains on prompts and tokens. Its state has `params` or, of low-rank changes, `lora`.

    Attributes:
        checkpoint: The model to start from, in the form that generation takes.
        held_out: Numbers of the examples that it does not learn; it is evaluated on some of them.
    """

    def __init__(self, checkpoint: Checkpoint, examples: Examples, options: TrainOptions):
        """Choose the examples and put what does not change on the devices.

        Raises:
            UserError: An option does not fit the model, the devices or the examples.
        """
        self._examples = examples
        self._tokenizer: Tokenizer = checkpoint.load_tokenizer()
        config, params = checkpoint.network_class.prepare_params(checkpoint.config, checkpoint.params, _PLATFORM)
        super().__init__(dataclasses.replace(checkpoint, config=config, params=params), options)
        self._config = config
        self._model = checkpoint.network_class(config, jnp.dtype(options.dtype))
        self._choose_examples()
        self._is_low_rank = options.lora_rank > 0
        self._trained = ADAPTERS if self._is_low_rank else PARAMS
        self._scale = options.lora_alpha / options.lora_rank if self._is_low_rank else 0.0
        if self._is_low_rank or options.objective == "dpo":
            self._frozen = self._place(put_params(params, options.dtype if self._is_low_rank else np.float32))
        self._nats = jax.jit(self._compute_nats)

    def init(self) -> State:
        """Make the state of step 0, on the host."""
        if not self._is_low_rank:
            return self.init_state(jax.tree.map(lambda leaf: np.array(leaf, np.float32), self.checkpoint.params))
        names = self._options.lora_layers or lora.DEFAULT_LAYERS
        shapes = lora.find_layers(self._model, self.checkpoint.params, names)
        return self.init_state(lora.make_adapters(shapes, self._options.lora_rank, self._options.seed))

    def params_of(self, state: State) -> dict:
        """Return the parameters of a state on the host, with low-rank changes merged."""
        if self._is_low_rank:
            return lora.merge_adapters(self.checkpoint.params, state[ADAPTERS], self._scale)
        return super().params_of(state)

    def make_batch(self, step: int) -> dict[str, jax.Array]:
        """Make the batch of a step, which depends on the seed and the step alone.

        Returns:
            `ids` and `mask` (K, B, T) and `tokens` (K, B, L) int32, `smoothing` and `weights` (K, B) float32. Of
            preferences, B is twice as large: the better images, then the worse ones.
        """
        options = self._options
        count = options.batch_size * options.accumulate
        chosen = choose_rows(options.seed, step, count, len(self._numbers))
        numbers = self._numbers[chosen]  # (count,), of pairs (count, 2)
        is_pair = numbers.ndim == 2
        if is_pair:  # the better and the worse images of each of the K batches
            numbers = numbers.reshape(options.accumulate, options.batch_size, 2).swapaxes(1, 2).reshape(-1)
        texts, tokens = self._examples.read(numbers)
        rng = np.random.default_rng([options.seed, step])
        is_dropped = rng.random(len(texts)) < (0.0 if is_pair else options.caption_dropout)
        by_prompt = getattr(self._tokenizer, "unconditional_by_prompt", False)
        prompts: list[Any] = [
            (Unconditional(str(text)) if by_prompt else None) if drop else text
            for drop, text in zip(is_dropped, texts, strict=True)
        ]
        ids, mask = self._tokenizer.encode(prompts, self._config.max_text_length)
        smoothing = np.where(is_dropped, options.unconditional_smoothing, options.label_smoothing)
        batch = {"ids": ids, "mask": mask, "tokens": tokens, "smoothing": smoothing.astype(np.float32)}
        batch["weights"] = self._weights[numbers]
        return self._put_batch(batch)

    def evaluate(self, state: State) -> Metrics:
        """Compute the mean nats of a token of images that are held out."""
        size, found = self._options.batch_size, []
        for first in range(0, len(self._evaluated), size):
            numbers = self._evaluated[first : first + size]
            padded = np.resize(numbers, size)  # by repeating them
            texts, tokens = self._examples.read(padded)
            ids, mask = self._tokenizer.encode(texts, self._config.max_text_length)
            nats = self._nats(state[self._trained], self._frozen, *self._put_rows((ids, mask, tokens)))
            found.append(hosts.fetch(nats)[: len(numbers)])
        return {"held_out_nats": np.concatenate(found).mean()} if found else {}

    # Private

    def _choose_examples(self) -> None:
        options, examples = self._options, self._examples
        trained, held_out = examples.split(options.held_out)
        self._weights = examples.weights(options.weight_by)
        self._numbers = trained
        if options.objective == "dpo":
            self._numbers = examples.pairs(trained, options.prefer, options.min_gap)
        order = np.random.default_rng([options.seed, 3]).permutation(len(held_out))
        self.held_out, self._evaluated = held_out, held_out[np.sort(order[:EVALUATED_ROWS])]
        check_prompt_kinds(examples.texts, self._config, self.checkpoint.name)
        length = self._config.max_text_length
        if not class_count_of(self._config) and (count := examples.count_cut(self._tokenizer, length)):
            logger.warning("captions longer than the %s tokens that the model reads, so cut: %s", length, f"{count:,}")
        what = "pairs" if options.objective == "dpo" else "images"
        logger.info(
            "learning from %s %s; %s images are held out", f"{len(self._numbers):,}", what, f"{len(held_out):,}"
        )

    def _logits(
        self,
        trained: Any,
        frozen: Any,
        ids: jax.Array,
        mask: jax.Array,
        tokens: jax.Array,
        key: jax.Array | None = None,
    ) -> Any:
        """Logits of a batch by the model that is trained; dropouts are on with a key."""
        options: dict[str, Any] = {} if key is None else {"rngs": {"dropout": key}}
        params, changes = (frozen, trained) if self._is_low_rank else (trained, None)
        with contextlib.ExitStack() as stack:
            stack.enter_context(recompute_layers(self._options.recompute))
            if changes is not None:
                stack.enter_context(lora.use_adapters(changes, self._scale))
            return self._model.apply(
                {"params": params}, ids, mask, tokens, key is None, method="training_logits", **options
            )

    def _loss(self, trained: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        """The loss of a batch (B, ...), and metrics."""
        inputs = batch["ids"], batch["mask"], batch["tokens"]
        is_pair = self._options.objective == "dpo"
        # The reference is the same function at first, so neither has dropouts.
        logits = self._logits(trained, frozen, *inputs, None if is_pair else key)
        if is_pair:
            reference = self._model.apply({"params": frozen}, *inputs, method="training_logits")
            new, old = (
                jnp.split(objectives.image_log_probs(each, batch["tokens"]), 2)
                for each in (logits, lax.stop_gradient(reference))
            )
            losses, metrics = objectives.preference_loss(new[0], new[1], old[0], old[1], self._options.beta)
            return losses.mean(), {name: value.mean() for name, value in metrics.items()}
        losses, nats = objectives.next_token_loss(
            logits, batch["tokens"], batch["smoothing"], self._options.text_weight
        )
        return (losses * batch["weights"]).mean(), {"nats": nats.mean()}

    def _compute_nats(self, trained: Any, frozen: Any, ids: Any, mask: Any, tokens: jax.Array) -> jax.Array:
        logits = self._logits(trained, frozen, ids, mask, tokens)
        return objectives.cross_entropy(logits.image, tokens).mean(axis=-1)
