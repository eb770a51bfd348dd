"""Decode the pictures of an archive into files.

Rows are read, checked and packed into batches of one size; while the device computes a batch, threads encode
and write the one before it. What is finished on disk is not decoded again.
"""

import contextlib
import functools
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import jax
import numpy as np

from dm_generations import compile_cache
from dm_generations.archive import Archive, ImageRow
from dm_generations.browser.manifest import Entry, GalleryEntry, build_manifest, write_manifest
from dm_generations.decode.codec import Codec
from dm_generations.decode.fit import check_fit
from dm_generations.decode.gallery import Sheet
from dm_generations.decode.npy import encode_npy
from dm_generations.decode.plan import GroupPlan, Layout, Selection, Target, is_finished, select_groups
from dm_generations.decode.png import encode_png
from dm_generations.decode.progress import Progress
from dm_generations.decode.tokens import BadTokens, tokens_of
from dm_generations.decode.writer import FileWriter
from dm_generations.errors import UserError
from dm_generations.files import remove_stale_temporaries
from dm_generations.models import checkpoints

_MAX_SHEET_PIXELS = 1 << 28  # of one file: 800 MB in memory, and each worker may hold several


@dataclass(frozen=True)
class Options:
    """How to decode; the command line's flags of the same names say more."""

    out_dir: Path
    layout: Layout = Layout("images", 8, 4)
    selection: Selection = Selection()
    codec: str | None = None  # a folder, a file or a name on the hub; None is the embedded one
    batch_size: int = 32
    num_workers: int | None = None  # None: one for each core
    overwrite: bool = False


@dataclass
class Report:
    """What a decode did. `problems` has a line for each bad row and each file that could not be written."""

    written: int = 0  # files
    already_there: int = 0  # files
    problems: list[str] = field(default_factory=list)
    page: Path | None = None  # to open in a browser


def decode_archive(archive: Archive, options: Options, warn: Callable[[str], None]) -> Report:
    """Write the pictures asked for under `options.out_dir`, with the page to look at them.

    Bad rows and files that cannot be written are reported (on stderr too), and the rest is done. UserError:
    nothing to decode or a codec that does not fit (before anything is written), a folder or disk that takes
    nothing more.
    """
    plans = select_groups(archive, options.selection)
    _check_folder(options.out_dir)
    job = _Job(archive, plans, options)
    due_count = job.count_due()
    codec = None
    if due_count and options.layout.mode == "npy":
        _make_folder(options.out_dir)
        codec = _AnyTokens()
    elif due_count:
        checkpoint = checkpoints.load(options.codec, "codec")
        grid, warnings = check_fit(archive, plans, checkpoint)
        for warning in warnings:
            warn(warning)
        codec = Codec.from_checkpoint(checkpoint, options.batch_size, grid=grid)
        _check_sheet_size(options.layout, codec.image_size)
        _make_folder(options.out_dir)
        compile_cache.enable()
    for folder in ("", *{plan.folder for plan in plans}):
        remove_stale_temporaries(options.out_dir / folder)
    with Progress(due_count) as progress:
        job.run(codec, progress)
    if options.layout.mode != "npy":
        job.write_page()
    return job.report


class _AnyTokens:
    """What stands for a codec where tokens are written as they are."""

    batch_size, token_count, codebook_size = 1, None, 1 << 16


class _Job:
    """One decode under way."""

    def __init__(self, archive: Archive, plans: list[GroupPlan], options: Options):
        self.archive, self.plans, self.options = archive, plans, options
        self.layout, self.out_dir = options.layout, options.out_dir
        self.report = Report()
        self.entries: dict[str, Entry | GalleryEntry] = {}  # by path, for files that are there or will be

    def count_due(self) -> int:
        """Pictures that are to be decoded."""
        targets = (target for plan in self.plans for target in plan.targets(self.layout))
        return sum(len(target.ranks) for target in targets if self._is_due(target))

    def run(self, codec: Codec | _AnyTokens | None, progress: Progress) -> None:
        """Decode and write what is due; `codec` may be None when nothing is."""
        batch_size = codec.batch_size if codec else 1
        cells = self._cells(codec, progress)
        with FileWriter(self.options.num_workers or _core_count()) as writer:
            if self.layout.mode == "npy":
                for sheet, _, tokens in cells:
                    encode = functools.partial(encode_npy, tokens)
                    writer.submit(self.out_dir / sheet.path, encode, self._when_written(sheet, progress))
                return
            for sheet, cell, picture in _decode(codec, _batches(cells, batch_size)):
                sheet.place(cell, picture)
                if sheet.is_full:
                    encode = functools.partial(encode_png, sheet.pixels)
                    writer.submit(self.out_dir / sheet.path, encode, self._when_written(sheet, progress))

    def write_page(self) -> None:
        """`manifest.js` and the page, for the files that are there."""
        if not self.entries:
            return
        manifest = build_manifest(self.layout.mode, self.archive.path.name, self.entries.values())
        try:
            self.report.page = write_manifest(self.out_dir, manifest)
        except OSError as error:
            raise UserError(f"cannot write the page into {self.out_dir}: {error.strerror}") from error

    def _is_due(self, target: Target) -> bool:
        return self.options.overwrite or not is_finished(os.path.join(self.out_dir, target.path))

    def _cells(self, codec: Codec | _AnyTokens | None, progress: Progress) -> Iterator[tuple[Sheet, int, np.ndarray]]:
        """The tokens to decode, with the place of each picture."""
        for plan in self.plans:
            rows = self.archive.rows(plan.settings, plan.count)
            for target in plan.targets(self.layout):
                members = list(islice(rows, len(target.ranks)))
                if codec is None or not self._is_due(target):
                    self.report.already_there += 1
                    self.entries[target.path] = _entry(plan, target, target.path, members)
                else:
                    yield from self._cells_of(plan, target, members, codec, progress)

    def _cells_of(
        self, plan: GroupPlan, target: Target, members: list[ImageRow], codec: Codec | _AnyTokens, progress: Progress
    ) -> Iterator[tuple[Sheet, int, np.ndarray]]:
        good = []
        for cell, row in enumerate(members):
            try:
                tokens = tokens_of(row.quantvec, row.quantvec_md5, codec.token_count, codec.codebook_size)
            except BadTokens as error:
                self._problem(f"image {row.id} was not decoded: {error}", progress)
            else:
                good.append((cell, tokens))
        if len(members) < len(target.ranks):
            self._problem(f"{target.path}: {self.archive.path} changed while it was read; run again", progress)
        progress.advance(len(target.ranks) - len(good))
        if not good:
            return
        is_whole = len(good) == len(target.ranks)
        path = target.path if is_whole or not target.incomplete_path else target.incomplete_path
        self.entries[path] = _entry(plan, target, path, members)
        cols, rows = (self.layout.cols, self.layout.rows) if self.layout.is_gallery else (1, 1)
        replaced = target.incomplete_path if is_whole else None
        sheet = Sheet(path, replaced, cols, rows, len(good))
        for cell, tokens in good:
            yield sheet, cell, tokens

    def _when_written(self, sheet: Sheet, progress: Progress) -> Callable[[Exception | None], None]:
        path, replaced, picture_count = (
            sheet.path,
            sheet.replaced,
            sheet.picture_count,
        )  # not the sheet: its pixels

        def done(error: Exception | None) -> None:
            progress.advance(picture_count)
            if error is not None:
                del self.entries[path]
                reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
                self._problem(f"{self.out_dir / path} was not written: {reason}", progress)
                return
            self.report.written += 1
            if replaced is not None:
                with contextlib.suppress(OSError):
                    (self.out_dir / replaced).unlink()

        return done

    def _problem(self, line: str, progress: Progress) -> None:
        self.report.problems.append(line)
        progress.say(f"error: {line}")


def _batches(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _decode(
    codec: Codec | None, batches: Iterable[list[tuple[Sheet, int, np.ndarray]]]
) -> Iterator[tuple[Sheet, int, np.ndarray]]:
    """The picture (H, W, 3) uint8 of each place; a batch is handed over while the next one is computed."""
    running: tuple[list, jax.Array] | None = None
    for batch in batches:
        started = batch, codec.start(np.stack([tokens for _, _, tokens in batch]))
        if running is not None:
            yield from _pictures(*running)
        running = started
    if running is not None:
        yield from _pictures(*running)


def _pictures(
    batch: list[tuple[Sheet, int, np.ndarray]], pictures: jax.Array
) -> Iterator[tuple[Sheet, int, np.ndarray]]:
    for (sheet, cell, _), picture in zip(batch, jax.device_get(pictures), strict=False):  # the rest is padding
        yield sheet, cell, picture


def _entry(plan: GroupPlan, target: Target, path: str, members: list[ImageRow]) -> Entry | GalleryEntry:
    """What the page shows of a file."""
    settings = plan.settings
    shared = {
        "file": path,
        "prompt_id": settings.prompt_id,
        "prompt": plan.prompt,
        "sc_prompt_id": settings.sc_prompt_id,
        "sc_prompt": plan.sc_prompt,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "temperature": settings.temperature,
        "cond_scale": settings.cond_scale,
    }
    scores = tuple(row.clip_score_input if isinstance(row.clip_score_input, float) else None for row in members)
    if target.incomplete_path:
        return GalleryEntry(**shared, scores=scores, page=target.page)
    (row,) = members
    return Entry(**shared, rank=target.ranks.start, score=scores[0], key0=row.key0, key1=row.key1)


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


def _check_sheet_size(layout: Layout, image_size: int) -> None:
    width, height = layout.cols * image_size, layout.rows * image_size
    if layout.is_gallery and width * height > _MAX_SHEET_PIXELS:
        raise UserError(
            f"a gallery of {layout.cols} x {layout.rows} would have {width:,} x {height:,} pixels; "
            "use smaller --gallery-cols and --gallery-rows"
        )


def _core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
