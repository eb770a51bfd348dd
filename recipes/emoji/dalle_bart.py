"""Train DalleBart: a caption to the tokens of its image.

    python -m recipes.emoji.dalle_bart --data build/emoji-64.npz --codec build/models/vqgan --run build/dalle_bart

Five things differ from dalle-mini's training, since a small model memorises its images:

- Rows without a caption (`--caption-dropout`) are trained towards equal probabilities of all tokens
  (`--unconditional-smoothing 1`). Super conditioning magnifies log p(token | caption) - log p(token). If the model
  memorises log p(token) too, that difference is largest for tokens that are improbable in both, and they blotch nearly
  every second image at a condition scale of 10. With equal probabilities, guidance is close to a temperature of
  1 / scale. To fine-tune a large model, whose p(token) is worth having, use `--unconditional-smoothing 0.005`.
- All other rows have a little label smoothing. It keeps the logits of tokens that never occur level.
- A random share of the tokens that a row reads is replaced. The model then goes on well after a bad token, and where
  most tokens are wrong it must read the caption. Without this it does not learn the style words.
- The first tokens of an emoji weigh more in the loss. Only the caption tells them, and the rest depends on them.
- Every step puts its emoji on other backgrounds, if the codec has them (`recipes.emoji.backgrounds`). The first token,
  which tells background and style, is trained towards equal probabilities of all that the caption leaves open, and
  without a caption too. Otherwise guidance would prefer those that the model happened to see with a name.

B: rows of a batch   T: text tokens   L: tokens of an image   V: image vocabulary
"""

import argparse
import contextlib
import dataclasses
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from tokenizers import Tokenizer

from dm_generations.models.dalle_mini.network import DalleBart, DalleBartConfig
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.tokenization import PromptTokenizer
from dm_generations.training.data import choose_rows
from dm_generations.training.objectives import cross_entropy
from dm_generations.weights import native
from recipes.emoji.backgrounds import BACKGROUNDS, COLOURS, Tokens, encode_emoji
from recipes.emoji.captions import caption_scene, mention_background, sample_caption
from recipes.emoji.common import has_bfloat16_units, make_optimizer, open_run, to_float32, use_bfloat16_dense
from recipes.emoji.data import Emoji, load_dataset
from recipes.emoji.layouts import LAYOUTS, Scene, list_small, sample_scene

CORRUPTION_POWER = 4  # the share of replaced tokens is u ** 4 with u uniform, a fifth on average
LABEL_SMOOTHING = 0.005
FIRST_TOKEN_WEIGHT = 4  # added to the weight 1 of the first token of a block; halves with each of its rows
SCENE_SHARE = 0.35  # of images: small emoji, one or several (`recipes.emoji.layouts`)
LONG_TEXT_EVERY = 8  # steps; few captions need more than half of the text length, so the other steps are padded to half
PROBE_ROWS = 256


def make_config(codebook_size: int, image_length: int, text_vocab_size: int) -> DalleBartConfig:
    """Make the configuration of the small DalleBart."""
    return DalleBartConfig.from_dict(
        {
            "encoder_vocab_size": text_vocab_size,
            "image_vocab_size": codebook_size,  # the model adds a row for the start token
            "image_length": image_length,
            "max_text_length": 32,
            "d_model": 192,
            "encoder_layers": 2,
            "encoder_ffn_dim": 960,
            "encoder_attention_heads": 4,
            "decoder_layers": 3,
            "decoder_ffn_dim": 384,
            "decoder_attention_heads": 4,
            "dropout": 0.0,
            "use_scan": False,
            "use_glu": True,
            "use_bias": False,
            "ln_positions": "normformer",
            "decoder_start_token_id": codebook_size,
            "bos_token_id": codebook_size + 1,
            "eos_token_id": codebook_size + 1,
            "pad_token_id": codebook_size + 1,
        }
    )


class Trainer:
    """Batches and the compiled training step. Its state has parameters and optimiser state."""

    def __init__(
        self,
        model: DalleBart,
        tokens: Tokens,
        emoji: list[Emoji],
        tokenizer: PromptTokenizer | None,
        args: argparse.Namespace,
    ) -> None:
        """Keep what batches are made of.

        Args:
            model: The DalleBart.
            tokens: Tokens of the training images.
            emoji: What is known of each of them.
            tokenizer: Tokenizer of the captions; None if no batch is made.
            args: Flags of the command.
        """
        self.model, self.config, self.args = model, model.config, args
        self.tokens, self.emoji, self.tokenizer = tokens, emoji, tokenizer
        self.weights = weigh_tokens(tokens.emoji.shape[1])
        self.small = list_small(emoji)
        self.styles_of_concept: dict[str, list[int]] = {}
        for one, style, outside in zip(emoji, tokens.styles, tokens.outside, strict=True):
            if outside[0, 0]:
                self.styles_of_concept.setdefault(one["concept"], []).append(int(style))
        self.optimizer = make_optimizer(
            args.learning_rate, args.steps, warmup=min(100, args.steps // 10), weight_decay=0.02, adam_share=1.0
        )

    def init(self, params: dict[str, Any] | None) -> dict[str, Any]:
        """Make the state of step 0, from random parameters if `params` is None."""
        if params is None:
            text = jnp.zeros((1, self.config.max_text_length), jnp.int32)
            image = jnp.zeros((1, self.config.image_length), jnp.int32)
            params = jax.jit(self.model.init)(jax.random.key(self.args.seed), text, text, image)["params"]
        return {"params": params, "opt": self.optimizer.init(params)}

    def logits(self, params: Any, ids: jax.Array, mask: jax.Array, tokens: jax.Array) -> jax.Array:
        """Compute logits (B, L, V) of each token (B, L), given those before it and the text (B, T)."""
        assert self.config.decoder_start_token_id is not None
        start = jnp.full((len(tokens), 1), self.config.decoder_start_token_id, jnp.int32)
        inputs = jnp.concatenate([start, tokens[:, :-1]], axis=1)
        apply: Any = self.model.apply
        return apply({"params": params}, ids, mask, inputs)

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def update(
        self,
        state: dict[str, Any],
        ids: jax.Array,
        mask: jax.Array,
        inputs: jax.Array,
        targets: jax.Array,
        first: jax.Array,
        smoothing: jax.Array,
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Take a step on a batch, which `make_batch` describes. Returns the new state and the metrics."""

        def loss_of(params: Any) -> jax.Array:
            with nn.intercept_methods(use_bfloat16_dense) if self.args.bfloat16 else contextlib.nullcontext():
                logits = self.logits(params, ids, mask, inputs)
            losses = cross_entropy(logits, targets, smoothing[:, None])
            return (losses.at[:, 0].set(optax.softmax_cross_entropy(logits[:, 0], first)) * self.weights).mean()

        loss, grads = jax.value_and_grad(loss_of)(state["params"])
        updates, opt = self.optimizer.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, {"loss": loss}

    def choose_images(self, step: int) -> np.ndarray:
        """Choose the images (B,) of a step. Each epoch has all images once, in random order."""
        return choose_rows(self.args.seed, step, self.args.batch_size, len(self.emoji))

    def encode_text(self, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode captions to ids and mask, int32 (B, length)."""
        assert self.tokenizer is not None
        return self.tokenizer.encode(texts, length)

    def make_batch(self, step: int) -> tuple[np.ndarray, ...]:
        """Make the batch of a step.

        Returns:
            Text ids and mask, int32 (B, T); tokens to read and tokens to predict, int32 (B, L); probabilities of
            the first token to learn, float32 (B, V); label smoothing of the others, float32 (B,).
        """
        rng = np.random.default_rng([self.args.seed, step])
        count = self.args.batch_size
        indices, backgrounds = self.choose_images(step), rng.integers(len(BACKGROUNDS), size=count)
        targets = self.tokens.compose(indices, backgrounds)
        scenes: dict[int, Scene] = {}
        if self.tokens.layouts is not None and len(self.small) > 1:
            rows = np.flatnonzero(rng.random(count) < SCENE_SHARE)
            scenes = {int(row): sample_scene(self.small, len(COLOURS), rng) for row in rows}
            backgrounds[rows] = [scene.colour for scene in scenes.values()]
            targets[rows] = self.tokens.compose_scenes(list(scenes.values()))
        is_dropped = rng.random(count) < self.args.caption_dropout
        texts, named = self.sample_captions(indices, backgrounds, scenes, is_dropped, rng)
        length = self.config.max_text_length
        ids, mask = self.encode_text(texts, length if step % LONG_TEXT_EVERY == 0 else length // 2)
        # Half of the wrong tokens are any token, half are those of another image at the same place.
        wrong = np.where(
            rng.random(targets.shape) < 0.5,
            rng.integers(self.config.codebook_size, size=targets.shape),
            np.roll(targets, 1, axis=0),
        )
        is_wrong = rng.random(targets.shape) < rng.random((count, 1)) ** CORRUPTION_POWER
        smoothing = np.where(is_dropped, self.args.unconditional_smoothing, LABEL_SMOOTHING).astype(np.float32)
        first_smoothing = smoothing
        if self.tokens.backgrounds is not None:
            is_wrong[:, 0] = False  # background and style are always read right
            first_smoothing = np.full_like(smoothing, LABEL_SMOOTHING)
        first = np.zeros((count, self.config.image_vocab_size + 1), np.float32)
        for row in range(count):
            if row in scenes:
                tokens = self.list_layout_tokens(len(scenes[row].emoji), named[row])
            else:
                tokens = self.list_first_tokens(indices[row], texts[row], named[row])
            first[row, tokens] = 1
        first /= first.sum(1, keepdims=True)
        first += first_smoothing[:, None] * (1 / first.shape[1] - first)
        return ids, mask, np.where(is_wrong, wrong, targets).astype(np.int32), targets, first, smoothing

    def sample_captions(
        self,
        indices: np.ndarray,
        backgrounds: np.ndarray,
        scenes: dict[int, Scene],
        is_dropped: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[list[str], list[int | None]]:
        """Sample captions of images (B,) or scenes, "" where dropped; tells the backgrounds that they name, too."""
        texts = [
            caption_scene([self.emoji[i] for i in scenes[row].emoji], rng)
            if row in scenes
            else sample_caption(self.emoji[i], rng)
            for row, i in enumerate(indices)
        ]
        named: list[int | None] = [None] * len(texts)
        if self.tokens.backgrounds is not None:
            for row, background in enumerate(backgrounds):
                texts[row], is_named = mention_background(texts[row], BACKGROUNDS[background].name, rng)
                named[row] = int(background) if is_named else None
        for dropped in np.flatnonzero(is_dropped):
            texts[dropped], named[dropped] = "", None
        return texts, named

    def list_first_tokens(self, index: int, text: str, background: int | None) -> np.ndarray:
        """List the tokens that an image may begin with.

        Args:
            index: Of the emoji.
            text: Its caption; one without a style leaves all styles open that its concept is seen in.
            background: Index of the background that the caption names; None leaves it open.
        """
        tokens, one = self.tokens, self.emoji[index]
        if tokens.backgrounds is None or not tokens.outside[index, 0, 0]:
            return tokens.emoji[index, :1, 0]
        styles = [int(tokens.styles[index])]
        if one["style"] not in re.split(r"\W+", text):
            styles = self.styles_of_concept[one["concept"]]
        variants = [
            i for i, each in enumerate(BACKGROUNDS) if background is None or each.name == BACKGROUNDS[background].name
        ]
        return tokens.backgrounds[np.ix_(styles, variants)].ravel()

    def list_layout_tokens(self, count: int, colour: int | None) -> np.ndarray:
        """List the tokens that an image of so many small emoji may begin with; None leaves the colour open."""
        assert self.tokens.layouts is not None
        colours = range(len(COLOURS)) if colour is None else [colour]
        layouts = [i for i, quarters in enumerate(LAYOUTS) if len(quarters) == count]
        return self.tokens.layouts[np.ix_(colours, layouts)].ravel()

    def step(self, state: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Take the step of this number. Returns the new state and the metrics."""
        return self.update(state, *self.make_batch(step))

    @partial(jax.jit, static_argnums=0)
    def _nll(self, params: Any, ids: jax.Array, mask: jax.Array, tokens: jax.Array) -> jax.Array:
        return cross_entropy(self.logits(params, ids, mask, tokens), tokens).mean()

    def nll(self, params: Any, tokens: np.ndarray, texts: list[str]) -> float:
        """Compute the mean negative log-likelihood of tokens (B, L), in nats, without corruption."""
        return float(self._nll(params, *self.encode_text(texts, self.config.max_text_length), tokens))


def weigh_tokens(side: int) -> np.ndarray:
    """Weigh the tokens of an image of `side` tokens a side in the loss, float32 (L,), with mean 1: first ones most."""
    weights = 1 + FIRST_TOKEN_WEIGHT * 0.5 ** (np.arange(side**2) / side)
    return (weights / weights.mean()).astype(np.float32)


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("build/emoji-64.npz"), help="file of recipes.emoji.data")
    add("--codec", type=Path, default=Path("build/models/vqgan"), help="folder of the VQGAN")
    add("--tokenizer", type=Path, default=Path("build/tokenizer/dalle_bart"), help="folder of the tokenizer")
    add("--run", type=Path, default=Path("build/dalle_bart"), help="folder of the run; resumes")
    add("--out", type=Path, help="write the trained model to this folder")
    add("--init", help="fine-tune this model (a folder) instead of starting at random")
    add("--steps", type=int, default=5800, help="training steps (default: 5800)")
    add("--batch-size", type=int, default=64, help="images of a step (default: 64)")
    add("--learning-rate", type=float, default=5e-3, help="peak rate of Muon (default: 0.005)")
    add(
        "--caption-dropout",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="rows without a caption, 0 to 1 (default: 0.05)",
    )
    add(
        "--unconditional-smoothing",
        type=float,
        default=1.0,
        metavar="SHARE",
        help=f"label smoothing of rows without a caption; others have {LABEL_SMOOTHING} (default: 1)",
    )
    add(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=has_bfloat16_units(),
        help="multiply matrices of dense layers in bfloat16 (default: where the device has units for it)",
    )
    add("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    return parser.parse_args()


def main() -> None:
    """Train from the command line."""
    args = parse_args()
    pixels, emoji = load_dataset(args.data, with_tones=False)  # captions do not tell skin tones apart
    is_train = np.array([not one["held_out"] for one in emoji])
    codec = load_checkpoint(args.codec, "codec")
    tokens = encode_emoji(codec.config, codec.params, pixels, emoji)
    tokenizer = PromptTokenizer(args.tokenizer)
    vocab_size = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json")).get_vocab_size()
    config, params = make_config(codec.config.codebook_size, codec.config.grid**2, vocab_size), None
    if args.init:
        loaded = load_checkpoint(args.init, "generator")
        config, params = loaded.config, to_float32(loaded.params)
    train_emoji = [one for one in emoji if not one["held_out"]]
    trainer = Trainer(DalleBart(config), tokens.choose(is_train), train_emoji, tokenizer, args)
    run = open_run(args.run, trainer.init(params), save_every=250, args=args)

    seen = np.random.default_rng(0).choice(np.flatnonzero(is_train), PROBE_ROWS, replace=False)
    unseen = np.flatnonzero(~is_train)[:PROBE_ROWS]
    texts = [f"{one['style']} {one['name']}" for one in emoji]
    backgrounds = np.arange(len(emoji)) % len(BACKGROUNDS)

    def nll(params: Any, indices: np.ndarray, texts: list[str]) -> float:
        return trainer.nll(params, tokens.compose(indices, backgrounds[indices]), texts)

    rng = np.random.default_rng(1)
    scenes = [sample_scene(trainer.small, len(COLOURS), rng) for _ in range(PROBE_ROWS)]
    scene_texts = [caption_scene([train_emoji[i] for i in scene.emoji], rng) for scene in scenes]

    def evaluate(state: dict[str, Any]) -> dict[str, float]:
        params = state["params"]
        return {
            "nll_train": nll(params, seen, [texts[i] for i in seen]),
            "nll_train_without_caption": nll(params, seen, [""] * len(seen)),
            "nll_held_out": nll(params, unseen, [texts[i] for i in unseen]),
            "nll_scenes": trainer.nll(params, trainer.tokens.compose_scenes(scenes), scene_texts),
        }

    run.train(args.steps, trainer.step, log_every=25, evaluate=evaluate, evaluate_every=250)
    if args.out:
        params = jax.device_get(run.state["params"])
        native.save(args.out, "dalle_bart", dataclasses.asdict(config), params, np.float16)
        shutil.copyfile(args.tokenizer / "tokenizer.json", args.out / "tokenizer.json")


if __name__ == "__main__":
    main()
