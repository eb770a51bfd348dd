"""Time sampling: a sweep against the structure of dalle-mini's notebook, and full sizes against the machine's limits.

    python benchmarks/generate.py sweep                              # the shipped model, 8 settings x 32 images
    python benchmarks/generate.py speed --shape mini --batch 1 4 16  # random weights at DALL-E mini's size
    python benchmarks/generate.py products                           # its matrix products alone, in both forms

Some minutes each on 2 cores, `products` one. `speed` times a few steps; the others take as long, as attention reads the
whole cache at every step. If torch is installed, min-dalle's structure is timed too. `sweep` compares both structures,
each in a process of its own.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from timing import matrix_peak, seconds_of

from dm_generations.archive import DTYPES
from dm_generations.inference.generator import Generator
from dm_generations.models.base import Tokenizer
from dm_generations.models.dalle_mini.config import DalleBartConfig
from dm_generations.models.dalle_mini.network import DalleBart
from dm_generations.models.dense import Dense, split_kernels
from dm_generations.models.loading import Checkpoint, load_checkpoint
from dm_generations.models.registry import parameter_shapes
from dm_generations.runtime.device import free_bytes, put_params
from dm_generations.sampling.params import SamplingParams
from dm_generations.sampling.prng import row_key
from dm_generations.weights.native import unflatten

SWEEP = tuple(itertools.product((256,), (0.95, 1.0), (0.7, 1.0), (3.0, 10.0)))  # as SamplingParams
PROMPTS = ("a rocket", "a 3d strawberry", "a green dragon", "a house with a garden")
# https://huggingface.co/dalle-mini/dalle-mini and dalle-mega, config.json
_MINI = DalleBartConfig(encoder_ffn_dim=2730, decoder_ffn_dim=2730, use_scan=False)
_MEGA = DalleBartConfig(
    encoder_vocab_size=50272,
    image_vocab_size=16415,
    d_model=2048,
    encoder_layers=24,
    encoder_ffn_dim=4096,
    encoder_attention_heads=32,
    decoder_layers=24,
    decoder_ffn_dim=4096,
    decoder_attention_heads=32,
    use_scan=False,
)
_TINY = DalleBartConfig(
    encoder_vocab_size=2048,
    image_vocab_size=64,
    image_length=16,
    d_model=64,
    encoder_layers=1,
    encoder_ffn_dim=64,
    encoder_attention_heads=2,
    decoder_layers=1,
    decoder_ffn_dim=64,
    decoder_attention_heads=2,
    use_scan=False,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sweep", "speed", "products"])
    parser.add_argument("--shape", choices=["embedded", "mini", "mega"], default="mini", help="(default: mini)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="(default: 1 4 16)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="to time, of each batch (default: 8)")
    parser.add_argument("--images", type=int, default=32, metavar="N", help="of each setting of `sweep` (default: 32)")
    parser.add_argument("--structure", help=argparse.SUPPRESS)  # what a process of `sweep` runs
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # of a GPU's memory torch needs a part
    if not args.structure:
        print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, load {os.getloadavg()[0]:.1f}", flush=True)
    {"sweep": sweep, "speed": speed, "products": products}[args.what](args)


def sweep(args: argparse.Namespace) -> None:
    """Print images a second of both structures, from the start of the process, with an empty compilation cache."""
    if args.structure:
        prompts = list(itertools.islice(itertools.cycle(PROMPTS), args.images))
        keys = np.array([row_key(0, index) for index in range(args.images)], np.uint32)
        {"ours": our_sweep, "dalle-mini": dalle_mini_sweep}[args.structure](prompts, keys)
        return
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    count, spent = len(SWEEP) * args.images, {}
    for structure in ("ours", "dalle-mini"):
        started, cpu_started = time.perf_counter(), cpu_seconds_of_children()
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--structure", structure], env=environment, check=True)
        seconds, cpu = time.perf_counter() - started, cpu_seconds_of_children() - cpu_started
        spent[structure] = seconds, cpu
        print(
            f"{structure:10} {count} images in {seconds:7.1f} s, {count / seconds:8.2f} images/s "
            f"({cpu:.1f} s of CPU time)",
            flush=True,
        )
    wall, cpu = (theirs / ours for ours, theirs in zip(spent["ours"], spent["dalle-mini"], strict=True))
    print(f"ours: {wall:.1f} times as many images/s, {cpu:.1f} times as many in the same CPU time")


def cpu_seconds_of_children() -> float:
    """Return the CPU seconds of ended processes, which other programs on the cores do not change much."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def our_sweep(prompts: list[str], keys: np.ndarray) -> None:
    """Sample all settings as rows of one program: a batch can have images of several settings, here of two."""
    checkpoint = load_checkpoint(None, "generator")
    generator = Generator(checkpoint, checkpoint.load_tokenizer(), batch_size=2 * len(prompts))
    settings = [SamplingParams(*values) for values in SWEEP for _ in prompts]
    generator.generate(prompts * len(SWEEP), settings, np.tile(keys, (len(SWEEP), 1)))


def dalle_mini_sweep(prompts: list[str], keys: np.ndarray) -> None:
    """Call and compile once for each setting, as `p_generate` of dalle-mini's notebook does: settings are constants.

    Of the same network: two calls of the decoder at every code, one for each half, and the filters of transformers
    (FlaxTopKLogitsWarper, FlaxTopPLogitsWarper). More than the notebook does for speed, a batch has many images.
    """
    checkpoint = load_checkpoint(None, "generator")
    config = checkpoint.config
    model, params = DalleBart(config), put_params(checkpoint.params)
    texts = checkpoint.load_tokenizer().encode([*prompts, *[None] * len(prompts)], config.max_text_length)
    cond, uncond = (tuple(np.split(array, 2)[half] for array in texts) for half in range(2))

    @functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
    def generate(params, texts, key, top_k: int, top_p: float, temperature: float, cond_scale: float):
        def begin(ids, mask):
            text = model.apply({"params": params}, ids, mask, method="encode_prompt")
            return model.apply({"params": params}, text, method="init_cache")

        def sample_one(state, step):
            caches, token, key = state
            (logits, cond), (other, uncond) = (
                model.apply({"params": params}, cache, token, step, method="decode_step") for cache in caches
            )
            logits = other + cond_scale * (logits - other)
            logits = _keep_top_k(logits / temperature, top_k)
            if top_p < 1:
                logits = _keep_top_p(logits, top_p)
            key, key_of_step = jax.random.split(key)
            token = jax.random.categorical(key_of_step, logits).astype(jnp.int32)
            return ((cond, uncond), token, key), token

        state = tuple(begin(*text) for text in texts), jnp.full(len(prompts), config.start_token, jnp.int32), key
        return jax.lax.scan(sample_one, state, jnp.arange(config.image_length))[1].T

    for number, setting in enumerate(SWEEP):
        jax.block_until_ready(generate(params, (cond, uncond), jax.random.PRNGKey(number), *setting))


def _keep_top_k(logits: jax.Array, top_k: int) -> jax.Array:
    """Filter as FlaxTopKLogitsWarper of transformers 4.25."""
    values, tokens = jax.lax.top_k(logits, top_k)
    rows = jnp.arange(len(logits))[:, None]
    return jnp.full_like(logits, -jnp.inf).at[rows, tokens].set(values)


def _keep_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """Filter as FlaxTopPLogitsWarper of transformers 4.25, with two sorts."""
    values, tokens = jax.lax.top_k(logits, logits.shape[-1])
    is_kept = jnp.roll(jax.nn.softmax(values, axis=-1).cumsum(axis=-1) < top_p, 1).at[:, 0].set(True)
    return jax.lax.sort_key_val(tokens, jnp.where(is_kept, values, -jnp.inf))[1]


def speed(args: argparse.Namespace) -> None:
    """Print tokens and images a second of each batch size, with guidance, and the least time of a step."""
    machine = Machine.measured(args.dtype)
    print(
        f"memory {machine.bandwidth / 1e9:,.1f} GB/s, matrix products {machine.flops / 1e9:,.0f} GFLOP/s, {args.dtype}"
    )
    checkpoint, tokenizer = model_of(args.shape)
    config = checkpoint.config
    weight_bytes = jnp.dtype(args.dtype).itemsize * sum(leaf.size for leaf in jax.tree.leaves(checkpoint.params))
    free = free_bytes(jax.local_devices()[0])
    if weight_bytes > 0.9 * free:
        needed, free = weight_bytes / 1e9, free / 1e9
        print(f"{args.shape}: skipped, its weights take {needed:.1f} GB in {args.dtype} and {free:.1f} GB are free")
        return
    torch = TorchDecoder.of(checkpoint, args.dtype) if 2 * weight_bytes < 0.9 * free else None
    for batch_size in args.batch:
        generator = Generator(checkpoint, tokenizer, batch_size, dtype=args.dtype)
        if generator.batch_size < batch_size:
            print(f"{args.shape}, batch {batch_size}: skipped, memory holds batches of {generator.batch_size}")
            continue
        begin, step = seconds_of_step(generator, args.steps)
        read, operations = cost_of_step(config, 2 * batch_size, jnp.dtype(args.dtype).itemsize)
        floor = max(read / machine.bandwidth, operations / machine.flops)
        limit = "memory" if floor == read / machine.bandwidth else "arithmetic"
        report(f"{args.shape}, batch {batch_size}", batch_size, config.image_length, begin, step)
        print(
            f"    floor {1e3 * floor:.2f} ms a step ({limit}: {read / 1e9:.2f} GB, {operations / 1e9:,.1f} GFLOP): "
            f"{floor / step:.0%} of the roofline",
            flush=True,
        )
        if generator.concurrency > 1:
            count, seconds = generator.concurrency * batch_size, generator.measure_seconds()
            print(f"    {generator.concurrency} concurrent batches: {count / seconds:.3f} images/s", flush=True)
        del generator
        if torch is not None:
            theirs = torch.seconds_of_step(batch_size, args.steps)
            report(f"    {torch.name}", batch_size, config.image_length, None, theirs)
            print(f"    torch takes {theirs / step:.2f} times as long", flush=True)


def products(args: argparse.Namespace) -> None:
    """Print the time of all matrix products of a step, with whole and with split kernels, in turn.

    Where other programs run too, the relation of the two says more than either.
    """
    checkpoint, _ = model_of(args.shape)
    config = checkpoint.config
    d, hidden, layers = config.d_model, config.decoder_ffn_dim, config.decoder_layers
    # (inputs, outputs) of each kind of matrix, and how many of it a step reads
    kinds = {(d, d): 6 * layers, (d, hidden): 2 * layers, (hidden, d): layers, (d, config.image_vocab_size + 1): 1}
    for batch_size in args.batch:
        total = np.zeros(2)
        for (inputs, outputs), count in kinds.items():
            # Some of a kind, more than a cache holds.
            some = min(count, max(1, (1 << 25) // (inputs * outputs)))
            seconds = seconds_of_products(inputs, outputs, some, 2 * batch_size, args.dtype)
            print(f"    {count} of {inputs} x {outputs}: {1e3 * seconds[0]:.2f}, {1e3 * seconds[1]:.2f} ms each")
            total += count * seconds
        whole, split = 1e3 * total
        print(
            f"{args.shape}, batch {batch_size}: {whole:.1f} ms a step with whole kernels, {split:.1f} ms with split "
            f"ones, {whole / split:.2f} times as fast",
            flush=True,
        )


def seconds_of_products(inputs: int, outputs: int, count: int, rows: int, dtype: str) -> np.ndarray:
    """Return the seconds of one product with a whole and with a split kernel: the best of some turns."""
    random = np.random.default_rng(0)
    layer = Dense(outputs, use_bias=False, dtype=dtype)
    kernels = [{"kernel": random.standard_normal((inputs, outputs), np.float32)} for _ in range(count)]
    x = jnp.asarray(random.standard_normal((rows, inputs), np.float32), dtype)

    @jax.jit
    def multiply(kernels, x):
        for kernel in kernels:  # one after the other
            x = x + 1e-9 * layer.apply({"params": kernel}, x)[:, :1]
        return x

    forms = [[put_params(form(kernel), dtype) for kernel in kernels] for form in (lambda whole: whole, split_kernels)]
    times = [[seconds_of(lambda form=form: multiply(form, x), 2) for form in forms] for _ in range(4)]
    return np.min(times, axis=0) / count


def report(what: str, batch_size: int, length: int, begin: float | None, step: float) -> None:
    """Print a line. `begin` is the time of encoding the prompts in seconds, None if not timed."""
    texts = "" if begin is None else f"{1e3 * begin:.0f} ms for the texts, "
    total = (begin or 0.0) + length * step
    print(
        f"{what}: {texts}{1e3 * step:.2f} ms a step, {batch_size / step:,.1f} tokens/s, "
        f"{batch_size / total:.3f} images/s",
        flush=True,
    )


def seconds_of_step(generator: Generator, steps: int, cond_scale: float = 3.0) -> tuple[float, float]:
    """Return the seconds of encoding prompts, and of one step: the best of three batches."""
    steps = min(steps, generator.token_count)
    _, *measured = (generator.measure_steps(steps, cond_scale) for _ in range(4))  # the first of them compiles
    encoding, step = (min(seconds) for seconds in zip(*measured, strict=True))
    return encoding, step


def cost_of_step(config: DalleBartConfig, sequences: int, itemsize: int) -> tuple[int, int]:
    """Return the bytes that a step must read (weights and caches, once) and its operations."""
    d, layers = config.d_model, config.decoder_layers
    # Self-attention has 4 matrices, cross-attention 2 at a step: keys and values of the text are computed once.
    ffn_matrices = 3 if config.use_glu else 2
    weights = layers * (6 * d * d + ffn_matrices * d * config.decoder_ffn_dim) + d * (config.image_vocab_size + 1)
    cached = 2 * layers * sequences * d * (config.image_length + config.max_text_length)  # keys and values
    return (weights + cached) * itemsize, 2 * sequences * weights + 2 * cached


@dataclasses.dataclass(frozen=True)
class Machine:
    """The limits of a device."""

    bandwidth: float  # bytes a second, read
    flops: float  # operations a second

    @classmethod
    def measured(cls, dtype: str, array_bytes: int = 1 << 29, matrix_size: int = 4096) -> "Machine":
        array = jnp.ones(array_bytes // 4, jnp.float32)
        total, copied = jax.jit(jnp.sum), jax.jit(lambda x: x + 1)
        bandwidth = max(
            array_bytes / seconds_of(lambda: total(array)), 2 * array_bytes / seconds_of(lambda: copied(array))
        )
        return cls(bandwidth, matrix_peak(dtype, matrix_size))


def model_of(shape: str) -> tuple[Checkpoint, Tokenizer]:
    """Return the shipped model, or random weights of another shape with the same tokenizer."""
    embedded = load_checkpoint(None, "generator")
    tokenizer = embedded.load_tokenizer()
    if shape == "embedded":
        return embedded, tokenizer
    config = {"mini": _MINI, "mega": _MEGA, "tiny": _TINY}[shape]
    return Checkpoint("dalle_bart", config, random_params(config), shape, "0" * 64, Path()), tokenizer


def random_params(config: DalleBartConfig) -> dict:
    """Return weights that keep activations near 1. Arrays are overlapping views, so 10 GB of weights take no memory."""
    shapes = parameter_shapes("dalle_bart", config)
    noise = np.random.default_rng(0).standard_normal(max(map(sum, shapes.values())), np.float32)

    def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("kernel"):
            values = noise * np.float32(shape[0] ** -0.5)
        else:  # biases near 0, scales near 1
            values = noise * np.float32(0.1) + np.float32(name.endswith("scale"))
        return np.lib.stride_tricks.as_strided(values, shape, (4,) * len(shape), writeable=False)

    return unflatten({name: array(name, shape) for name, shape in shapes.items()})


class TorchDecoder:
    """The decoder of a DalleBart in PyTorch, structured as in min-dalle, with DALL-E mini's norms and blocks.

    Both halves in one batch, caches, one setting for the batch; texts are noise, and not timed.
    After kuprel/min-dalle, `min_dalle/models/dalle_bart_decoder.py`.
    """

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: str) -> "TorchDecoder | None":
        """Build it, on a GPU if there is one. Returns None if torch is not installed."""
        try:
            import torch
        except ImportError:
            return None
        return cls(torch, checkpoint, "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype))

    def __init__(self, torch, checkpoint: Checkpoint, device: str, dtype):
        def tensors(tree):
            if isinstance(tree, dict):
                return {name: tensors(part) for name, part in tree.items()}
            tree = np.asarray(tree)
            array = np.array(tree.T if tree.ndim == 2 else tree, np.float32, order="C")  # kernels as torch has them
            return torch.from_numpy(array).to(device, dtype)

        self.torch, self.device, self.dtype, self.config = torch, device, dtype, checkpoint.config
        self.name = f"torch {torch.__version__}, {device}"
        decoder = dict(checkpoint.params["model"]["decoder"])
        self.layers = [
            tensors(decoder["layers"][f"FlaxBartDecoderLayer_{index}"]) for index in range(self.config.decoder_layers)
        ]
        self.tokens, self.positions = (
            tensors(decoder[name]["embedding"].T) for name in ("embed_tokens", "embed_positions")
        )
        self.norms = {name: tensors(decoder[name]) for name in ("layernorm_embedding", "final_ln")}
        self.head = tensors(checkpoint.params["lm_head"]["kernel"])

    def seconds_of_step(self, batch_size: int, steps: int) -> float:
        """Return the best time of three runs of `steps` steps."""
        wait = self.torch.cuda.synchronize if self.device == "cuda" else lambda: None
        best = float("inf")
        with self.torch.inference_mode():
            state = self.begin(batch_size)
            self.step(state, 0)
            for _ in range(3):
                wait()
                started = time.perf_counter()
                for step in range(steps):
                    self.step(state, step)
                wait()
                best = min(best, (time.perf_counter() - started) / steps)
        return best

    def begin(self, batch_size: int) -> dict:
        """Make empty caches, and random keys and values of prompts; both halves of each image are rows."""
        torch, config = self.torch, self.config
        heads = config.decoder_attention_heads

        def keys_values(make: Callable, length: int):
            shape = (2, 2 * batch_size, heads, length, config.d_model // heads)
            return make(shape, device=self.device, dtype=self.dtype)

        return {
            "caches": [keys_values(torch.zeros, config.image_length) for _ in range(config.decoder_layers)],
            "cross": [keys_values(torch.randn, config.max_text_length) for _ in range(config.decoder_layers)],
            "token": torch.full((batch_size,), config.start_token, device=self.device),
        }

    def step(self, state: dict, step: int) -> None:
        """Sample one token for each image."""
        torch, config = self.torch, self.config
        token = torch.cat([state["token"]] * 2)
        x = self._norm(self.norms["layernorm_embedding"], self.tokens[token] + self.positions[step])[:, None]
        visible = torch.arange(config.image_length, device=self.device) <= step
        for weights, cache, cross in zip(self.layers, state["caches"], state["cross"], strict=True):
            x = x + self._attention(weights, 0, x, cache, visible, step)
            x = x + self._attention(weights, 1, x, cross, None, None)
            x = x + self._feed_forward(weights["GLU_0"], x)
        logits = (self._norm(self.norms["final_ln"], x)[:, 0] @ self.head.T).float()
        cond, uncond = logits.chunk(2)
        logits = uncond + 3.0 * (cond - uncond)
        values, _ = logits.topk(256)
        logits = torch.where(logits < values[:, -1:], -torch.inf, logits)
        state["token"] = torch.multinomial(torch.softmax(logits, -1), 1)[:, 0]

    def _attention(self, weights: dict, number: int, x, cache, visible, step: int | None):
        functional, heads = self.torch.nn.functional, self.config.decoder_attention_heads
        hidden = self._norm(weights[f"LayerNorm_{2 * number}"], x)
        layer = weights[f"FlaxBartAttention_{number}"]

        def projected(name):
            return functional.linear(hidden, layer[name]["kernel"]).unflatten(-1, (heads, -1)).transpose(1, 2)

        if step is not None:
            cache[0][:, :, step], cache[1][:, :, step] = (projected(name)[:, :, 0] for name in ("k_proj", "v_proj"))
        mask = None if visible is None else visible[None, None, None]
        mixed = functional.scaled_dot_product_attention(projected("q_proj"), *cache, attn_mask=mask)
        mixed = functional.linear(mixed.transpose(1, 2).reshape(x.shape), layer["out_proj"]["kernel"])
        return self._norm(weights[f"LayerNorm_{2 * number + 1}"], mixed)

    def _feed_forward(self, weights: dict, x):
        functional = self.torch.nn.functional
        hidden = self._norm(weights["LayerNorm_0"], x)
        gate, value = (functional.linear(hidden, weights[f"Dense_{number}"]["kernel"]) for number in range(2))
        hidden = self._norm(weights["LayerNorm_1"], functional.gelu(gate) * value)
        return functional.linear(hidden, weights["Dense_2"]["kernel"])

    def _norm(self, weights: dict, x):
        scale, bias = weights.get("scale"), weights.get("bias")
        return self.torch.nn.functional.layer_norm(x, x.shape[-1:], scale, bias, 1e-5)


if __name__ == "__main__":
    main()
