"""Codes that are given, not drawn: the first ones of a picture, which the model goes on from.

They come from a picture, through the codec's encoder, or from a file of tokens as `--output npy` writes it.

L: codes of a picture, row-major over its grid   S: pixels a side of the codec's pictures
"""

import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from dm_generations.archive import init_md5
from dm_generations.decode.tokens import TOKEN_DTYPE
from dm_generations.errors import UserError, one_line
from dm_generations.models.loading import Checkpoint

# Of a picture's codes, what is kept of a given one unless told otherwise: 14 rows of 32, as OpenAI primed DALL-E
# (Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021) and DALLE-pytorch's `generate_images` does.
KEPT_SHARE = 14 / 32
_BACKGROUND = (255, 255, 255)  # behind what is transparent


class Given(NamedTuple):
    """The codes of one picture, of which the first `count` are kept and the rest drawn."""

    tokens: np.ndarray  # (L,) uint16
    count: int  # 1 to L - 1

    @property
    def md5(self) -> str:
        """Hex, of the codes that are kept, as an archive stores it."""
        return init_md5(self.tokens.astype(TOKEN_DTYPE).tobytes(), self.count)


def load_given(
    init_image: Path | None,
    init_tokens: Path | None,
    init_count: int | None,
    codec: Checkpoint,
    token_count: int,
    codebook_size: int,
) -> Given | None:
    """What --init-image or --init-tokens and --init-count ask for; None where nothing does.

    init_count: codes that are kept; None is `KEPT_SHARE` of them   token_count: L, a square   codebook_size: codes that
    the model and the codec both have
    Raises UserError for flags that exclude or need each other, and as the functions below.
    """
    if init_image is not None and init_tokens is not None:
        raise UserError("use just one of --init-image and --init-tokens")
    if init_image is None and init_tokens is None:
        if init_count is not None:
            raise UserError(
                "--init-count says how many codes of --init-image or --init-tokens are kept; give one of them"
            )
        return None
    count = kept_count(init_count, token_count)
    if init_tokens is not None:
        return Given(read_tokens(init_tokens, token_count, codebook_size), count)
    return Given(_checked(encode_picture(init_image, codec, token_count), init_image, codebook_size), count)


def kept_count(init_count: int | None, token_count: int) -> int:
    """How many codes are kept, 1 to L - 1. Raises UserError for another number."""
    count = int(KEPT_SHARE * token_count) if init_count is None else init_count
    if not 1 <= count < token_count:
        raise UserError(
            f"--init-count {count} is not between 1 and {token_count - 1}: a picture has {token_count} codes"
        )
    return count


def read_tokens(path: Path, token_count: int, codebook_size: int) -> np.ndarray:
    """The codes (L,) uint16 in a `.npy` file of L whole numbers, of any integer dtype and shape.

    Raises UserError for what is no such file, another number of codes, or one outside the codebook.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files of older versions of NumPy
            # Mapped, so that a header which lies about the size is refused and not believed.
            found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, TypeError, EOFError, SyntaxError, MemoryError, OverflowError) as error:
        # NumPy takes whatever is no .npy file for a pickle, and its message is about those.
        raise UserError(f"{str(path)!r} is not a .npy file of codes, as --output npy writes them") from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise UserError(f"{str(path)!r} is an .npz file; give one array of it, saved as .npy")
    if found.dtype.kind not in "iu":
        raise UserError(f"{str(path)!r} holds {found.dtype} values; codes are whole numbers")
    if found.size != token_count:
        raise UserError(f"{str(path)!r} holds {found.size:,} codes; pictures of this model have {token_count:,}")
    return _checked(np.asarray(found).reshape(-1), path, codebook_size)


def encode_picture(path: Path, codec: Checkpoint, token_count: int) -> np.ndarray:
    """The codes (L,) uint16 that the codec's encoder makes of a picture file, cropped and resized to its size.

    Raises UserError for what is no picture, and for a codec that has no encoder.
    """
    if not has_encoder(codec):
        raise UserError(
            f"codec {codec.name!r} has no encoder, so it makes no codes of a picture; give one that has it with --codec"
        )
    grid = math.isqrt(token_count)
    picture = read_picture(path, codec.config.image_size // codec.config.grid * grid)
    return encode_pixels(picture[None], codec)[0]


def has_encoder(codec: Checkpoint) -> bool:
    """Whether it makes codes of pictures too: min-dalle's `detoker.pt`, for one, only has a decoder."""
    return codec.params.keys() >= set(codec.network_class.ENCODER_PARTS)


def encode_pixels(pixels: np.ndarray, codec: Checkpoint) -> np.ndarray:
    """Codes (n, L) uint16 of pictures (n, S, S, 3) uint8, sRGB, by an encoder in float32."""
    import jax
    import jax.numpy as jnp

    from dm_generations.programs import Kept
    from dm_generations.runtime.params import matmul_precision, put_params

    model = codec.network_class(codec.config, jnp.float32)

    @jax.jit
    def encode(params, pixels):
        with matmul_precision(jnp.float32):
            _, tokens = model.apply({"params": params}, pixels.astype(jnp.float32) / 255, method="encode")
        return tokens.astype(jnp.uint16)

    program = Kept(encode, closed_over=(codec.kind, codec.config))
    return jax.device_get(program(put_params(codec.params), jax.device_put(pixels)))


def read_picture(path: Path, size: int) -> np.ndarray:
    """A picture file as (size, size, 3) uint8, sRGB: the middle square of it, resized with a Lanczos filter.

    Turned as its EXIF says, on white where it is transparent, the first picture of an animation.
    Raises UserError for what Pillow cannot read, and for more pixels than it takes for harmless.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                if opened.mode == "F":  # of no agreed range
                    raise UserError(f"{str(path)!r} has floating-point pixels; save it with 8 or 16 bits a channel")
                picture = _rgb(ImageOps.exif_transpose(opened))
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(
            f"{str(path)!r} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller first"
        ) from error
    except OSError as error:
        reason = error.strerror or "it is no picture, or a broken one"
        raise UserError(f"cannot read {str(path)!r}: {reason}") from error
    except Exception as error:  # readers of single formats let errors of all kinds through
        raise UserError(f"cannot read {str(path)!r}: it is no picture, or a broken one ({one_line(error)})") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))  # first, so that nothing beside it shows
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode == "I":  # grey of 16 bits, which `convert` would clip
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        behind = Image.new("RGBA", picture.size, _BACKGROUND)
        picture = Image.alpha_composite(behind, picture)
    return picture.convert("RGB")


def _checked(tokens: np.ndarray, path: Path, codebook_size: int) -> np.ndarray:
    """`tokens` as uint16. Raises UserError for one outside the codebook."""
    for extreme in (int(tokens.max()), int(tokens.min())):
        if not 0 <= extreme < codebook_size:
            raise UserError(f"{str(path)!r} gives code {extreme:,}, outside the model's codebook of {codebook_size:,}")
    return tokens.astype(np.uint16)
