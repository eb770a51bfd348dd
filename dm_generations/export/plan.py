"""What a decode is to write: which groups, which files, and which of those are finished already."""

import functools
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from dm_generations.archive import Archive, GroupKey
from dm_generations.errors import UserError
from dm_generations.export import filenames
from dm_generations.paths import utf8_path

_MAX_IDS_LISTED = 20


@dataclass(frozen=True)
class Selection:
    """Which images to decode: by default all. Ids and texts of one kind add up; the two kinds both have to match.

    Attributes:
        n_best: At most so many of each group; None for all.
    """

    prompt_ids: Sequence[int] = ()
    prompt_texts: Sequence[str] = ()
    sc_prompt_ids: Sequence[int] = ()
    sc_prompt_texts: Sequence[str] = ()
    n_best: int | None = None


@dataclass(frozen=True)
class Layout:
    """How images become files.

    Attributes:
        mode: "images" is a file each, "gallery" a grid of cols x rows for each group, "npy" a file of tokens each,
            "tar" a file for each `shard_size` images, and "zip" one file for all.
        image_extension: Of image files, with its dot.
        is_seamless: Whether the images of a gallery are decoded as one.
    """

    mode: str
    cols: int
    rows: int
    image_extension: str = ".png"
    shard_size: int = 1000
    is_seamless: bool = False

    @property
    def is_gallery(self) -> bool:
        """Whether a file holds several images as one."""
        return self.mode == "gallery"

    @property
    def is_sharded(self) -> bool:
        """Whether image files are put into larger files."""
        return self.mode in ("tar", "zip")

    @property
    def has_page(self) -> bool:
        """Whether the folder gets a page, and a journal of what its files show."""
        return self.mode in ("images", "gallery")

    @property
    def extension(self) -> str:
        """Of the files, with its dot."""
        return ".npy" if self.mode == "npy" else self.image_extension

    @property
    def images_per_file(self) -> int:
        """Images of one image file; of a full gallery."""
        return self.cols * self.rows if self.is_gallery else 1


@dataclass(frozen=True, slots=True)
class Target:
    """One file to write.

    Attributes:
        path: Relative to the output folder, with "/" between its two parts.
        page: Of a gallery, from 0.
        ranks: The images on it; 0 is the best of the group.
        incomplete_path: Where a gallery goes that lacks images; None for single images.
    """

    path: str
    page: int
    ranks: range
    incomplete_path: str | None


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """The images of one prompt and one setting, best first, up to `count`."""

    key: GroupKey
    prompt: str | None
    sc_prompt: str | None
    count: int

    @property
    def folder(self) -> str:
        """The group's folder in the output folder."""
        return filenames.prompt_folder(self.key.prompt_id, self.prompt)

    def targets(self, layout: Layout) -> Iterator[Target]:
        """Yield the files of this group, best images first."""
        folder = self.folder
        fields = (self.key.sc_prompt_id, *astuple(self.key.params), self.sc_prompt)
        name = functools.partial(filenames.image_file, *fields, extension=layout.extension)
        for page, first in enumerate(range(0, self.count, layout.images_per_file)):
            ranks = range(first, min(first + layout.images_per_file, self.count))
            if layout.is_gallery:
                incomplete_path = f"{folder}/{name(page=page, is_incomplete=True)}"
                yield Target(f"{folder}/{name(page=page)}", page, ranks, incomplete_path)
            else:
                yield Target(f"{folder}/{name(rank=first)}", 0, ranks, None)


def select_groups(archive: Archive, selection: Selection) -> list[GroupPlan]:
    """Return the selected groups, in the order of their ids and settings.

    Raises:
        UserError: The archive lacks an id or a text, or nothing is selected.
    """
    prompts, sc_prompts = archive.prompts(), archive.sc_prompts()
    prompt_ids = _select_ids("prompt", archive.path, prompts, selection.prompt_ids, selection.prompt_texts)
    sc_prompt_ids = _select_ids(
        "sc prompt", archive.path, sc_prompts, selection.sc_prompt_ids, selection.sc_prompt_texts
    )
    groups = archive.groups(prompt_ids, sc_prompt_ids)
    if not groups:
        found = "no images" if prompt_ids is None and sc_prompt_ids is None else "no images of these prompts"
        raise UserError(f"{archive.path} holds {found}; `python -m dm_generations info` shows what it holds")
    return [
        GroupPlan(
            group.key,
            prompts.get(group.key.prompt_id),
            sc_prompts.get(group.key.sc_prompt_id),
            group.count if selection.n_best is None else min(group.count, selection.n_best),
        )
        for group in groups
    ]


def describe_plan(plan: GroupPlan) -> str:
    """Return what stands for a group in the names of shards. It never changes, so that finished shards are found."""
    params = plan.key.params
    settings = (
        f"Settings(prompt_id={plan.key.prompt_id!r}, sc_prompt_id={plan.key.sc_prompt_id!r}, top_k={params.top_k!r}, "
        f"top_p={params.top_p!r}, temperature={params.temperature!r}, cond_scale={params.cond_scale!r})"
    )
    return f"GroupPlan(settings={settings}, prompt={plan.prompt!r}, sc_prompt={plan.sc_prompt!r}, count={plan.count!r})"


def is_finished(out_dir: Path, path: str) -> bool:
    """Return whether a file stands at its final name: it is whole then, since files are put there by renaming.

    An empty one is not, which a power cut may leave.
    """
    try:
        status = utf8_path(out_dir, path).stat()
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0


def _select_ids(
    kind: str, path: Path, texts: Mapping[int, str | None], ids: Sequence[int], wanted: Sequence[str]
) -> list[int] | None:
    """Return the ids that are listed or have a wanted text; None when there is no filter."""
    if not ids and not wanted:
        return None
    if unknown := sorted(set(ids) - texts.keys()):
        raise UserError(f"{path} has no {kind} with id {_list_ids(unknown)}; its {kind} ids are {_list_ids(texts)}")
    known_texts, wanted_texts = set(texts.values()), set(wanted)  # a sweep may ask for thousands
    if unknown_texts := [text for text in wanted if text not in known_texts]:
        raise UserError(f"{path} has no {kind} {unknown_texts[0]!r:.200}; give the whole text, or its id")
    return sorted(set(ids) | {text_id for text_id, text in texts.items() if text in wanted_texts})


def _list_ids(ids: Sequence[int] | Mapping[int, object]) -> str:
    listed = ", ".join(str(number) for number in list(ids)[:_MAX_IDS_LISTED])
    return listed + (f" and {len(ids) - _MAX_IDS_LISTED:,} more" if len(ids) > _MAX_IDS_LISTED else "")
