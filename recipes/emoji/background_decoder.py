"""Teach the decoder of a VQGAN to draw emoji on backgrounds; its tokens keep their meaning.

    python -m recipes.emoji.background_decoder --init build/vqgan-alone --out build/models/vqgan

The encoder and the codebook stay, but for the rows of the backgrounds (`recipes.emoji.backgrounds`), which images use
least: they go where no output of the encoder is near. The decoder then learns that an emoji beside a token of a
background stands on its colour, though its own tokens were made on white. A fifth of the images are emoji as the codec
encodes them.

B, N: images   S: pixels a side   L: tokens of an image
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dm_generations.models.loading import load_checkpoint
from dm_generations.models.vqgan.network import VQGAN, VQGANConfig
from dm_generations.weights import native
from recipes.emoji.backgrounds import (
    BACKGROUNDS,
    COLOURS,
    Tokens,
    draw_backgrounds,
    draw_scenes,
    encode_emoji,
    find_backgrounds,
    place_backgrounds,
)
from recipes.emoji.common import make_grid, make_optimizer, open_run, shard_batch, to_float32
from recipes.emoji.data import Emoji, load_dataset
from recipes.emoji.layouts import list_small, sample_scene
from recipes.emoji.vqgan import (
    CPU_DEVICES,
    apply_model,
    compute_psnr,
    decode_tokens,
    get_codebook,
    reconstruct,
    reconstruction_loss,
    replace_codebook,
)  # fmt: skip

TRAINED = ("decoder", "post_quant_conv")
ALONE_SHARE = 0.2  # of a batch: emoji on white, without tokens of backgrounds
SCENE_SHARE = 0.35  # of a batch: small emoji
PROBES = 128


def give_backgrounds(
    config: VQGANConfig, params: dict[str, Any], pixels: np.ndarray, emoji: list[Emoji]
) -> dict[str, Any]:
    """Copy a VQGAN's parameters with the tokens that emoji, uint8 (N, S, S, 3), use least as backgrounds."""
    tokens = encode_emoji(config, params, pixels, emoji)
    seen = np.concatenate([tokens.emoji.ravel(), tokens.small[list_small(emoji)].ravel()])
    used = np.bincount(seen, minlength=config.codebook_size)
    return replace_codebook(params, jnp.asarray(place_backgrounds(np.asarray(get_codebook(params)), used)))


class Trainer:
    """Emoji with their tokens, and the compiled training step. Its state has parameters and optimiser state."""

    def __init__(
        self,
        config: VQGANConfig,
        params: dict[str, Any],
        tokens: Tokens,
        pixels: np.ndarray,
        emoji: list[Emoji],
        args: argparse.Namespace,
    ) -> None:
        """Keep the emoji.

        Args:
            config: Sizes of the model.
            params: Its parameters; the encoder's stay.
            tokens: Tokens of the emoji.
            pixels: The emoji on white, uint8 (N, S, S, 3).
            emoji: What is known of each.
            args: Flags of the command.
        """
        self.model, self.tokens, self.pixels, self.args = VQGAN(config), tokens, pixels, args
        self.small = list_small(emoji)
        self.fixed = {name: value for name, value in params.items() if name not in TRAINED}
        self.optimizer = make_optimizer(args.learning_rate, args.steps, warmup=min(100, args.steps // 10))

    def init(self, params: dict[str, Any]) -> dict[str, Any]:
        """Make the state of step 0."""
        trained = {name: params[name] for name in TRAINED}
        return {"params": trained, "opt": self.optimizer.init(trained)}

    def make_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Make the tokens, int32 (B, L), and the pixels, uint8 (B, S, S, 3), of a step."""
        rng = np.random.default_rng([self.args.seed, step])
        count = self.args.batch_size
        indices, backgrounds = rng.integers(len(self.pixels), size=count), rng.integers(len(BACKGROUNDS), size=count)
        is_alone = rng.random(count) < ALONE_SHARE
        alone, pixels = self.tokens.emoji[indices].reshape(count, -1), self.pixels[indices]
        tokens = np.where(is_alone[:, None], alone, self.tokens.compose(indices, backgrounds))
        pixels = np.where(is_alone[:, None, None, None], pixels, draw_backgrounds(pixels, backgrounds))
        rows = np.flatnonzero(rng.random(count) < SCENE_SHARE)
        if len(rows) and len(self.small) > 1:
            scenes = [sample_scene(self.small, len(COLOURS), rng) for _ in rows]
            tokens[rows], pixels[rows] = self.tokens.compose_scenes(scenes), draw_scenes(self.pixels, scenes)
        return tokens, pixels

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def update(
        self, state: dict[str, Any], fixed: dict[str, Any], tokens: jax.Array, pixels: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Take a step on a batch. Returns the new state and the metrics."""
        target = pixels.astype(jnp.float32) / 255

        def loss_of(trained: Any) -> tuple[jax.Array, jax.Array]:
            output = apply_model(self.model, fixed | trained, tokens, method="decode_code")
            return reconstruction_loss(output, target), output

        (loss, output), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
        updates, opt = self.optimizer.update(grads, state["opt"], state["params"])
        mse = jnp.square(jnp.clip(output, 0, 1) - target).mean(axis=(1, 2, 3))
        metrics = {"loss": loss, "psnr_train": (-10 * jnp.log10(mse + 1e-8)).mean()}
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, metrics

    def step(self, state: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Take the step of this number. Returns the new state and the metrics."""
        return self.update(state, self.fixed, *shard_batch(self.make_batch(step)))


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("build/emoji-64.npz"), help="file of recipes.emoji.data")
    add("--init", default="build/vqgan-alone", help="folder of the VQGAN to start from")
    add("--run", type=Path, default=Path("build/background_decoder"), help="folder of the run; resumes")
    add("--out", type=Path, help="write the trained model to this folder")
    add("--steps", type=int, default=800, help="training steps (default: 800)")
    add("--batch-size", type=int, default=16, help="images of a step (default: 16)")
    add("--learning-rate", type=float, default=2e-3, help="peak rate of Muon (default: 0.002)")
    add("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    return parser.parse_args()


def main() -> None:
    """Train from the command line."""
    args = parse_args()
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
    pixels, emoji = load_dataset(args.data, with_tones=False)
    train = np.array([not one["held_out"] for one in emoji])
    train_emoji = [one for one in emoji if not one["held_out"]]
    loaded = load_checkpoint(args.init, "codec")
    config, params = loaded.config, to_float32(loaded.params)
    if find_backgrounds(np.asarray(get_codebook(params))) is None:
        params = give_backgrounds(config, params, pixels[train], train_emoji)
    tokens = encode_emoji(config, params, pixels, emoji)
    trainer = Trainer(config, params, tokens.choose(train), pixels[train], train_emoji, args)
    run = open_run(args.run, trainer.init(params), save_every=200, args=args)

    unseen = pixels[~train]
    probes = np.flatnonzero(~train)[:PROBES]
    backgrounds = np.arange(len(probes)) % len(BACKGROUNDS)
    targets = draw_backgrounds(pixels[probes], backgrounds)
    probe_tokens = tokens.compose(probes, backgrounds)
    rng = np.random.default_rng(1)
    small = list_small(emoji)
    small = small[~train[small]]  # held out, too
    scenes = [sample_scene(small, len(COLOURS), rng) for _ in probes]
    scene_targets, scene_tokens = draw_scenes(pixels, scenes), tokens.compose_scenes(scenes)

    def evaluate(state: dict[str, Any]) -> dict[str, float]:
        params = jax.device_get(trainer.fixed | state["params"])
        drawn = decode_tokens(trainer.model, params, probe_tokens)
        drawn_scenes = decode_tokens(trainer.model, params, scene_tokens)
        pairs = np.stack([targets, drawn, scene_targets, drawn_scenes], 1).reshape(-1, *targets.shape[1:])
        make_grid(pairs, 16).save(args.run / f"backgrounds-{run.step:05d}.png")
        return {
            "psnr_backgrounds": compute_psnr(drawn, targets).mean(),
            "psnr_scenes": compute_psnr(drawn_scenes, scene_targets).mean(),
            "psnr_held_out": compute_psnr(reconstruct(trainer.model, params, unseen)[0], unseen).mean(),
        }

    run.train(args.steps, trainer.step, log_every=50, evaluate=evaluate, evaluate_every=200)
    if args.out:
        params = jax.device_get(trainer.fixed | run.state["params"])
        native.save(args.out, "vqgan", dataclasses.asdict(config), params, np.float16)


if __name__ == "__main__":
    main()
