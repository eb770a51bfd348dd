"""Archives from an address or from the Hugging Face hub."""

import http.client
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Final

from dm_generations.atomic_io import replacing
from dm_generations.errors import UserError, one_line
from dm_generations.paths import sanitize_file_name, shipped, utf8_path

TIMEOUT_S: Final = 60  # without any data
_SQLITE: Final = b"SQLite format 3\0"
_HUB: Final = re.compile(
    r"hf://(?P<kind>datasets/)?(?P<repository>[\w.-]{1,96}/[\w.-]{1,96}?)(@(?P<revision>[\w.-]{1,200}))?/(?P<file>.+)"
)


def find_archive(source: str | os.PathLike[str] | None, folder: Path) -> Path:
    """Return the file of an archive, which is downloaded if it has to be.

    Args:
        source: As `Archive.load` takes it.
        folder: Where a file from an address is stored.

    Raises:
        UserError: It cannot be downloaded, or the address has no SQLite file.
    """
    if source is None:
        return shipped("archive/emoji.db")
    if not isinstance(source, str) or "://" not in source:
        return Path(source)
    scheme = source.partition("://")[0].lower()
    if scheme == "hf":
        return _download_from_hub(source)
    if scheme in ("http", "https"):
        return _download(source, folder)
    raise UserError(f"{source!r:.200}: an archive is a path, https://... or hf://datasets/OWNER/NAME/FILE.db")


def _download(address: str, folder: Path) -> Path:
    try:
        name = urllib.parse.unquote(urllib.parse.urlsplit(address).path).rpartition("/")[2]
        path = utf8_path(folder, sanitize_file_name(name.removesuffix(".db") or "archive", ".db"))
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer, replacing(path) as file:
            head = answer.read(len(_SQLITE))
            if head != _SQLITE:
                raise UserError(f"{address!r:.200} is not an archive: it is not a file of SQLite")
            file.write(head)
            shutil.copyfileobj(answer, file)
            expected = answer.headers.get("Content-Length")
            if expected is not None and expected.isdecimal() and file.tell() != int(expected):
                raise UserError(f"{address!r:.200} ended early, after {file.tell():,} of {expected} bytes; try again")
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"cannot download {address!r:.200}: HTTP status {error.code}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # no network, a full disk; not an address
        raise UserError(f"cannot download {address!r:.200}: {one_line(error)}") from error
    return path


def _download_from_hub(source: str) -> Path:
    match = _HUB.fullmatch(source)
    if match is None:
        raise UserError(f"{source!r:.200} is not a file on the hub; write hf://datasets/OWNER/NAME/FILE.db")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("the hub needs huggingface_hub; install dm-generations[checkpoints]") from error
    repo_type = "dataset" if match["kind"] else "model"
    try:
        path = huggingface_hub.hf_hub_download(
            match["repository"], match["file"], repo_type=repo_type, revision=match["revision"]
        )
    except Exception as error:  # the library's HTTP clients have no base class of their errors in common
        raise UserError(f"cannot download {source!r:.200}: {one_line(error)}") from error
    return Path(os.path.realpath(path))  # links of the hub's cache lead to the file
