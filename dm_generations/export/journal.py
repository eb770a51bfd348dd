"""Which images the files of an output folder show, so that a decode replaces those whose ranks went to other images.

A file's name holds a rank and not an image: when an archive gets more images, or other scores, ranks go to other
images. `.journal.jsonl` tells them apart. It is ASCII: for each file a line break and

    [path, identity]        path: relative to the folder, with "/"    identity: see `identify`

The last line of a path counts. Lines are appended before a file is written, so a decode that is killed leaves no file
without a line; when one ends, the journal is written anew with one line a file. An identity of null says that the
file shows one of two images: a decode that was to replace it may have ended before.

A folder may come from anyone, so the journal is opened without following links, and only a regular file of bounded
size is read. While it is open it is locked against a second decode; the lock goes when the process ends.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from dm_generations.atomic_io import write_atomic
from dm_generations.errors import UserError
from dm_generations.export.manifest import MANIFEST, MANIFEST_START, Entry, GalleryEntry
from dm_generations.export.plan import is_finished

JOURNAL = ".journal.jsonl"
_EARLIER = (".others.json", ".under-way.jsonl")  # with manifest.js, the lists before there was a journal

MAX_BYTES = 1 << 29
_LOCK_OFFSET = 1 << 30  # Windows locks bytes, and others may not read them: one beyond the end of the file
_OPEN_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))

Identity = str | None


class Journal:
    """The journal of one output folder; a context manager that closes it."""

    def __init__(self, out_dir: Path):
        self._out_dir, self._path = out_dir, out_dir / JOURNAL
        self._file: io.FileIO | None = None
        self._identities: dict[str, Identity] = {}  # by path
        self._replacing: dict[str, str] = {}  # new identities of files that are being replaced, by path
        self._unwritten: list[bytes] = []  # lines for the next `flush`

    def open(self, create: bool = False) -> None:
        """Lock and read the journal, or the lists of earlier versions where there is none.

        Args:
            create: Make the journal if it is missing. Without it, nothing is written.

        Raises:
            UserError: Another decode has it open, or it is not a file to be read or written.
        """
        if self._file is not None:
            return
        try:
            if create or os.path.lexists(self._path):
                self._file = _open_locked(self._path, create)
                self._identities = dict(_parse(_lines_of(self._file)))
            if not self._identities:
                self._identities = _read_earlier_lists(self._out_dir)
                if self._file is not None and self._identities:
                    self._rewrite()
                    self._file = _open_locked(self._path, create)
        except BlockingIOError as error:
            raise UserError(
                f"another decode writes into {self._out_dir}; wait until it ends, or choose another folder "
                "with --out-dir"
            ) from error
        except OSError as error:
            raise UserError(
                f"cannot use {self._path}: {error.strerror}; remove it, or choose another folder with --out-dir"
            ) from error

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known of any file."""
        return not self._identities

    def is_stale(self, path: str, identity: str) -> bool:
        """Return whether a file is known to show, or perhaps to show, other images than these."""
        return path in self._identities and self._identities[path] != identity

    def begin(self, path: str, identity: str, is_there: bool) -> None:
        """Note which images a file is going to show. Call `flush` before the file is written.

        Args:
            path: Of the file.
            identity: Of its images.
            is_there: Whether a file is at this path now.
        """
        is_sure = not is_there or self._identities.get(path) == identity
        if not is_sure:
            self._replacing[path] = identity
        self._add(path, identity if is_sure else None)

    def confirm(self, path: str) -> None:
        """Note that a file was written."""
        if path in self._replacing:
            self._add(path, self._replacing.pop(path))

    def flush(self) -> None:
        """Append what was noted to the file, in one write.

        Raises:
            UserError: The disk is full, or another error of writing.
        """
        lines, self._unwritten = b"".join(self._unwritten), []
        try:
            while lines:
                assert self._file is not None, "opened by `open(create=True)`"
                lines = lines[self._file.write(lines) :]
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; free some space and run the same command again to "
                "continue"
            ) from error

    def assume(self, path: str, identity: str) -> None:
        """Take a finished file for one that shows these images, unless something else is known of it."""
        self._identities.setdefault(path, identity)

    def compact(self) -> None:
        """Write the journal anew, with one line for each file that is there, and close it.

        Raises:
            OSError: It cannot be written.
        """
        found = self._identities.items()
        self._identities = {p: identity for p, identity in found if is_finished(self._out_dir, p)}
        self._rewrite()
        for name in _EARLIER:
            (self._out_dir / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Write what was noted, if possible, and release the lock."""
        if self._file is not None:
            with contextlib.suppress(UserError):
                self.flush()
            self._file.close()
            self._file = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _add(self, path: str, identity: Identity) -> None:
        self._identities[path] = identity
        self._unwritten.append(_line(path, identity))

    def _rewrite(self) -> None:
        """Write all lines anew, or remove a journal that would have none; close it."""
        self._unwritten = []
        if sys.platform == "win32":  # which replaces no open file
            self.close()
        if self._identities:
            write_atomic(self._path, b"".join(_line(*item) for item in sorted(self._identities.items())))
        else:
            self._path.unlink(missing_ok=True)
        self.close()


def identify(entry: Entry) -> str:
    """Return 16 hex digits that differ for files of other images, or with other text on them or inside.

    A key alone is not enough: images of other initial tokens or of another model can have the same key.
    """
    facts = entry.facts()
    return _digest([*facts[0], *facts[1:]] if isinstance(entry, GalleryEntry) else facts)


def _digest(values: list) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _line(path: str, identity: Identity) -> bytes:
    """Return a line. It begins with its line break: a line before it may be cut off."""
    return f"\n{json.dumps([path, identity], separators=(',', ':'))}".encode("ascii")


def _parse(lines: Iterable[bytes]) -> Iterator[tuple[str, Identity]]:
    """Yield the contents of lines; those that are cut off or not of this format are left out."""
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            path, identity = json.loads(line)
            if isinstance(path, str) and isinstance(identity, (str, type(None))):
                yield path, identity


def _open_regular(path: Path, flags: int) -> io.FileIO:
    """Open a regular file of bounded size without following links. Raises OSError."""
    if os.path.islink(path):  # where there is no O_NOFOLLOW
        raise OSError(errno.ELOOP, "it is a symbolic link")
    file = io.FileIO(os.open(path, flags | _OPEN_FLAGS, 0o666), "r+" if flags & os.O_RDWR else "r")
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    if status.st_size > MAX_BYTES:
        file.close()
        raise OSError(errno.EFBIG, f"it has more than {MAX_BYTES:,} bytes")
    return file


def _open_locked(path: Path, create: bool) -> io.FileIO:
    """Open the journal for this process alone. Raises OSError; BlockingIOError if another has it open."""
    while True:
        file = _open_regular(path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0))
        try:
            lock_file(file)
            if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
                return file
        except FileNotFoundError:  # removed by the decode that ended meanwhile
            create = True
        except BaseException:
            file.close()
            raise
        file.close()  # replaced by the decode that ended meanwhile


def lock_file(file: io.FileIO) -> None:
    """Raise BlockingIOError if another process holds the lock. On a file system without locks there is none."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(_LOCK_OFFSET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            raise BlockingIOError(error.errno, error.strerror) from error


def _lines_of(file: io.FileIO) -> Iterator[bytes]:
    """Yield the lines of an open file, which stays open."""
    with os.fdopen(os.dup(file.fileno()), "rb") as lines:
        lines.seek(0)
        yield from lines


# The lists of versions before the journal: read once, when a folder has none.


def _read_earlier_lists(out_dir: Path) -> dict[str, Identity]:
    """Return what `.others.json`, `manifest.js` and `.under-way.jsonl` say of files, by path; the last has priority."""
    others, under_way = (out_dir / name for name in _EARLIER)
    found: dict[str, Identity] = {}
    for read, path in ((_read_others, others), (_read_manifest, out_dir / MANIFEST), (_read_under_way, under_way)):
        with contextlib.suppress(OSError, *_NOT_A_LIST), _open_regular(path, os.O_RDONLY) as file:
            listed = {name: _digest(values) if values else None for name, values in read(file.readall())}
            if all(isinstance(name, str) for name in listed):
                found |= listed
    return found


_NOT_A_LIST = (ValueError, KeyError, AttributeError, TypeError, IndexError, RecursionError)


def _read_others(data: bytes) -> Iterator[tuple[str, list]]:
    for path, values in json.loads(data).items():
        yield path, list(values)


def _read_manifest(data: bytes) -> Iterator[tuple[str, list]]:
    manifest = json.loads(data.decode("ascii").removeprefix(MANIFEST_START).rstrip(";\n"))
    if manifest["version"] != 1:  # later ones lie beside a journal
        return
    for *_, prefix, suffix, files in manifest["groups"]:
        for middle, _, *rest in files:
            yield prefix + middle + suffix, rest if manifest["mode"] == "images" else [*rest[0], *rest[1:]]


def _read_under_way(data: bytes) -> Iterator[tuple[str, list]]:
    for line in data.splitlines():
        with contextlib.suppress(*_NOT_A_LIST):
            path, values = json.loads(line)
            yield os.fspath(path), list(values)
