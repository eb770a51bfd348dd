"""Images and prompts to scores: CLIP's, and those of an aesthetic head on CLIP's image vectors.

n: images   B: batch   H, W: pixels   P: CLIP's projection width
"""

import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from dm_generations.archive import ModelInfo
from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoding
from dm_generations.models.clip.network import CLIP, unit
from dm_generations.models.clip.preprocessing import Preprocessing
from dm_generations.models.loading import Checkpoint, load_checkpoint
from dm_generations.models.tokenization import PromptTokenizer
from dm_generations.runtime import compile_cache
from dm_generations.runtime.device import matmul_precision, put_params

TEXT_BATCH = 8  # texts of one run of the text tower; a sweep has few distinct prompts
_PARTS = {"image": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}  # of each tower
MAX_CACHED_TEXTS = 4096  # prompts whose features stay in memory: 8 MB at P = 512


class Scorer:
    """CLIP scores in batches of one fixed shape, divided among the local devices: each tower is compiled once.

    Attributes:
        info: What an archive stores about the CLIP; None if it was not made of a checkpoint.
    """

    info: ModelInfo | None = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: PromptTokenizer,
        batch_size: int = 32,
        towers: Collection[str] = ("image", "text"),
    ):
        """Put a CLIP on the devices.

        Args:
            checkpoint: Of kind "clip".
            tokenizer: For prompts.
            batch_size: Images at a time, rounded up to as many for each device; fewer are padded with black.
            towers: Of "image" and "text" those that are needed.
        """
        config = checkpoint.config
        preprocessing = Preprocessing.from_folder(checkpoint.folder, config.vision_config.image_size)
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
        self._params = {
            tower: put_params(
                {name: checkpoint.params[name] for name in (*_PARTS[tower], "logit_scale")}, sharding=self._replicate
            )
            for tower in towers
        }
        self._scale = float(np.exp(np.float32(checkpoint.params["logit_scale"])))
        self._text_features: dict[str, np.ndarray] = {}

        @jax.jit
        def image_tower(params, images):
            with matmul_precision(np.float32):
                pixels = preprocessing.apply(images)
                features: Any = model.apply({"params": params}, pixels, method="get_image_features")
                return unit(features)

        @jax.jit
        def text_tower(params, input_ids, attention_mask):
            with matmul_precision(np.float32):
                features: Any = model.apply({"params": params}, input_ids, attention_mask, method="get_text_features")
                return unit(features)

        self._image_tower, self._text_tower = image_tower, text_tower

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, batch_size: int = 32, towers: Collection[str] = ("image", "text")
    ) -> "Scorer":
        """Make the scorer of a loaded CLIP, with its own tokenizer; see `Scorer` for the arguments.

        Raises:
            UserError: The tokenizer is missing or broken, or memory does not hold the weights.
        """
        tokenizer = checkpoint.load_tokenizer()
        assert isinstance(tokenizer, PromptTokenizer), "CLIP has no other"
        scorer = cls(checkpoint, tokenizer, batch_size, towers)
        scorer.info = checkpoint.model_info()
        return scorer

    @classmethod
    def load(cls, clip: str | os.PathLike[str] | None = None, batch_size: int = 32) -> "Scorer":
        """Load a CLIP from a folder, a file or the Hugging Face hub; None is the one that ships.

        Raises:
            UserError: The CLIP is missing or broken, or memory does not hold it.
        """
        compile_cache.enable()
        return cls.from_checkpoint(load_checkpoint(clip, "clip"), batch_size)

    def __repr__(self) -> str:
        return f"<Scorer {'CLIP' if self.info is None else self.info.name}>"

    def __call__(self, images: np.ndarray | Sequence[Image.Image], prompts: str | Sequence[str]) -> np.ndarray:
        """Score images against prompts.

        >>> import numpy as np
        >>> Scorer.load()(np.zeros((2, 64, 64, 3), np.uint8), "a black square").shape
        (2,)

        Args:
            images: uint8 (n, H, W, 3), or images of Pillow of one size.
            prompts: A prompt for each image, or one for all.

        Returns:
            float32 (n,), as `clip_score_input` of an archive; `score` also gives `clip_score_tokenized`.

        Raises:
            UserError: The images have several sizes, or the numbers of images and prompts differ.
        """
        if not isinstance(images, np.ndarray):
            if len({image.size for image in images}) > 1:
                raise UserError("the images have several sizes; score those of one size at a time")
            images = np.array([np.asarray(image.convert("RGB")) for image in images], np.uint8)
        prompts = [prompts] * len(images) if isinstance(prompts, str) else prompts
        if len(prompts) != len(images):
            raise UserError(f"{len(images)} images do not match {len(prompts)} prompts")
        if not len(images):
            return np.empty(0, np.float32)
        return self.score(images, prompts)[0]

    def compile(self, images: jax.ShapeDtypeStruct, prompts: Sequence[str]) -> None:
        """Compile ahead of the first batch.

        Args:
            images: The shape of a batch of images, as `Decoder.compile` returns it.
            prompts: Of that batch; their features are computed now.
        """
        self._image_tower.lower(self._params["image"], images).compile()
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
        return self.score_features(self.image_features(images), prompts)

    def score_features(self, features: np.ndarray, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Score images by their features, float32 (n, P), against n prompts; see `score`."""
        read_back = {prompt: self._tokenizer.round_trip(prompt, self._text_length) for prompt in set(prompts)}
        typed = self.text_features(prompts)
        read = self.text_features([read_back[prompt] for prompt in prompts])
        return tuple(np.float32(self._scale) * np.sum(features * text, axis=-1) for text in (typed, read))

    def image_features(self, images: np.ndarray | Decoding) -> np.ndarray:
        """Return features of images, float32 (n, P), rows of unit length.

        Args:
            images: uint8 (n, H, W, 3) of any size, or images that a decoder is computing, which stay on the device.
                They are resized as transformers' CLIP processor does it.
        """
        if isinstance(images, Decoding):
            parts = images.on_device()
        elif images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3:
            parts = self._on_device(images)
        else:
            raise ValueError(f"images must be uint8 (n, H, W, 3), not {images.dtype} {images.shape}")
        pending = [(self._image_tower(self._params["image"], batch), count) for batch, count in parts]
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
            pending.append(self._text_tower(self._params["text"], ids, mask))
        features.update(zip(new, np.concatenate(jax.device_get(pending))[: len(new)] if new else [], strict=True))
        self._text_features.update((text, features[text]) for text in new)
        while len(self._text_features) > MAX_CACHED_TEXTS:
            del self._text_features[next(iter(self._text_features))]  # the oldest
        return np.array([features[text] for text in texts], np.float32).reshape(len(texts), self._width)


class AestheticScorer:
    """Scores of CLIP vectors by an aesthetic head, which reads no prompt. It is so small that NumPy computes it."""

    def __init__(self, head: Checkpoint, clip: Checkpoint):
        """Check that a head reads the vectors of a CLIP.

        Args:
            head: Of kind "aesthetic".
            clip: Of kind "clip".

        Raises:
            UserError: It reads vectors of another width.
        """
        self._head, self._clip = head, clip
        self._layers = [
            {name: np.asarray(array, np.float32) for name, array in head.params[f"layers_{number}"].items()}
            for number in range(len(head.config.widths) - 1)
        ]
        if head.config.widths[0] != (width := clip.config.projection_dim):
            raise UserError(
                f"aesthetic head {head.name!r:.100} reads vectors of {head.config.widths[0]:,} numbers, CLIP "
                f"{clip.name!r:.100} gives {width:,}: give the CLIP that it was trained on with --clip"
            )

    @property
    def model_info(self) -> ModelInfo:
        """What an archive stores about it; the config names the CLIP."""
        info = self._head.model_info()
        return dataclasses.replace(info, config={**info.config, "clip_sha256": self._clip.sha256})

    def score_features(self, features: np.ndarray) -> np.ndarray:
        """Return scores, float32 (n,), of features of images (n, P), rows of unit length."""
        for number, layer in enumerate(self._layers):
            if number and self._head.config.has_relu:
                features = np.maximum(features, 0)
            features = features @ layer["kernel"] + layer["bias"]
        return features[:, 0]


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    """Return `rows` followed by zeros up to `count` rows."""
    return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1))
