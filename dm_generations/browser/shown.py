"""Which pictures the files of an earlier decode show, as the manifest beside them says.

A name holds a rank and not a picture: when an archive gets more pictures, or other scores, ranks go to other pictures.
"""

import json
from pathlib import Path

from dm_generations.browser.manifest import MANIFEST, MANIFEST_START, Entry, GalleryEntry, rounded_score

Shown = tuple[int | float | None, ...]  # the key of the picture; of a gallery, which has no keys, the scores


def shown_before(out_dir: Path) -> dict[str, Shown]:
    """By path, for the files that the manifest in `out_dir` lists; nothing where there is none that can be read."""
    try:
        text = (out_dir / MANIFEST).read_text(encoding="ascii")
        manifest = json.loads(text.removeprefix(MANIFEST_START).rstrip(";\n"))
        found = {}
        for *_, prefix, suffix, files in manifest["groups"]:
            for middle, _, *rest in files:
                found[prefix + middle + suffix] = tuple(rest[1:] if manifest["mode"] == "images" else rest[0])
        return found
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # someone else's file, or none
        return {}


def shown_by(entry: Entry | GalleryEntry) -> Shown:
    """What `shown_before` is going to give for the file of this entry."""
    if isinstance(entry, Entry):
        return entry.key0, entry.key1
    return tuple(map(rounded_score, entry.scores))
