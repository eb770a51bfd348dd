"""Tokens to WebP images on demand: requests that arrive together are decoded together, and the files are kept.

L: tokens of an image   n: images of a batch   H, W: pixels of an image
"""

import asyncio
import concurrent.futures
import contextlib
import io
import logging
import os
import textwrap
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dm_generations.archive import ModelInfo
from dm_generations.archive.records import BadTokensError, format_shape, square_side, tokens_from_blob
from dm_generations.atomic_io import remove_stale_temporaries, write_atomic
from dm_generations.errors import UserError, one_line, printable
from dm_generations.export.manifest import HASH_DIGITS
from dm_generations.export.output_file import Encoding
from dm_generations.inference.decoder import Decoder, RowKey
from dm_generations.models.loading import Checkpoint
from dm_generations.paths import cache_dir
from dm_generations.runtime import compile_cache

if TYPE_CHECKING:
    from dm_generations.inference.diffusion import Diffusion

MAX_SIDE: Final = 2048  # pixels
MAX_DECODERS: Final = 4  # for grids of other sizes
MAX_CACHE_BYTES: Final = 1 << 30
COLLECT_S: Final = 0.008  # requests that arrive within this time are decoded together
# A batch has a fixed size, and a CPU takes as long for an empty place in it; a browser asks for 6 images at a time.
_CPU_BATCH_PIXELS: Final = 1 << 14
_MAX_BATCH: Final = 16
_PRUNE_AFTER: Final = 64 << 20  # bytes written
_NOTICE_SIDE: Final = 256  # pixels
_NOTICE_COLOURS: Final = (238, 238, 240), (70, 70, 76)  # of the ground and the text
_logger = logging.getLogger(__name__)


class UnknownImageError(UserError):
    """An image that is not in the archive."""


class UndecodableError(UserError):
    """An image that is in the archive, with tokens that this codec does not decode."""


# Tokens (L,) uint16 and the key of the row of images by MD5; an exception in place of those that cannot be shown.
LoadTokens = Callable[[list[str]], Awaitable[Mapping[str, "tuple[np.ndarray, RowKey] | UserError"]]]


def hash_of(codec: Checkpoint, diffusion: "Diffusion | None" = None) -> str:
    """Return hex digits that differ for what decodes the same tokens to other images."""
    return codec.sha256 if diffusion is None else diffusion.hash_with(codec.sha256)


class ImageCache:
    """Files of images by the MD5 of their tokens, for one codec; the least recently used ones are deleted."""

    def __init__(self, codec_sha256: str, max_bytes: int = MAX_CACHE_BYTES):
        self._max_bytes = max_bytes
        self._written = 0
        self._folder: Path | None = None
        try:
            folder = cache_dir("images") / codec_sha256
            folder.mkdir(mode=0o700, exist_ok=True)
            remove_stale_temporaries(folder)
            compile_cache.prune(folder.parent, max_bytes)
            self._folder = folder
        except (OSError, UserError) as error:
            _logger.warning("decoded images are not cached: %s", error)

    def read(self, md5: str) -> bytes | None:
        """Return a file, None if there is none."""
        if self._folder is None:
            return None
        path = self._folder / f"{md5}.webp"
        try:
            data = path.read_bytes()
            os.utime(path)  # it is used; access times are not kept everywhere
        except OSError:
            return None
        # https://developers.google.com/speed/webp/docs/riff_container: its length is in its head.
        is_whole = data[:4] == b"RIFF" and len(data) == 8 + int.from_bytes(data[4:8], "little")
        return data if is_whole else None

    def write(self, md5: str, data: bytes) -> None:
        """Keep a file; a disk that takes it not costs only time."""
        if self._folder is None:
            return
        try:
            write_atomic(self._folder / f"{md5}.webp", data)
            self._written += len(data)
            if self._written > min(_PRUNE_AFTER, self._max_bytes // 16):
                self._written = 0
                compile_cache.prune(self._folder.parent, self._max_bytes)
        except OSError as error:
            _logger.warning("decoded images are not cached: %s", one_line(error))
            self._folder = None


@dataclass
class _Job:
    """An image that requests wait for."""

    future: "asyncio.Future[bytes]"
    waiter_count: int = 0


@dataclass
class ImageService:
    """Decodes images with one codec. `run` has to run while `get` is called.

    Attributes:
        codec: What decodes the tokens.
        load_tokens: Asked for tokens by MD5.
        cache: Where files are kept.
        diffusion: What decodes in place of the codec's own decoder.
    """

    codec: Checkpoint
    load_tokens: LoadTokens
    cache: ImageCache
    diffusion: "Diffusion | None" = None
    decoded_count: int = 0
    _waiting: dict[str, _Job] = field(default_factory=dict)
    _decoders: dict[int, Decoder] = field(default_factory=dict)
    _has_work: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._device = concurrent.futures.ThreadPoolExecutor(1, "device")
        self._encoders = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1, "encode")

    @property
    def codec_hash(self) -> str:
        """The codec in addresses."""
        return hash_of(self.codec, self.diffusion)[:HASH_DIGITS]

    async def get(self, md5: str) -> bytes:
        """Return an image as a WebP file. If the caller is cancelled before the image's turn, it is not decoded.

        Raises:
            UserError: It is not in the archive, or cannot be decoded.
        """
        loop = asyncio.get_running_loop()
        if (data := await loop.run_in_executor(self._encoders, self.cache.read, md5)) is not None:
            return data
        job = self._waiting.get(md5)
        if job is None:
            job = self._waiting[md5] = _Job(loop.create_future())
            self._has_work.set()
        job.waiter_count += 1
        try:
            return await asyncio.shield(job.future)
        finally:
            job.waiter_count -= 1
            if not job.waiter_count and self._waiting.get(md5) is job:
                del self._waiting[md5]

    async def run(self) -> None:
        """Decode what is waited for, until cancelled."""
        loop = asyncio.get_running_loop()
        running: set[asyncio.Task[None]] = set()
        try:
            warm_up = loop.run_in_executor(self._device, self._warm_up)
            while True:
                await self._has_work.wait()
                await asyncio.sleep(COLLECT_S)
                await warm_up
                jobs = self._take_jobs()
                if not self._waiting:
                    self._has_work.clear()
                try:
                    decoded = await self._decode_jobs(jobs)
                except Exception as error:  # of the device, for instance: the next ones may succeed
                    if not isinstance(error, UserError):
                        _logger.warning("images cannot be decoded: %s", one_line(error))
                        error = UserError(f"this image cannot be decoded: {one_line(error)}")
                    for job in jobs.values():
                        _fail(job, error)
                    continue
                # While these are encoded, the device decodes the next ones.
                task = loop.create_task(self._encode_jobs(decoded))
                running.add(task)
                task.add_done_callback(running.discard)
        finally:
            self._device.shutdown(wait=False, cancel_futures=True)
            self._encoders.shutdown(wait=False, cancel_futures=True)

    def _take_jobs(self) -> dict[str, _Job]:
        decoder = self._decoders.get(self.codec.config.grid)
        limit = _MAX_BATCH if decoder is None else max(decoder.batch_size * decoder.concurrency, 1)
        return {md5: self._waiting.pop(md5) for md5 in list(self._waiting)[:limit]}

    async def _decode_jobs(self, jobs: dict[str, _Job]) -> "list[tuple[str, _Job, np.ndarray]]":
        """Return images with their pixels (H, W, 3) uint8; those without tokens have failed."""
        tokens = await self.load_tokens(list(jobs))
        by_length: dict[int, dict[str, tuple[np.ndarray, RowKey]]] = {}
        for md5, job in jobs.items():
            found = tokens[md5]
            if isinstance(found, UserError):
                _fail(job, found)
            else:
                by_length.setdefault(len(found[0]), {})[md5] = found
        decoded = []
        for batch in by_length.values():
            arrays, keys = np.stack([found for found, _ in batch.values()]), [key for _, key in batch.values()]
            pixels = await asyncio.get_running_loop().run_in_executor(self._device, self._decode, arrays, keys)
            decoded += [(md5, jobs[md5], image) for md5, image in zip(batch, pixels, strict=True)]
        return decoded

    async def _encode_jobs(self, decoded: "list[tuple[str, _Job, np.ndarray]]") -> None:
        loop = asyncio.get_running_loop()

        async def encode(md5: str, job: _Job, pixels: np.ndarray) -> None:
            try:
                data = await loop.run_in_executor(self._encoders, self._encode, md5, pixels)
            except Exception as error:
                _fail(job, UserError(f"this image cannot be encoded: {one_line(error)}"))
            else:
                if not job.future.done():
                    job.future.set_result(data)

        await asyncio.gather(*(encode(*one) for one in decoded))

    def _encode(self, md5: str, pixels: np.ndarray) -> bytes:
        data = Encoding("webp").encode(pixels)
        self.cache.write(md5, data)
        return data

    def _warm_up(self) -> None:
        """Compile before the first request; its error, if there is one, is that of the first request."""
        with contextlib.suppress(Exception):
            compile_cache.enable()
            self._decode(np.zeros((1, self.codec.config.grid**2), np.uint16), [RowKey()])
            self.decoded_count = 0

    def _decode(self, tokens: np.ndarray, keys: Sequence[RowKey]) -> np.ndarray:
        """Return images (n, H, W, 3) uint8 of tokens (n, L) uint16 of a square grid, of rows with these keys."""
        grid = round(tokens.shape[1] ** 0.5)
        if (decoder := self._decoders.get(grid)) is None:
            if len(self._decoders) == MAX_DECODERS:
                raise UserError(f"this archive has tokens of more than {MAX_DECODERS} sizes")
            decoder = self._decoders[grid] = self._make_decoder(grid)
        self.decoded_count += len(tokens)
        return decoder.decode(tokens, keys)

    def _make_decoder(self, grid: int) -> Decoder:
        if jax.local_devices()[0].platform == "cpu" and self.diffusion is None:
            size = self.codec.config.image_size // self.codec.config.grid * grid
            return Decoder.from_checkpoint(self.codec, max(1, _CPU_BATCH_PIXELS // size**2), grid=grid)
        decoder = Decoder.from_checkpoint(self.codec, "auto", grid=grid, diffusion=self.diffusion)
        decoder.set_batch_size(min(decoder.batch_size, _MAX_BATCH))
        return decoder


def draw_notice(text: str) -> bytes:
    """Return a WebP image that says why there is no other one; `text` may be of others."""
    ground, ink = _NOTICE_COLOURS
    image = Image.new("RGB", (_NOTICE_SIDE, _NOTICE_SIDE), ground)
    font = ImageFont.load_default(15)
    lines = textwrap.wrap(printable(text, 400), 30, max_lines=12)
    ImageDraw.Draw(image).multiline_text((14, 14), "\n".join(lines), ink, font)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def _fail(job: _Job, error: Exception) -> None:
    if not job.future.done():
        job.future.set_exception(error)
        job.future.exception()  # so that nothing is logged if nobody waits any more


def read_tokens(row: Mapping[str, Any], models: Mapping[int, ModelInfo], codec: Checkpoint) -> np.ndarray:
    """Read the tokens of an image, checked.

    Args:
        row: With quantvec, quantvec_md5 and codec_id.
        models: Of the archive.
        codec: What decodes them.

    Returns:
        (L,) uint16 of a square grid.

    Raises:
        BadTokensError: They cannot be decoded by this codec; the text says why.
    """
    config = codec.config
    grid, codebook_size = config.grid, config.codebook_size
    if row["codec_id"] is not None:
        recorded = models.get(row["codec_id"])
        if recorded is None or recorded.token_shape is None:
            raise BadTokensError("its codec is not in the archive")
        if recorded.sha256 != codec.sha256 or recorded.codebook_size != codebook_size:
            raise BadTokensError(
                f"it was made with codec {recorded.name!r:.100}; start `browse` with its folder as --codec"
            )
        side = square_side(recorded.token_shape)
        if side is None:
            raise BadTokensError(
                f"its tokens have shape {format_shape(recorded.token_shape)}, which is not decoded here"
            )
        grid = side
    if config.image_size // config.grid * grid > MAX_SIDE:
        raise BadTokensError(f"it has more than {MAX_SIDE:,} pixels a side")
    return tokens_from_blob(row["quantvec"], row["quantvec_md5"], grid**2, codebook_size)
