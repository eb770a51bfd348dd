"""Which images the files of an output folder show, so that a decode replaces those whose ranks went to other images.

A file's name holds a rank and not an image: when an archive gets more images, or other scores, ranks go to other
images. `.journal.jsonl` tells them apart. It is ASCII: for each file a line break and

    [path, identity]        path: relative to the folder, with "/"    identity: see `identify`

The last line of a path counts. Lines are appended before a file is written, so a decode that is killed leaves no file
without a line; when one ends, the journal is written anew with one line a file. An identity of null says that the
file shows one of two images: a decode that was to replace it may have ended before.

Earlier versions had other lists, and two decodes at the same time could leave them wrong. So where there are such lists
and no journal, it begins with the path "" and the identity null: all that it does not name is decoded anew.

A folder may come from anyone, so the journal is opened without following links, and only a regular file of bounded
size is read. While it is open it is locked against a second decode; the lock goes when the process ends.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from dm_generations.atomic_io import lock_file, open_regular, write_atomic
from dm_generations.errors import UserError
from dm_generations.export.manifest import MANIFEST, Entry, GalleryEntry
from dm_generations.export.plan import is_finished

JOURNAL = ".journal.jsonl"
_EARLIER = (".others.json", ".under-way.jsonl")  # with manifest.js, the lists before there was a journal
_UNNAMED = ""  # stands for all paths that the journal does not name

MAX_BYTES = 1 << 29
MAX_LINES = 1 << 22  # which take 10 s and 1 GB at most
_MAX_LINE_BYTES = 1 << 13  # two names of 255 bytes, escaped

_LINE = re.compile(rb'\["((?:[ !#-\[\]-~]|\\(?:u[0-9a-f]{4}|["\\bfnrt]))*)",(?:null|"([ !#-\[\]-~]*)")\]\n?')

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
        """Lock and read the journal.

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
            if not self._identities and any(os.path.lexists(self._out_dir / name) for name in (MANIFEST, *_EARLIER)):
                self._identities, self._unwritten = {_UNNAMED: None}, [_line(_UNNAMED, None)]
        except BlockingIOError as error:
            raise UserError(
                f"another decode writes into {self._out_dir}; wait until it ends, or choose another folder "
                "with --out-dir"
            ) from error
        except OSError as error:
            self.close()
            raise UserError(
                f"cannot use {self._path}: {error.strerror}; remove it, or choose another folder with --out-dir"
            ) from error

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known of any file."""
        return not self._identities

    def is_stale(self, path: str, identity: str) -> bool:
        """Return whether a file is known to show, or perhaps to show, other images than these."""
        return self._identities.get(path, self._identities.get(_UNNAMED, identity)) != identity

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

    def compact(self) -> set[str]:
        """Write the journal anew, with one line for each file that is there, and close it.

        Returns:
            The paths of these files.

        Raises:
            OSError: It cannot be written.
        """
        found = self._identities.items()
        self._identities = {p: identity for p, identity in found if p == _UNNAMED or is_finished(self._out_dir, p)}
        self._rewrite()
        for name in _EARLIER:
            (self._out_dir / name).unlink(missing_ok=True)
        return self._identities.keys() - {_UNNAMED}

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
        if match := _LINE.fullmatch(line):
            path, identity = match[1].decode(), None if match[2] is None else match[2].decode()
            yield json.loads(f'"{path}"') if "\\" in path else path, identity


def _open_locked(path: Path, create: bool) -> io.FileIO:
    """Open the journal for this process alone. Raises OSError; BlockingIOError if another has it open."""
    while True:
        file = open_regular(path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0))
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


def _lines_of(file: io.FileIO) -> Iterator[bytes]:
    """Yield the lines of an open file, which stays open; too long ones in parts. Raises OSError for too many."""
    if os.fstat(file.fileno()).st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_BYTES:,} bytes")
    with os.fdopen(os.dup(file.fileno()), "rb") as lines:
        lines.seek(0)
        for count, line in enumerate(iter(lambda: lines.readline(_MAX_LINE_BYTES), b"")):
            if count == MAX_LINES:
                raise OSError(errno.EFBIG, f"it has more than {MAX_LINES:,} lines")
            yield line
