"""Encoding and writing in the background: separate files, WebDataset shards (tar), or one zip.

A shard holds, for each image, `<id>.png` (or .webp, .jpg), `<id>.json` with the row and `<id>.txt` with the prompt;
<id> is the row's, in nine digits. A zip holds the tree that separate files would be. Shards of a set carry a
fingerprint of what the set holds, so those of another selection, archive or format have other names, and a shard that
is there is one that was asked for. Files have no times of their own: the same images give the same bytes. A shard is
written under a temporary name and renamed when it is whole; one in which images are missing
because of bad rows gets another name.
"""

import contextlib
import errno
import hashlib
import io
import os
import stat
import tarfile
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, Self

from dm_generations.atomic_io import TemporaryFile, write_atomic
from dm_generations.errors import UserError, defer_sigint
from dm_generations.paths import utf8_path

Member = tuple[str, bytes]  # name, with "/" between its parts, and content

FATAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # every later file would meet them too

_QUEUE_PER_WORKER = 4  # enough to keep threads busy, few enough to bound memory
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
_MODE = 0o644


def check_folders(out_dir: Path, folders: Iterable[str]) -> None:
    """Raise UserError if the output folder is not a folder, or a prompt's folder is a symbolic link."""
    try:
        is_folder = stat.S_ISDIR(out_dir.stat().st_mode)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise _bad_folder(out_dir, error) from error
    if not is_folder:
        raise UserError(f"{out_dir} is a file, not a folder; choose another with --out-dir")
    for folder in folders:
        if utf8_path(out_dir, folder).is_symlink():
            raise UserError(f"{out_dir / folder} is a symbolic link; remove it, or choose another --out-dir")


def make_folder(out_dir: Path) -> None:
    """Make the output folder if it is missing, and raise UserError if it cannot be written."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
    except (OSError, ValueError) as error:
        raise _bad_folder(out_dir, error) from error


def _bad_folder(out_dir: Path, error: OSError | ValueError) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else error
    return UserError(f"cannot write into {str(out_dir)!r}: {reason}; choose another folder with --out-dir")


class _BoundedPool:
    """Threads with a queue of bounded length; a context manager that waits for what is queued.

    What is queued is dropped when the block ends with an error.
    """

    def __init__(self, workers: int):
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        self._limit = _QUEUE_PER_WORKER * workers
        self._pending: deque[tuple[Future, Callable[[Future], None]]] = deque()

    @defer_sigint()
    def _submit(self, task: Callable[[], Any], settle: Callable[[Future], None]) -> None:
        """Queue a task; wait while the queue is full. `settle` is called later in this thread, in order."""
        while self._pending and (self._pending[0][0].done() or len(self._pending) >= self._limit):
            self._settle_first()
        self._pending.append((self._pool.submit(task), settle))

    def _settle_first(self) -> None:
        future, settle = self._pending.popleft()
        settle(future)

    def __enter__(self) -> Self:
        return self

    @defer_sigint()
    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            while error is None and self._pending:
                self._settle_first()
            if error is None:
                self._finish()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._discard()

    def _finish(self) -> None:
        """Do what is left to do when everything is settled."""

    def _discard(self) -> None:
        """Remove what is unfinished."""


class FileWriter(_BoundedPool):
    """Encodes and writes files. A full or read-only disk ends the run with a UserError."""

    def submit(self, path: Path, encode: Callable[[], bytes], done: Callable[[Exception | None], None]) -> None:
        """Queue a file; wait while the queue is full.

        Args:
            path: Of the file; its folder is made when it is missing.
            encode: Returns the content.
            done: Called later in this thread, with None when the file is written and else with the error.
        """

        def settle(future: Future) -> None:
            error = future.exception()
            _raise_if_fatal(path, error)
            if error is not None and not isinstance(error, Exception):
                raise error
            done(error)

        self._submit(lambda: _write_file(path, encode), settle)


@dataclass(eq=False)
class Shard:
    """One shard, with paths relative to the output folder.

    Attributes:
        is_due: Whether it is to be written.
        is_whole: Whether it has all its images, as far as its rows are read.
    """

    path: str
    incomplete_path: str
    is_due: bool = True
    is_whole: bool = True

    @property
    def final_path(self) -> str:
        """Where it goes by what is known of it now."""
        return self.path if self.is_whole else self.incomplete_path


class ShardSet:
    """The shards of one export: which one an image goes to, by its position among all images asked for."""

    def __init__(self, mode: str, shard_size: int, set_id: str, is_due: Callable[[str], bool]):
        """Plan shards.

        Args:
            mode: "tar" has `shard_size` images in a shard, "zip" has one shard.
            shard_size: Images.
            set_id: See `fingerprint`.
            is_due: Whether a shard is to be written, by its path.
        """
        self._mode, self._size, self._set_id, self._is_due = mode, shard_size, set_id, is_due
        self._number: int | None = None
        self._shard: Shard | None = None

    def at(self, position: int) -> Shard:
        """Return the shard of an image. Asked in order, it is the same object for all images of a shard."""
        number = position // self._size if self._mode == "tar" else 0
        if self._shard is None or number != self._number:
            stem = f"pictures-{self._set_id}" + (f"-{number:06d}" if self._mode == "tar" else "")
            path, incomplete_path = f"{stem}.{self._mode}", f"{stem}-incomplete.{self._mode}"
            self._number, self._shard = number, Shard(path, incomplete_path, self._is_due(path))
        return self._shard


def fingerprint(parts: Iterable[object]) -> str:
    """Return eight hex digits that tell one list of things from another, by how they print."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:8]


class Container(Protocol):
    """Takes files one after the other."""

    def add(self, name: str, content: bytes) -> None:
        """Append a file."""

    def close(self) -> None:
        """Write what comes after the last file."""


class Tar:
    """A tar file under construction in `file`."""

    def __init__(self, file: BinaryIO):
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, name: str, content: bytes) -> None:
        """Append a file."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), _MODE
        self._tar.addfile(info, io.BytesIO(content))
        self._tar.members.clear()  # type: ignore[attr-defined]  # a list of all members, which is not needed

    def close(self) -> None:
        """Write what comes after the last file."""
        self._tar.close()


class Zip:
    """A zip file under construction in `file`. Images are compressed already, so they are stored."""

    def __init__(self, file: IO[bytes]):
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)

    def add(self, name: str, content: bytes) -> None:
        """Append a file."""
        info = zipfile.ZipInfo(name, _ZIP_EPOCH)
        info.create_system, info.external_attr = 3, _MODE << 16  # as on Unix, wherever it was made
        self._zip.writestr(info, content)

    def close(self) -> None:
        """Write what comes after the last file."""
        self._zip.close()


CONTAINERS: dict[str, Callable[[BinaryIO], Container]] = {"tar": Tar, "zip": Zip}


class ShardWriter(_BoundedPool):
    """Encodes images and fills one shard after the other.

    Images of a shard follow each other, and by the time that the first of the next one comes, the rows of the shard
    have been read. A full or read-only disk ends the run with a UserError; a shard that cannot be written for another
    reason is skipped, and the next one started.
    """

    def __init__(
        self,
        out_dir: Path,
        mode: str,
        workers: int,
        added: Callable[[], None],
        ended: Callable[[Shard, Exception | None], None],
        last_members: Callable[[], list[Member]] = list,
    ):
        """Start with no shard open.

        Args:
            out_dir: Folder of the shards.
            mode: A key of CONTAINERS.
            workers: Threads that encode.
            added: Called for each image, once it is in its shard or skipped.
            ended: Called for each shard, with None when it is at its place and else with the error.
            last_members: Called before that, for what the shard is to end with.
        """
        super().__init__(workers)
        self._out_dir, self._container = out_dir, CONTAINERS[mode]
        self._added, self._ended, self._last_members = added, ended, last_members
        self._current: _OpenShard | None = None

    def submit(self, shard: Shard, encode: Callable[[], list[Member]]) -> None:
        """Queue what `encode` returns for a shard; wait while the queue is full."""

        def settle(future: Future) -> None:
            if self._current is None or self._current.shard is not shard:
                self._finish()
                self._current = _OpenShard(shard, self._out_dir, self._container)
            self._current.extend(future.result)
            self._added()

        self._submit(encode, settle)

    def _finish(self) -> None:
        if self._current is None:
            return
        self._current.land(self._last_members)
        ended, self._current = self._current, None
        self._ended(ended.shard, ended.error)

    def _discard(self) -> None:
        if self._current is not None:
            self._current.discard()


class _OpenShard:
    """A shard that is being filled under a temporary name; after an error it takes no more."""

    def __init__(self, shard: Shard, out_dir: Path, container: Callable[[BinaryIO], Container]):
        self.shard = shard
        self.error: Exception | None = None
        self._out_dir = out_dir
        self._temporary: TemporaryFile | None = None
        self._filled: Container | None = None
        self._try(lambda: self._start(container))

    def extend(self, members: Callable[[], list[Member]]) -> None:
        self._try(lambda: self._add(members()))

    def land(self, last_members: Callable[[], list[Member]]) -> None:
        """Give the shard its name."""
        self.extend(last_members)
        self._try(self._close)

    def discard(self) -> None:
        """Leave nothing of it."""
        if self._temporary is None:
            return
        with contextlib.suppress(Exception):  # there may be no room for what is still to be written
            if self._filled is not None:
                self._filled.close()
        self._temporary.discard()

    def _start(self, container: Callable[[BinaryIO], Container]) -> None:
        self._temporary = TemporaryFile(self._out_dir)
        self._filled = container(self._temporary.file)

    def _add(self, members: list[Member]) -> None:
        assert self._filled is not None, "started"
        for name, content in members:
            self._filled.add(name, content)

    def _close(self) -> None:
        assert self._temporary is not None, "started"
        assert self._filled is not None, "started"
        self._filled.close()
        self._temporary.file.flush()
        os.fsync(self._temporary.file.fileno())  # else a power cut may leave half of it at its final name
        self._temporary.rename(self._out_dir / self.shard.final_path)
        if self.shard.is_whole:
            (self._out_dir / self.shard.incomplete_path).unlink(missing_ok=True)

    def _try(self, step: Callable[[], None]) -> None:
        if self.error is not None:
            return
        try:
            step()
        except Exception as error:
            self.error = error
            self.discard()
            _raise_if_fatal(self._out_dir / self.shard.path, error)


def _raise_if_fatal(path: Path, error: BaseException | None) -> None:
    """Raise UserError if `error`, of writing `path`, is one that every later file would meet."""
    if isinstance(error, OSError) and error.errno in FATAL_ERRNOS:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free some space and run the same command again to continue"
        ) from error


def _write_file(path: Path, encode: Callable[[], bytes]) -> None:
    data = encode()
    try:
        write_atomic(path, data)
    except FileNotFoundError:  # the first image of a prompt
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, data)
