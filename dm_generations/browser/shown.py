"""Which pictures the files of earlier decodes show, as the manifest beside them says.

A name holds a rank and not a picture: when an archive gets more pictures, or other scores, ranks go to other pictures.
The manifest lists what the latest decode was asked for; other files of its folder are listed in `.others.json`. Both
are written when a decode ends. So that one which is killed leaves no file that nobody knows, each is noted in
`.under-way.jsonl` before it is written; that goes when the lists are there.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from dm_generations.atomic_io import write_atomic
from dm_generations.browser.manifest import MANIFEST, MANIFEST_START, Entry, GalleryEntry, rounded_score, unusual
from dm_generations.errors import UserError

OTHERS = ".others.json"
NOTES = ".under-way.jsonl"  # a line is [path, shown]; the last one of a path counts

# The score of the picture, its key, and what else sets it apart; of a gallery the scores and its identity. A key
# alone would not do: pictures that go on from two given ones have the same keys, and so have those of two models.
Shown = tuple[int | float | str | None, ...]
UNKNOWN: Shown = ()  # shows one of two pictures: a decode that was to replace it may not have come to it


def shown_before(out_dir: Path) -> dict[str, Shown]:
    """By path, for the files that are listed in `out_dir`; nothing where there is no list that can be read."""
    return _of_others(out_dir / OTHERS) | _of_manifest(out_dir / MANIFEST) | dict(_of_notes(out_dir / NOTES))


class Notes:
    """What the files of a decode under way show, kept on disk until `write_others` and the manifest say so.

    Notes of decodes that were killed are kept too. Nothing is made before the first note.
    """

    def __init__(self, out_dir: Path):
        self._path, self._file = out_dir / NOTES, None

    def add(self, path: str, shown: Shown) -> None:
        """To be called before the file at `path` is written. UserError where the disk takes no more."""
        # Begins the line: what was cut off before it, on a full disk, costs only itself.
        line = f"\n{json.dumps([path, shown], separators=(',', ':'))}".encode("ascii")
        try:
            if self._file is None:
                self._file = open(self._path, "ab", buffering=0)  # a note that is not on disk would be none
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; make room for it and run the same command again to go on"
            ) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Once the lists say it all. Raises OSError."""
        self.close()
        self._path.unlink(missing_ok=True)


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


def _of_notes(path: Path) -> Iterator[tuple[str, Shown]]:
    with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):  # cut off, or someone else's
                noted, shown = json.loads(line)
                yield os.fspath(noted), tuple(shown)


def _of_manifest(path: Path) -> dict[str, Shown]:
    try:
        manifest = json.loads(path.read_text(encoding="ascii").removeprefix(MANIFEST_START).rstrip(";\n"))
        found = {}
        for *_, prefix, suffix, files in manifest["groups"]:
            for middle, _, *rest in files:
                found[prefix + middle + suffix] = tuple(rest if manifest["mode"] == "images" else [*rest[0], *rest[1:]])
        return found
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):  # someone else's file, or none
        return {}


def shown_by(entry: Entry | GalleryEntry) -> Shown:
    """What `shown_before` is going to give for the file of this entry."""
    if isinstance(entry, Entry):
        return rounded_score(entry.score), entry.key0, entry.key1, *unusual(entry)
    return *map(rounded_score, entry.scores), *filter(None, [entry.identity])
