"""The archive that is served: read on one thread, as the JSON that `browser/source.js` describes."""

import asyncio
import collections
import concurrent.futures
import contextlib
import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import numpy as np

from dm_generations.archive import Archive, ArchiveError
from dm_generations.archive.browse import (
    AXES,
    SETTING,
    Browser,
    GroupId,
    Listed,
    Query,
    Question,
    ValueStatistics,
    data_version,
    plain,
    statistics,
)
from dm_generations.archive.ratings import add_ratings, parse_judgement, read_judgements
from dm_generations.archive.records import GROUP_COLUMNS, PARAM_COLUMNS, BadTokensError, key_words
from dm_generations.archive.schema import SCHEMA_VERSION
from dm_generations.errors import UserError
from dm_generations.export.manifest import HASH_DIGITS
from dm_generations.export.output_file import EXTENSIONS
from dm_generations.export.plan import make_file_name, make_folder_name
from dm_generations.inference.decoder import RowKey
from dm_generations.models.loading import Checkpoint
from dm_generations.paths import model_label
from dm_generations.server.images import UndecodableError, UnknownImageError, hash_of, read_tokens

if TYPE_CHECKING:
    from dm_generations.inference.diffusion import Diffusion

LOCK_TIMEOUT: Final = 3.0  # seconds; a request waits so long for another program's lock
MAX_JUDGEMENTS: Final = 100_000
MAX_REMEMBERED: Final = 200_000  # images whose MD5 the page was told
SUMMARY_VERSION: Final = 2
VALUES: Final = ("top_k", "top_p", "temperature", "cond_scale", "sc_prompt", "extra_settings", "model", "archive")
_P = ParamSpec("_P")
_T = TypeVar("_T")


class BadRequestError(UserError):
    """What was asked or sent is wrong; the archive is not."""


class ArchiveThread:
    """The thread on which archives are read: only `call` is used on other ones, and runs the other methods on it."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "archive")

    async def call(self, method: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run a method of this class on its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: method(*args, **kwargs))

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class ServedArchive(ArchiveThread):
    """An archive that may change, vanish and come back while it is served.

    Attributes:
        path: The archive.
        revision: A number that grows when images or scores were added.
    """

    def __init__(self, path: Path, codec: Checkpoint, diffusion: "Diffusion | None" = None, is_writable: bool = True):
        """Take an archive, what decodes its images, and whether judgements may be stored in it."""
        super().__init__()
        self.path = path
        self._is_writable = is_writable
        self.revision = 0
        self._codec = codec
        self._codec_hash = hash_of(codec, diffusion)
        self._decoder = None if diffusion is None else diffusion.describe()
        self._archive: Archive | None = None
        self._browser: Browser | None = None
        self._file: tuple[int, int] | None = None
        self._version = 0
        self._statistics: dict[Any, list[list[Any]]] = {}
        self._ids: collections.OrderedDict[str, int] = collections.OrderedDict()

    def browser(self) -> Browser:
        """Return the archive as it is now, opened again if it has been replaced.

        Raises:
            ArchiveError: It cannot be read at the moment.
        """
        try:
            status = os.stat(self.path)
        except OSError as error:
            self._forget()
            raise ArchiveError(f"{self.path}: no such file; put it back, or stop this server") from error
        if self._archive is None or self._file != (status.st_dev, status.st_ino):
            self._open((status.st_dev, status.st_ino))
        assert self._archive is not None
        if (version := data_version(self._archive)) != self._version:
            if self._archive.version < SCHEMA_VERSION:  # it may have been updated
                self._open((status.st_dev, status.st_ino))
                version = data_version(self._archive)
            self._start_revision(version)
        if self._browser is None:
            self._browser = Browser(self._archive)
        return self._browser

    def _open(self, file: tuple[int, int]) -> None:
        self._forget()
        self._archive = Archive.open(self.path, timeout=LOCK_TIMEOUT)
        self._file = file
        self._start_revision(data_version(self._archive))

    def _start_revision(self, version: int) -> None:
        self.revision += 1
        self._version = version
        self._browser = None
        self._statistics.clear()

    def _forget(self) -> None:
        if self._archive is not None:
            self._archive.close()
        self._archive = self._browser = self._file = None
        self._ids.clear()

    # Reading

    def changes(self) -> dict[str, Any]:
        """Return the revision."""
        self.browser()
        return {"revision": self.revision}

    def summary(self) -> dict[str, Any]:
        """Return what the page asks first."""
        browser = self.browser()
        first = (
            None
            if browser.first is None
            else {"prompt": plain(browser.first.values[0]), "values": _values(browser.first)}
        )
        return {
            **{"version": SUMMARY_VERSION, "mode": "images", "archives": [self.path.name], "models": browser.models},
            **{"sc_prompts": browser.sc_prompts(), "seeds": list(browser.seeds), "images": browser.image_count},
            **{"prompts": browser.prompt_count, "score_range": browser.score_range, "first": first},
            **{"decoder": self._decoder, "revision": self.revision},
        }

    def values(self) -> dict[str, Any]:
        """Return all values of each axis."""
        return {"values": self.browser().values}

    def prompts(self, search: str, offset: int, limit: int, ids: Sequence[int]) -> dict[str, Any]:
        """Return prompts that hold all words of `search`, or those of `ids`."""
        browser = self.browser()
        if ids:
            found = browser.prompt_texts(ids)
            total = len(found)
        else:
            total, found = browser.prompts(search, offset, limit)
        best = browser.best_of_prompts([row_id for row_id, _ in found])
        listed = {row_id: Listed(image_id, 0, 0, 1, score, None) for row_id, (_, image_id, score) in best.items()}
        images = dict(zip(listed, self._images(browser, list(listed.values())), strict=True))
        rows = [[row_id, text, best[row_id][0] if row_id in best else 0, images.get(row_id)] for row_id, text in found]
        return {"total": total, "prompts": rows}

    def groups(self, prompt_ids: Sequence[int]) -> dict[str, Any]:
        """Return the groups of prompts."""
        return {
            "groups": [
                [
                    *(str(group.id), plain(group.id.values[0]), *_values(group.id).values()),
                    *(group.count, group.scored, group.mean, group.sd, group.best),
                ]
                for group in self.browser().groups(prompt_ids)
            ]
        }

    def images(self, group_ids: Sequence[str], query: Query) -> dict[str, Any]:
        """Return images of groups."""
        browser = self.browser()
        answer = {}
        for text in group_ids:
            try:
                group = GroupId.parse(text)
            except ArchiveError as error:
                raise BadRequestError(str(error)) from error
            total, listed = browser.images(group, query)
            answer[text] = {"total": total, "images": self._images(browser, listed, text)}
        return {"groups": answer}

    def _images(self, browser: Browser, listed: Sequence[Listed], group: str | None = None) -> list[list[Any] | None]:
        """Return what the page is told of images; None of one that is gone."""
        rows = browser.details([one.id for one in listed])
        models = browser.archive.models()
        return [self._image(browser, one, rows[one.id], models, group) if one.id in rows else None for one in listed]

    def _image(
        self, browser: Browser, listed: Listed, row: dict[str, Any], models: Mapping[int, Any], group: str | None
    ) -> list[Any]:
        codec = models.get(row["codec_id"])
        problem, md5 = None, plain(row["quantvec_md5"])
        try:
            read_tokens(row, models, self._codec)
        except BadTokensError as error:
            problem = str(error)
        else:
            self._ids[md5] = listed.id
            self._ids.move_to_end(md5)
            if len(self._ids) > MAX_REMEMBERED:
                self._ids.popitem(last=False)
        if group is None:
            values = tuple(plain(row[name]) for name in GROUP_COLUMNS)
            group = str(GroupId(values, browser.model_position(row["generator_id"])))
        key = plain(row["key0"]), plain(row["key1"])
        name = f"{key[0]}.{key[1]}" + (f".{listed.namesakes}" if listed.namesakes else "")
        recorded = self._codec.sha256 if codec is None else codec.sha256
        codec_hash = (self._codec_hash if recorded == self._codec.sha256 else recorded)[:HASH_DIGITS]
        return [
            *(name, group, listed.rank, listed.score, *key, browser.seeds.get(key, -1), md5, listed.time, codec_hash),
            *(plain(row[column]) for column in ("sampler_version", "init_count", "dtype", "log_prob")),
            *(plain(row["clip_score_tokenized"]), listed.copies, problem),
            None if codec is None else model_label(codec.name),
        ]

    def statistics(self, axis: str, prompt_id: int | None, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """Return the scores by the values of an axis."""
        if axis not in (*AXES, SETTING):
            raise BadRequestError(f"axis is {axis!r:.40}, not one of {', '.join((*AXES, SETTING))}")
        browser = self.browser()
        fixed = {name: value for name, value in fixed.items() if name not in (axis, "archive")}
        question = (axis, prompt_id, tuple(sorted(fixed.items())))
        if question not in self._statistics:
            asked = Question(axis, None if prompt_id is None else [prompt_id], fixed)
            found = statistics([browser], [asked], lambda _, value: browser.shown(axis, value), browser.score_range)
            self._statistics[question] = statistics_rows(found)
        return {"range": browser.score_range, "values": self._statistics[question]}

    def load_tokens(self, md5s: Sequence[str]) -> dict[str, "tuple[np.ndarray, RowKey] | UserError"]:
        """Return tokens (L,) uint16 and the key of a row that has them by their MD5, or why it cannot be shown."""
        models = self.browser().archive.models()
        found: dict[str, tuple[np.ndarray, RowKey] | UserError] = {}
        for md5, row in self._find_rows(md5s).items():
            if row is None:
                found[md5] = UnknownImageError(f"no image of {self.path} has tokens with the MD5 {md5}")
                continue
            try:
                found[md5] = read_tokens(row, models, self._codec), RowKey(*key_words(row["key0"], row["key1"]))
            except BadTokensError as error:
                found[md5] = UndecodableError(f"image {row['id']} cannot be decoded: {error}")
        return found

    def _find_rows(self, md5s: Sequence[str]) -> dict[str, dict[str, Any] | None]:
        """Return columns of images by the MD5 of their tokens; None where there is no such image."""
        browser = self.browser()
        ids: dict[str, int | None] = {}
        for md5 in md5s:
            if (row_id := self._ids.get(md5)) is None and (row_id := browser.find_md5(md5)) is not None:
                self._ids[md5] = row_id  # the page was told by a server before this one
            ids[md5] = row_id
        details = browser.details([row_id for row_id in ids.values() if row_id is not None])
        rows = {md5: None if row_id is None else details.get(row_id) for md5, row_id in ids.items()}
        return {md5: row if row and row["quantvec_md5"] == md5 else None for md5, row in rows.items()}

    def file_names(self, md5s: Sequence[str]) -> dict[str, str]:
        """Return file names, in their prompts' folders, by the MD5 of the tokens; unknown ones are left out."""
        browser = self.browser()
        rows = {md5: row for md5, row in self._find_rows(md5s).items() if row is not None}
        prompts = dict(browser.prompt_texts(sorted({row["prompt_id"] for row in rows.values()})))
        sc_prompts = browser.archive.sc_prompts()
        names = {}
        for md5, row in rows.items():
            values = [row[name] for name in ("sc_prompt_id", *PARAM_COLUMNS)]
            texts = {"sc_prompt": sc_prompts.get(row["sc_prompt_id"]), "extra_settings": row["extra_settings"]}
            name = make_file_name(*values, **texts, rank=row["id"], extension=EXTENSIONS["webp"])
            names[md5] = f"{make_folder_name(row['prompt_id'], prompts.get(row['prompt_id']))}/{name}"
        return names

    # Judgements

    def judgements(self) -> list[dict[str, Any]]:
        """Return the newest judgements, the last one last."""
        return list(read_judgements(self.browser().archive, last=MAX_JUDGEMENTS))

    def add_judgements(self, judgements: object) -> dict[str, Any]:
        """Store judgements, all or none.

        Raises:
            BadRequestError: One is wrong, or its image is not in the archive.
            ArchiveError: The archive cannot be written at the moment.
        """
        if not self._is_writable:
            raise BadRequestError("this archive was downloaded; browse a copy of the file to store judgements")
        if not isinstance(judgements, list):
            raise BadRequestError("the body is not a list of judgements")
        try:
            ratings = [parse_judgement(judgement) for judgement in judgements]
        except ArchiveError as error:
            raise BadRequestError(str(error)) from error
        self.browser()  # so that a change before this one is noticed
        with Archive.open(self.path, "w", LOCK_TIMEOUT) as archive:
            try:
                stored_count = add_ratings(archive, ratings)
            except ArchiveError as error:
                cause = error.__cause__
                if isinstance(cause, ArchiveError) and not isinstance(cause.__cause__, sqlite3.OperationalError):
                    raise BadRequestError(str(error)) from error
                raise
        with contextlib.suppress(ArchiveError):
            if self._archive is not None and self._archive.version == SCHEMA_VERSION:
                self._version = data_version(self._archive)  # the page knows of its own judgements
        return {"stored": stored_count}


def statistics_rows(found: Sequence[ValueStatistics]) -> list[list[Any]]:
    """Return statistics as the page gets them."""
    return [[one.value, one.n, one.mean, one.sd, one.counts, one.difference] for one in found]


def _values(group: GroupId) -> dict[str, Any]:
    values = dict(zip(GROUP_COLUMNS, group.values, strict=True)) | {"model": group.model, "archive": 0}
    values["sc_prompt"] = values.pop("sc_prompt_id")
    return {name: plain(values[name]) for name in VALUES}
