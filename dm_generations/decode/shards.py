"""Many pictures in one file: WebDataset shards (tar), or one zip with the tree that separate files would be.

A shard holds, for each picture, `<id>.png` (or .webp, .jpg), `<id>.json` with the row and `<id>.txt` with the prompt;
<id> is the row's, in nine digits. Shards of a set carry a fingerprint of what the set holds, so that those of another
selection, archive or format go beside it, and a shard that is there is one that was asked for. Files have no
times of their own: the same pictures give the same bytes. A shard is written under a temporary name and renamed
when it is whole; one that lacks pictures because of bad rows is renamed to a name of its own.
"""

import contextlib
import hashlib
import io
import os
import tarfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from dm_generations.atomic_io import temporary_path
from dm_generations.decode.metadata import Record, as_json
from dm_generations.decode.tokens import TOKEN_DTYPE
from dm_generations.decode.writer import QUEUE_PER_WORKER, raise_if_hopeless
from dm_generations.errors import defer_sigint

Member = tuple[str, bytes | memoryview]  # name, with "/" between its parts, and content
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
_MODE = 0o644


@dataclass(eq=False)
class Shard:
    """One file to be, named relative to the output folder. Whole until the reading of its rows shows otherwise."""

    path: str
    incomplete_path: str
    is_due: bool = True  # to be written
    is_whole: bool = True

    @property
    def final_path(self) -> str:
        """Where it goes by what is known of it now."""
        return self.path if self.is_whole else self.incomplete_path


class ShardSet:
    """The shards of one decode: which one a picture goes to, by its position among all pictures asked for."""

    def __init__(self, mode: str, shard_size: int, set_id: str, is_due: Callable[[str], bool]):
        """mode: "tar" has `shard_size` pictures in a shard, "zip" has one shard   set_id: see `fingerprint`

        is_due: whether a shard is to be written, by its path
        """
        self._mode, self._size, self._set_id, self._is_due = mode, shard_size, set_id, is_due
        self._number, self._shard = None, None

    def at(self, position: int) -> Shard:
        """The shard of a picture. Asked in order, it is the same object for all pictures of a shard."""
        number = position // self._size if self._mode == "tar" else 0
        if number != self._number:
            stem = f"pictures-{self._set_id}" + (f"-{number:06d}" if self._mode == "tar" else "")
            path, incomplete_path = f"{stem}.{self._mode}", f"{stem}-incomplete.{self._mode}"
            self._number, self._shard = number, Shard(path, incomplete_path, self._is_due(path))
        return self._shard


def fingerprint(parts: Iterable[object]) -> str:
    """Eight hex digits that tell one list of things from another; `parts` print the same in every run."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part!r}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:8]


def webdataset_members(picture: bytes | memoryview, extension: str, record: Record, tokens) -> list[Member]:
    """One sample of a shard; the JSON is the record with the tokens (L,) uint16."""
    key = f"{record['id']:09d}"
    row = as_json(record | {"tokens": tokens.astype(TOKEN_DTYPE).tolist()})
    prompt = (record["prompt"] or "").encode("utf-8", "replace")
    return [(key + extension, picture), (f"{key}.json", row), (f"{key}.txt", prompt)]


class Container(Protocol):
    """Takes files one after the other."""

    def add(self, name: str, content: bytes | memoryview) -> None: ...

    def close(self) -> None: ...


class Tar:
    """A tar file under construction in `file`."""

    def __init__(self, file: BinaryIO):
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, name: str, content: bytes | memoryview) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), _MODE
        self._tar.addfile(info, io.BytesIO(content))
        self._tar.members.clear()  # a list of all, which nobody asks for

    def close(self) -> None:
        self._tar.close()


class Zip:
    """A zip file under construction in `file`. Pictures are compressed already, so they are stored."""

    def __init__(self, file: BinaryIO):
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)

    def add(self, name: str, content: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(name, _ZIP_EPOCH)
        info.create_system, info.external_attr = 3, _MODE << 16  # as on Unix, wherever it was made
        self._zip.writestr(info, content)

    def close(self) -> None:
        self._zip.close()


CONTAINERS = {"tar": Tar, "zip": Zip}


class ShardWriter:
    """Encodes in the background and fills one shard after the other; a context manager that ends the last one.

    Pictures of a shard follow each other, and by the time that the first of the next one comes, the rows of the
    shard have been read. A full or read-only disk ends the run with a UserError; a shard that cannot be written for
    another reason is given up, and the next one started.
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
        """mode: of CONTAINERS. What is called, in the thread that submits:

        added: for each picture, once it is in its shard or given up   ended: for each shard, with None when it is at
        its place   last_members: before that, for what the shard is to end with
        """
        self._out_dir, self._container = out_dir, CONTAINERS[mode]
        self._added, self._ended, self._last_members = added, ended, last_members
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        self._limit = QUEUE_PER_WORKER * workers
        self._pending: deque[tuple[Shard, Future[list[Member]]]] = deque()
        self._current: _OpenShard | None = None

    @defer_sigint()
    def submit(self, shard: Shard, encode: Callable[[], list[Member]]) -> None:
        """Queue what `encode` gives for `shard`; waits while the queue is full."""
        while self._pending and (self._pending[0][1].done() or len(self._pending) >= self._limit):
            self._settle(*self._pending.popleft())
        self._pending.append((shard, self._pool.submit(encode)))

    def __enter__(self) -> "ShardWriter":
        return self

    @defer_sigint()
    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            while error is None and self._pending:
                self._settle(*self._pending.popleft())
            if error is None:
                self._end()
        finally:
            self._pool.shutdown(cancel_futures=True)
            if self._current is not None:
                self._current.discard()

    def _settle(self, shard: Shard, future: Future[list[Member]]) -> None:
        if self._current is None or self._current.shard is not shard:
            self._end()
            self._current = _OpenShard(shard, self._out_dir, self._container)
        self._current.extend(future.result)
        self._added()

    def _end(self) -> None:
        if self._current is None:
            return
        self._current.land(self._last_members)
        ended, self._current = self._current, None
        self._ended(ended.shard, ended.error)


class _OpenShard:
    """A shard that is being filled under a temporary name; after an error it takes no more."""

    def __init__(self, shard: Shard, out_dir: Path, container: Callable[[BinaryIO], Container]):
        self.shard, self.error = shard, None
        self._out_dir, self._temporary = out_dir, temporary_path(out_dir)
        self._file: BinaryIO | None = None
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
        if self._file is not None:
            # Both may still have something to write, for which there may be no room.
            with contextlib.suppress(Exception):
                self._filled.close()
            with contextlib.suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _start(self, container: Callable[[BinaryIO], Container]) -> None:
        self._file = open(self._temporary, "xb")
        self._filled = container(self._file)

    def _add(self, members: list[Member]) -> None:
        for name, content in members:
            self._filled.add(name, content)

    def _close(self) -> None:
        self._filled.close()
        self._file.flush()
        os.fsync(self._file.fileno())  # else a power cut may leave half of it at its final name
        self._file.close()
        os.replace(self._temporary, self._out_dir / self.shard.final_path)
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
            raise_if_hopeless(self._out_dir / self.shard.path, error)
