"""Images and prompts to CLIP scores.

n: images   B: batch   H, W: pixels   P: CLIP's projection width
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoding
from dm_generations.models.clip.network import CLIP, CLIPConfig, unit
from dm_generations.models.clip.preprocessing import FILTERS, OPENAI_MEAN, OPENAI_STD, preprocess
from dm_generations.models.loading import Checkpoint
from dm_generations.models.tokenization import PromptTokenizer
from dm_generations.runtime.params import matmul_precision, put_params
from dm_generations.weights.native import read_json_object

TEXT_BATCH = 8  # texts of one run of the text tower; a sweep has few distinct prompts
_STEPS = ("do_resize", "do_rescale", "do_normalize")  # that a config may switch off; cropping changes no square image
MAX_CACHED_TEXTS = 4096  # prompts whose features stay in memory: 8 MB at P = 512


@dataclass(frozen=True)
class Preprocessing:
    """How images are made ready for one CLIP."""

    image_size: int
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    resample: Image.Resampling = Image.Resampling.BICUBIC

    @classmethod
    def of_model(cls, folder: Path, config: CLIPConfig) -> "Preprocessing":
        """Read `preprocessor_config.json` beside the model, or transformers 5's `processor_config.json`.

        Without these files, the values are OpenAI's.

        Raises:
            UserError: A file is broken, was made for a network of another size, or leaves out a step.
        """
        image_size = config.vision_config.image_size
        found = [Path(folder) / name for name in ("preprocessor_config.json", "processor_config.json")]
        path = next(filter(Path.is_file, found), None)
        if path is None:
            return cls(image_size)
        values = read_json_object(path)
        try:
            if path.name == "processor_config.json":
                values = values.get("image_processor", {})
            left_out = [step for step in _STEPS if not values.get(step, True)]
            factor = float(values.get("rescale_factor", 1 / 255))
            mean = tuple(float(x) for x in values.get("image_mean", OPENAI_MEAN))
            std = tuple(float(x) for x in values.get("image_std", OPENAI_STD))
            resample = Image.Resampling(values.get("resample", Image.Resampling.BICUBIC))
            sizes = {_side(values[key]) for key in ("size", "crop_size") if key in values}
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            raise UserError(f"{path}: not a CLIP preprocessor config ({error})") from error
        if left_out or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
            what = f"{left_out[0]} is false" if left_out else f"rescale_factor is {factor} and not 1/255"
            raise UserError(f"{path}: {what}, which this program does not support")
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise UserError(f"{path}: image_mean and image_std must be 3 numbers each, the latter above 0")
        if resample not in FILTERS:
            raise UserError(
                f"{path}: resample {resample} is not one of {', '.join(str(int(name)) for name in FILTERS)}"
            )
        if sizes - {image_size}:
            raise UserError(f"{path}: images of {sorted(sizes)} pixels, but the model reads {image_size}")
        return cls(image_size, mean, std, resample)


def _side(size: Any) -> int:
    """Return pixels, of any of the ways in which preprocessor configs write a size."""
    if isinstance(size, dict):
        size = size["shortest_edge"] if "shortest_edge" in size else max(size["height"], size["width"])
    return int(size)


class Scorer:
    """CLIP scores in batches of one fixed shape, divided among the local devices: each tower is compiled once."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: PromptTokenizer, batch_size: int = 32):
        """Put a CLIP on the devices.

        Args:
            checkpoint: Of kind "clip".
            tokenizer: For prompts.
            batch_size: Images at a time, rounded up to as many for each device; fewer are padded with black.
        """
        config = checkpoint.config
        preprocessing = Preprocessing.of_model(checkpoint.folder, config)
        model = CLIP(config)
        self._preprocessing = preprocessing
        self._tokenizer = tokenizer
        devices = jax.local_devices()
        mesh = Mesh(devices, ("images",))
        self._shard_batch, self._replicate = (
            NamedSharding(mesh, PartitionSpec("images")),
            NamedSharding(mesh, PartitionSpec()),
        )
        self._batch_size = -(-batch_size // len(devices)) * len(devices)
        self._width = config.projection_dim
        self._text_length = config.text_config.max_position_embeddings
        self._params = put_params(checkpoint.params, sharding=self._replicate)
        self._scale = float(np.exp(np.float32(checkpoint.params["logit_scale"])))
        self._text_features: dict[str, np.ndarray] = {}

        def apply(params: dict, *inputs: jax.Array, method: str) -> jax.Array:
            return cast(jax.Array, model.apply({"params": params}, *inputs, method=method))

        @jax.jit
        def image_tower(params, images):
            with matmul_precision(np.float32):
                pixels = preprocess(images, **dataclasses.asdict(preprocessing))
                return unit(apply(params, pixels, method="get_image_features"))

        @jax.jit
        def text_tower(params, input_ids, attention_mask):
            with matmul_precision(np.float32):
                return unit(apply(params, input_ids, attention_mask, method="get_text_features"))

        self._image_tower, self._text_tower = image_tower, text_tower

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, batch_size: int = 32) -> "Scorer":
        """Make the scorer of a loaded CLIP, with its own tokenizer; see `Scorer` for the arguments.

        Raises:
            UserError: The tokenizer is missing or broken, or memory does not hold the weights.
        """
        tokenizer = checkpoint.load_tokenizer()
        assert isinstance(tokenizer, PromptTokenizer), "CLIP has no other"
        return cls(checkpoint, tokenizer, batch_size)

    def compile(self, images: jax.ShapeDtypeStruct, prompts: Sequence[str]) -> None:
        """Compile ahead of the first batch.

        Args:
            images: The shape of a batch of images, as `Decoder.compile` returns it.
            prompts: Of that batch; their features are computed now.
        """
        self._image_tower.lower(self._params, images).compile()
        self.text_features(prompts)

    def score(self, images: np.ndarray | Decoding, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Score image i against prompt i.

        Args:
            images: As `image_features` takes them.
            prompts: n texts.

        Returns:
            score_input and score_tokenized, float32 (n,): cosine x exp(logit_scale). The first is for the prompt as
            typed, the second for the prompt as CLIP's tokenizer reads it back.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images do not match {len(prompts)} prompts")
        read_back = {prompt: self._tokenizer.round_trip(prompt, self._text_length) for prompt in set(prompts)}
        features = self.image_features(images)
        typed = self.text_features(prompts)
        read = self.text_features([read_back[prompt] for prompt in prompts])
        return tuple(np.float32(self._scale) * np.sum(features * text, axis=-1) for text in (typed, read))

    def image_features(self, images: np.ndarray | Decoding) -> np.ndarray:
        """Return features of images, float32 (n, P), rows of unit length.

        Args:
            images: uint8 (n, H, W, 3) of any size, or images on their way from a decoder, which stay on the device.
                They are resized as transformers' CLIP processor does it.
        """
        if isinstance(images, Decoding):
            parts = images.on_device()
        elif images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3:
            parts = self._on_device(images)
        else:
            raise ValueError(f"images must be uint8 (n, H, W, 3), not {images.dtype} {images.shape}")
        pending = [(self._image_tower(self._params, batch), count) for batch, count in parts]
        features = [jax.device_get(rows)[:count] for rows, count in pending]
        return np.concatenate([np.empty((0, self._width), np.float32), *features])

    def _on_device(self, images: np.ndarray) -> Iterator[tuple[jax.Array, int]]:
        """Return batches (B, H, W, 3) on the device, and how many images each holds."""
        for start in range(0, len(images), self._batch_size):
            batch = images[start : start + self._batch_size]
            yield jax.device_put(_padded(batch, self._batch_size), self._shard_batch), len(batch)

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Return features of n texts, float32 (n, P), rows of unit length. Those of recent texts are cached."""
        distinct = list(dict.fromkeys(texts))
        features = {text: self._text_features[text] for text in distinct if text in self._text_features}
        new = [text for text in distinct if text not in features]
        pending = []
        for start in range(0, len(new), TEXT_BATCH):
            ids, mask = self._tokenizer.encode(new[start : start + TEXT_BATCH], self._text_length)
            ids, mask = (jax.device_put(_padded(x, TEXT_BATCH), self._replicate) for x in (ids, mask))
            pending.append(self._text_tower(self._params, ids, mask))
        features.update(zip(new, np.concatenate(jax.device_get(pending))[: len(new)] if new else [], strict=True))
        self._text_features.update((text, features[text]) for text in new)
        while len(self._text_features) > MAX_CACHED_TEXTS:
            del self._text_features[next(iter(self._text_features))]  # the oldest
        return np.array([features[text] for text in texts], np.float32).reshape(len(texts), self._width)


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    """Return `rows` followed by zeros up to `count` rows."""
    return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1))
