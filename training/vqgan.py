"""Train the VQGAN: pictures to codes and back.

    python -m training.vqgan --data build/emoji-64.npz --run build/vqgan

The codebook starts after `--continuous-steps` steps without quantisation, by k-means over the encoder's outputs (a
codebook that starts at random collapses), and then follows them as a moving average with restart of dead codes:
van den Oord et al., "Neural Discrete Representation Learning", 2017, https://arxiv.org/abs/1711.00937, appendix A.1.
Loss: L1, squared error and L1 of the picture's gradients; no adversary.
"""

import argparse
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dm_generations.models.loading import load_checkpoint
from dm_generations.models.vqgan.network import VQGAN, VQGANConfig
from dm_generations.weights import native
from training import data
from training.common import Run, in_float32, muon, on_every_device, picture_grid, shared_out

CPU_64 = VQGANConfig(
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
FIRST_USE = 0.05  # of the mean use, counted for a code that k-means found: one that the encoder leaves restarts soon
RESTART_BELOW = 0.02  # of the mean use; a code used less starts again from a random vector of the batch
MAX_SHIFT = 3  # pixels
CPU_DEVICES = 2  # each with half of a batch: layers this small leave one of two cores idle
THREADS = 2  # for the same reason, where nothing is learnt


def augment(pixels, key, max_shift: int, mirrored: bool):
    """uint8 (B, S, S, 3) to float [0, 1]: moved by up to `max_shift` pixels over white, and half of them mirrored."""
    flip_key, shift_key = jax.random.split(key)
    if mirrored:
        flipped = jax.random.bernoulli(flip_key, 0.5, (len(pixels), 1, 1, 1))
        pixels = jnp.where(flipped, pixels[:, :, ::-1], pixels)
    margin = ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0))
    padded = jnp.pad(pixels, margin, constant_values=255)
    shifts = jax.random.randint(shift_key, (len(pixels), 2), 0, 2 * max_shift + 1)

    def crop(picture, shift):
        return jax.lax.dynamic_slice(picture, (shift[0], shift[1], 0), pixels.shape[1:])

    return jax.vmap(crop)(padded, shifts).astype(jnp.float32) / 255


def reconstruction_loss(output, target):
    error = output - target
    gradient_error = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    return 0.5 * jnp.abs(error).mean() + 4 * jnp.square(error).mean() + 0.25 * gradient_error


def get_codebook(params):
    return params[CODEBOOK[0]][CODEBOOK[1]][CODEBOOK[2]]


def with_codebook(params, codebook):
    return params | {CODEBOOK[0]: {CODEBOOK[1]: {CODEBOOK[2]: codebook}}}


def kmeans(points: np.ndarray, count: int, rounds: int, seed: int) -> np.ndarray:
    """`count` centres (count, D) of points (N, D): Lloyd's algorithm from a random start."""
    rng = np.random.default_rng(seed)
    centres = points[rng.choice(len(points), count, replace=False)]
    for _ in range(rounds):
        nearest = np.concatenate(
            [np.argmin((centres**2).sum(1) - 2 * part @ centres.T, axis=1) for part in np.array_split(points, 32)]
        )
        counts = np.bincount(nearest, minlength=count)
        order = np.argsort(nearest, kind="stable")
        sums = np.add.reduceat(points[order], np.minimum(np.cumsum(counts) - counts, len(points) - 1), axis=0)
        # An empty cell gets a random point; reduceat gives nonsense for it.
        means = sums / np.maximum(counts, 1)[:, None]
        fresh = points[rng.choice(len(points), count)]
        centres = np.where(counts[:, None] > 0, means, fresh).astype(np.float32)
    return centres


class Trainer:
    """Owns the compiled steps. State: params, optimiser state, and the codebook's running counts and sums."""

    def __init__(self, config: VQGANConfig, pixels: np.ndarray, weights: np.ndarray, args: argparse.Namespace):
        self.config, self.args = config, args
        self.model = VQGAN(config)
        self.pixels = on_every_device(pixels)
        self.weights = weights / weights.sum()
        self.optimiser = muon(args.learning_rate, args.steps, warmup=min(200, args.steps // 10))

    def init(self, params: dict | None) -> dict:
        size = self.config.resolution
        if params is None:
            init = jax.jit(self.model.init)
            params = init(jax.random.key(self.args.seed), jnp.zeros((1, size, size, 3)))["params"]
        codebook = get_codebook(params)
        return {
            "params": params,
            "opt": self.optimiser.init(params),
            "counts": jnp.ones(len(codebook)),
            "sums": jnp.array(codebook, copy=True),  # buffers are donated, so no two leaves may share one
        }

    def apply(self, params, *args, method):
        return self.model.apply({"params": params}, *args, method=method)

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _step(self, state, indices, key, quantised):
        augment_key, restart_key = jax.random.split(key)
        target = augment(self.pixels[indices], augment_key, MAX_SHIFT, mirrored=True)

        def loss_of(params):
            z = self.apply(params, target, method="encode_continuous")
            codes = self.apply(params, z, method=lambda model, z: model.quantize(z))
            chosen = jnp.where(quantised, jax.lax.stop_gradient(get_codebook(params))[codes], z)
            output = self.apply(params, z + jax.lax.stop_gradient(chosen - z), method="decode")
            commitment = jnp.square(z - chosen).mean()
            return reconstruction_loss(output, target) + COMMITMENT * commitment, (z, codes, output)

        (loss, (z, codes, output)), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
        updates, opt = self.optimiser.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        size = len(state["counts"])
        flat, codes = z.reshape(-1, z.shape[-1]), codes.reshape(-1)
        counts = EMA_DECAY * state["counts"] + (1 - EMA_DECAY) * jnp.zeros(size).at[codes].add(1.0)
        sums = EMA_DECAY * state["sums"] + (1 - EMA_DECAY) * jnp.zeros_like(state["sums"]).at[codes].add(flat)
        mean_use = len(flat) / size
        dead = counts < RESTART_BELOW * mean_use
        fresh = flat[jax.random.randint(restart_key, (size,), 0, len(flat))]
        counts = jnp.where(dead, 0.2 * mean_use, counts)
        sums = jnp.where(dead[:, None], fresh * counts[:, None], sums)
        codebook = jnp.where(quantised, sums / counts[:, None], get_codebook(state["params"]))
        params = with_codebook(params, codebook)
        mse = jnp.square(jnp.clip(output, 0, 1) - target).mean(axis=(1, 2, 3))
        metrics = {
            "loss": loss,
            "psnr_train": (-10 * jnp.log10(mse + 1e-8)).mean(),
            "restarted": quantised * dead.sum(),
        }
        return {"params": params, "opt": opt, "counts": counts, "sums": sums}, metrics

    def step(self, state, step: int):
        args = self.args
        if step == args.continuous_steps:
            state = self.start_codebook(state)
        rng = np.random.default_rng([args.seed, step])
        indices = rng.choice(len(self.pixels), args.batch_size, p=self.weights)
        key = jax.random.fold_in(jax.random.key(args.seed), step)
        return self._step(state, shared_out(indices), key, step >= args.continuous_steps)

    def start_codebook(self, state):
        rng = np.random.default_rng([self.args.seed, 1 << 20])
        chosen = rng.choice(len(self.pixels), min(2048, len(self.pixels)), replace=False, p=self.weights)
        encode = jax.jit(lambda p, x: self.apply(p, x.astype(jnp.float32) / 255, method="encode_continuous"))
        vectors = [
            np.asarray(encode(state["params"], self.pixels[part])) for part in np.array_split(np.sort(chosen), 32)
        ]
        points = np.concatenate(vectors).reshape(-1, self.config.embed_dim)
        codebook = jnp.asarray(kmeans(points, self.config.n_embed, rounds=8, seed=self.args.seed))
        use = FIRST_USE * self.args.batch_size * self.config.grid**2 / self.config.n_embed
        counts = jnp.full(self.config.n_embed, use, jnp.float32)  # else of weak type, and _step compiled anew
        params = with_codebook(state["params"], codebook)
        return on_every_device(state | {"params": params, "counts": counts, "sums": codebook * counts[:, None]})


def encode(model: VQGAN, params: dict, pixels: np.ndarray) -> np.ndarray:
    """uint8 (N, S, S, 3) to tokens, int32 (N, L)."""

    @jax.jit
    def run(params, x):
        return model.apply({"params": params}, x.astype(jnp.float32) / 255, method="encode")[1]

    return in_batches(partial(run, params), pixels)


def encode_frugally(model: VQGAN, params: dict, pixels: np.ndarray, thrift: float, rounds: int = 4) -> np.ndarray:
    """As `encode`, but of nearly equal codes the more common one is taken: tokens, int32 (N, L), of less entropy.

    Minimised is squared distance + thrift * (mean of the nearest's) * -log(share of the code, in all pixels), by turns:
    Chou, Lookabaugh and Gray, "Entropy-Constrained Vector Quantization", 1989, https://doi.org/10.1109/29.17498.
    """
    codebook = np.asarray(get_codebook(params))

    @jax.jit
    def outputs(params, x):
        return model.apply({"params": params}, x.astype(jnp.float32) / 255, method="encode_continuous")

    @jax.jit
    def choose(costs, z):
        return jnp.argmin(costs - 2 * z @ codebook.T, axis=-1).astype(jnp.int32)

    z = in_batches(partial(outputs, params), pixels).reshape(len(pixels), -1, codebook.shape[1])
    norms = np.square(codebook).sum(1)
    tokens = in_batches(partial(choose, norms), z)
    scale = thrift * np.square(z - codebook[tokens]).sum(-1).mean()
    for _ in range(rounds):
        counts = np.bincount(tokens.ravel(), minlength=len(codebook)) + 0.1  # a code without use may come back
        tokens = in_batches(partial(choose, norms - scale * np.log(counts / counts.sum(), dtype=np.float32)), z)
    return tokens


def reconstruct(model: VQGAN, params: dict, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, S, S, 3) through the codes: pictures as decode writes them, and tokens int32 (N, L)."""

    @jax.jit
    def run(params, tokens):
        output = model.apply({"params": params}, tokens, method="decode_code")
        return (jnp.clip(output, 0, 1) * 255).astype(jnp.uint8)

    tokens = encode(model, params, pixels)
    return in_batches(partial(run, params), tokens), tokens


def in_batches(run: Callable, rows: np.ndarray, batch: int = 32) -> np.ndarray:
    """`run` of each batch of rows, the last one padded: to compile once."""

    def of_batch(start: int) -> np.ndarray:
        part = rows[start : start + batch]
        padded = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), part.dtype)])
        return jax.device_get(run(padded))[: len(part)]

    with ThreadPoolExecutor(THREADS) as threads:
        return np.concatenate(list(threads.map(of_batch, range(0, len(rows), batch))))


def psnr(pictures: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each uint8 picture, (N,): 10 log10(255^2 / mean squared error)."""
    mse = np.square(pictures.astype(np.float64) - targets).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(mse, 1e-3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("build/emoji-64.npz"))
    parser.add_argument("--run", type=Path, default=Path("build/vqgan"), help="folder of the run; resumes")
    parser.add_argument("--out", type=Path, help="write the trained model to this folder")
    parser.add_argument("--init", help="fine-tune this model (a folder) instead of starting at random")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--continuous-steps", type=int, default=250, help="first steps without quantisation")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES)

    pixels, rows = data.load(args.data)
    train = np.array([not row["held_out"] for row in rows])
    held_out = np.array([row["held_out"] and not row["tone"] for row in rows])
    weights = np.array([0.2 if row["tone"] else 1.0 for row in rows])
    config, params = CPU_64, None
    if args.init:
        loaded = load_checkpoint(args.init, "codec")
        config, params = loaded.config, in_float32(loaded.params)
        args.continuous_steps = -1  # its codebook goes on: started anew, the text model's codes would mean other things
    if config.resolution != pixels.shape[1]:
        raise SystemExit(f"{args.data} is {pixels.shape[1]} px a side, the model {config.resolution}")
    trainer = Trainer(config, pixels[train], weights[train], args)
    run = Run(args.run, trainer.init(params), save_every=500, args=args)

    def evaluate(state) -> dict:
        pictures, tokens = reconstruct(trainer.model, jax.device_get(state["params"]), pixels[held_out])
        sheet = np.stack([pixels[held_out][:32], pictures[:32]], 1).reshape(-1, *pixels.shape[1:])
        picture_grid(sheet, 16).save(args.run / f"held_out-{run.step:05d}.png")
        values = psnr(pictures, pixels[held_out])
        return {"psnr_held_out": values.mean(), "codes_used_held_out": len(np.unique(tokens))}

    run.loop(args.steps, trainer.step, log_every=50, evaluate=evaluate, evaluate_every=500)
    if args.out:
        params = jax.device_get(run.state["params"])
        native.save(args.out, "vqgan", dataclasses.asdict(config), params, np.float16)


if __name__ == "__main__":
    main()
