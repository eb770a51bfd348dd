"""Train the VQGAN: an image to tokens and back.

    python -m recipes.emoji.vqgan --data build/emoji-64.npz --run build/vqgan

The first `--continuous-steps` steps do not quantise. Then k-means over the encoder's outputs starts the codebook (a
random one collapses). From there the codebook is a moving average of the outputs, and dead tokens restart: van den Oord
et al., "Neural Discrete Representation Learning", 2017, https://arxiv.org/abs/1711.00937, appendix A.1. The loss is L1,
squared error and L1 of the image gradients. There is no discriminator.

B, N: images   S: pixels a side   L: tokens of an image   D: width of a token   K: codebook size
"""

import argparse
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dm_generations.models.loading import load_checkpoint
from dm_generations.models.vqgan.network import VQGAN, VQGANConfig
from dm_generations.training.codec import straight_through
from dm_generations.weights import native
from recipes.emoji.common import make_grid, make_optimizer, open_run, replicate, shard_batch, to_float32
from recipes.emoji.data import load_dataset

CONFIG = VQGANConfig(
    ch=16,
    ch_mult=(1, 2, 4, 8),
    num_res_blocks=1,
    attn_resolutions=(),
    resolution=64,
    z_channels=64,
    n_embed=4096,
    embed_dim=32,
    num_groups=8,
)
CODEBOOK = ("quantize", "embedding", "embedding")
EMA_DECAY = 0.99
COMMITMENT = 0.25
KMEANS_IMAGES = 2048
FIRST_COUNT = 0.05  # count of a token that k-means found, as a share of the mean: one without use restarts soon
RESTART_BELOW = 0.02  # share of the mean count below which a token restarts from a random output of the batch
RESTART_COUNT = 0.2  # count of a restarted token, as a share of the mean
MAX_SHIFT = 3  # pixels
CPU_DEVICES = 2  # each takes half of a batch: layers this small leave one of two cores idle
CPU_THREADS = 2  # for inference, for the same reason


def augment(pixels: jax.Array, key: jax.Array, max_shift: int, mirror: bool) -> jax.Array:
    """Shift images at random over white and mirror half of them.

    Args:
        pixels: uint8 (B, S, S, 3).
        key: JAX key.
        max_shift: Highest shift in pixels, in each direction.
        mirror: Whether to mirror at random.

    Returns:
        float32 (B, S, S, 3) in [0, 1].
    """
    flip_key, shift_key = jax.random.split(key)
    if mirror:
        is_flipped = jax.random.bernoulli(flip_key, 0.5, (len(pixels), 1, 1, 1))
        pixels = jnp.where(is_flipped, pixels[:, :, ::-1], pixels)
    margin = ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0))
    padded = jnp.pad(pixels, margin, constant_values=255)
    shifts = jax.random.randint(shift_key, (len(pixels), 2), 0, 2 * max_shift + 1)

    def crop(image: jax.Array, shift: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (shift[0], shift[1], 0), pixels.shape[1:])

    return jax.vmap(crop)(padded, shifts).astype(jnp.float32) / 255


def reconstruction_loss(output: jax.Array, target: jax.Array) -> jax.Array:
    """Compute the mean loss of reconstructed images, float (B, S, S, 3) in [0, 1]."""
    error = output - target
    gradient_error = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    return 0.5 * jnp.abs(error).mean() + 4 * jnp.square(error).mean() + 0.25 * gradient_error


def apply_model(model: VQGAN, params: Any, *args: Any, method: Any) -> Any:
    """Call a method of the model."""
    return model.apply({"params": params}, *args, method=method)


def get_codebook(params: Any) -> jax.Array:
    """Get the codebook (K, D) of a VQGAN's parameters."""
    return params[CODEBOOK[0]][CODEBOOK[1]][CODEBOOK[2]]


def replace_codebook(params: dict[str, Any], codebook: jax.Array) -> dict[str, Any]:
    """Copy a VQGAN's parameters with another codebook (K, D)."""
    return params | {CODEBOOK[0]: {CODEBOOK[1]: {CODEBOOK[2]: codebook}}}


def find_centres(points: np.ndarray, count: int, rounds: int, seed: int) -> np.ndarray:
    """Find k-means centres, float32 (count, D), of points (N, D) by Lloyd's algorithm from random points."""
    rng = np.random.default_rng(seed)
    centres = points[rng.choice(len(points), count, replace=False)]
    for _ in range(rounds):
        nearest = np.concatenate(
            [np.argmin((centres**2).sum(1) - 2 * part @ centres.T, axis=1) for part in np.array_split(points, 32)]
        )
        counts = np.bincount(nearest, minlength=count)
        order = np.argsort(nearest, kind="stable")
        sums = np.add.reduceat(points[order], np.minimum(np.cumsum(counts) - counts, len(points) - 1), axis=0)
        # An empty cell gets a random point: reduceat gives it a wrong sum.
        means = sums / np.maximum(counts, 1)[:, None]
        fresh = points[rng.choice(len(points), count)]
        centres = np.where(counts[:, None] > 0, means, fresh).astype(np.float32)
    return centres


class Trainer:
    """The compiled training step. Its state has parameters, optimiser state, and the codebook's counts and sums."""

    def __init__(self, config: VQGANConfig, pixels: np.ndarray, weights: np.ndarray, args: argparse.Namespace) -> None:
        """Put the images on the devices.

        Args:
            config: Sizes of the model.
            pixels: uint8 (N, S, S, 3).
            weights: How often each image is seen, relative to the others (N,).
            args: Flags of the command.
        """
        self.config, self.args = config, args
        self.model = VQGAN(config)
        self.pixels = replicate(pixels)
        self.weights = weights / weights.sum()
        self.optimizer = make_optimizer(args.learning_rate, args.steps, warmup=min(200, args.steps // 10))

    def init(self, params: dict[str, Any] | None) -> dict[str, Any]:
        """Make the state of step 0, from random parameters if `params` is None."""
        size = self.config.resolution
        if params is None:
            init = jax.jit(self.model.init)
            params = init(jax.random.key(self.args.seed), jnp.zeros((1, size, size, 3)))["params"]
        codebook = get_codebook(params)
        return {
            "params": params,
            "opt": self.optimizer.init(params),
            "counts": jnp.ones(len(codebook)),
            "sums": jnp.array(codebook, copy=True),  # buffers are donated, so no two leaves may share one
        }

    def _loss(self, params: Any, target: jax.Array, is_quantized: jax.Array) -> tuple[jax.Array, tuple]:
        z = apply_model(self.model, params, target, method="encode_continuous")
        tokens = apply_model(self.model, params, z, method=lambda model, z: model.quantize(z))
        chosen = jnp.where(is_quantized, jax.lax.stop_gradient(get_codebook(params))[tokens], z)
        output = apply_model(self.model, params, straight_through(z, chosen), method="decode")
        commitment = jnp.square(z - chosen).mean()
        return reconstruction_loss(output, target) + COMMITMENT * commitment, (z, tokens, output)

    def _move_codebook(
        self, state: dict[str, Any], z: jax.Array, tokens: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Follow the outputs z (..., D) of tokens (...): new counts (K,), new sums (K, D), restarted tokens (K,)."""
        size = len(state["counts"])
        z, tokens = z.reshape(-1, z.shape[-1]), tokens.reshape(-1)
        counts = EMA_DECAY * state["counts"] + (1 - EMA_DECAY) * jnp.zeros(size).at[tokens].add(1.0)
        sums = EMA_DECAY * state["sums"] + (1 - EMA_DECAY) * jnp.zeros_like(state["sums"]).at[tokens].add(z)
        mean_count = len(z) / size
        is_dead = counts < RESTART_BELOW * mean_count
        fresh = z[jax.random.randint(key, (size,), 0, len(z))]
        counts = jnp.where(is_dead, RESTART_COUNT * mean_count, counts)
        return counts, jnp.where(is_dead[:, None], fresh * counts[:, None], sums), is_dead

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def update(
        self, state: dict[str, Any], indices: jax.Array, key: jax.Array, is_quantized: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Take a step on the images `indices` (B,). Returns the new state and the metrics."""
        augment_key, restart_key = jax.random.split(key)
        target = augment(self.pixels[indices], augment_key, MAX_SHIFT, mirror=True)
        gradients_of = jax.value_and_grad(self._loss, has_aux=True)
        (loss, (z, tokens, output)), grads = gradients_of(state["params"], target, is_quantized)
        updates, opt = self.optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        counts, sums, is_dead = self._move_codebook(state, z, tokens, restart_key)
        codebook = jnp.where(is_quantized, sums / counts[:, None], get_codebook(state["params"]))
        mse = jnp.square(jnp.clip(output, 0, 1) - target).mean(axis=(1, 2, 3))
        metrics = {
            "loss": loss,
            "psnr_train": (-10 * jnp.log10(mse + 1e-8)).mean(),
            "restarted": is_quantized * is_dead.sum(),
        }
        return {"params": replace_codebook(params, codebook), "opt": opt, "counts": counts, "sums": sums}, metrics

    def step(self, state: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Take the step of this number. Returns the new state and the metrics."""
        args = self.args
        if step == args.continuous_steps:
            state = self.start_codebook(state)
        rng = np.random.default_rng([args.seed, step])
        indices = rng.choice(len(self.pixels), args.batch_size, p=self.weights)
        key = jax.random.fold_in(jax.random.key(args.seed), step)
        return self.update(state, shard_batch(indices), key, step >= args.continuous_steps)

    def start_codebook(self, state: dict[str, Any]) -> dict[str, Any]:
        """Replace the codebook by k-means centres of the encoder's outputs."""
        rng = np.random.default_rng([self.args.seed, 1 << 20])
        count = min(KMEANS_IMAGES, len(self.pixels))
        chosen = np.sort(rng.choice(len(self.pixels), count, replace=False, p=self.weights))

        @jax.jit
        def encode(params: Any, x: jax.Array) -> jax.Array:
            return apply_model(self.model, params, x.astype(jnp.float32) / 255, method="encode_continuous")

        outputs = [np.asarray(encode(state["params"], self.pixels[part])) for part in np.array_split(chosen, 32)]
        points = np.concatenate(outputs).reshape(-1, self.config.embed_dim)
        codebook = jnp.asarray(find_centres(points, self.config.n_embed, rounds=8, seed=self.args.seed))
        first_count = FIRST_COUNT * self.args.batch_size * self.config.grid**2 / self.config.n_embed
        # The dtype is given, since weakly typed counts would compile the step again.
        counts = jnp.full(self.config.n_embed, first_count, jnp.float32)
        params = replace_codebook(state["params"], codebook)
        return replicate(state | {"params": params, "counts": counts, "sums": codebook * counts[:, None]})


def encode_images(model: VQGAN, params: Any, pixels: np.ndarray) -> np.ndarray:
    """Encode images, uint8 (N, S, S, 3), to the nearest tokens, int32 (N, L)."""

    @jax.jit
    def run(params: Any, x: jax.Array) -> jax.Array:
        return apply_model(model, params, x.astype(jnp.float32) / 255, method="encode")[1]

    return run_in_batches(partial(run, params), pixels)


def decode_tokens(model: VQGAN, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Decode tokens, int32 (N, L), to images, uint8 (N, S, S, 3)."""

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> jax.Array:
        output = apply_model(model, params, tokens, method="decode_code")
        return (jnp.clip(output, 0, 1) * 255).astype(jnp.uint8)

    return run_in_batches(partial(run, params), tokens)


def reconstruct(model: VQGAN, params: Any, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encode and decode images.

    Args:
        model: The VQGAN.
        params: Its parameters.
        pixels: uint8 (N, S, S, 3).

    Returns:
        The reconstructions, uint8 (N, S, S, 3), and the tokens, int32 (N, L).
    """
    tokens = encode_images(model, params, pixels)
    return decode_tokens(model, params, tokens), tokens


def run_in_batches(run: Callable[[np.ndarray], jax.Array], rows: np.ndarray, batch_size: int = 32) -> np.ndarray:
    """Concatenate `run` of all batches of rows. The last batch is padded, so that one shape is compiled."""

    def run_batch(start: int) -> np.ndarray:
        part = rows[start : start + batch_size]
        padded = np.concatenate([part, np.zeros((batch_size - len(part), *part.shape[1:]), part.dtype)])
        return jax.device_get(run(padded))[: len(part)]

    with ThreadPoolExecutor(CPU_THREADS) as pool:
        return np.concatenate(list(pool.map(run_batch, range(0, len(rows), batch_size))))


def compute_psnr(images: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Compute the peak signal-to-noise ratio in dB (N,) of images and targets, uint8 (N, S, S, 3)."""
    mse = np.square(images.astype(np.float64) - targets).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(mse, 1e-3))


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("build/emoji-64.npz"), help="file of recipes.emoji.data")
    parser.add_argument("--run", type=Path, default=Path("build/vqgan"), help="folder of the run; resumes")
    parser.add_argument("--out", type=Path, help="write the trained model to this folder")
    parser.add_argument("--init", help="fine-tune this model (a folder) instead of starting at random")
    parser.add_argument("--steps", type=int, default=2200, help="training steps (default: 2200)")
    parser.add_argument(
        "--continuous-steps", type=int, default=250, help="first steps without quantisation (default: 250)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images of a step (default: 16)")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="peak rate of Muon (default: 0.005)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    return parser.parse_args()


def main() -> None:
    """Train from the command line."""
    args = parse_args()
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
    pixels, emoji = load_dataset(args.data)
    train = np.array([not one["held_out"] for one in emoji])
    held_out = np.array([one["held_out"] and not one["tone"] for one in emoji])
    weights = np.array([0.2 if one["tone"] else 1.0 for one in emoji])
    config, params = CONFIG, None
    if args.init:
        loaded = load_checkpoint(args.init, "codec")
        config, params = loaded.config, to_float32(loaded.params)
        args.continuous_steps = -1  # with another codebook, the tokens that the text model knows would change meaning
    if config.resolution != pixels.shape[1]:
        raise SystemExit(f"{args.data} is {pixels.shape[1]} px a side, the model {config.resolution}")
    trainer = Trainer(config, pixels[train], weights[train], args)
    run = open_run(args.run, trainer.init(params), save_every=500, args=args)

    def evaluate(state: dict[str, Any]) -> dict[str, float]:
        images, tokens = reconstruct(trainer.model, jax.device_get(state["params"]), pixels[held_out])
        pairs = np.stack([pixels[held_out][:32], images[:32]], 1).reshape(-1, *pixels.shape[1:])
        make_grid(pairs, 16).save(args.run / f"held_out-{run.step:05d}.png")
        psnr = compute_psnr(images, pixels[held_out])
        return {"psnr_held_out": psnr.mean(), "tokens_used_held_out": len(np.unique(tokens))}

    run.train(args.steps, trainer.step, log_every=50, evaluate=evaluate, evaluate_every=500)
    if args.out:
        params = jax.device_get(run.state["params"])
        native.save(args.out, "vqgan", dataclasses.asdict(config), params, np.float16)


if __name__ == "__main__":
    main()
