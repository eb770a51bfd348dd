"""Models of the Hugging Face hub by name, stored in the hub's own cache.

A name is `owner/name`, or `owner/name/file.pt` for one file of a repository; each can have an `@revision` at its end.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dm_generations.errors import UserError, one_line
from dm_generations.weights.native import CONFIG_FILE, FORMAT, WEIGHTS_FILE, read_json_object

_NAME = re.compile(
    r"(?P<repository>[\w.-]{1,96}/[\w.-]{1,96})(/(?P<file>[\w./-]{1,200}\.(pt|pth|ckpt|bin|safetensors)))?"
    r"(@(?P<revision>[\w./-]{1,200}))?"
)
_SMALL = (".json", ".yaml", ".yml", ".txt", ".txt.gz", ".model", "tokenizer.tar.gz")

WeightGroups = Sequence[Sequence[str]]


def is_hub_name(name: str) -> bool:
    """Whether this can be the name of a model there."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def download(name: str, weight_groups: WeightGroups) -> Path | None:
    """Download what a model needs, unless it is in the hub's cache.

    Args:
        name: For which `is_hub_name` is true.
        weight_groups: See `choose_files`.

    Returns:
        The folder in the hub's cache, or the file of it; None if the repository has no such weights.

    Raises:
        UserError: huggingface_hub is not installed, the hub has no such model, file or revision, or there is no network
            and the model is not in the cache.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise UserError(
            f"{name}: no such file or folder; if it is a model of the Hugging Face hub: "
            "pip install 'dm-generations[checkpoints]'"
        ) from None
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a model of the hub")
    options: dict[str, Any] = {"repo_id": match["repository"], "revision": match["revision"]}
    # Without a network the errors are those of the library's HTTP client: requests, httpx and httpx2 have no base class
    # of their own in common.
    try:
        try:
            # not list_repo_files, which tries for half a minute where there is no network
            siblings = huggingface_hub.HfApi().model_info(**options).siblings
        except Exception as error:
            if 400 <= (_status(error) or 0) < 500 or isinstance(error, ValueError):
                raise
            return _find_cached(huggingface_hub.snapshot_download, options, match["file"] or "")
        files = [file.rfilename for file in siblings or ()]
        if match["file"] is not None:
            patterns = _choose_beside(files, match["file"], name)
            return Path(huggingface_hub.snapshot_download(allow_patterns=patterns, **options)) / match["file"]
        is_native = CONFIG_FILE in files and _is_native(
            huggingface_hub.hf_hub_download(filename=CONFIG_FILE, **options)
        )
        patterns = choose_files(files, weight_groups, is_native)
        return Path(huggingface_hub.snapshot_download(allow_patterns=patterns, **options)) if patterns else None
    except UserError:
        raise
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        raise UserError(f"{name}: not in the cache of the Hugging Face hub, and the hub cannot be reached") from error
    except Exception as error:
        raise UserError(
            f"{name}: no such folder, and the Hugging Face hub does not give it ({one_line(error)})"
        ) from error


def _find_cached(snapshot_download: Callable[..., str], options: dict[str, Any], file: str) -> Path:
    """Return the folder of a model in the hub's cache, or a file of it."""
    try:
        folder = Path(snapshot_download(local_files_only=True, **options))
    except FileNotFoundError as error:
        # The library calls a snapshot incomplete without the files of the repository that this program never reads.
        found = getattr(error, "snapshot_path", None)
        if found is None:
            raise
        folder = Path(found)
    path = folder / file
    if not path.exists():
        raise FileNotFoundError(str(path))
    return path


def _choose_beside(names: Iterable[str], file: str, name: str) -> list[str]:
    """Return a file of a repository, and the configs and tokenizers of its folder. Raises UserError without it."""
    there = sorted(each for each in names if each.isprintable())
    if file not in there:
        weights = [each for each in there if not each.endswith(_SMALL)]
        raise UserError(f"{name}: the repository has no file {file}, but {', '.join(weights[:20]):.500}")
    folder = file.rpartition("/")[0]
    return [file, *(each for each in there if each.endswith(_SMALL) and each.rpartition("/")[0] == folder)]


def _status(error: Exception) -> int | None:
    """Return the HTTP status of an answer of the hub; None for other errors."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_native(config: str) -> bool:
    return read_json_object(Path(config)).get("format") == FORMAT


def choose_files(names: Iterable[str], weight_groups: WeightGroups, is_native: bool) -> list[str]:
    """Choose the files of a repository to download.

    The same weights are often there in several formats.

    Args:
        names: Of all files.
        weight_groups: Patterns of names of weight files, a group for each format that loads. The first group with a
            file counts, the others are left.
        is_native: Whether `config.json` is that of a folder of our own.

    Returns:
        Weights, configs and tokenizers; nothing if there are no weights that load.
    """
    names = [name for name in names if name.isprintable()]  # the library shows them in its bars of progress
    groups = [(WEIGHTS_FILE,)] if is_native else weight_groups
    weights = next((found for group in groups if (found := _match(names, group))), [])
    return weights + [name for name in names if name.endswith(_SMALL)] if weights else []


def _match(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatch(name.rsplit("/", 1)[-1], pattern) for pattern in patterns)]
