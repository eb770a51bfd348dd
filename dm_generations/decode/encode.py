"""Pixels to the bytes of a picture file: PNG, WebP or JPEG. All of it releases the GIL."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dm_generations.decode.metadata import Record, exif, png_chunks
from dm_generations.decode.png import encode_png

EXTENSIONS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
JPEG_QUALITY = 90
# Pixels on the longer side: what PNG, WebP and libjpeg take.
MAX_SIDES = {"png": (1 << 31) - 1, "webp": (1 << 14) - 1, "jpeg": 65_500}


@dataclass(frozen=True)
class Encoding:
    """How pixels become a file; small, so that it goes to the threads that encode."""

    format: str = "png"  # a key of EXTENSIONS
    quality: int | None = None  # 1 to 100, for webp (None: lossless) and jpeg (None: JPEG_QUALITY)
    png: str = "default"  # an effort of png.EFFORTS

    @property
    def extension(self) -> str:
        return EXTENSIONS[self.format]

    @property
    def max_side(self) -> int:
        """Pixels on the longer side that the format takes."""
        return MAX_SIDES[self.format]

    def encode(self, pixels: np.ndarray, record: Record | None = None) -> bytes | memoryview:
        """A file of `pixels` (H, W, 3) uint8, sRGB, with `record` inside (see metadata.py)."""
        if self.format == "png":
            return encode_png(pixels, self.png, png_chunks(record) if record else ())
        buffer = io.BytesIO()
        tags = {"exif": exif(record, self.format == "jpeg")} if record else {}
        picture = Image.fromarray(pixels)
        if self.format == "jpeg":
            picture.save(buffer, "JPEG", quality=self.quality or JPEG_QUALITY, **tags)
        elif self.quality is None:
            # Method and quality 0 are libwebp's quickest search: a PNG's size, in a PNG's time.
            picture.save(buffer, "WEBP", lossless=True, method=0, quality=0, **tags)
        else:
            picture.save(buffer, "WEBP", quality=self.quality, **tags)
        return buffer.getvalue()
