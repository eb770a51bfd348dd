"""Teach the decoder of a VQGAN to draw scenes; its tokens keep their meaning.

    python -m recipes.emoji.scene_decoder --init build/models/vqgan --out build/scenes/vqgan

The encoder and the codebook stay, but for the rows of the seven grounds, which no image uses: they go where no output
of the encoder is near. The decoder then learns scenes from their tokens: an emoji beside a ground token stands on its
colour, though its own tokens were made on white. A fifth of the images are emoji on white as the codec encodes them.

B, N: images   S: pixels a side   L: tokens of an image   D: width of a token
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
from recipes.emoji.common import make_grid, make_optimizer, open_run, shard_batch, to_float32
from recipes.emoji.data import Emoji, load_dataset
from recipes.emoji.scenes import (
    CELL,
    GROUNDS,
    LARGE,
    SIZE,
    SMALL,
    Blocks,
    Part,
    Scene,
    SceneSampler,
    compose_pixels,
    compose_tokens,
    encode_blocks,
    find_outside,
    place_alone,
    shrink,
)  # fmt: skip
from recipes.emoji.vqgan import (
    CPU_DEVICES,
    apply_model,
    compute_psnr,
    decode_tokens,
    encode_images,
    get_codebook,
    reconstruct,
    reconstruction_loss,
    replace_codebook,
)  # fmt: skip

TRAINED = ("decoder", "post_quant_conv")
ALONE_SHARE = 0.2  # of a batch: emoji on white, without tokens of grounds
GROUND_DISTANCE = 1.5  # length of a ground's row, as a multiple of the longest other one
PROBES = 64


def place_grounds(params: dict[str, Any], grounds: np.ndarray) -> dict[str, Any]:
    """Copy a VQGAN's parameters with rows of the grounds that no encoder output is near."""
    codebook = np.array(get_codebook(params))
    rows = np.random.default_rng(0).normal(size=(len(grounds), codebook.shape[1]))
    longest = np.linalg.norm(codebook, axis=1).max()
    codebook[grounds] = rows * (GROUND_DISTANCE * longest / np.linalg.norm(rows, axis=1, keepdims=True))
    return replace_codebook(params, jnp.asarray(codebook))


class Trainer:
    """Scenes with their tokens, and the compiled training step. Its state has parameters and optimiser state."""

    def __init__(
        self, config: VQGANConfig, params: dict[str, Any], blocks: Blocks, pixels: np.ndarray, emoji: list[Emoji],
        args: argparse.Namespace,
    ) -> None:  # fmt: skip
        """Encode the emoji on white.

        Args:
            config: Sizes of the model, for scenes.
            params: Its parameters; the encoder's stay.
            blocks: Tokens of the emoji.
            pixels: The emoji, uint8 (N, 64, 64, 3).
            emoji: What is known of each.
            args: Flags of the command.
        """
        self.model, self.blocks, self.args = VQGAN(config), blocks, args
        self.fixed = {name: value for name, value in params.items() if name not in TRAINED}
        self.images = {LARGE: pixels, SMALL: shrink(pixels)}
        self.outside = {size: find_outside(images) for size, images in self.images.items()}
        self.sampler = SceneSampler(emoji)
        self.alone = place_alone(pixels)
        self.alone_tokens = encode_images(self.model, params, self.alone)
        self.optimizer = make_optimizer(args.learning_rate, args.steps, warmup=min(100, args.steps // 10))

    def init(self, params: dict[str, Any]) -> dict[str, Any]:
        """Make the state of step 0."""
        trained = {name: params[name] for name in TRAINED}
        return {"params": trained, "opt": self.optimizer.init(trained)}

    def make_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Make the tokens, int32 (B, L), and the pixels, uint8 (B, S, S, 3), of a step."""
        rng = np.random.default_rng([self.args.seed, step])
        tokens, pixels = [], []
        for index in rng.integers(len(self.alone), size=self.args.batch_size):
            if rng.random() < ALONE_SHARE:
                tokens.append(self.alone_tokens[index])
                pixels.append(self.alone[index])
            else:
                scene = self.sampler.sample(int(index), rng)
                tokens.append(compose_tokens(self.blocks, scene))
                pixels.append(compose_pixels(self.images, self.outside, scene))
        return np.stack(tokens), np.stack(pixels)

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
    add("--init", default="build/models/vqgan", help="folder of the VQGAN to start from")
    add("--run", type=Path, default=Path("build/scenes/vqgan-run"), help="folder of the run; resumes")
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
    loaded = load_checkpoint(args.init, "codec")
    config = dataclasses.replace(loaded.config, resolution=SIZE)
    params = to_float32(loaded.params)
    blocks = encode_blocks(config, params, pixels[train])
    params = place_grounds(params, blocks.grounds)
    trainer = Trainer(config, params, blocks, pixels[train], [one for one in emoji if not one["held_out"]], args)
    run = open_run(args.run, trainer.init(params), save_every=200, args=args)

    unseen = pixels[~train]
    unseen_blocks = encode_blocks(config, params, unseen)._replace(grounds=blocks.grounds)
    rng = np.random.default_rng(0)
    sampler = SceneSampler([one for one in emoji if one["held_out"]])
    scenes = [sampler.sample(i, rng) for i in range(PROBES)]
    scenes += [Scene((Part(i, LARGE, 1, 1),), i % len(GROUNDS)) for i in range(PROBES)]
    images = {LARGE: unseen, SMALL: shrink(unseen)}
    outside = {size: find_outside(some) for size, some in images.items()}
    targets = np.stack([compose_pixels(images, outside, scene) for scene in scenes])
    tokens = np.stack([compose_tokens(unseen_blocks, scene) for scene in scenes])
    alone = place_alone(unseen)

    def evaluate(state: dict[str, Any]) -> dict[str, float]:
        params = jax.device_get(trainer.fixed | state["params"])
        drawn = decode_tokens(trainer.model, params, tokens)
        pairs = np.stack([targets, drawn], 1).reshape(-1, SIZE, SIZE, 3)
        make_grid(pairs, 16).save(args.run / f"scenes-{run.step:05d}.png")
        again = reconstruct(trainer.model, params, alone)[0]
        return {
            "psnr_scenes": compute_psnr(drawn, targets).mean(),
            "psnr_held_out": compute_psnr(again[:, CELL:-CELL, CELL:-CELL], unseen).mean(),
        }

    run.train(args.steps, trainer.step, log_every=50, evaluate=evaluate, evaluate_every=200)
    if args.out:
        params = jax.device_get(trainer.fixed | run.state["params"])
        native.save(args.out, "vqgan", dataclasses.asdict(config), params, np.float16)


if __name__ == "__main__":
    main()
