"""Images in Python, for notebooks: `MinDalle` with the methods of the package min-dalle, version 0.4.

>>> model = MinDalle(is_verbose=False)
>>> model.generate_image("a rocket", seed=1, grid_size=2, supercondition_factor=3).size
(128, 128)

Programs written for min-dalle (https://github.com/kuprel/min-dalle) run when they import this class instead, with two
differences. Arrays are NumPy's and not torch's; dtypes and devices may still be torch's, and torch is never imported
here. And the noise is this program's own: a seed gives the same images every time, but not those of min-dalle. Image i
has the key `row_key(seed, i)`.

n: images, grid_size ** 2   S: pixels a side of an image   L: tokens of an image
"""

import secrets
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from dm_generations.archive import DTYPES
from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder
from dm_generations.inference.generator import Generator
from dm_generations.models.loading import load_models
from dm_generations.pipelines.progressive import pad_tokens
from dm_generations.pipelines.sweep import MAX_SEED
from dm_generations.runtime import compile_cache
from dm_generations.runtime.device import memory_errors
from dm_generations.sampling.params import SamplingParams
from dm_generations.sampling.prng import row_key

_STEPS = 8  # images of a progressive stream: with 256 tokens one every 32, as in min-dalle
_PLATFORMS = {"cuda": "gpu"}  # JAX's name for torch's


class Images(np.ndarray):
    """A NumPy array with those methods of a torch tensor that convert it to NumPy."""

    def to(self, *targets: Any) -> "Images":
        """Return this array, converted if a dtype is among `targets`; devices are ignored."""
        array: np.ndarray = self
        for target in targets:
            try:
                array = array.astype(np.dtype(_plain_name(target)))
            except TypeError:  # a device
                continue
        return array.view(Images)

    def cpu(self) -> "Images":
        """Return this array."""
        return self

    def numpy(self) -> np.ndarray:
        """Return this array as a plain one of NumPy."""
        return self.view(np.ndarray)


class MinDalle:
    """A text-to-image model and its codec.

    Attributes:
        is_mega: Whether `models_root` has the model in dalle_bart_mega/ or dalle_bart_mini/.
        is_reusable: Whether models stay loaded between calls.
        is_verbose: Whether loading is reported on stdout, as min-dalle does.
        dtype: Name of the dtype of the model's activations.
        device: What JAX computes on.
    """

    def __init__(
        self,
        models_root: str | Path | None = None,
        dtype: Any = "float32",
        device: Any = None,
        is_mega: bool = True,
        is_reusable: bool = True,
        is_verbose: bool = True,
        *,
        model: str | Path | None = None,
        codec: str | Path | None = None,
    ):
        """Load the models, unless `is_reusable` is false.

        Args:
            models_root: Folder with models where min-dalle downloads them (dalle_bart_mega/ or dalle_bart_mini/, and
                vqgan/). None is the embedded model; nothing is downloaded.
            dtype: "float32", "float16", "bfloat16", or such a dtype of torch or NumPy.
            device: "cpu" leaves accelerators alone, if JAX has not been used yet in this process. Otherwise JAX uses
                the accelerator that it finds, and another name is answered by a warning.
            is_mega: See `MinDalle`.
            is_reusable: See `MinDalle`.
            is_verbose: See `MinDalle`.
            model: In place of `models_root` and `is_mega`, a model of any format that the README lists: a folder, a
                file or a name on the Hugging Face hub.
            codec: In place of the model's own codec, another one.

        Raises:
            UserError: A model is missing or broken, or the codec is not compatible with it.
        """
        if models_root is not None and model is not None:
            raise UserError("use just one of models_root and model")
        self.is_mega, self.is_reusable, self.is_verbose = is_mega, is_reusable, is_verbose
        self.dtype = _dtype_name(dtype)
        self._model, self._codec = (None if path is None else str(path) for path in (model, codec))
        if models_root is not None:
            self._model, own_codec = map(str, _find_models(Path(models_root), is_mega))
            self._codec = self._codec or own_codec
        self.device = _device_name(device)
        compile_cache.enable()
        if is_verbose:
            print("using device", self.device)
        self._loaded: tuple[Generator, Decoder] | None = None
        if is_reusable:
            self._load_models()

    def generate_raw_image_stream(
        self,
        text: str,
        seed: int = -1,
        grid_size: int = 1,
        progressive_outputs: bool = False,
        is_seamless: bool = False,
        temperature: float = 1.0,
        top_k: int = 256,
        supercondition_factor: float = 16.0,
        is_verbose: bool = False,
    ) -> Iterator[Images]:
        """Generate a square sheet of images.

        Args:
            text: The prompt.
            seed: 0 or more; the same seed gives the same images. A negative one stands for a random seed.
            grid_size: Images a side of the sheet; they fill it column by column, as in min-dalle.
            progressive_outputs: Whether 7 unfinished sheets come first. What is not sampled yet is filled with each
                image's first token; see `pad_tokens`.
            is_seamless: Whether the images are decoded as one, without seams between them.
            temperature: As `--temperature` of `generate`.
            top_k: As `--top-k`.
            supercondition_factor: As `--cond-scale`.
            is_verbose: Whether the prompt and the seed are printed.

        Yields:
            Sheets (grid_size * S, grid_size * S, 3) float32, whole numbers from 0, black, to 255.

        Raises:
            UserError: A value is out of range, or memory does not hold so many images.
        """
        params = _make_params(temperature, top_k, supercondition_factor)
        if grid_size < 1:
            raise UserError(f"grid_size must be at least 1, not {grid_size}")
        if seed > MAX_SEED:
            raise UserError(f"seed must be below 2^64, not {seed}")
        count = grid_size**2
        seed = secrets.randbits(32) if seed < 0 else seed
        if is_verbose:
            print(f"generating {count} {'image' if count == 1 else 'images'} of {text!r}, seed {seed}")
        generator, decoder = self._load_models()
        # All images at once, and not more: both fill up short batches.
        device_count = jax.local_device_count()
        generator.set_batch_size(-(-count // device_count))
        decoder.set_batch_size(generator.batch_size * device_count)
        keys = np.array([row_key(seed, i) for i in range(count)], np.uint32)
        with memory_errors("take a smaller grid_size"):
            steps: Iterable[np.ndarray]
            if progressive_outputs:
                steps = generator.stream([text] * count, params, keys, max(1, generator.token_count // _STEPS))
            else:
                steps = [generator.generate([text] * count, params, keys)]
            if is_seamless:
                decoder = decoder.tiled(grid_size, grid_size)  # here, so that all steps share its compiled program
            for tokens in steps:
                pixels = _decode_sheet(decoder, pad_tokens(tokens, generator.token_count), grid_size, is_seamless)
                yield pixels.astype(np.float32).view(Images)

    def generate_image_stream(self, *args: Any, **kwargs: Any) -> Iterator[Image.Image]:
        """Yield the sheets of `generate_raw_image_stream`, with its arguments, as images of Pillow."""
        for pixels in self.generate_raw_image_stream(*args, **kwargs):
            yield Image.fromarray(pixels.astype(np.uint8))

    def generate_images_stream(
        self, text: str, seed: int = -1, grid_size: int = 1, *args: Any, **kwargs: Any
    ) -> Iterator[Images]:
        """Yield the sheets of `generate_raw_image_stream`, with its arguments, cut into images (n, S, S, 3) float32.

        `Image.fromarray(images[i].astype("uint8"))` is one for Pillow.
        """
        for pixels in self.generate_raw_image_stream(text, seed, grid_size, *args, **kwargs):
            size = len(pixels) // grid_size
            cells = pixels.reshape(grid_size, size, grid_size, size, 3).transpose(2, 0, 1, 3, 4)
            yield cells.reshape(-1, size, size, 3).view(Images)

    def generate_image(self, text: str, seed: int = -1, grid_size: int = 1, *args: Any, **kwargs: Any) -> Image.Image:
        """Return the finished sheet.

        Further arguments are those of `generate_raw_image_stream` without progressive_outputs: is_seamless,
        temperature, top_k, supercondition_factor and is_verbose.
        """
        return next(self.generate_image_stream(text, seed, grid_size, False, *args, **kwargs))

    def generate_images(self, text: str, seed: int = -1, grid_size: int = 1, *args: Any, **kwargs: Any) -> Images:
        """Return the finished images, (n, S, S, 3) float32; the arguments are those of `generate_image`."""
        return next(self.generate_images_stream(text, seed, grid_size, False, *args, **kwargs))

    def _load_models(self) -> tuple[Generator, Decoder]:
        if self._loaded is not None:
            return self._loaded
        models = load_models(self._model, self._codec, None, is_scored=False)
        if self.is_verbose:
            print(f"loading {models.generator.name!r} and {models.codec.name!r}")
        generator = Generator(models.generator, models.generator.load_tokenizer(), batch_size=1, dtype=self.dtype)
        loaded = generator, Decoder.from_checkpoint(models.codec, batch_size=1, grid=models.grid)
        if self.is_reusable:
            self._loaded = loaded
        return loaded


def _decode_sheet(decoder: Decoder, tokens: np.ndarray, grid_size: int, is_seamless: bool) -> np.ndarray:
    """Decode tokens (n, L) to a sheet (grid_size * S, grid_size * S, 3) uint8; image 1 is below image 0.

    Args:
        decoder: Of single images, or if `is_seamless` of such sheets.
        tokens: (n, L) uint16.
        grid_size: Images a side.
        is_seamless: Whether the sheet is decoded as one.
    """
    by_rows = np.arange(grid_size**2).reshape(grid_size, grid_size).T.ravel()
    tokens = tokens[by_rows]
    if is_seamless:
        return decoder.decode(tokens[None])[0]
    images = decoder.decode(tokens)
    size = decoder.image_size
    return images.reshape(grid_size, grid_size, size, size, 3).swapaxes(1, 2).reshape(grid_size * size, -1, 3)


def _make_params(temperature: float, top_k: int, supercondition_factor: float) -> SamplingParams:
    """Return these values as settings. Raises UserError, with min-dalle's names, for one out of range."""
    params = SamplingParams(int(top_k), 1.0, float(temperature), float(supercondition_factor))
    try:
        params.validate()
    except UserError as error:
        raise UserError(str(error).replace("cond_scale", "supercondition_factor")) from error
    return params


def _find_models(root: Path, is_mega: bool) -> tuple[Path, Path]:
    """Return the folders of the model and of its codec below `models_root`. Raises UserError if one is missing."""
    folders = root / f"dalle_bart_{'mega' if is_mega else 'mini'}", root / "vqgan"
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"{folder} is missing, and nothing is downloaded into models_root; leave it out for the "
                "embedded model, or give model='kuprel/min-dalle' for the one on the Hugging Face hub"
            )
    return folders


def _plain_name(dtype_or_device: Any) -> Any:
    """Return torch.float16 as "float16", torch.device("cpu") as "cpu", and other values as they are."""
    if type(dtype_or_device).__module__.split(".")[0] == "torch":
        return str(dtype_or_device).removeprefix("torch.")
    return dtype_or_device


def _dtype_name(dtype: Any) -> str:
    try:
        name = np.dtype(_plain_name(dtype)).name
    except TypeError:
        name = str(_plain_name(dtype))  # NumPy does not know bfloat16 by name
    if name not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r:.100}")
    return name


def _device_name(device: Any) -> str:
    """Return what JAX computes on, after telling it to leave accelerators alone if `device` is the CPU."""
    wanted = None if device is None else str(_plain_name(device)).split(":")[0]
    if wanted == "cpu":
        jax.config.update("jax_platforms", "cpu")
    found = jax.default_backend()
    if wanted is not None and _PLATFORMS.get(wanted, wanted) != found:
        reason = "was started on it before" if wanted == "cpu" else f"has no {wanted} here"
        warnings.warn(f"device {str(device)!r:.100}: JAX {reason}, so {found} is used", stacklevel=3)
    return found
