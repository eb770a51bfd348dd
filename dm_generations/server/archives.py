"""Several archives that are served as one, with the archive as one more axis.

Each archive has its own ids of prompts and models. Here those with the same text or name are one, under new ids that
stay as long as the server runs.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final

from dm_generations.archive.browse import AXES, MAX_SEEDS, SETTING, Browser, Query, Question, statistics
from dm_generations.errors import UserError
from dm_generations.paths import label_paths, sanitize_name
from dm_generations.server.data import (
    MAX_JUDGEMENTS,
    SUMMARY_VERSION,
    VALUES,
    ArchiveThread,
    BadRequestError,
    ServedArchive,
    statistics_rows,
)
from dm_generations.server.images import UndecodableError

_GROUP, _SCORE, _SEED, _KEY = 1, 3, 6, slice(4, 6)  # positions in an image, see browser/source.js
_EVERY: Final = 1 << 62


class _Ids:
    """One id for equal values of several archives: a number from `first`, in the order in which they are found."""

    def __init__(self, first: int):
        self._first = first
        self._ids: dict[Hashable, int] = {}
        self._own: dict[tuple[int, Any], int] = {}
        self._members: dict[int, set[tuple[int, Any]]] = {}

    def add(self, archive: int, own: Any, value: Hashable) -> None:
        """Note that an archive has a value under an id of its own."""
        new = self._ids.setdefault(value, self._first + len(self._ids))
        self._own[archive, own] = new
        self._members.setdefault(new, set()).add((archive, own))

    def get(self, archive: int, own: Any) -> Any:
        """Return the id of what an archive has under `own`; None if it is not known."""
        return self._own.get((archive, own))

    def own(self, archive: int, new: Any) -> list[Any]:
        """Return what an archive has it under: nothing, or more than one in a damaged archive."""
        return sorted(own for i, own in self._members.get(new, ()) if i == archive)

    def values(self) -> dict[int, Any]:
        """Return all values by id."""
        return {new: value for value, new in self._ids.items()}


class ServedArchives(ArchiveThread):
    """Several archives as one, with the methods of ServedArchive."""

    def __init__(self, archives: Sequence[ServedArchive]):
        """Take the archives."""
        super().__init__()
        self._archives = archives
        self._names = label_paths([archive.path for archive in archives])
        self._revisions: list[int] = []
        self._prompts, self._sc_prompts, self._models = _Ids(1), _Ids(1), _Ids(0)
        self._model_names: list[str | None] = []
        self._folded: dict[int, str] = {}
        self._shown_prompts: list[int] = []
        self._seeds: dict[tuple[Any, Any], int] = {}
        self._statistics: dict[Any, list[list[Any]]] = {}

    def close(self) -> None:
        """Close the archives."""
        super().close()
        for archive in self._archives:
            archive.close()

    def _browsers(self) -> list[Browser]:
        """Return the archives as they are now, with their ids known here."""
        browsers = [archive.browser() for archive in self._archives]
        revisions = [archive.revision for archive in self._archives]
        if revisions != self._revisions:
            self._read_ids(browsers)
            self._revisions = revisions
        return browsers

    def _read_ids(self, browsers: Sequence[Browser]) -> None:
        self._seeds, self._statistics = {}, {}
        shown: set[int] = set()
        for i, browser in enumerate(browsers):
            for own, text in browser.prompts("", 0, _EVERY)[1]:
                self._prompts.add(i, own, text)
                shown.add(self._prompts.get(i, own))
            for own, text in browser.sc_prompts():
                self._sc_prompts.add(i, own, text)
            names = browser.models
            for own, name in enumerate(names):  # two of one archive are two here, whatever their names
                self._models.add(i, own, (name, names[:own].count(name)))
            for key in browser.seeds:
                if len(self._seeds) < MAX_SEEDS:
                    self._seeds.setdefault(key, len(self._seeds))
        self._model_names = [name for name, _ in self._models.values().values()]
        self._shown_prompts = sorted(shown)
        texts = self._prompts.values()
        self._folded = {new: f"{new} {texts[new] or ''}".casefold() for new in self._shown_prompts}

    def _merge_values(self, archive: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a group with the ids of all archives."""
        new = {"archive": archive, "model": self._models.get(archive, values["model"])}
        new["sc_prompt"] = self._sc_prompts.get(archive, values["sc_prompt"])
        return {**values, **new}

    # Reading

    def changes(self) -> dict[str, Any]:
        """Return the revision."""
        self._browsers()
        return {"revision": sum(self._revisions)}

    def summary(self) -> dict[str, Any]:
        """Return what the page asks first."""
        browsers = self._browsers()
        ranges = [browser.score_range for browser in browsers]
        best = max(range(len(browsers)), key=lambda i: (ranges[i] or (0, -math.inf))[1])
        with_images = [best, *(i for i, browser in enumerate(browsers) if browser.image_count)]
        summaries = [archive.summary() for archive in self._archives]
        first = next(({**summaries[i]["first"], "archive": i} for i in with_images if summaries[i]["first"]), None)
        if first is not None:
            i = first.pop("archive")
            first = {"prompt": self._prompts.get(i, first["prompt"]), "values": self._merge_values(i, first["values"])}
        return {
            **{"version": SUMMARY_VERSION, "mode": "images", "archives": self._names, "models": self._model_names},
            **{"sc_prompts": list(self._sc_prompts.values().items()), "seeds": list(self._seeds), "first": first},
            "images": sum(browser.image_count for browser in browsers),
            **{"prompts": len(self._shown_prompts), "score_range": _join_ranges(ranges)},
            **{"decoder": summaries[0]["decoder"], "revision": sum(self._revisions)},
        }

    def values(self) -> dict[str, Any]:
        """Return all values of each axis."""
        found: dict[str, dict[Any, None]] = {axis: {} for axis in AXES}
        for i, browser in enumerate(self._browsers()):
            for axis, values in browser.values.items():
                for value in values:
                    merged = self._merge_values(i, {"model": None, "sc_prompt": None, "archive": None, axis: value})
                    found[axis].setdefault(merged[axis])
        return {"values": {axis: list(values) for axis, values in found.items()}}

    def prompts(self, search: str, offset: int, limit: int, ids: Sequence[int]) -> dict[str, Any]:
        """Return prompts that hold all words of `search`, or those of `ids`."""
        self._browsers()
        words = search.casefold().split()
        found = [new for new in self._shown_prompts if all(word in self._folded[new] for word in words)]
        total, chosen = len(found), found[offset : offset + limit]
        if ids:
            chosen = [new for new in ids if new in self._folded]
            total = len(chosen)
        texts = self._prompts.values()
        rows: dict[int, list[Any]] = {new: [new, texts[new], 0, None] for new in chosen}
        for i, archive in enumerate(self._archives):
            owners = {own: new for new in chosen for own in self._prompts.own(i, new)}
            for own, _, count, image in archive.prompts("", 0, 0, list(owners))["prompts"] if owners else ():
                row = rows[owners[own]]
                row[2] += count
                if image is not None and (row[3] is None or _score(image) > _score(row[3])):
                    row[3] = self._merge_image(i, image)
        return {"total": total, "prompts": list(rows.values())}

    def groups(self, prompt_ids: Sequence[int]) -> dict[str, Any]:
        """Return the groups of prompts."""
        self._browsers()
        found = []
        for i, archive in enumerate(self._archives):
            own = [own for new in prompt_ids for own in self._prompts.own(i, new)]
            for group_id, prompt, *rest in archive.groups(own)["groups"] if own else ():
                values = self._merge_values(i, dict(zip(VALUES, rest, strict=False)))
                found.append([f"{i}:{group_id}", self._prompts.get(i, prompt), *values.values(), *rest[len(VALUES) :]])
        return {"groups": found}

    def images(self, group_ids: Sequence[str], query: Query) -> dict[str, Any]:
        """Return images of groups."""
        self._browsers()
        answer = {}
        for text in group_ids:
            number, _, own = text.partition(":")
            if not (number.isascii() and number.isdigit() and int(number[:9]) < len(self._archives)):
                raise BadRequestError(f"{text!r:.80} is not a group")
            i = int(number[:9])
            found = self._archives[i].images([own], query)["groups"][own]
            images = [image and self._merge_image(i, image) for image in found["images"]]
            answer[text] = {"total": found["total"], "images": images}
        return {"groups": answer}

    def _merge_image(self, archive: int, image: list[Any]) -> list[Any]:
        merged = list(image)
        merged[_GROUP] = f"{archive}:{image[_GROUP]}"
        merged[_SEED] = self._seeds.get(tuple(image[_KEY]), -1)
        return merged

    def statistics(self, axis: str, prompt_id: int | None, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """Return the scores by the values of an axis."""
        if axis not in (*AXES, SETTING):
            raise BadRequestError(f"axis is {axis!r:.40}, not one of {', '.join((*AXES, SETTING))}")
        browsers = self._browsers()
        score_range = _join_ranges([browser.score_range for browser in browsers])
        fixed = {name: value for name, value in fixed.items() if name != axis}
        key = (axis, prompt_id, tuple(sorted(fixed.items())))
        if key not in self._statistics:
            questions = [self._own_question(i, axis, prompt_id, fixed) for i in range(len(browsers))]
            shown = self._shown(browsers, axis)
            self._statistics[key] = statistics_rows(statistics(browsers, questions, shown, score_range))
        return {"range": score_range, "values": self._statistics[key]}

    def _own_question(
        self, archive: int, axis: str, prompt_id: int | None, fixed: Mapping[str, Any]
    ) -> Question | None:
        """Return a question with the ids of one archive; None if it has no such images."""
        prompts = None if prompt_id is None else self._prompts.own(archive, prompt_id)
        own = {name: value for name, value in fixed.items() if name != "archive"}
        for name, ids in (("sc_prompt", self._sc_prompts), ("model", self._models)):
            if name in own:
                found = ids.own(archive, own[name])
                if not found:
                    return None
                own[name] = found[0]
        return None if prompts == [] or fixed.get("archive", archive) != archive else Question(axis, prompts, own)

    def _shown(self, browsers: Sequence[Browser], axis: str) -> Callable[[int, Any], Any]:
        ids = {"sc_prompt": self._sc_prompts, "model": self._models}.get(axis)
        if axis == "archive":
            return lambda i, _: i
        if axis == SETTING:
            return lambda i, value: tuple(
                self._merge_values(i, dict(zip(AXES, browsers[i].shown(axis, value), strict=True))).values()
            )
        if ids is None:
            return lambda i, value: browsers[i].shown(axis, value)
        return lambda i, value: ids.get(i, browsers[i].shown(axis, value))

    def load_tokens(self, md5s: Sequence[str]) -> dict[str, Any]:
        """Return tokens (L,) uint16 by their MD5, or why an image cannot be shown."""
        found: dict[str, Any] = {}
        for archive in self._archives:
            missing = [md5 for md5 in md5s if isinstance(found.get(md5, UserError()), UserError)]
            for md5, tokens in archive.load_tokens(missing).items() if missing else ():
                if not isinstance(found.get(md5), UndecodableError) or not isinstance(tokens, UserError):
                    found[md5] = tokens
        return found

    def file_names(self, md5s: Sequence[str]) -> dict[str, str]:
        """Return a file name for each image by the MD5 of its tokens, in a folder of its archive."""
        found: dict[str, str] = {}
        for number, archive in enumerate(self._archives, 1):
            folder = sanitize_name(f"{number}_{archive.path.stem}")
            own = archive.file_names([md5 for md5 in md5s if md5 not in found])
            found |= {md5: f"{folder}/{path}" for md5, path in own.items()}
        return found

    # Judgements

    def judgements(self) -> list[dict[str, Any]]:
        """Return the newest judgements, the last one last."""
        self._browsers()
        found = []
        for name, archive in zip(self._names, self._archives, strict=True):
            for judgement in archive.judgements():
                images = [{**image, "archive": name} for image in judgement["images"]]
                found.append({**judgement, "images": images})
        return sorted(found, key=lambda judgement: judgement["time"])[-MAX_JUDGEMENTS:]

    def add_judgements(self, judgements: object) -> dict[str, Any]:
        """Store judgements in the archive of their images, all or none.

        Raises:
            BadRequestError: One is wrong, or they are of several archives.
            ArchiveError: The archive cannot be written at the moment.
        """
        listed = judgements if isinstance(judgements, list) else []
        images = [one["images"] for one in listed if isinstance(one, dict) and isinstance(one.get("images"), list)]
        named = {str(image.get("archive")) for some in images for image in some if isinstance(image, dict)}
        if len(named) != 1 or not named <= set(self._names):
            raise BadRequestError(f"judgements are of images of one of these archives: {', '.join(self._names)}")
        return self._archives[self._names.index(named.pop())].add_judgements(judgements)


def _score(image: list[Any]) -> float:
    return -math.inf if image[_SCORE] is None else image[_SCORE]


def _join_ranges(ranges: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    known = [one for one in ranges if one is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None
