"""Tokens to images by a diffusion decoder, in place of a codec's own.

It begins with noise, and takes it away step by step. The noise of an image comes from the key of its row, the seed of
the decoder and the number of the decoding alone, so an image is decoded alike alone, in any batch and on any device.

B: batch   n: images asked for   L: tokens of an image   H, W: pixels of an image
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder, RowKey
from dm_generations.inference.scorer import Scorer
from dm_generations.models.base import token_grid
from dm_generations.models.clip.network import CLIP
from dm_generations.models.clip.preprocessing import Preprocessing
from dm_generations.models.diffusion_decoder import samplers
from dm_generations.models.diffusion_decoder.guidance import GuidanceScales, draw_cutouts, guidance_loss
from dm_generations.models.diffusion_decoder.network import PreparedUNet
from dm_generations.models.diffusion_decoder.samplers import DDIM, Steps
from dm_generations.models.loading import Checkpoint, load_checkpoint
from dm_generations.runtime.device import (
    WEIGHTS_ADVICE,
    largest_array_bytes,
    matmul_precision,
    memory_errors,
    put_params,
)
from dm_generations.sampling.params import DECODER_STEPS
from dm_generations.weights.native import flatten

_GUIDED_MEMORY = 8  # times the memory of a step without a gradient, whose maps are not kept


@dataclasses.dataclass(frozen=True)
class Guidance:
    """A CLIP that draws images towards their prompts while they are decoded.

    Attributes:
        scale: How much; the original's default is 1,000.
        cutouts: Of each image at each step, which the CLIP looks at.
    """

    clip: Checkpoint
    scale: float = 1000.0
    cutouts: int = 16


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """A diffusion decoder, and how it is to decode.

    Attributes:
        steps: Which steps are taken, and how.
        clips: Whether predictions are clipped to the range of images at each step.
        seed: Of the noise, 0 to 2^32 - 1.
        guidance: By a CLIP; None is none.
    """

    checkpoint: Checkpoint
    steps: Steps
    clips: bool = False
    seed: int = 0
    guidance: Guidance | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        steps: str = DECODER_STEPS,
        eta: float | None = None,
        clip_denoised: bool = False,
        seed: int = 0,
        guidance: Guidance | None = None,
    ) -> "Diffusion":
        """Load a diffusion decoder.

        Args:
            path: A `model-latest.pt` or `ema_*.pt` of guided-diffusion, or a folder that `convert` made of one.
            steps: "25" is DDPM in 25 steps, "ddim25" DDIM and "dpm25" DPM-Solver++.
            eta: Of DDIM, the noise of its steps; None is 0.
            clip_denoised: Whether predictions are clipped to the range of images at each step.
            seed: Of the noise, 0 to 2^32 - 1.
            guidance: By a CLIP; None is none.

        Raises:
            UserError: The decoder is missing or broken, or there are no such steps.
        """
        checkpoint = load_checkpoint(path, "decoder")
        parsed = Steps.parse(steps, eta, checkpoint.config.diffusion_steps)
        return cls(checkpoint, parsed, clip_denoised, seed, guidance)

    def hash_with(self, sha256: str, decoding: int = 0) -> str:
        """Return 64 hex digits that differ for what makes other images of the same tokens.

        Args:
            sha256: Of the weights that it works with, a codec's or a CLIP's.
            decoding: The number of an image among those of its row.
        """
        how = {name: value for name, value in self.describe().items() if name != "name"}
        return hashlib.sha256(f"{sha256} {how} {decoding}".encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what an image's record says of it."""
        sampler, guidance = self.steps.sampler, self.guidance
        found: dict[str, Any] = {
            "name": self.checkpoint.name,
            "sha256": self.checkpoint.sha256,
            "steps": self.steps.text,
            "eta": sampler.eta if isinstance(sampler, DDIM) else None,
            "clip_denoised": self.clips,
            "seed": self.seed,
        }
        if guidance is not None:
            found |= {"clip_guidance_scale": guidance.scale, "cutouts": guidance.cutouts}
            found |= {"clip_sha256": guidance.clip.sha256}
        return found

    def image_size(self, grid: int) -> int:
        """Return the pixels a side of an image of `grid` x `grid` tokens.

        Raises:
            UserError: It is no multiple of what the decoder was trained on.
        """
        config = self.checkpoint.config
        size, trained = config.image_side(grid), config.image_size
        if size % trained:  # a multiple is how ruDALL-E's 32x32 tokens become 512 pixels
            raise UserError(
                f"{grid}x{grid} tokens would become {size} pixels, and decoder {self.checkpoint.name!r:.100} was "
                f"trained on {trained}: it is not for images of this codec"
            )
        return size


class DiffusionDecoder(Decoder):
    """The decoder of a codec's tokens by diffusion; it takes from the codec its codebook alone."""

    _enough_pixels: Mapping[str, int] = {"cpu": 1, "elsewhere": 1 << 22}

    def __init__(
        self,
        codec: Checkpoint,
        diffusion: Diffusion,
        batch_size: int | Literal["auto"],
        dtype: str = "float32",
        grid: int | None = None,
    ):
        """Put the network and the codebook on the devices.

        Args:
            codec: What made the tokens.
            diffusion: The decoder.
            batch_size: See `Decoder`, as for the next two.
            dtype: Of the convolutions and of what they read and write.
            grid: Tokens a side.

        Raises:
            UserError: The decoder reads vectors of another width or another grid of tokens, or memory is too small.
        """
        config = diffusion.checkpoint.config
        _check_codec(codec, diffusion.checkpoint)
        grid = grid or codec.config.grid
        self._set_sizes(grid, codec.config.codebook_size, diffusion.image_size(grid))
        self.name, self._diffusion = f"{codec.name} with {diffusion.checkpoint.name}", diffusion
        network = PreparedUNet(config, np.dtype(dtype), self._devices[0].platform)
        codebook = np.array(read_codebook(codec, config.emb_input_dims), np.float32)
        with memory_errors(WEIGHTS_ADVICE):
            self._params = {
                "codebook": jax.device_put(codebook, self._replicate),
                "network": network.prepare_params(diffusion.checkpoint.params, self._replicate),
            }
            guide = None if diffusion.guidance is None else _Guide(diffusion.guidance)
            if guide is not None:
                self._params["clip"] = put_params(guide.params, sharding=self._replicate)
        self._guide = guide
        self._rows = diffusion.steps.rows(config)
        self._begin = self._compiled(self._make_begin(), (False, True, True))
        self._step = self._compiled(_make_step(network, diffusion, guide), (False, False, False, True, True))
        self._finish = self._compiled(samplers.to_uint8, (True,))
        self.set_batch_size(self._auto_batch_size() if batch_size == "auto" else batch_size)
        self._check_memory("close other programs, or use --dtype bfloat16")

    def set_batch_size(self, wanted: int) -> None:
        """Decode `wanted` images at a time; on CPUs one for each of them, whatever is wanted.

        One image keeps a CPU busy and stays in the cache; it comes out the same whatever it is asked for with, and
        little is lost when a decode is killed.
        """
        super().set_batch_size(1 if self._devices[0].platform == "cpu" else wanted)

    def _make_begin(self) -> Callable:
        shape = self.image_size, self.image_size, 3

        def begin(params: dict, tokens: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
            """The vectors of tokens, and the noise to begin with."""
            return params["codebook"][token_grid(tokens.astype(jnp.int32))], samplers.normal(keys, 0, shape)

        return begin

    def decode_batch(self, tokens: np.ndarray, *row_arrays: np.ndarray) -> jax.Array:
        """Decode one whole batch, step by step.

        Args:
            tokens: (B, L) uint16.
            row_arrays: (B, 2) uint32, the keys of the noise; then, with guidance, CLIP's vectors of the prompts (B, F).

        Returns:
            Images (B, H, W, 3) uint8 on the devices.
        """
        on_device = [jax.device_put(array, self._shard_batch) for array in (tokens, *row_arrays)]
        vectors, x = self._begin(self._params, *on_device[:2])
        given, state = (vectors, *on_device[1:]), (x, x)
        for number, row in enumerate(self._rows, 1):
            state = self._step(self._params, row, np.uint32(number), given, state)
            if self.on_step is not None:
                jax.block_until_ready(state)
                self.on_step(number, len(self._rows))
        return self._finish(state[1])

    def tiled(self, rows: int, cols: int) -> "Decoder":
        """Refuse: an image has noise of its own, so there is no sheet that is decoded as one."""
        raise UserError("a diffusion decoder decodes each image by itself: leave out --seamless, or --decoder")

    def compile(self) -> jax.ShapeDtypeStruct:
        """Compile the step ahead of the first batch; return the shape of a batch of images, (B, H, W, 3) uint8."""
        self._step.lower(*self._step_arguments(self.batch_size)).compile()
        shape = self.batch_size, self.image_size, self.image_size, 3
        return jax.ShapeDtypeStruct(shape, np.uint8, sharding=self._shard_batch)

    def _row_arrays(self, keys: Sequence[RowKey]) -> tuple[np.ndarray, ...]:
        words = np.array([(key.key0, key.key1) for key in keys], np.uint64).reshape(-1, 2).astype(np.uint32)
        decodings = np.array([key.decoding for key in keys], np.uint32)
        noise = samplers.noise_keys(words, decodings, self._diffusion.seed)
        return (noise,) if self._guide is None else (noise, self._guide.targets([key.prompt for key in keys]))

    def _count_concurrent(self) -> int:
        return 1  # a step keeps all cores busy

    def _largest_bytes(self, batch_size: int) -> int:
        largest = largest_array_bytes(self._step.trace(*self._step_arguments(batch_size)).jaxpr.jaxpr)
        return largest if self._guide is None else _GUIDED_MEMORY * largest

    def _step_arguments(self, batch_size: int) -> tuple:
        def shape_of(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch_size, *sizes), dtype, sharding=self._shard_batch)

        vectors = shape_of(np.float32, self.grid, self.grid, self._diffusion.checkpoint.config.emb_input_dims)
        targets = () if self._guide is None else (shape_of(np.float32, self._guide.width),)
        x = shape_of(np.float32, self.image_size, self.image_size, 3)
        given = (vectors, shape_of(np.uint32, 2), *targets)
        return self._params, self._rows[0], np.uint32(0), given, (x, x)


class _Guide:
    """The CLIP of a guidance: its text tower, and what the step needs of its image tower."""

    def __init__(self, guidance: Guidance):
        checkpoint, self.cutouts = guidance.clip, guidance.cutouts
        self._scorer = Scorer.from_checkpoint(checkpoint, towers=("text",))
        self._network: Any = CLIP(checkpoint.config)
        self._scales = GuidanceScales(guidance.scale)
        self.width, self.cut_size = checkpoint.config.projection_dim, checkpoint.config.vision_config.image_size
        self._preprocessing = Preprocessing.from_folder(checkpoint.folder, self.cut_size)
        self.params = {name: checkpoint.params[name] for name in ("vision_model", "visual_projection", "logit_scale")}

    def targets(self, prompts: Sequence[str | None]) -> np.ndarray:
        """Return CLIP's vectors of prompts, (n, F) float32."""
        return self._scorer.text_features([prompt or "" for prompt in prompts])

    def loss(self, params: dict, cutouts: jax.Array, targets: jax.Array) -> samplers.Loss:
        """Return the loss of images of these cutouts (B, N, 3) and these vectors (B, F)."""
        mean, deviation = np.array(self._preprocessing.mean, np.float32), np.array(self._preprocessing.std, np.float32)

        def features(pixels: jax.Array) -> jax.Array:
            normalised = (pixels - mean) / deviation
            with matmul_precision(np.float32):
                return self._network.apply({"params": params}, normalised, method="get_image_features")

        weights = jnp.ones((len(targets), 1))
        return guidance_loss(features, self.cut_size, cutouts, targets[:, None], weights, self._scales)


def _make_step(network: PreparedUNet, diffusion: Diffusion, guide: _Guide | None) -> Callable:
    def step(
        params: dict, row: samplers.Row, number: jax.Array, given: tuple[jax.Array, ...], state: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Take one step.

        Args:
            params: Of the networks.
            row: Of the steps' tables.
            number: Of the step, from 1.
            given: Vectors (B, h, w, D), keys (B, 2), and with guidance CLIP's vectors (B, F).
            state: x and the x0 of the last step, (B, H, W, 3).

        Returns:
            The next state.
        """
        (vectors, keys, *targets), (x, last_x0) = given, state
        noise = samplers.normal(keys, number, x.shape[1:])
        loss = None
        if guide is not None:
            cutouts = draw_cutouts(keys, number, guide.cutouts, x.shape[1], guide.cut_size)
            loss = guide.loss(params["clip"], cutouts, *targets)

        def predict(x: jax.Array, times: jax.Array) -> jax.Array:
            return network(params["network"], x, times, vectors)

        return samplers.denoise(predict, diffusion.steps.sampler, row, x, last_x0, noise, diffusion.clips, loss)

    return step


def read_codebook(codec: Checkpoint, width: int | None = None) -> np.ndarray:
    """Return the codebook (K, D) of a codec, whose rows a decoder reads.

    Args:
        codec: What made the tokens.
        width: D of the decoder; None for any.

    Raises:
        UserError: It has none, or one of another width.
    """
    found = [
        array
        for path, array in flatten(codec.params).items()
        if path.endswith("embedding") and array.ndim == 2 and len(array) == codec.config.codebook_size
    ]
    widths = ", ".join(str(array.shape[1]) for array in found) or "no"
    if len(found) != 1:
        raise UserError(f"codec {codec.name!r:.100} has {widths} numbers in its codebook, which no decoder reads")
    if width is not None and found[0].shape[1] != width:
        raise UserError(
            f"the decoder reads vectors of {width} numbers, codec {codec.name!r:.100} has {widths} numbers in its "
            "codebook: give the codec that the decoder was trained with by --codec"
        )
    return found[0]


def _check_codec(codec: Checkpoint, decoder: Checkpoint) -> None:
    """Raise UserError for another codec than a decoder says that it was trained with."""
    trained = (decoder.lineage or {}).get("codec", codec.sha256)
    if trained != codec.sha256:
        raise UserError(
            f"decoder {decoder.name!r:.100} was trained with codec {str(trained)[:8]!r}, and {codec.name!r:.100} is "
            f"{codec.sha256[:8]}: give the codec that it was trained with by --codec"
        )
