"""Pairs of tokens and images, for trainers of codecs and of their decoders, in two files of a run's folder.

    tokens.bin   little-endian uint16, a row of L for each image
    pixels.bin   uint8, S * S * 3 for each image

They are written once, so that each image is read, encoded or decoded once. The folder appears whole or not at all.

n: images of a batch   S: pixels a side of the images that are learnt   L: tokens of an image
K: batches whose gradients are added up   B: images of one of them
"""

import hashlib
import logging
import os
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from dm_generations.archive import Selection
from dm_generations.archive.records import TOKEN_DTYPE
from dm_generations.errors import UserError, one_line
from dm_generations.inference.decoder import Decoder
from dm_generations.inference.encoder import Encoder
from dm_generations.models.loading import Checkpoint
from dm_generations.pipelines.encode import Columns, Item, open_source
from dm_generations.pipelines.init_tokens import read_image
from dm_generations.training import hosts
from dm_generations.training.data import Examples, choose_held_out, choose_rows
from dm_generations.training.options import TrainOptions
from dm_generations.training.run import PARAMS, Metrics, State
from dm_generations.training.trainer import EVALUATED_ROWS, BaseTrainer

SOURCE_SUFFIXES: Final = (".jsonl", ".csv", ".tar", ".parquet")
_TOKENS, _PIXELS = "tokens.bin", "pixels.bin"
_MAX_LOGGED: Final = 20  # images that cannot be read

logger = logging.getLogger(__name__)

Batch = tuple[np.ndarray, np.ndarray]  # tokens (n, L) and pixels (n, S, S, 3) uint8


class Pairs:
    """Tokens and pixels of images, mapped from their files."""

    def __init__(self, folder: Path, token_count: int, size: int):
        """Map the files.

        Args:
            folder: That `write_pairs` made.
            token_count: L.
            size: S.

        Raises:
            UserError: A file is missing, or is not of these sizes.
        """
        try:
            self._tokens = _map(folder / _TOKENS, TOKEN_DTYPE, (token_count,))
            self._pixels = _map(folder / _PIXELS, np.dtype(np.uint8), (size, size, 3))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {folder}: {one_line(error)}; remove it, it is made again") from error
        if len(self._tokens) != len(self._pixels):
            raise UserError(f"{folder} is damaged; remove it, it is made again")

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Read `tokens` (n, L) uint16 and `pixels` (n, S, S, 3) uint8 of these images."""
        return {"tokens": np.asarray(self._tokens[numbers]), "pixels": np.asarray(self._pixels[numbers])}

    def split(self, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Split the images by their tokens: equal ones are on one side.

        Args:
            share: Of what is held out.

        Returns:
            Numbers of the images to learn from, and of those held out.

        Raises:
            UserError: None are left to learn from.
        """
        unique, places = np.unique(self._tokens, axis=0, return_inverse=True)
        digests = [hashlib.sha256(row.tobytes()).digest() for row in unique]
        is_held_out = np.isin(places.reshape(-1), choose_held_out(digests, share, "images"))
        return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


class PairsTrainer(BaseTrainer):
    """What trainers on pairs share: their batches and their evaluation."""

    def __init__(self, checkpoint: Checkpoint, options: TrainOptions):
        """Make the optimiser.

        Raises:
            UserError: The devices do not divide the batch.
        """
        super().__init__(checkpoint, options)
        self._losses = jax.jit(self._compute_losses)
        self._pairs: Pairs | None = None

    def use(self, pairs: Pairs) -> None:
        """Set what it learns from. Raises UserError if nothing is left to learn from, or to hold out."""
        self._pairs = pairs
        self._numbers, held_out = pairs.split(self._options.held_out)
        order = np.random.default_rng([self._options.seed, 3]).permutation(len(held_out))
        self._evaluated = held_out[np.sort(order[:EVALUATED_ROWS])]
        logger.info("learning from %s images; %s images are held out", f"{len(self._numbers):,}", f"{len(held_out):,}")

    def make_batch(self, step: int) -> dict[str, jax.Array]:
        """Make the batch of a step.

        Returns:
            `tokens` (K, B, L) uint16 and `pixels` (K, B, S, S, 3) uint8.
        """
        assert self._pairs is not None
        count = self._options.batch_size * self._options.accumulate
        return self._put_batch(
            self._pairs.read(self._numbers[choose_rows(self._options.seed, step, count, len(self._numbers))])
        )

    def evaluate(self, state: State) -> Metrics:
        """Compute the mean loss of images that are held out, by the `params` of a state."""
        assert self._pairs is not None
        size, found = self._options.batch_size, []
        for first in range(0, len(self._evaluated), size):
            numbers = self._evaluated[first : first + size]
            rows = self._put_rows(self._pairs.read(np.resize(numbers, size)))  # by repeating them
            key = jax.random.fold_in(jax.random.key(self._options.seed), 2**32 - 1 - first)  # of no step
            losses = hosts.fetch(self._losses(state[PARAMS], self._frozen, rows, key))
            found.append({name: values[: len(numbers)] for name, values in losses.items()})
        if not found:
            return {}
        return {f"held_out_{name}": np.concatenate([each[name] for each in found]).mean() for name in found[0]}

    @abstractmethod
    def _compute_losses(self, params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        """Return "loss", and parts of it, of each image of a batch: (B,) float32."""


def write_pairs(
    folder: Path, sources: Sequence[Path], selection: Selection, codec: Checkpoint, size: int, batch_size: int
) -> Pairs:
    """Write the pairs of some sources, or open those that have been written.

    Args:
        folder: To write.
        sources: Archives, whose tokens the codec decodes; or what `encode` takes, whose images it encodes.
        selection: Of the images of archives.
        codec: It has an encoder, if there is an image to encode.
        size: S.
        batch_size: Images at a time.

    Raises:
        UserError: A source cannot be read, the codec's images are of another size, or a file cannot be written.
    """
    token_count = codec.config.grid**2
    if folder.is_dir():
        return Pairs(folder, token_count, size)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    archives = [source for source in sources if not _has_images(source)]
    readers: list[Iterator[Batch]] = [_read_archives(archives, selection, codec, size, batch_size)] if archives else []
    readers += [_read_images(source, codec, size, batch_size) for source in sources if _has_images(source)]
    count = 0
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with open(unfinished / _TOKENS, "wb") as tokens_file, open(unfinished / _PIXELS, "wb") as pixels_file:
            for reader in readers:
                for tokens, pixels in reader:
                    tokens_file.write(tokens.astype(TOKEN_DTYPE).tobytes())
                    pixels_file.write(pixels.tobytes())
                    count += len(tokens)
        if not count:
            raise UserError(f"{', '.join(map(str, sources))}: no images to learn from")
        os.rename(unfinished, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or one_line(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Pairs(folder, token_count, size)


def _has_images(source: Path) -> bool:
    """Whether a source is one of images, not an archive."""
    return source.is_dir() or source.suffix.lower() in SOURCE_SUFFIXES


def _read_archives(
    paths: Sequence[Path], selection: Selection, codec: Checkpoint, size: int, batch_size: int
) -> Iterator[Batch]:
    """Yield the tokens of archives, and the codec's images of them."""
    if codec.config.image_size != size:
        raise UserError(
            f"{paths[0]}: the images of codec {codec.name!r:.100} have {codec.config.image_size} pixels, the decoder's "
            f"{size}: train it on images, a folder for instance"
        )
    decoder = Decoder.from_checkpoint(codec, batch_size)
    with Examples(paths, selection, codec, codec.config.grid**2) as examples:
        for first in range(0, len(examples.rows), batch_size):
            _, tokens = examples.read(range(first, min(first + batch_size, len(examples.rows))))
            yield tokens, decoder(tokens.astype(TOKEN_DTYPE))
            _log(first + len(tokens), batch_size)


def _read_images(source: Path, codec: Checkpoint, size: int, batch_size: int) -> Iterator[Batch]:
    """Yield the images of a source, and the codec's tokens of them; those that cannot be read are logged."""
    encoder, side = Encoder(codec), codec.config.image_size
    pending: list[tuple[np.ndarray, np.ndarray]] = []  # as the codec and as the decoder take them
    failed = done = 0

    def encode() -> Batch:
        count = len(pending)
        images = np.stack([image for image, _ in pending])
        padded = np.concatenate([images, np.repeat(images[-1:], batch_size - count, axis=0)])
        pixels = np.stack([image for _, image in pending])
        pending.clear()
        return encoder.encode(padded)[:count], pixels

    for item in open_source(source, Columns()):
        try:
            pending.append(_read_item(item, side, size))
        except UserError as error:
            failed += 1
            if failed <= _MAX_LOGGED:
                logger.warning("left out: %s", error)
            continue
        if len(pending) == batch_size:
            yield encode()
            done += batch_size
            _log(done, batch_size)
    if pending:
        yield encode()
    if failed > _MAX_LOGGED:
        logger.warning("left out %s more images", f"{failed - _MAX_LOGGED:,}")


def _read_item(item: Item, codec_size: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    content = item.read()
    image = read_image(item.name, codec_size, content=content)
    return image, image if size == codec_size else read_image(item.name, size, content=content)


def _log(done: int, batch_size: int) -> None:
    if done // 1000 != (done - batch_size) // 1000:
        logger.info("%s images read", f"{done:,}")


def _map(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(path, dtype, "r").reshape(-1, *shape)
