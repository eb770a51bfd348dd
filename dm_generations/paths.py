"""Where shipped files and caches are, and names: of archives and models as people see them, and of files."""

import os
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath
from urllib.parse import quote

from pathvalidate import sanitize_filename

from dm_generations.errors import UserError

NAME_BYTES = 255  # the longest name that common file systems take
PAGE = "samplebrowser.html"  # ships, and is written into a folder of decoded images
STEM_CHARACTERS = 250  # where the 2022 script cut, before it added ".png"
_SHIPPED_MODELS = "embedded/"  # so begin the names of models that ship
_SURROGATE = re.compile("[\ud800-\udfff]")
_SAFE = re.compile(r"[0-9][A-Za-z0-9_=,. -]{,200}(?<![ .])")  # most names, which the library need not look at

PACKAGE = Path(__file__).resolve().parent


def shipped(relative: str) -> Path:
    """Return the path of a file that ships: inside the wheel (`_shipped/`), or at the root of a checkout.

    Raises:
        UserError: The installation lacks it.
    """
    for root in (PACKAGE / "_shipped", PACKAGE.parent):
        path = root / relative
        if path.exists():
            return path
    raise UserError(f"{relative} is missing from this installation of dm_generations; install it again")


def cache_dir(name: str) -> Path:
    """Return a private folder (mode 0700) of this user, created when it is missing.

    It holds executable code (compiled programs), so it is refused if another user, except the administrator, could put
    something in it or another folder in its place. In a folder that all can write to, as `/tmp`, the sticky bit
    prevents that.

    Args:
        name: Relative to this program's caches.

    Returns:
        The path without links.

    Raises:
        UserError: A folder on the way belongs to another user or others can write to it; or this user has no home, as
            in a container that runs under a user number without a name.
    """
    path = Path(os.path.realpath(_cache_base() / "dm-generations" / name))  # links are followed here, once
    for folder in [*reversed(path.parents), path]:
        folder.mkdir(mode=0o700, exist_ok=True)
        if hasattr(os, "getuid"):
            _check_owner(folder, is_shared=folder != path)
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)
    return path


def _check_owner(folder: Path, is_shared: bool) -> None:
    """Raise UserError if others control a folder. With `is_shared`, the administrator's and sticky ones are good too.

    The administrator is whoever owns "/": in a container that can be another number than 0.
    """
    status = folder.lstat()
    owners = {os.getuid(), os.lstat("/").st_uid} if is_shared else {os.getuid()}
    is_sticky = is_shared and status.st_mode & stat.S_ISVTX
    if status.st_uid not in owners:
        what = "belongs to another user"
    elif stat.S_ISLNK(status.st_mode) or (status.st_mode & 0o022 and not is_sticky):
        what = "can be written by other users"
    else:
        return
    raise UserError(f"{folder} {what}: set XDG_CACHE_HOME to a folder of your own, or remove it if it is not needed")


def _cache_base() -> Path:
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches"
        if os.name == "nt":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise UserError("this user has no home folder; set HOME or XDG_CACHE_HOME") from error


def label_paths(paths: Sequence[Path]) -> list[str]:
    """Return a name for each file: its own, with its folder or a number where names are equal."""
    names = [path.name for path in paths]
    names = [f"{path.parent.name}/{path.name}" if names.count(path.name) > 1 else path.name for path in paths]
    return [f"{name} ({names[:i].count(name) + 1})" if names[:i].count(name) else name for i, name in enumerate(names)]


def model_label(name: object) -> str | None:
    """Return a model's name in judgements and on the page: "" for one that ships, None for one that is unknown."""
    if not isinstance(name, str):
        return None
    return "" if name.startswith(_SHIPPED_MODELS) else name


def sanitize_name(text: str) -> str:
    """Return `text`, which starts with a digit or a letter, as a file name; lone surrogates become U+FFFD."""
    if _SAFE.fullmatch(text):
        return text
    # The encoding in which names are cut to 255 bytes must not depend on this machine's locale.
    return sanitize_filename(_SURROGATE.sub("\ufffd", text), fs_encoding="utf-8")


def sanitize_file_name(text: str, extension: str) -> str:
    """Return `text` with an extension as a file name of at most 255 bytes; see `sanitize_name`."""
    stem = sanitize_name(text)[:STEM_CHARACTERS].encode()
    return stem[: NAME_BYTES - len(extension)].decode(errors="ignore") + extension


def sqlite_uri(path: PurePath, query: str) -> str:
    """Return the URI of a database for SQLite, which takes no host: a Windows share is a path like others.

    Args:
        path: Absolute. In the URI it is bytes, those of the name on disk, whatever the locale is.
        query: What comes after "?".
    """
    name = path.as_posix()
    return f"file://{'' if name.startswith('/') else '/'}{quote(os.fsencode(name), safe='/:')}?{query}"


def utf8_path(folder: Path, name: str) -> Path:
    """Return the path of a file whose name is UTF-8 on disk in every locale, also in one that lacks its characters.

    Args:
        folder: An existing or new folder.
        name: Relative to it, with "/" between its parts.
    """
    return folder / os.fsdecode(name.encode())
