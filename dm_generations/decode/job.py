"""One decode under way: rows are read, checked and put into batches, and what comes back is put into files."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from dm_generations.archive import Archive, ImageRow
from dm_generations.browser.manifest import (
    Entry,
    GalleryEntry,
    build_manifest,
    manifest_files,
    write_manifest,
)
from dm_generations.browser.shown import UNKNOWN, Notes, Shown, shown_before, shown_by, write_others
from dm_generations.decode.gallery import Sheet, sheet_tokens
from dm_generations.decode.npy import encode_npy
from dm_generations.decode.options import Options, Report
from dm_generations.decode.piece import Finish, Piece, entry
from dm_generations.decode.plan import GroupPlan, Target, is_finished
from dm_generations.decode.shards import Member, Shard, ShardSet, ShardWriter, fingerprint
from dm_generations.decode.tokens import BadTokens, tokens_of
from dm_generations.decode.writer import FileWriter
from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder, Decoding
from dm_generations.progress import Progress
from dm_generations.runtime.device import core_count

# What is decoded as one: the file, the cell there, and the tokens (L,) uint16; or no cell, and those of all its cells
# (cells, L).
Cell = tuple[Piece, int | None, np.ndarray]


class AnyTokens:
    """What stands for a codec where tokens are written as they are."""

    batch_size, token_count, codebook_size = 1, None, 1 << 16


class Job:
    """What is to be written, and what is known of it by now."""

    def __init__(self, archive: Archive, plans: list[GroupPlan], options: Options):
        self.archive, self.plans, self.options = archive, plans, options
        self.layout = replace(options.layout, picture_extension=options.encoding.extension)
        self.out_dir = options.out_dir
        self.report = Report()
        self._entries: dict[str, Entry | GalleryEntry] = {}  # by path, for files that are there or will be
        self._models = archive.models()
        self._finish = Finish(options.encoding, options.strips, options.has_metadata, self._models)
        self._has_page = self.layout.mode in ("images", "gallery")
        self._shown: dict[str, Shown] = shown_before(self.out_dir) if self._has_page else {}
        self._notes = Notes(self.out_dir)
        self._moved_paths = set(self._find_other_tokens() if self.layout.mode == "npy" else self._find_moved())
        self._set_id = fingerprint(self._contents()) if self.layout.is_sharded else ""

    def count_due(self) -> int:
        """Pictures that are to be decoded."""
        return sum(len(target.ranks) for _, target, shard in self._targets() if self._is_due(target, shard))

    def run(self, codec: Decoder | AnyTokens | None, progress: Progress) -> None:
        """Decode and write what is due; `codec` may be None when nothing is."""
        workers = self.options.num_workers or core_count()
        cells = self._cells(codec, progress)
        if self.layout.mode == "npy":
            with FileWriter(workers) as writer:
                for piece, _, tokens in cells:
                    encode = functools.partial(encode_npy, tokens)
                    writer.submit(self.out_dir / piece.sheet.path, encode, self._when_written(piece, progress))
        elif self.layout.is_sharded:
            added = functools.partial(progress.advance, 1)
            ended = functools.partial(self._when_shard_ended, progress=progress)
            with ShardWriter(self.out_dir, self.layout.mode, workers, added, ended, self._last_members) as writer:
                for piece in _full(_decoded(codec, cells)):
                    writer.submit(piece.shard, functools.partial(piece.members, self._finish, self.layout.mode))
        else:
            with FileWriter(workers) as writer, contextlib.closing(self._notes):
                for piece in _full(_decoded(codec, cells)):
                    encode = functools.partial(piece.encoded, self._finish)
                    writer.submit(self.out_dir / piece.sheet.path, encode, self._when_written(piece, progress))

    def write_page(self) -> None:
        """`manifest.js` and the page, for the files that are there."""
        if not self._entries or not self._has_page:
            return
        others = {path: shown for path, shown in self._shown.items() if self._is_other(path)}
        with contextlib.closing(self._notes):
            for path, shown in others.items():
                self._notes.add(path, shown)  # the manifest lists some of them no more, and the other list not yet
        try:
            self.report.page = write_manifest(self.out_dir, self._manifest())
            write_others(self.out_dir, others)
            self._notes.remove()
        except OSError as error:
            raise UserError(f"cannot write the page into {self.out_dir}: {error.strerror}") from error

    def _is_other(self, path: str) -> bool:
        """Whether a file of an earlier decode stands that this one was not asked for, or could not replace."""
        return path not in self._entries and is_finished(os.path.join(self.out_dir, path))

    def _manifest(self) -> dict:
        mode = "gallery" if self.layout.is_gallery else "images"
        return build_manifest(mode, self.archive.path.name, self._entries.values())

    def _last_members(self) -> list[Member]:
        """A zip is the tree that separate files would be, with its page."""
        return list(manifest_files(self._manifest()).items()) if self.layout.mode == "zip" else []

    def _contents(self) -> Iterator[object]:
        """What tells one set of shards from another."""
        yield self.layout.mode, self.layout.extension, self.layout.shard_size if self.layout.mode == "tar" else None
        for plan in self.plans:
            yield plan
            for row in self.archive.rows(plan.settings, plan.count):
                yield row.id, row.quantvec_md5, row.clip_score_input, row.clip_score_tokenized

    def _targets(self) -> Iterator[tuple[GroupPlan, Target, Shard | None]]:
        """All files asked for; those that are parts of shards, with the shard."""
        shards = ShardSet(self.layout.mode, self.layout.shard_size, self._set_id, self._is_path_due)
        targets = ((plan, target) for plan in self.plans for target in plan.targets(self.layout))
        for position, (plan, target) in enumerate(targets):
            yield plan, target, shards.at(position) if self.layout.is_sharded else None

    def _is_due(self, target: Target, shard: Shard | None) -> bool:
        return self._is_path_due(target.path) if shard is None else shard.is_due

    def _is_path_due(self, path: str) -> bool:
        is_due = self.options.overwrite or path in self._moved_paths
        return is_due or not is_finished(os.path.join(self.out_dir, path))

    def _find_moved(self) -> Iterator[str]:
        """Paths of files that stand, but whose names belong to other pictures by now."""
        for plan in self.plans if self._shown else ():
            rows = self.archive.rows(plan.settings, plan.count)
            for target in plan.targets(self.layout):
                members = list(islice(rows, len(target.ranks)))
                if members and target.path in self._shown:
                    if self._is_moved(entry(plan, target, target.path, members, self._models), members):
                        yield target.path

    def _is_moved(self, standing: Entry | GalleryEntry, members: list[ImageRow]) -> bool:
        """Whether the file that stands is known to show other pictures than the entry's, which are `members`."""
        if standing.file not in self._shown or not all(row.quantvec for row in members):
            return False  # a row that cannot be read could not be decoded again either
        return self._shown[standing.file] != shown_by(standing)

    def _find_other_tokens(self) -> Iterator[str]:
        """Paths of files of tokens that hold other ones than the picture of their rank has. They have no manifest."""
        for plan in self.plans:
            rows = self.archive.rows(plan.settings, plan.count)
            for target, row in zip(plan.targets(self.layout), rows, strict=False):  # fewer if the archive changes
                with contextlib.suppress(OSError, ValueError, BadTokens):
                    held = (self.out_dir / target.path).read_bytes()
                    if held != encode_npy(self._tokens(row, AnyTokens())):
                        yield target.path

    def _cells(self, codec: Decoder | AnyTokens | None, progress: Progress) -> Iterator[Cell]:
        """The tokens to decode, with the place of each picture."""
        rows_of: GroupPlan | None = None
        finished_shard: Shard | None = None
        for plan, target, shard in self._targets():
            if plan is not rows_of:
                rows_of, rows = plan, self.archive.rows(plan.settings, plan.count)
            members = list(islice(rows, len(target.ranks)))
            is_due = self._is_due(target, shard)
            if shard is None and members and not is_due:
                standing = entry(plan, target, target.path, members, self._models)
                is_due = self._is_moved(standing, members)  # since this run began: others may add to the archive
            if codec is not None and is_due:
                yield from self._cells_of(plan, target, members, shard, codec, progress)
            elif is_due or not members:
                self._problem(f"{target.path}: {self.archive.path} changed while it was read; run again", progress)
            elif shard is None:
                self.report.already_there += 1
                self._entries[target.path] = standing
            elif shard is not finished_shard:
                finished_shard = shard
                self.report.already_there += 1

    def _cells_of(
        self,
        plan: GroupPlan,
        target: Target,
        members: list[ImageRow],
        shard: Shard | None,
        codec: Decoder | AnyTokens,
        progress: Progress,
    ) -> Iterator[Cell]:
        good = []
        for cell, row in enumerate(members):
            try:
                tokens = self._tokens(row, codec)
            except BadTokens as error:
                self._problem(f"image {row.id} was not decoded: {error}", progress)
            else:
                good.append((cell, row, tokens))
        if len(members) < len(target.ranks):
            self._problem(f"{target.path}: {self.archive.path} changed while it was read; run again", progress)
        progress.advance(len(target.ranks) - len(good))
        is_whole = len(good) == len(target.ranks)
        if shard is not None and not is_whole:
            shard.is_whole = False
        if not good:
            return
        path = target.path if is_whole or not target.incomplete_path else target.incomplete_path
        self._entries[path] = going_to_stand = entry(plan, target, path, members, self._models)
        if self._has_page:
            self._note(path, shown_by(going_to_stand))
        cols, rows = (self.layout.cols, self.layout.rows) if self.layout.is_gallery else (1, 1)
        replaced = target.incomplete_path if is_whole else None
        sheet = Sheet(path, replaced, cols, rows, len(good))
        piece = Piece(sheet, plan, target, [(cell, row) for cell, row, _ in good], shard)
        if self.layout.is_seamless:
            yield piece, None, sheet_tokens({cell: tokens for cell, _, tokens in good}, cols * rows)
            return
        for cell, _, tokens in good:
            yield piece, cell, tokens

    def _note(self, path: str, shown: Shown) -> None:
        """Note what the file at `path` is going to show."""
        is_sure = self._shown.get(path) == shown or not is_finished(os.path.join(self.out_dir, path))
        self._notes.add(path, shown if is_sure else UNKNOWN)

    def _tokens(self, row: ImageRow, codec: Decoder | AnyTokens) -> np.ndarray:
        """(L,) uint16. Raises BadTokens for what the codec, or else the one that the row records, does not decode."""
        expected = codec.token_count, codec.codebook_size
        recorded = self._models.get(row.codec_id)
        if isinstance(codec, AnyTokens) and recorded is not None and recorded.grid and recorded.codebook_size:
            expected = recorded.grid**2, recorded.codebook_size
        return tokens_of(row.quantvec, row.quantvec_md5, *expected)

    def _when_written(self, piece: Piece, progress: Progress) -> Callable[[Exception | None], None]:
        sheet = piece.sheet
        # Not the sheet, nor the piece: they hold pixels.
        path, replaced, picture_count = sheet.path, sheet.replaced, sheet.picture_count

        def done(error: Exception | None) -> None:
            progress.advance(picture_count)
            if error is not None:
                del self._entries[path]
                self._not_written(path, error, progress)
                return
            self.report.written += 1
            if replaced is not None:
                with contextlib.suppress(OSError):
                    (self.out_dir / replaced).unlink()

        return done

    def _when_shard_ended(self, shard: Shard, error: Exception | None, progress: Progress) -> None:
        if error is not None:
            self._not_written(shard.final_path, error, progress)
        else:
            self.report.written += 1

    def _not_written(self, path: str, error: Exception, progress: Progress) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        self._problem(f"{self.out_dir / path} was not written: {reason}", progress)

    def _problem(self, line: str, progress: Progress) -> None:
        self.report.problems.append(line)
        progress.say(f"error: {line}")


def _full(placed: Iterable[tuple[Piece, int | None, np.ndarray]]) -> Iterator[Piece]:
    """The files that are full, each when its last picture is on it."""
    for piece, cell, pixels in placed:
        if cell is None:
            piece.sheet.place_all(pixels, [cell for cell, _ in piece.rows])
        else:
            piece.sheet.place(cell, pixels)
        if piece.sheet.is_full:
            yield piece


def _decoded(codec: Decoder | None, cells: Iterator[Cell]) -> Iterator[tuple[Piece, int | None, np.ndarray]]:
    """The pixels of each, (H, W, 3) uint8 of a cell; a batch is handed over while the next one is computed."""
    running: tuple[list[Cell], Decoding] | None = None
    while batch := list(islice(cells, codec.batch_size if codec else 1)):
        started = batch, codec.start(np.stack([tokens for _, _, tokens in batch]))
        if running is not None:
            yield from _pictures(*running)
        running = started
    if running is not None:
        yield from _pictures(*running)


def _pictures(batch: list[Cell], decoding: Decoding) -> Iterator[tuple[Piece, int | None, np.ndarray]]:
    for (piece, cell, _), picture in zip(batch, decoding.images(), strict=True):
        yield piece, cell, picture
