"""Images as what evaluators of FID take: one array `arr_0` of all, (n, H, W, 3) uint8, in a `.npz` file.

It is written as it is decoded, a batch at a time. 50,000 images of 256 px are 9.8 GB, of which memory holds a batch.
"""

import contextlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import numpy as np

from dm_generations.archive import Archive, ImageRow
from dm_generations.archive.records import BadTokensError, tokens_from_blob
from dm_generations.archive.selection import Selection
from dm_generations.atomic_io import replacing
from dm_generations.errors import UserError
from dm_generations.export.plan import check_codec, select_groups
from dm_generations.inference.decoder import Decoder
from dm_generations.models.loading import load_checkpoint
from dm_generations.runtime import compile_cache

_MEMBER = "arr_0.npy"  # as numpy.savez names the first array


class _Image(NamedTuple):
    tokens: np.ndarray  # (L,) uint16


def write_fid(
    archive: Archive,
    path: Path,
    selection: Selection,
    codec: str | None = None,
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, list[str]]:
    """Write the images of a selection. The file appears as a whole or not at all.

    Args:
        archive: Only read.
        path: The `.npz` file; one that is there is replaced.
        selection: Which images.
        codec: A folder, a file or a name on the hub; None is the embedded one.
        batch_size: Images decoded at a time.
        on_progress: Called with (done, total) images at the start and after every batch.

    Returns:
        How many images there are, and warnings about the codec.

    Raises:
        UserError: Nothing is selected, the codec is not one for these images, an image is damaged, or the file cannot
            be written.
    """
    checkpoint = load_checkpoint(codec, "codec")
    plans = select_groups(archive, selection)
    grid, warnings = check_codec(archive, plans, checkpoint)
    compile_cache.enable()
    decoder = Decoder.from_checkpoint(checkpoint, batch_size, grid=grid)
    total, side = sum(plan.count for plan in plans), decoder.image_size
    rows = (row for plan in plans for row in plan.rows(archive))
    on_progress(done := 0, total)
    try:
        with replacing(path) as file, _open_array(file, (total, side, side, 3)) as member:
            for images, pixels in decoder.decode_batches(_read(rows, decoder)):
                member.write(np.ascontiguousarray(pixels).data)
                on_progress(done := done + len(images), total)
            if done != total:
                raise UserError(f"{archive.path} has changed in the meantime; repeat the command")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return total, warnings


@contextlib.contextmanager
def _open_array(file: BinaryIO, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """Yield what the values of an array (of uint8, in C order) are to be written to, in a `.npz` file."""
    with zipfile.ZipFile(file, "w") as npz, npz.open(_MEMBER, "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(cast(Any, member), header)
        yield member


def _read(rows: Iterable[ImageRow], decoder: Decoder) -> Iterator[_Image]:
    for row in rows:
        try:
            yield _Image(tokens_from_blob(row.quantvec, row.quantvec_md5, decoder.token_count, decoder.codebook_size))
        except BadTokensError as error:
            raise UserError(f"image {row.id}: {error}; leave it out, or `verify` the archive") from error
