"""Decode the pictures of an archive into files.

Rows are read, checked and packed into batches of one size; while the device computes a batch, threads encode
and write the one before it. What is finished on disk is not decoded again.
"""

import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from dm_generations.archive import Archive
from dm_generations.atomic_io import remove_stale_temporaries
from dm_generations.decode.fit import check_fit
from dm_generations.decode.job import AnyTokens, Job
from dm_generations.decode.options import Options, Report
from dm_generations.decode.plan import select_groups
from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder
from dm_generations.models.loading import load_checkpoint
from dm_generations.progress import Progress
from dm_generations.runtime import compile_cache

__all__ = ["Options", "Report", "decode_archive"]

_MAX_SHEET_PIXELS = 1 << 28  # of one file: 800 MB in memory, and each worker may hold several
_LEAST_BATCH = 64  # a larger one is cut down to the power of two that holds all pictures


def decode_archive(archive: Archive, options: Options, warn: Callable[[str], None]) -> Report:
    """Write the pictures asked for under `options.out_dir`, with the page to look at them.

    Bad rows and files that cannot be written are reported (on stderr too), and the rest is done. UserError:
    nothing to decode or a codec that does not fit (before anything is written), a folder or disk that takes
    nothing more.
    """
    plans = select_groups(archive, options.selection)
    _check_folder(options.out_dir)
    job = Job(archive, plans, options)
    due_count = job.count_due()
    codec = None
    if due_count and options.layout.mode == "npy":
        _make_folder(options.out_dir)
        codec = AnyTokens()
    elif due_count:
        checkpoint = load_checkpoint(options.codec, "codec")
        grid, warnings = check_fit(archive, plans, checkpoint)
        for warning in warnings:
            warn(warning)
        batch_size = _useful_batch_size(options.batch_size, due_count) if options.batch_size else "auto"
        codec = Decoder.from_checkpoint(checkpoint, batch_size, options.dtype, grid=grid)
        _check_sheet_size(options, codec.image_size)
        if options.layout.is_seamless:
            codec = codec.tiled(options.layout.rows, options.layout.cols)
        _make_folder(options.out_dir)
        compile_cache.enable()
    folders = [] if options.layout.is_sharded else {plan.folder for plan in plans}
    for folder in ("", *folders):
        remove_stale_temporaries(options.out_dir / folder)
    with Progress(due_count) as progress:
        job.run(codec, progress)
    job.write_page()
    return job.report


def _useful_batch_size(asked: int, due_count: int) -> int:
    """Not many more than there are: all of a batch is decoded, filled or not. Of few sizes, each is compiled anew."""
    return min(asked, max(_LEAST_BATCH, 1 << (due_count - 1).bit_length()))


def _check_folder(out_dir: Path) -> None:
    try:
        is_folder = stat.S_ISDIR(out_dir.stat().st_mode)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise _bad_folder(out_dir, error) from error
    if not is_folder:
        raise UserError(f"{out_dir} is a file, not a folder; choose another with --out-dir")


def _make_folder(out_dir: Path) -> None:
    """Make it where it is missing, and find out now whether it can be written."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
    except (OSError, ValueError) as error:
        raise _bad_folder(out_dir, error) from error


def _bad_folder(out_dir: Path, error: OSError | ValueError) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else error
    return UserError(f"cannot write into {str(out_dir)!r}: {reason}; choose another folder with --out-dir")


def _check_sheet_size(options: Options, image_size: int) -> None:
    if not options.layout.is_gallery:
        return
    options.strips.check()
    cols, rows = options.layout.cols, options.layout.rows
    width, height = options.strips.size(cols, rows, image_size)
    if width * height > _MAX_SHEET_PIXELS or max(width, height) > options.encoding.max_side:
        raise UserError(
            f"a gallery of {cols} x {rows} would have {width:,} x {height:,} pixels, too many for memory or for "
            f"{options.encoding.format}; use smaller --gallery-cols and --gallery-rows"
        )
