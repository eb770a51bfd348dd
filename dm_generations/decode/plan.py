"""What a decode is to write: which groups, which files, and which of those are finished already."""

import functools
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dm_generations.archive import Archive, Settings
from dm_generations.decode import names
from dm_generations.errors import UserError

_IDS_SHOWN = 20


@dataclass(frozen=True)
class Selection:
    """Which pictures: ids and texts of one kind are OR-ed, the two kinds AND-ed; by default all."""

    prompt_ids: Sequence[int] = ()
    prompt_texts: Sequence[str] = ()
    sc_prompt_ids: Sequence[int] = ()
    sc_prompt_texts: Sequence[str] = ()
    n_best: int | None = None  # of each group


@dataclass(frozen=True)
class Layout:
    """How pictures become files: "images" is one each, "gallery" a grid of cols x rows for each group.

    "npy" is a file of tokens for each, which needs no codec. "tar" is a file for each `shard_size` pictures, and
    "zip" one file for all (see shards.py).
    """

    mode: str
    cols: int
    rows: int
    picture_extension: str = ".png"
    shard_size: int = 1000
    is_seamless: bool = False  # of galleries: the pictures of a file are decoded as one

    @property
    def is_gallery(self) -> bool:
        return self.mode == "gallery"

    @property
    def extension(self) -> str:
        return ".npy" if self.mode == "npy" else self.picture_extension

    @property
    def is_sharded(self) -> bool:
        return self.mode in ("tar", "zip")

    @property
    def cells(self) -> int:
        """Pictures of one file."""
        return self.cols * self.rows if self.is_gallery else 1


@dataclass(frozen=True, slots=True)
class Target:
    """One file to be: `path` is relative to the output folder, with "/" between its two parts."""

    path: str
    page: int
    ranks: range  # the pictures on it, 0 the best of the group
    incomplete_path: str | None  # where a gallery goes that lacks pictures; None for single pictures


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """The pictures of one prompt and one setting, best first, up to `count`."""

    settings: Settings
    prompt: str | None
    sc_prompt: str | None
    count: int

    @property
    def folder(self) -> str:
        return names.prompt_folder(self.settings.prompt_id, self.prompt)

    def targets(self, layout: Layout) -> Iterator[Target]:
        """The files of this group, best pictures first."""
        folder, settings = self.folder, self.settings
        fields = (
            settings.sc_prompt_id,
            settings.top_k,
            settings.top_p,
            settings.temperature,
            settings.cond_scale,
            self.sc_prompt,
        )
        name = functools.partial(names.picture_file, *fields, extension=layout.extension)
        for page, first in enumerate(range(0, self.count, layout.cells)):
            ranks = range(first, min(first + layout.cells, self.count))
            if layout.is_gallery:
                incomplete_path = f"{folder}/{name(page=page, is_incomplete=True)}"
                yield Target(f"{folder}/{name(page=page)}", page, ranks, incomplete_path)
            else:
                yield Target(f"{folder}/{name(rank=first)}", 0, ranks, None)


def select_groups(archive: Archive, selection: Selection) -> list[GroupPlan]:
    """The groups asked for, in the order of their ids and settings.

    UserError for an id or text that the archive lacks, and when nothing is selected.
    """
    prompts, sc_prompts = archive.prompts(), archive.sc_prompts()
    prompt_ids = _selected_ids("prompt", archive.path, prompts, selection.prompt_ids, selection.prompt_texts)
    sc_prompt_ids = _selected_ids(
        "sc prompt", archive.path, sc_prompts, selection.sc_prompt_ids, selection.sc_prompt_texts
    )
    groups = archive.groups(prompt_ids, sc_prompt_ids)
    if not groups:
        asked = "no pictures" if prompt_ids is None and sc_prompt_ids is None else "no pictures of these prompts"
        raise UserError(f"{archive.path} holds {asked}; `python -m dm_generations info` shows what it holds")
    return [
        GroupPlan(
            group.settings,
            prompts.get(group.settings.prompt_id),
            sc_prompts.get(group.settings.sc_prompt_id),
            group.count if selection.n_best is None else min(group.count, selection.n_best),
        )
        for group in groups
    ]


def _selected_ids(
    kind: str, path: Path, texts: Mapping[int, str | None], ids: Sequence[int], wanted: Sequence[str]
) -> list[int] | None:
    """Ids that are listed or have a wanted text; None when there is no filter."""
    if not ids and not wanted:
        return None
    if unknown := sorted(set(ids) - texts.keys()):
        raise UserError(f"{path} has no {kind} with id {_some(unknown)}; its {kind} ids are {_some(texts)}")
    known_texts, wanted_texts = set(texts.values()), set(wanted)  # a sweep may have asked for thousands
    if unknown_texts := [text for text in wanted if text not in known_texts]:
        raise UserError(f"{path} has no {kind} {unknown_texts[0]!r:.200}; give the whole text, or its id")
    return sorted(set(ids) | {text_id for text_id, text in texts.items() if text in wanted_texts})


def _some(ids: Sequence[int] | Mapping[int, object]) -> str:
    shown = ", ".join(str(number) for number in list(ids)[:_IDS_SHOWN])
    return shown + (f" and {len(ids) - _IDS_SHOWN:,} more" if len(ids) > _IDS_SHOWN else "")


def is_finished(path: str) -> bool:
    """Whether the file stands at its final name: since files land by rename, it is whole then.

    Except an empty one, which a power cut may leave.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0
