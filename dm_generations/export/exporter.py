"""Decode the images of an archive into files: read -> decode -> encode -> write.

Rows are read, checked and packed into batches of one size; while the device computes a batch, threads encode and write
the one before it. What is finished on disk is not decoded again, unless its rank went to another image.

H, W: pixels of one image   L: tokens of one image
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, repeat
from typing import Literal

import numpy as np

from dm_generations.archive import Archive, ImageRow
from dm_generations.archive.records import BadTokensError, count_tokens, tokens_from_blob
from dm_generations.atomic_io import remove_stale_temporaries, write_atomic
from dm_generations.errors import UserError
from dm_generations.export.journal import Journal, identify
from dm_generations.export.manifest import (
    THUMBNAILS,
    Entry,
    build_manifest,
    describe_decoder,
    make_entry,
    manifest_files,
    thumbnail_path,
    write_manifest,
)
from dm_generations.export.options import ExportOptions, ExportReport
from dm_generations.export.output_file import (
    Decoded,
    EncodeContext,
    OutputFile,
    PassthroughDecoder,
    TokenDecoder,
    encode_npy,
    fill_cells,
    thumbnail_side,
)
from dm_generations.export.plan import GroupPlan, Target, check_codec, is_finished, select_groups
from dm_generations.export.writers import (
    FileWriter,
    Member,
    Shard,
    ShardSet,
    ShardWriter,
    check_folders,
    fingerprint,
    make_folder,
)
from dm_generations.inference.decoder import Decoder, RowKey
from dm_generations.models.loading import load_checkpoint
from dm_generations.paths import utf8_path
from dm_generations.runtime import compile_cache
from dm_generations.runtime.device import core_count

_logger = logging.getLogger(__name__)
_MAX_FILE_PIXELS = 1 << 28  # 800 MB in memory, and each worker may hold several
_LEAST_BATCH = 64  # a larger one is cut down to the power of two that holds all images

# What is decoded as one: its file, its cell there, its tokens (L,) uint16 and its key; or no cell, and all tokens
# (cells, L).
Item = tuple[OutputFile, int | None, np.ndarray, RowKey]


def export_archive(
    archive: Archive,
    options: ExportOptions,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_step: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write the selected images under `options.out_dir`, with the page to look at them.

    Bad rows and files that cannot be written are reported, and logged as errors, and the rest is done.

    Args:
        archive: The archive.
        options: What to write, and how.
        on_progress: Called with how many images are done, and of how many.
        on_step: Called with how many steps of a batch a diffusion decoder has taken, and of how many.

    Returns:
        What was written, and the problems.

    Raises:
        UserError: There is nothing to decode, the codec is not one for these rows, or another decode writes there
            (before anything is written); or the folder or disk takes nothing more.
    """
    plans = select_groups(archive, options.selection)
    folders = [] if options.layout.is_sharded else sorted({plan.folder for plan in plans})
    if options.has_thumbnails:
        folders += [f"{folder}/{THUMBNAILS}" for folder in folders]
    check_folders(options.out_dir, folders)
    with Journal(options.out_dir) as journal:
        if options.layout.has_page:
            journal.open()
        exporter = Exporter(archive, plans, options, journal, on_progress)
        decoder = _load_decoder(archive, plans, options, exporter.due_count) if exporter.due_count else None
        if isinstance(decoder, Decoder):
            decoder.on_step = on_step
        for folder in ("", *folders):
            remove_stale_temporaries(utf8_path(options.out_dir, folder))
        on_progress(0, exporter.due_count)
        exporter.run(decoder)
        exporter.write_page()
    return exporter.report


class Exporter:
    """One export: what is to be written, and what is known of it by now."""

    def __init__(
        self,
        archive: Archive,
        plans: list[GroupPlan],
        options: ExportOptions,
        journal: Journal,
        on_progress: Callable[[int, int], None],
    ):
        self.archive, self.plans, self.options, self.journal = archive, plans, options, journal
        self.layout = replace(options.layout, image_extension=options.encoding.extension)
        self.out_dir = options.out_dir
        self.report = ExportReport()
        self._entries: dict[str, Entry] = {}  # by path, for files that are there or will be
        self._models = archive.models()
        self._decoder = None if options.diffusion is None else options.diffusion.describe()
        self._context = EncodeContext(
            self.layout, options.encoding, options.strips, options.has_metadata, self._models, self._decoder
        )
        folders = {"", *(plan.folder for plan in plans)}
        self._new_folders = {folder for folder in folders if not os.path.exists(utf8_path(self.out_dir, folder))}
        self._stale_paths = set(self._find_stale_tokens() if self.layout.mode == "npy" else self._find_stale())
        self._set_id = fingerprint(self._describe_set()) if self.layout.is_sharded else ""
        due = (target for _, target, shard in self._files() if self._is_due(target, shard))
        self.due_count = sum(len(target.ranks) for target in due)  # images that are to be decoded
        self._done_count = 0  # of them, those that are written, or cannot be
        self._on_progress = on_progress

    def run(self, decoder: TokenDecoder | None) -> None:
        """Decode and write what is due; `decoder` may be None when nothing is."""
        if self.layout.has_page:
            self.journal.open(create=True)
        workers = self.options.num_workers or core_count()
        files = _fill(_decode(decoder, self._read(decoder)))
        if self.layout.is_sharded:
            added, ended = partial(self._advance, 1), self._when_shard_ended
            with ShardWriter(self.out_dir, self.layout.mode, workers, added, ended, self._last_members) as shards:
                for file in files:
                    assert file.shard is not None, "all files have one"
                    shards.submit(file.shard, partial(file.encode_members, self._context))
        else:
            with FileWriter(workers) as writer:
                for file in files:
                    self.journal.flush()
                    done = self._when_written(file)
                    writer.submit(utf8_path(self.out_dir, file.path), partial(self._encode, file), done)

    def _encode(self, file: OutputFile) -> bytes:
        """Return the bytes of a file; its thumbnail is written before it, so that a finished file has one."""
        if self.options.has_thumbnails:
            path = utf8_path(self.out_dir, thumbnail_path(file.path))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, file.encode_thumbnail())
        return file.encode(self._context)

    def write_page(self) -> None:
        """Write `manifest.js`, the page and the compacted journal, for the files that are there.

        Raises:
            UserError: They cannot be written.
        """
        if not self.layout.has_page:
            return
        try:
            if self._entries:
                self.report.manifest = self._manifest()
                self.report.page = write_manifest(self.out_dir, self.report.manifest, self.options.page)
            self.report.left_out_count = len(self.journal.compact() - self._entries.keys())
        except OSError as error:
            raise UserError(f"cannot write the page into {self.out_dir}: {error.strerror}") from error

    # Which files.

    def _files(self) -> Iterator[tuple[GroupPlan, Target, Shard | None]]:
        """Yield all files asked for; those that are parts of shards, with the shard."""
        shards = ShardSet(self.layout.mode, self.layout.shard_size, self._set_id, self._is_path_due)
        targets = ((plan, target) for plan in self.plans for target in plan.targets(self.layout))
        for position, (plan, target) in enumerate(targets):
            yield plan, target, shards.at(position) if self.layout.is_sharded else None

    def _is_due(self, target: Target, shard: Shard | None) -> bool:
        return self._is_path_due(target.path) if shard is None else shard.is_due

    def _is_path_due(self, path: str) -> bool:
        is_due = self.options.overwrite or path in self._stale_paths
        return is_due or not self._is_finished(path)

    def _is_finished(self, path: str) -> bool:
        """Return whether a file was there before this export; asks the disk only where the file's folder was."""
        if path.rpartition("/")[0] in self._new_folders or not is_finished(self.out_dir, path):
            return False
        return not self.options.has_thumbnails or is_finished(self.out_dir, thumbnail_path(path))

    def _find_stale(self) -> Iterator[str]:
        """Yield paths of files whose ranks belong to other images by now."""
        for plan in self.plans if self.layout.has_page and not self.journal.is_empty else ():
            rows = self._rows(plan)
            for target in plan.targets(self.layout):
                members = list(islice(rows, len(target.ranks)))
                if members:
                    identity = identify(self._entry(plan, target, target.path, members))
                    if self._is_stale(target.path, identity, members):
                        yield target.path

    def _is_stale(self, path: str, identity: str, members: list[ImageRow]) -> bool:
        """Return whether a file is known to show other images than `members`."""
        # A row that cannot be read could not be decoded either.
        return self.journal.is_stale(path, identity) and all(row.quantvec for row in members)

    def _find_stale_tokens(self) -> Iterator[str]:
        """Yield paths of files of tokens that differ from those of the image of their rank. They have no journal."""
        for plan in self.plans:
            rows = plan.rows(self.archive)
            for target, row in zip(plan.targets(self.layout), rows, strict=False):  # fewer if the archive changes
                with contextlib.suppress(OSError, ValueError, BadTokensError):
                    path, content = utf8_path(self.out_dir, target.path), encode_npy(self._tokens(row, None))
                    is_there = self._is_finished(target.path)
                    if is_there and (path.stat().st_size != len(content) or path.read_bytes() != content):
                        yield target.path

    def _describe_set(self) -> Iterator[object]:
        """Yield what tells one set of shards from another."""
        yield self.layout.mode, self.layout.extension, self.layout.shard_size if self.layout.mode == "tar" else None
        if self._decoder is not None:
            yield describe_decoder(self._decoder), self.layout.decodings
        for plan in self.plans:
            yield plan.describe()
            for row in plan.rows(self.archive):
                yield row.id, row.quantvec_md5, row.clip_score_input, row.clip_score_tokenized

    # Read: rows to tokens.

    def _read(self, decoder: TokenDecoder | None) -> Iterator[Item]:
        """Yield the tokens to decode, with the place of each image."""
        current_plan: GroupPlan | None = None
        rows: Iterator[ImageRow] = iter(())
        finished_shard: Shard | None = None
        for plan, target, shard in self._files():
            if plan is not current_plan:
                current_plan, rows = plan, self._rows(plan)
            members = list(islice(rows, len(target.ranks)))
            is_due = self._is_due(target, shard)
            if shard is None and members and not is_due:
                entry = self._entry(plan, target, target.path, members)
                identity = identify(entry)
                # Since this export began: others may add to the archive.
                is_due = self._is_stale(target.path, identity, members)
            if decoder is not None and is_due:
                yield from self._read_file(plan, target, members, shard, decoder)
            elif is_due or not members:
                self._report_change(target)
            elif shard is None:
                self.report.already_there += 1
                self._entries[target.path] = entry
                self.journal.assume(target.path, identity)
            elif shard is not finished_shard:
                finished_shard = shard
                self.report.already_there += 1

    def _rows(self, plan: GroupPlan) -> Iterator[ImageRow]:
        """Yield the images of a group, each as often as it is decoded."""
        for row in plan.rows(self.archive):
            yield from repeat(row, self.layout.decodings)

    def _read_file(
        self, plan: GroupPlan, target: Target, members: list[ImageRow], shard: Shard | None, decoder: TokenDecoder
    ) -> Iterator[Item]:
        """Yield the tokens of one file."""
        tokens_by_cell = {}
        for cell, row in enumerate(members):
            try:
                tokens_by_cell[cell] = self._tokens(row, decoder)
            except BadTokensError as error:
                self._report_problem(f"image {row.id} was not decoded: {error}")
        if len(members) < len(target.ranks):
            self._report_change(target)
        self._advance(len(target.ranks) - len(tokens_by_cell))
        is_whole = len(tokens_by_cell) == len(target.ranks)
        if shard is not None and not is_whole:
            shard.is_whole = False
        if not tokens_by_cell:
            return
        path = target.path if is_whole or not target.incomplete_path else target.incomplete_path
        self._entries[path] = entry = self._entry(plan, target, path, members)
        if self.layout.has_page:
            self.journal.begin(path, identify(entry), self._is_finished(path))
        grid, decoded_grid = (1, 1), (1, 1)
        if self.layout.is_gallery:
            decoded_grid = self.layout.cols, self.layout.rows
            # The script of 2022 filled up with black, and its files stay as they are.
            is_trimmed = self.archive.version > 0
            grid = self.layout.trim(len(target.ranks), self.options.strips.captions) if is_trimmed else decoded_grid
        replaced_path = target.incomplete_path if is_whole else None
        file_rows = [(cell, members[cell]) for cell in tokens_by_cell]
        file = OutputFile(path, replaced_path, plan, target, file_rows, shard, grid, decoded_grid)
        if self.layout.is_seamless:
            tokens = fill_cells(tokens_by_cell, self.layout.images_per_file)
            yield file, None, tokens, RowKey()
        else:
            for cell, tokens in tokens_by_cell.items():
                number = self.layout.decoding(target.ranks.start + cell)
                yield file, cell, tokens, RowKey(*members[cell].key, number, plan.prompt)

    def _tokens(self, row: ImageRow, decoder: TokenDecoder | None) -> np.ndarray:
        """Return (L,) uint16. Raises BadTokensError for what the codec, or the one that the row records, cannot decode.

        Without a codec or a record, tokens may be of any number and any value.
        """
        if isinstance(decoder, Decoder):
            return tokens_from_blob(row.quantvec, row.quantvec_md5, decoder.token_count, decoder.codebook_size)
        recorded = None if row.codec_id is None else self._models.get(row.codec_id)
        if recorded is not None and recorded.token_shape and recorded.codebook_size:
            token_count = count_tokens(recorded.token_shape)
            return tokens_from_blob(row.quantvec, row.quantvec_md5, token_count, recorded.codebook_size)
        return tokens_from_blob(row.quantvec, row.quantvec_md5, None, 1 << 16)

    def _entry(self, plan: GroupPlan, target: Target, path: str, members: list[ImageRow]) -> Entry:
        return make_entry(plan, target, path, members, self._models, self.layout, self._decoder)

    # Written, or not.

    def _when_written(self, file: OutputFile) -> Callable[[Exception | None], None]:
        # Not the file itself: it holds pixels.
        path, replaced_path, image_count = file.path, file.replaced_path, len(file.rows)

        def done(error: Exception | None) -> None:
            self._advance(image_count)
            if error is not None:
                del self._entries[path]
                self._report_unwritten(path, error)
                return
            self.report.written += 1
            self.journal.confirm(path)
            if replaced_path is not None:
                with contextlib.suppress(OSError):
                    utf8_path(self.out_dir, replaced_path).unlink()

        return done

    def _when_shard_ended(self, shard: Shard, error: Exception | None) -> None:
        if error is not None:
            self._report_unwritten(shard.final_path, error)
        else:
            self.report.written += 1

    def _report_unwritten(self, path: str, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        self._report_problem(f"{self.out_dir / path} was not written: {reason}")

    def _report_change(self, target: Target) -> None:
        self._report_problem(
            f"{target.path}: {self.archive.path} changed while it was read; run the same command again"
        )

    def _report_problem(self, line: str) -> None:
        self.report.problems.append(line)
        _logger.error(line)

    def _advance(self, image_count: int) -> None:
        self._done_count += image_count
        self._on_progress(self._done_count, self.due_count)

    def _manifest(self) -> dict:
        mode = "gallery" if self.layout.is_gallery else "images"
        manifest = build_manifest(mode, self.archive.path.name, self._entries.values(), self._decoder)
        if self.options.has_thumbnails:
            side = thumbnail_side(utf8_path(self.out_dir, thumbnail_path(next(iter(self._entries)))))
            manifest["thumbnails"] = {"folder": THUMBNAILS, "side": side}
        return manifest

    def _last_members(self) -> list[Member]:
        """Return the page for a zip, which is the tree that separate files would be."""
        return list(manifest_files(self._manifest()).items()) if self.layout.mode == "zip" else []


# Decode: tokens to pixels.


def _decode(decoder: TokenDecoder | None, items: Iterator[Item]) -> Iterator[Item]:
    """Yield each item with pixels (H, W, 3) uint8 for its tokens; one batch is computed while another is yielded."""
    running: tuple[list[Item], Decoded] | None = None
    while batch := list(islice(items, decoder.batch_size if decoder else 1)):
        assert decoder is not None, "there are no items without one"
        started = batch, decoder.start(np.stack([item[2] for item in batch]), [item[3] for item in batch])
        if running is not None:
            yield from _wait(*running)
        running = started
    if running is not None:
        yield from _wait(*running)


def _wait(batch: list[Item], decoded: Decoded) -> Iterator[Item]:
    for (file, cell, _, key), image in zip(batch, decoded.images(), strict=True):
        yield file, cell, image, key


def _fill(items: Iterable[Item]) -> Iterator[OutputFile]:
    """Yield each file when its last image is on it."""
    for file, cell, pixels, _ in items:
        if cell is None:
            file.place_all(pixels)
        else:
            file.place(cell, pixels)
        if file.is_full:
            yield file


# Before anything is read.


def _load_decoder(archive: Archive, plans: list[GroupPlan], options: ExportOptions, due_count: int) -> TokenDecoder:
    """Return what decodes the rows of `plans`, once the output folder is there. Raises UserError."""
    layout = options.layout
    if layout.mode == "npy":
        make_folder(options.out_dir)
        return PassthroughDecoder()
    checkpoint = load_checkpoint(options.codec, "codec")
    grid, warnings = check_codec(archive, plans, checkpoint)
    for warning in warnings:
        _logger.warning(warning)
    batch_size = _limit_batch(options.batch_size, due_count)
    codec = Decoder.from_checkpoint(checkpoint, batch_size, options.dtype, grid, options.diffusion)
    _check_gallery_size(options, codec.image_size)
    if layout.is_seamless:
        codec = codec.tiled(layout.rows, layout.cols)
    make_folder(options.out_dir)
    compile_cache.enable()
    return codec


def _limit_batch(batch_size: int | None, due_count: int) -> int | Literal["auto"]:
    """Return not many more than are due: all of a batch is decoded, filled or not. Each size is compiled anew."""
    if batch_size is None:
        return "auto"
    return min(batch_size, max(_LEAST_BATCH, 1 << (due_count - 1).bit_length()))


def _check_gallery_size(options: ExportOptions, image_size: int) -> None:
    if not options.layout.is_gallery:
        return
    options.strips.check()
    cols, rows = options.layout.cols, options.layout.rows
    width, height = options.strips.size(cols, rows, image_size)
    if width * height > _MAX_FILE_PIXELS or max(width, height) > options.encoding.max_side:
        raise UserError(
            f"a gallery of {cols} x {rows} would have {width:,} x {height:,} pixels, too many for memory or for "
            f"{options.encoding.format}; use smaller --gallery-cols and --gallery-rows"
        )
