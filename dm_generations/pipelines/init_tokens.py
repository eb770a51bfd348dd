"""Initial tokens: the first tokens of an image, which are not sampled and which the model continues.

They come from an image, through the codec's encoder, or from a file of tokens as `--output npy` writes it.

L: tokens of an image, row-major over its grid   S: pixels a side of the codec's images
"""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from dm_generations.archive import init_md5
from dm_generations.archive.records import TOKEN_DTYPE
from dm_generations.errors import UserError, one_line
from dm_generations.inference.encoder import Encoder
from dm_generations.models.loading import Checkpoint

# How much of an image is used by default: 14 rows of 32, as OpenAI primed DALL-E (Ramesh et al., "Zero-Shot
# Text-to-Image Generation", 2021) and DALLE-pytorch's `generate_images` does.
DEFAULT_SHARE = 14 / 32
_BACKGROUND = (255, 255, 255)  # behind transparent pixels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InitTokens:
    """The tokens of one image, of which the first `count` are used and the rest sampled.

    Attributes:
        tokens: (L,) uint16.
        count: 1 to L - 1.
    """

    tokens: np.ndarray
    count: int

    @property
    def md5(self) -> str:
        """Hex MD5 of the tokens that are used, as an archive stores it."""
        return init_md5(self.tokens.astype(TOKEN_DTYPE).tobytes(), self.count)


def load_init_tokens(
    init_image: Path | None,
    init_tokens: Path | None,
    init_count: int | None,
    codec: Checkpoint,
    token_count: int,
    codebook_size: int,
) -> InitTokens | None:
    """Load what --init-image, --init-tokens and --init-count ask for; None if they ask for nothing.

    Args:
        init_image: An image file.
        init_tokens: A `.npy` file.
        init_count: How many tokens are used; None is `DEFAULT_SHARE` of them.
        codec: Encodes the image.
        token_count: L, a square.
        codebook_size: Number of tokens that the model and the codec both have.

    Raises:
        UserError: The flags exclude or need each other, or a file has no usable tokens or pixels.
    """
    if init_image is not None and init_tokens is not None:
        raise UserError("use just one of --init-image and --init-tokens")
    if init_image is not None:
        count = resolve_init_count(init_count, token_count)
        return InitTokens(
            _check_tokens(encode_image_file(init_image, codec, token_count), init_image, codebook_size), count
        )
    if init_tokens is not None:
        count = resolve_init_count(init_count, token_count)
        return InitTokens(read_token_file(init_tokens, token_count, codebook_size), count)
    if init_count is not None:
        raise UserError("--init-count needs --init-image or --init-tokens; give one of them")
    return None


def resolve_init_count(init_count: int | None, token_count: int) -> int:
    """Return how many tokens are used, 1 to L - 1.

    Raises:
        UserError: `init_count` is another number.
    """
    count = int(DEFAULT_SHARE * token_count) if init_count is None else init_count
    if not 1 <= count < token_count:
        raise UserError(
            f"--init-count {count} is not between 1 and {token_count - 1}: an image has {token_count} tokens"
        )
    return count


def read_token_file(path: Path, token_count: int, codebook_size: int) -> np.ndarray:
    """Read a `.npy` file of L whole numbers, of any integer dtype and shape.

    Returns:
        (L,) uint16.

    Raises:
        UserError: The file is not a `.npy` file, has another number of tokens, or one outside the codebook.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files of older versions of NumPy
            # Mapped, so that a header with a wrong size is refused and not believed.
            found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, TypeError, EOFError, SyntaxError, MemoryError, OverflowError) as error:
        # NumPy takes any other file for a pickle, and its message is about those.
        raise UserError(f"{str(path)!r} is not a .npy file of tokens, as --output npy writes them") from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise UserError(f"{str(path)!r} is an .npz file; give one array of it, saved as .npy")
    if found.dtype.kind not in "iu":
        raise UserError(f"{str(path)!r} holds {found.dtype} values; tokens are whole numbers")
    if found.size != token_count:
        raise UserError(f"{str(path)!r} holds {found.size:,} tokens; images of this model have {token_count:,}")
    return _check_tokens(np.asarray(found).reshape(-1), path, codebook_size)


def encode_image_file(path: Path, codec: Checkpoint, token_count: int) -> np.ndarray:
    """Encode an image file, cropped and resized to the codec's size.

    Returns:
        (L,) uint16.

    Raises:
        UserError: The file is not an image, or the codec has no encoder.
    """
    encoder = Encoder(codec)
    grid = math.isqrt(token_count)
    image = read_image(path, codec.config.image_size // codec.config.grid * grid)
    return encoder.encode(image[None])[0]


def read_image(
    path: Path, size: int, resample: Image.Resampling = Image.Resampling.LANCZOS, content: bytes | None = None
) -> np.ndarray:
    """Read the middle square of an image file, resized.

    The image is turned as its EXIF data says, its colours are converted from its colour profile to sRGB, transparent
    pixels become white, and of an animation the first image is used.

    Args:
        path: The file.
        size: Pixels a side.
        resample: How it is resized.
        content: Of the file, if it has been read; then `path` is its name in messages.

    Returns:
        (size, size, 3) uint8, sRGB.

    Raises:
        UserError: Pillow cannot read the file, or it has more pixels than Pillow takes for harmless.
    """
    if content is None and path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"cannot read {str(path)!r}: it is not a file")
    try:
        with warnings.catch_warnings(), _long_texts():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path if content is None else io.BytesIO(content)) as opened:
                if opened.mode == "F":  # of no agreed range
                    raise UserError(f"{str(path)!r} has floating-point pixels; save it with 8 or 16 bits a channel")
                opened.load()
                image = _to_rgb(_turn(opened))
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(
            f"{str(path)!r} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller first"
        ) from error
    except OSError as error:
        reason = error.strerror or "it is not an image, or a broken one"
        raise UserError(f"cannot read {str(path)!r}: {reason}") from error
    except Exception as error:  # readers of single formats let errors of all kinds through
        if "MAX_TEXT" in str(error):
            raise UserError(
                f"{str(path)!r} has more than {PngImagePlugin.MAX_TEXT_MEMORY >> 20} MiB of text; save it without"
            ) from error
        raise UserError(
            f"cannot read {str(path)!r}: it is not an image, or a broken one ({one_line(error)})"
        ) from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))  # first, so that pixels outside it do not count
    return np.asarray(square.resize((size, size), resample))


@contextlib.contextmanager
def _long_texts() -> Iterator[None]:
    """Let a PNG have as long a text as all texts together may be: programs store their whole workflow in one."""
    before = PngImagePlugin.MAX_TEXT_CHUNK
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    try:
        yield
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK = before


def _turn(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF data say; one whose data are broken stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow has no error of its own for them
        logger.warning("the EXIF data of the image are not used: %s", one_line(error))
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode but "F" to sRGB of 8 bits, on white."""
    icc_profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # gray of 16 bits, or of 31 if it has larger values, which `convert` would clip
        gray = np.asarray(image).clip(0)
        image = Image.fromarray((gray >> (8 if gray.max() < 1 << 16 else 23)).astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    rgb = _to_srgb(image, icc_profile)
    if alpha is None:
        return rgb
    background = Image.new("RGB", rgb.size, _BACKGROUND)
    return Image.composite(rgb, background, alpha)


def _to_srgb(image: Image.Image, icc_profile: bytes | None) -> Image.Image:
    """Convert an image of mode "L", "RGB", "CMYK" or "LAB" to sRGB; colours without a usable profile as Pillow does."""
    if image.mode == "LAB":
        return _transform(image, ImageCms.createProfile("LAB"))
    if icc_profile:
        try:
            return _transform(image, ImageCms.ImageCmsProfile(io.BytesIO(icc_profile)))
        except (OSError, ImageCms.PyCMSError) as error:
            logger.warning("the colour profile of the image is not used: %s", one_line(error))
    return image.convert("RGB")


def _transform(image: Image.Image, profile: Any) -> Image.Image:
    transformed = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert transformed is not None, "it is None for a transformation in place"
    return transformed


def _check_tokens(tokens: np.ndarray, path: Path, codebook_size: int) -> np.ndarray:
    """Return `tokens` as uint16. Raises UserError for one outside the codebook."""
    for extreme in (int(tokens.max()), int(tokens.min())):
        if not 0 <= extreme < codebook_size:
            raise UserError(f"{str(path)!r} gives token {extreme:,}, outside the model's codebook of {codebook_size:,}")
    return tokens.astype(np.uint16)
