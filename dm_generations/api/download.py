"""Archives from an address or from the Hugging Face hub.

A file from an address is written under another name until it is whole. What a stopped download has got is kept if the
server names the version of its file (ETag or Last-Modified), and the next one goes on there if the server gives ranges.
`#sha256=` after an address is the hash that the file has to have.
"""

import hashlib
import http.client
import io
import json
import logging
import os
import re
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Final, Self

from dm_generations.archive.connection import HEADER_BYTES, MAGIC
from dm_generations.atomic_io import lock_file, open_regular
from dm_generations.errors import UserError, one_line
from dm_generations.paths import cache_dir, sanitize_file_name, shipped, utf8_path

TIMEOUT_S: Final = 60  # without any data
_logger = logging.getLogger(__name__)
_CHUNK_BYTES: Final = 1 << 20
_LOG_S: Final = 10.0
_HASH: Final = re.compile(r"sha256=([0-9a-fA-F]{64})")
_HUB: Final = re.compile(
    r"hf://(?P<kind>datasets/)?(?P<repository>[\w.-]{1,96}/[\w.-]{1,96}?)(@(?P<revision>[\w.-]{1,200}))?/(?P<file>.+)"
)


def is_address(source: object) -> bool:
    """Return whether this is an address and not a path."""
    return isinstance(source, str) and "://" in source


def archive_name(address: str) -> str:
    """Return the file name of an address, which is safe, and ends in `.db`."""
    name = urllib.parse.unquote(urllib.parse.urlsplit(address).path).rpartition("/")[2]
    return sanitize_file_name(name.removesuffix(".db") or "archive", ".db")


def find_archive(source: str | os.PathLike[str] | None, folder: Path | None = None) -> Path:
    """Return the file of an archive, which is downloaded if it has to be.

    Args:
        source: As `Archive.load` takes it.
        folder: Where a file from an address is stored; None is a cache.

    Raises:
        UserError: It cannot be downloaded, the address has no SQLite file, or one with another hash.
    """
    if source is None:
        return shipped("archive/emoji.db")
    if not isinstance(source, str) or not is_address(source):
        return Path(source)
    address, _, fragment = source.partition("#")
    match = _HASH.fullmatch(fragment)
    if fragment and match is None:
        raise UserError(f"{source!r:.300}: after # there can only be sha256= and 64 hex digits")
    digest = None if match is None else match[1].lower()
    scheme = address.partition("://")[0].lower()
    if scheme == "hf":
        path = _download_from_hub(address)
        _check_hash(address, path, digest)
    elif scheme in ("http", "https"):
        path = _download(address, folder, digest)
    else:
        raise UserError(f"{address!r:.200}: an archive is a path, https://... or hf://datasets/OWNER/NAME/FILE.db")
    return path


def _download(address: str, folder: Path | None, digest: str | None) -> Path:
    try:
        if folder is None:
            folder = cache_dir(f"archives/{hashlib.sha256(address.encode()).hexdigest()[:16]}")
        path = utf8_path(folder, archive_name(address))
        if path.exists():
            _check_hash(address, path, digest)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _fetch(address, path, digest)
        return path
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"cannot download {address!r:.200}: HTTP status {error.code}") from error
    except BlockingIOError as error:
        raise UserError(f"another program downloads {address!r:.200}; wait until it ends") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # no network, a full disk; not an address
        raise UserError(f"cannot download {address!r:.200}: {one_line(error)}") from error


def _fetch(address: str, path: Path, digest: str | None) -> None:
    """Write the file of an address to a path, from where an earlier download ended."""
    with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
        size, version = _size_and_version(answer)
        name = hashlib.sha256(json.dumps([address, size, version]).encode()).hexdigest()[:16]
        with _Part(path.parent / f".{name}.part", is_kept=size is not None and version is not None) as part:
            if part.size < HEADER_BYTES or size is None or part.size > size:
                part.truncate()
            if part.size == 0:
                _copy(address, answer, part, size)
            elif size is not None and version is not None and part.size < size:
                answer.close()
                _resume(address, part, size, version)
            part.finish(address, path, digest)


def _resume(address: str, part: "_Part", size: int, version: str) -> None:
    """Ask for the rest of a file; a server without ranges gives all of it."""
    request = urllib.request.Request(address, headers={"Range": f"bytes={part.size}-", "If-Range": version})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        if answer.headers.get("Content-Range") != f"bytes {part.size}-{size - 1}/{size}":
            part.truncate()
            if _size_and_version(answer) != (size, version):
                raise UserError(f"{address!r:.200} has changed meanwhile; repeat the command")
        _copy(address, answer, part, size)


def _size_and_version(answer: Any) -> tuple[int | None, str | None]:
    """Return the size of a file that a server states, and what tells one version of it from another."""
    length, tag = answer.headers.get("Content-Length"), answer.headers.get("ETag")
    is_strong = tag is not None and not tag.startswith("W/")
    size = int(length) if length is not None and length.isdecimal() else None
    return size, tag if is_strong else answer.headers.get("Last-Modified")


def _copy(address: str, answer: Any, part: "_Part", size: int | None) -> None:
    """Append the rest of a file to its part."""
    last_log = time.monotonic()
    while chunk := answer.read(_CHUNK_BYTES):
        if part.size == 0 and not chunk.startswith(MAGIC):
            raise UserError(f"{address!r:.200} is not an archive: it is not a file of SQLite")
        part.append(chunk)
        if time.monotonic() - last_log > _LOG_S:
            last_log = time.monotonic()
            _logger.info("%s of %s MB", f"{part.size / 1e6:,.0f}", "?" if size is None else f"{size / 1e6:,.0f}")
    if part.size == 0:
        raise UserError(f"{address!r:.200} is not an archive: it is empty")
    expected = part.expected_size() if size is None else size
    if part.size < expected:
        advice = "repeat the command to go on" if part.is_kept else "try again"
        raise UserError(f"{address!r:.200} ended early, after {part.size:,} of {expected:,} bytes; {advice}")


class _Part:
    """What there is of a file, locked; a context manager that removes it after an error, unless it is kept."""

    def __init__(self, path: Path, is_kept: bool):
        self._path, self.is_kept = path, is_kept
        self._file: io.FileIO = open_regular(path, os.O_RDWR | os.O_CREAT)
        self.size = 0
        try:
            lock_file(self._file)
            self.size = self._file.seek(0, os.SEEK_END)
        except BaseException:
            self._file.close()
            raise
        if not is_kept:
            self.truncate()

    def truncate(self) -> None:
        """Begin anew."""
        self._file.seek(0)
        self._file.truncate()
        self.size = 0

    def append(self, chunk: bytes) -> None:
        """Write. Raises OSError."""
        while chunk:
            written = self._file.write(chunk)
            self.size += written
            chunk = chunk[written:]

    def expected_size(self) -> int:
        """Return the size that the header of the database states, or 0."""
        self._file.seek(0)
        header = self._file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES or header[24:28] != header[92:96]:  # the number of pages is not valid
            return HEADER_BYTES
        (page_bytes,), (pages,) = struct.unpack_from(">H", header, 16), struct.unpack_from(">I", header, 28)
        return pages * (65536 if page_bytes == 1 else page_bytes)

    def finish(self, address: str, path: Path, digest: str | None) -> None:
        """Check the hash, and give the file its name."""
        self._file.seek(0)
        found = hashlib.file_digest(self._file, "sha256").hexdigest()
        if digest not in (None, found):
            self.is_kept = False
            raise _wrong_hash(address, digest, found)
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._path, path)
        _logger.info("Downloaded %s: %s bytes, sha256 %s", address, f"{self.size:,}", found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        is_kept = self.is_kept and self.size >= HEADER_BYTES
        self._file.close()
        if error is not None and not is_kept:
            self._path.unlink(missing_ok=True)


def _check_hash(address: str, path: Path, digest: str | None) -> None:
    """Check a file that was downloaded before."""
    if digest is None:
        return
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error
    if found != digest:
        raise UserError(f"{_wrong_hash(address, digest, found)}; {path} was downloaded before: remove it")


def _wrong_hash(address: str, digest: str | None, found: str) -> UserError:
    return UserError(f"{address!r:.200} has SHA-256 {found}, not {digest}")


def _download_from_hub(source: str) -> Path:
    match = _HUB.fullmatch(source)
    if match is None:
        raise UserError(f"{source!r:.200} is not a file on the hub; write hf://datasets/OWNER/NAME/FILE.db")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("the hub needs huggingface_hub; install dm-generations[checkpoints]") from error
    repository: dict[str, Any] = {"repo_type": "dataset" if match["kind"] else "model", "revision": match["revision"]}
    try:
        try:
            path = huggingface_hub.hf_hub_download(
                match["repository"], match["file"], **repository, local_files_only=True
            )
        except FileNotFoundError:  # it is not in the cache
            # Where there is no network this fails at once; the download would try for half a minute.
            huggingface_hub.HfApi().repo_info(match["repository"], **repository)
            path = huggingface_hub.hf_hub_download(match["repository"], match["file"], **repository)
    except Exception as error:  # the library's HTTP clients have no base class of their errors in common
        raise UserError(f"cannot download {source!r:.200}: {one_line(error)}") from error
    return Path(os.path.realpath(path))  # links of the hub's cache lead to the file
