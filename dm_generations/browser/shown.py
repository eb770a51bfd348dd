"""Which pictures the files of earlier decodes show, as the manifest beside them says.

A name holds a rank and not a picture: when an archive gets more pictures, or other scores, ranks go to other pictures.
The manifest lists what the latest decode was asked for; other files of its folder are listed in `.others.json`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from dm_generations.browser.manifest import MANIFEST, MANIFEST_START, Entry, GalleryEntry, rounded_score, unusual
from dm_generations.files import write_atomic

OTHERS = ".others.json"

# The score of the picture, its key, and what else sets it apart; of a gallery, which has no keys, the scores. A key
# alone would not do: pictures that go on from two given ones have the same keys, and so have those of two models.
Shown = tuple[int | float | str | None, ...]


def shown_before(out_dir: Path) -> dict[str, Shown]:
    """By path, for the files that are listed in `out_dir`; nothing where there is no list that can be read."""
    return _of_others(out_dir / OTHERS) | _of_manifest(out_dir / MANIFEST)


def write_others(out_dir: Path, others: Mapping[str, Shown]) -> None:
    """Note what the files show that the manifest is not going to list. Raises OSError."""
    if others:
        write_atomic(out_dir / OTHERS, json.dumps(others, sort_keys=True, separators=(",", ":")).encode("ascii"))
    else:
        (out_dir / OTHERS).unlink(missing_ok=True)


def _of_others(path: Path) -> dict[str, Shown]:
    try:
        return {path: tuple(shown) for path, shown in json.loads(path.read_text(encoding="ascii")).items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):  # someone else's file, or none
        return {}


def _of_manifest(path: Path) -> dict[str, Shown]:
    try:
        manifest = json.loads(path.read_text(encoding="ascii").removeprefix(MANIFEST_START).rstrip(";\n"))
        found = {}
        for *_, prefix, suffix, files in manifest["groups"]:
            for middle, _, *rest in files:
                found[prefix + middle + suffix] = tuple(rest if manifest["mode"] == "images" else rest[0])
        return found
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):  # someone else's file, or none
        return {}


def shown_by(entry: Entry | GalleryEntry) -> Shown:
    """What `shown_before` is going to give for the file of this entry."""
    if isinstance(entry, Entry):
        return rounded_score(entry.score), entry.key0, entry.key1, *unusual(entry)
    return tuple(map(rounded_score, entry.scores))
