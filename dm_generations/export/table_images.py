"""The images of tables, decoded and encoded, for data sets that hold images.

L: tokens of an image
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dm_generations.archive import Archive, ArchiveError
from dm_generations.archive.records import BadTokensError, tokens_from_blob
from dm_generations.archive.selection import Selection
from dm_generations.archive.tables import Table
from dm_generations.export.output_file import Encoding
from dm_generations.export.plan import check_codec, select_groups
from dm_generations.inference.decoder import Decoder
from dm_generations.models.loading import load_checkpoint
from dm_generations.runtime import compile_cache
from dm_generations.runtime.device import core_count

_BATCH_SIZE: Final = 32


@dataclass(frozen=True)
class _Image:
    tokens: np.ndarray  # (L,) uint16


class ImageMaker:
    """Makes the files of the images of tables."""

    def __init__(self, archive: Archive, selection: Selection, codec: str | None, encoding: Encoding):
        """Load the codec.

        Args:
            archive: Whose images they are.
            selection: Which images.
            codec: A folder, a file or a name on the hub; None is the one that ships.
            encoding: Of the files.

        Raises:
            UserError: Nothing is selected, or the codec is not one for these images.
        """
        checkpoint = load_checkpoint(codec, "codec")
        grid, self.warnings = check_codec(archive, select_groups(archive, selection), checkpoint)
        compile_cache.enable()
        self._decoder = Decoder.from_checkpoint(checkpoint, _BATCH_SIZE, grid=grid)
        self._encoding, self._archive = encoding, archive
        self._threads = ThreadPoolExecutor(core_count(), "encode")

    def __call__(self, table: Table) -> Sequence[dict[str, Any]]:
        """Return {"bytes", "path"} for each image of a table.

        Raises:
            ArchiveError: Tokens cannot be decoded.
        """
        images = [_Image(self._tokens(*row)) for row in zip(table["id"], table["tokens"], strict=True)]
        files: list[bytes] = []
        for _, pixels in self._decoder.decode_batches(images):
            files += self._threads.map(self._encoding.encode, pixels)
        names = (f"{row_id:09d}{self._encoding.extension}" for row_id in table["id"])
        return [{"bytes": content, "path": name} for content, name in zip(files, names, strict=True)]

    def _tokens(self, row_id: int, blob: bytes) -> np.ndarray:
        try:
            return tokens_from_blob(blob, None, self._decoder.token_count, self._decoder.codebook_size)
        except BadTokensError as error:
            raise ArchiveError(f"{self._archive.path}: image {row_id} cannot be decoded: {error}") from error
