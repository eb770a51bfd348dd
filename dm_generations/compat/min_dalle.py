"""Pictures in Python, for notebooks: `MinDalle` with the methods of the package min-dalle, version 0.4.

    from dm_generations import MinDalle

    model = MinDalle()
    image = model.generate_image("a rocket", seed=1, grid_size=2, supercondition_factor=3)

What was written for min-dalle (https://github.com/kuprel/min-dalle) runs when its import is changed to this one, with
two differences. Arrays are NumPy's and not torch's; dtypes and devices may still be torch's, and torch is never
imported here. And the noise is this program's own: a seed gives the same pictures every time, but not those that
min-dalle draws. Picture i has the key `threefry.row_key(seed, i)`.

n: pictures, grid_size ** 2   S: pixels a side of a picture   L: its codes
"""

import secrets
import warnings
from collections.abc import Iterator
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

_STEPS = 8  # pictures of a progressive stream: for 256 codes one every 32, as min-dalle has it
_PLATFORMS = {"cuda": "gpu"}  # what JAX calls otherwise


class Images(np.ndarray):
    """A NumPy array that also has the methods of a torch tensor which take it to NumPy."""

    def to(self, *targets: Any) -> "Images":
        """This array, as another dtype where one is among `targets`; devices mean nothing here."""
        array = self
        for target in targets:
            try:
                array = array.astype(np.dtype(_plain_name(target)))
            except TypeError:  # a device
                continue
        return array

    def cpu(self) -> "Images":
        return self

    def numpy(self) -> np.ndarray:
        return self.view(np.ndarray)


class MinDalle:
    """A text model and its codec.

    models_root: folder with models as min-dalle's own download lays them (dalle_bart_mega/ or dalle_bart_mini/, and
    vqgan/); None is the small model that ships, and nothing is downloaded
    dtype: what the text model computes in: "float32", "float16", "bfloat16", or such a dtype of torch or NumPy
    device: "cpu" leaves accelerators alone, which takes effect only before JAX has been used in the process; otherwise
    JAX takes what there is, and a name of what there is not is answered by a warning
    is_reusable: whether models stay loaded between calls   is_verbose: whether it says what it does
    model, codec: in place of `models_root` and `is_mega`, a model of any format that the README lists: a folder, a file
    or a name on the Hugging Face hub

    Raises UserError for a model that is missing, broken or not fitting its codec.
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
        if models_root is not None and model is not None:
            raise UserError("use just one of models_root and model")
        self.is_mega, self.is_reusable, self.is_verbose = is_mega, is_reusable, is_verbose
        self.dtype = _dtype_name(dtype)
        self._model, self._codec = model, codec
        if models_root is not None:
            self._model, own_codec = _downloaded(Path(models_root), is_mega)
            self._codec = codec or own_codec
        self.device = _device_name(device)
        compile_cache.enable()
        if is_verbose:
            print("using device", self.device)
        self._loaded: tuple[Generator, Decoder] | None = None
        if is_reusable:
            self._models()

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
        """Grids of grid_size x grid_size pictures of `text`, (grid_size * S, grid_size * S, 3) float32: whole numbers,
        0 is black and 255 white. They fill the grid column by column, as min-dalle's do.

        seed: 0 or more; the same gives the same pictures again. A negative one stands for a fresh one.
        progressive_outputs: the finished grid comes last of 8 that show how far it is, and not alone. What is not drawn
        yet is made of each picture's own first code; see `pipelines.generate.pad_tokens`.
        is_seamless: the pictures are decoded as one, and run into each other
        temperature, top_k: --temperature and --top-k of `generate`   supercondition_factor: its --cond-scale
        Raises UserError for values out of range, and where memory does not hold as many pictures.
        """
        settings = _settings(temperature, top_k, supercondition_factor)
        if grid_size < 1:
            raise UserError(f"grid_size must be at least 1, not {grid_size}")
        if seed > MAX_SEED:
            raise UserError(f"seed must be below 2^64, not {seed}")
        count = grid_size**2
        seed = secrets.randbits(32) if seed < 0 else seed
        if is_verbose:
            print(f"drawing {count} {'picture' if count == 1 else 'pictures'} of {text!r}, seed {seed}")
        generator, codec = self._models()
        # All pictures at once, and not more: both fill up short batches.
        device_count = jax.local_device_count()
        generator.set_batch_size(-(-count // device_count))
        codec.set_batch_size(generator.batch_size * device_count)
        keys = np.array([row_key(seed, i) for i in range(count)], np.uint32)
        with memory_errors("take a smaller grid_size"):
            if progressive_outputs:
                steps = generator.stream([text] * count, settings, keys, max(1, generator.token_count // _STEPS))
            else:
                steps = [generator.generate([text] * count, settings, keys)]
            if is_seamless:
                codec = codec.tiled(grid_size, grid_size)  # here, so that all steps share its compiled program
            for tokens in steps:
                pixels = _sheet(codec, pad_tokens(tokens, generator.token_count), grid_size, is_seamless)
                yield pixels.astype(np.float32).view(Images)

    def generate_image_stream(self, *args: Any, **kwargs: Any) -> Iterator[Image.Image]:
        """The same as pictures of Pillow; arguments as `generate_raw_image_stream` takes them."""
        for pixels in self.generate_raw_image_stream(*args, **kwargs):
            yield Image.fromarray(pixels.astype(np.uint8))

    def generate_images_stream(
        self, text: str, seed: int = -1, grid_size: int = 1, *args: Any, **kwargs: Any
    ) -> Iterator[Images]:
        """The same cut into its pictures, (n, S, S, 3) float32; arguments as `generate_raw_image_stream` takes them.

        `Image.fromarray(images[i].astype("uint8"))` is one for Pillow.
        """
        for pixels in self.generate_raw_image_stream(text, seed, grid_size, *args, **kwargs):
            size = len(pixels) // grid_size
            cells = pixels.reshape(grid_size, size, grid_size, size, 3).transpose(2, 0, 1, 3, 4)
            yield cells.reshape(-1, size, size, 3)

    def generate_image(self, text: str, seed: int = -1, grid_size: int = 1, *args: Any, **kwargs: Any) -> Image.Image:
        """The finished picture. Arguments after these: is_seamless, temperature, top_k, supercondition_factor and
        is_verbose, as `generate_raw_image_stream` takes them.
        """
        return next(self.generate_image_stream(text, seed, grid_size, False, *args, **kwargs))

    def generate_images(self, text: str, seed: int = -1, grid_size: int = 1, *args: Any, **kwargs: Any) -> Images:
        """The finished pictures one by one, (n, S, S, 3) float32; arguments as for `generate_image`."""
        return next(self.generate_images_stream(text, seed, grid_size, False, *args, **kwargs))

    def _models(self) -> tuple[Generator, Decoder]:
        if self._loaded is not None:
            return self._loaded
        models = load_models(self._model, self._codec, None, is_scored=False)
        if self.is_verbose:
            print(f"loading {models.generator.name} and {models.codec.name}")
        generator = Generator(models.generator, models.generator.load_tokenizer(), batch_size=1, dtype=self.dtype)
        loaded = generator, Decoder.from_checkpoint(models.codec, batch_size=1, grid=models.grid)
        if self.is_reusable:
            self._loaded = loaded
        return loaded


def _sheet(codec: Decoder, tokens: np.ndarray, grid_size: int, is_seamless: bool) -> np.ndarray:
    """Tokens (n, L) to one picture (grid_size * S, grid_size * S, 3) uint8; picture 1 stands below picture 0.

    codec: of single pictures, or if is_seamless of such sheets
    """
    by_rows = np.arange(grid_size**2).reshape(grid_size, grid_size).T.ravel()
    tokens = tokens[by_rows]
    if is_seamless:
        return codec.decode(tokens[None])[0]
    pictures = codec.decode(tokens)
    size = codec.image_size
    return pictures.reshape(grid_size, grid_size, size, size, 3).swapaxes(1, 2).reshape(grid_size * size, -1, 3)


def _settings(temperature: float, top_k: int, supercondition_factor: float) -> SamplingParams:
    """Return these values as settings. Raises UserError, with min-dalle's names, for one out of range."""
    settings = SamplingParams(int(top_k), 1.0, float(temperature), float(supercondition_factor))
    try:
        settings.validate()
    except UserError as error:
        raise UserError(str(error).replace("cond_scale", "supercondition_factor")) from error
    return settings


def _downloaded(root: Path, is_mega: bool) -> tuple[Path, Path]:
    """The folders of the model and of its codec below `models_root`. Raises UserError where one is missing."""
    folders = root / f"dalle_bart_{'mega' if is_mega else 'mini'}", root / "vqgan"
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"{folder} is missing, and nothing is downloaded into models_root; leave it out for the model that "
                "ships, or give model='kuprel/min-dalle' for the one on the Hugging Face hub"
            )
    return folders


def _plain_name(dtype_or_device: Any) -> Any:
    """torch.float16 as "float16", torch.device("cpu") as "cpu", without importing torch; others as they are."""
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
    """What JAX computes on, having told it to leave accelerators alone if `device` is the CPU."""
    wanted = None if device is None else str(_plain_name(device)).split(":")[0]
    if wanted == "cpu":
        jax.config.update("jax_platforms", "cpu")
    found = jax.default_backend()
    if wanted is not None and _PLATFORMS.get(wanted, wanted) != found:
        reason = "was started on it before" if wanted == "cpu" else f"has no {wanted} here"
        warnings.warn(f"device {str(device)!r:.100}: JAX {reason}, so {found} is used", stacklevel=3)
    return found
