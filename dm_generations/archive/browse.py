"""What the page asks of an archive, page by page: prompts, groups, images and statistics, never all rows.

A group here is the images of one prompt, one setting and one model: a model is a position in `models`, where the last
one stands for an unknown model. Values of a damaged archive that are not texts or numbers come back as None.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dm_generations.archive.connection import ArchiveError, Row
from dm_generations.archive.database import Archive
from dm_generations.archive.records import GROUP_COLUMNS, parse_text, quantvec_md5
from dm_generations.errors import short_repr
from dm_generations.paths import model_label

SETTINGS: Final = ("top_k", "top_p", "temperature", "cond_scale", "sc_prompt", "extra_settings")
AXES: Final = (*SETTINGS, "model", "archive")
SETTING: Final = "setting"  # all of AXES together; a value is a tuple of theirs
COLUMNS: Final = {name: name for name in SETTINGS} | {
    **{"sc_prompt": "sc_prompt_id", "model": "generator_id"},
    "archive": "0",  # there is one
}
BINS: Final = 24
MAX_SEEDS: Final = 1000
MAX_IMAGES: Final = 10_000  # of a group, in one answer
MAX_VALUES: Final = 2_000  # of an axis
MAX_PAIRED: Final = 300_000  # images among which pairs are looked for
_SEED_ROWS: Final = 20_000  # the first images, whose keys are the seeds
_SCORE: Final = "CASE WHEN typeof(clip_score_input) IN ('real', 'integer') THEN clip_score_input END"
_COMMON: Final = ", ".join(f"{COLUMNS[name]}" for name in SETTINGS)
_SAME_DRAW: Final = ("prompt_id", *(COLUMNS[name] for name in SETTINGS), "key0", "key1")
_ORDERS: Final = {
    "score": "score IS NULL, score {}, rank",
    "seed": "id {}",  # images of a group are stored in the order of sampling
    "time": "time_end IS NULL, time_end {}, rank",
}


@dataclass(frozen=True, slots=True)
class GroupId:
    """A prompt, a setting and a model: the values of GROUP_COLUMNS, and a position in `models`."""

    values: Row
    model: int

    def __str__(self) -> str:
        return json.dumps([*self.values, self.model], separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> "GroupId":
        """Read what `str` wrote.

        Raises:
            ArchiveError: It is something else.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        is_list = isinstance(values, list) and len(values) == len(GROUP_COLUMNS) + 1
        is_plain = is_list and all(isinstance(value, str | int | float | None) for value in values)
        if not is_plain or type(values[-1]) is not int:
            raise ArchiveError(f"{short_repr(text)} is not a group")
        return cls(tuple(values[:-1]), values[-1])


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """The images of a group: how many, how many have a score, and the mean, deviation and best of these."""

    id: GroupId
    count: int
    scored: int
    mean: float | None
    sd: float | None
    best: float | None


@dataclass(frozen=True, slots=True)
class Listed:
    """An image in its group. `copies` have the same tokens, this one included; `namesakes` before it the same key."""

    id: int
    rank: int
    namesakes: int
    copies: int
    score: float | None
    time: float | None


@dataclass(frozen=True, slots=True)
class Query:
    """Which images of a group, and in which order."""

    sort: str = "score"
    is_descending: bool = True
    low: float | None = None
    high: float | None = None
    key: tuple[int, int] | None = None
    limit: int = MAX_IMAGES
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """Which scores are asked for: by an axis of AXES or by SETTING, of these prompts (None: all).

    `fixed` has the values of other axes.
    """

    axis: str
    prompt_ids: Sequence[Any] | None
    fixed: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sums:
    """What adds up of scores: their number, sum, sum of squares, and histogram."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0
    counts: tuple[int, ...] = (0,) * BINS

    def __add__(self, other: "Sums") -> "Sums":
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Sums(self.n + other.n, self.total + other.total, self.squares + other.squares, counts)

    def moments(self) -> tuple[float | None, float | None]:
        """Return mean and standard deviation."""
        return moments(self.n, self.total, self.squares)


NO_SCORES: Final = Sums()


@dataclass(frozen=True, slots=True)
class ValueStatistics:
    """Scores of the images that have one value of an axis.

    `difference` is (n, mean, sd) of their scores minus those of the value with the highest mean, over images that
    differ in this axis alone; None where there are fewer than two such pairs, or too many images to look for them.
    """

    value: Any
    n: int
    mean: float | None
    sd: float | None
    counts: list[int]
    difference: tuple[int, float | None, float | None] | None


def plain(value: Any) -> Any:
    """Return a value that JSON has a form for; None in place of others."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int) else None


def moments(count: int, total: Any, squares: Any) -> tuple[float | None, float | None]:
    """Return mean and standard deviation of numbers from their count, sum and sum of squares."""
    if not count or plain(total) is None or plain(squares) is None:
        return None, None
    mean = total / count
    return mean, math.sqrt(max(0.0, (squares - count * mean * mean) / (count - 1))) if count > 1 else None


class Browser:
    """An open archive as the page sees it. Make a new one when the archive has changed.

    Attributes:
        archive: Open for reading.
        models: Labels of the generators; the last one, None, is an unknown one.
        generator_ids: Their ids.
    """

    def __init__(self, archive: Archive):
        self.archive = archive
        self._table = archive.indexed_table()
        generators = {i: model.name for i, model in archive.models().items() if model.kind == "generator"}
        self.generator_ids: list[int | None] = [*generators, None]
        self.models = [*map(model_label, generators.values()), None]

    @functools.cached_property
    def image_count(self) -> int:
        """How many images there are."""
        return self.archive.count()

    @functools.cached_property
    def seeds(self) -> dict[tuple[Any, Any], int]:
        """The first keys by their place in the order of sampling."""
        found: dict[tuple[Any, Any], int] = {}
        for key in self._rows(f"SELECT key0, key1 FROM images ORDER BY id LIMIT {_SEED_ROWS}"):
            if len(found) == MAX_SEEDS:
                break
            found.setdefault(tuple(map(plain, key)), len(found))
        return found

    @functools.cached_property
    def _totals(self) -> tuple[int, float | None, float | None, Any]:
        """Number of prompts that have images, lowest and highest score, and the prompt of the latter."""
        sql = f"SELECT prompt_id, min({_SCORE}), max({_SCORE}) FROM {self._table} GROUP BY 1 ORDER BY 1"
        count, lowest, highest, first = 0, math.inf, -math.inf, None
        for prompt_id, low, high in self._rows(sql):
            if not count or (high is not None and high > highest):
                first = prompt_id
            count += 1
            lowest = min(lowest, math.inf if low is None else low)
            highest = max(highest, -math.inf if high is None else high)
        return count, plain(lowest), plain(highest), first

    @property
    def prompt_count(self) -> int:
        """How many prompts have images."""
        return self._totals[0]

    @property
    def score_range(self) -> tuple[float, float] | None:
        """The lowest and the highest score."""
        _, low, high, _ = self._totals
        return None if low is None or high is None else (low, high)

    @functools.cached_property
    def first(self) -> GroupId | None:
        """Of the prompt with the best image the group with the best mean."""
        found = self.groups([self._totals[3]]) if self.prompt_count else []
        best = max(found, key=lambda one: -math.inf if one.mean is None else one.mean, default=None)
        return None if best is None else best.id

    @functools.cached_property
    def values(self) -> dict[str, list[Any]]:
        """The values that the images have of each of AXES, in no order; of an axis at most MAX_VALUES."""
        found = {}
        for axis in AXES:
            sql = f"SELECT DISTINCT {COLUMNS.get(axis, axis)} FROM images LIMIT {MAX_VALUES}"
            found[axis] = list(dict.fromkeys(self.shown(axis, value) for (value,) in self._rows(sql)))
        return found

    def _rows(self, sql: str, parameters: Any = ()) -> Iterator[Row]:
        return self.archive.connection.rows(sql, parameters)

    def sc_prompts(self) -> list[tuple[int, str | None]]:
        """Return (id, text) of the unconditional prompts."""
        return list(self.archive.sc_prompts().items())

    def prompts(self, search: str, offset: int, limit: int) -> tuple[int, list[tuple[int, str | None]]]:
        """Return how many prompts that have images hold all words, in any case, and (id, text) of some of them."""
        words = search.casefold().split()
        sql = (
            "SELECT id, desc FROM prompts WHERE EXISTS (SELECT 1 FROM "
            f"{self._table} AS found WHERE found.prompt_id = prompts.id) ORDER BY id"
        )
        if not words:
            rows = self._rows(f"{sql} LIMIT ? OFFSET ?", (limit, offset))
            return self.prompt_count, [(row_id, parse_text(text)) for row_id, text in rows]
        total, found = 0, []
        for row_id, raw in self._rows(sql):
            text = parse_text(raw)
            folded = f"{row_id} {text or ''}".casefold()
            if all(word in folded for word in words):
                if offset <= total < offset + limit:
                    found.append((row_id, text))
                total += 1
        return total, found

    def prompt_texts(self, ids: Sequence[int]) -> list[tuple[int, str | None]]:
        """Return (id, text) of these prompts, in this order."""
        sql = "SELECT id, desc FROM prompts WHERE id IN (SELECT value FROM json_each(?))"
        texts: dict[int, Any] = {row_id: text for row_id, text in self._rows(sql, (json.dumps(ids),))}
        return [(row_id, parse_text(texts[row_id])) for row_id in ids if row_id in texts]

    def best_of_prompts(self, ids: Sequence[int]) -> dict[int, tuple[int, int, float | None]]:
        """Return by prompt (number of images, id of the best one, its score)."""
        sql = (
            f"SELECT prompt_id, count(*), id, max({_SCORE}) FROM {self._table}"
            " WHERE prompt_id IN (SELECT value FROM json_each(?)) GROUP BY prompt_id"
        )
        return {row[0]: (row[1], row[2], plain(row[3])) for row in self._rows(sql, (json.dumps(ids),))}

    def groups(self, prompt_ids: Sequence[Any]) -> list[GroupSummary]:
        """Return the groups of prompts."""
        columns = ", ".join(GROUP_COLUMNS)
        sql = (
            f"SELECT {columns}, generator_id, count(*), count(score), sum(score), sum(score * score), max(score) FROM"
            f" (SELECT {columns}, generator_id, {_SCORE} AS score FROM images"
            f" WHERE id IN (SELECT id FROM {self._table} WHERE prompt_id IN (SELECT value FROM json_each(?))))"
            f" GROUP BY {columns}, generator_id ORDER BY {columns}, generator_id"
        )
        found = []
        for row in self._rows(sql, (json.dumps(prompt_ids),)):
            *values, generator_id, count, scored, total, squares, best = row
            group = GroupId(tuple(map(plain, values)), self.model_position(generator_id))
            found.append(GroupSummary(group, count, scored, *moments(scored, total, squares), plain(best)))
        return found

    def model_position(self, generator_id: Any) -> int:
        """Return the position of a generator in `models`."""
        if generator_id in self.generator_ids:
            return self.generator_ids.index(generator_id)
        return len(self.generator_ids) - 1

    def images(self, group: GroupId, query: Query) -> tuple[int, list[Listed]]:
        """Return how many different images of a group a query finds, and some of them."""
        if not 0 <= group.model < len(self.generator_ids):
            return 0, []
        conditions = " AND ".join(f"{name} IS ?" for name in GROUP_COLUMNS)
        parameters = [*group.values, self.generator_ids[group.model]]
        filters = ["TRUE"]
        for condition, value in (("score >= ?", query.low), ("score <= ?", query.high)):
            if value is not None:
                filters.append(condition)
                parameters.append(value)
        if query.key is not None:
            filters.append("key0 = ? AND key1 = ?")
            parameters += query.key
        order = _ORDERS[query.sort].format("DESC" if query.is_descending else "ASC")
        sql = f"""
            WITH found AS (
                SELECT id, {_SCORE} AS score, key0, key1, time_end, coalesce(quantvec_md5, id) AS md5 FROM images
                WHERE id IN (SELECT id FROM {self._table} WHERE {conditions}) AND generator_id IS ?
            ), ranked AS (
                SELECT *, row_number() OVER (ORDER BY score DESC, id) - 1 AS rank,
                    row_number() OVER (PARTITION BY key0, key1 ORDER BY score DESC, id) - 1 AS namesakes FROM found
            ), folded AS (
                SELECT *, row_number() OVER (PARTITION BY md5 ORDER BY rank) AS copy,
                    count(*) OVER (PARTITION BY md5) AS copies FROM ranked WHERE {" AND ".join(filters)}
            )
            SELECT count(*) OVER (), id, rank, namesakes, copies, score, time_end FROM folded WHERE copy = 1
            ORDER BY {order} LIMIT ? OFFSET ?"""
        rows = list(self._rows(sql, [*parameters, query.limit, query.offset]))
        if not rows and query.offset:
            rows = list(self._rows(sql, [*parameters, 1, 0]))
            return (rows[0][0] if rows else 0), []
        return (rows[0][0] if rows else 0), [Listed(*row[1:5], *map(plain, row[5:])) for row in rows]

    def details(self, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Return columns of images by id, their tokens too; of 2022, the MD5 is that of the tokens."""
        columns = (
            *("id", *GROUP_COLUMNS, "generator_id", "key0", "key1", "quantvec", "quantvec_md5", "codec_id"),
            *("sampler_version", "init_count", "dtype", "log_prob", "clip_score_tokenized"),
        )
        sql = f"SELECT {', '.join(columns)} FROM images WHERE id IN (SELECT value FROM json_each(?))"
        found = {}
        for row in self._rows(sql, (json.dumps(ids),)):
            values = dict(zip(columns, row, strict=True))
            if values["quantvec_md5"] is None and isinstance(values["quantvec"], bytes):
                values["quantvec_md5"] = quantvec_md5(values["quantvec"])
            found[values["id"]] = values
        return found

    def find_md5(self, md5: str) -> int | None:
        """Return the id of an image with tokens of this MD5. It reads all rows, as there is no index."""
        return self.archive.connection.value("SELECT id FROM images WHERE quantvec_md5 = ? LIMIT 1", (md5,))

    def score_sums(self, question: Question, score_range: tuple[float, float]) -> dict[Any, Sums]:
        """Return what adds up of the scores, by the value of the question's axis as the archive stores it.

        Args:
            question: What is asked.
            score_range: Of the histogram.
        """
        where, parameters = self._narrow(question)
        columns = _columns_of(question.axis)
        low, high = score_range
        scale = BINS / (high - low) if high > low else 0.0
        bins = f"min({BINS - 1}, CAST(({_SCORE} - ?) * ? AS INTEGER))"
        sql = (
            f"SELECT {', '.join(columns)}, {bins} AS bin, count(*), sum({_SCORE}), sum({_SCORE} * {_SCORE})"
            f" FROM images WHERE {_SCORE} IS NOT NULL AND {where}"
            f" GROUP BY {', '.join(str(i + 1) for i in range(len(columns) + 1))}"
        )
        found: dict[Any, Sums] = {}
        for *values, position, count, total, squares in self._rows(sql, [low, scale, *parameters]):
            value = tuple(values) if question.axis == SETTING else values[0]
            counts = [0] * BINS
            counts[position] = count
            found[value] = found.get(value, NO_SCORES) + Sums(count, total, squares, tuple(counts))
        return found

    def _narrow(self, question: Question) -> tuple[str, list[Any]]:
        """Return a condition on `images`, and its parameters."""
        conditions, parameters = ["TRUE"], []
        if question.prompt_ids is not None:
            chosen = f"SELECT id FROM {self._table} WHERE prompt_id IN (SELECT value FROM json_each(?))"
            conditions.append(f"images.id IN ({chosen})")
            parameters.append(json.dumps(question.prompt_ids))
        for name, value in question.fixed.items():
            conditions.append(f"images.{COLUMNS[name]} IS ?")
            if name == "model":
                value = self.generator_ids[value] if 0 <= value < len(self.generator_ids) else -1
            parameters.append(value)
        return " AND ".join(conditions), parameters

    def difference_sums(self, question: Question, best: Any) -> dict[Any, Sums]:
        """Return what adds up of scores minus those of the value `best`, over images that differ in the axis alone."""
        where, parameters = self._narrow(question)
        columns, is_setting = _columns_of(question.axis), question.axis == SETTING
        same = [f"other.{name} = images.{name}" for name in _SAME_DRAW if name not in columns]
        if COLUMNS["model"] not in columns:  # as in the index of samples
            same.append("coalesce(other.generator_id, 0) = coalesce(images.generator_id, 0)")
        same += [f"other.{column} IS ?" for column in columns]
        own = ", ".join(f"images.{column}" for column in columns)
        differs = " OR ".join(f"images.{column} IS NOT ?" for column in columns)
        difference = "(images.clip_score_input - other.clip_score_input)"
        sql = (
            f"SELECT {own}, count({difference}), sum({difference}), sum({difference} * {difference})"
            f" FROM images CROSS JOIN images AS other ON {' AND '.join(same)}"
            f" WHERE ({differs}) AND {where} GROUP BY {own}"
        )
        bests = best if is_setting else (best,)
        return {
            (tuple(values) if is_setting else values[0]): Sums(count, total, squares)
            for *values, count, total, squares in self._rows(sql, [*bests, *bests, *parameters])
            if count
        }

    def shown(self, axis: str, value: Any) -> Any:
        """Return a value of an axis as the page has it."""
        if axis == SETTING:
            *settings, generator_id = value
            return (*map(plain, settings), self.model_position(generator_id), 0)
        return self.model_position(value) if axis == "model" else plain(value)


def _columns_of(axis: str) -> list[str]:
    """Return the columns of `images` whose values an axis has; a setting's archive is not one."""
    return [COLUMNS[name] for name in (*SETTINGS, "model")] if axis == SETTING else [COLUMNS[axis]]


def statistics(
    browsers: Sequence[Browser],
    questions: Sequence[Question | None],
    shown: Callable[[int, Any], Any],
    score_range: tuple[float, float] | None,
) -> list[ValueStatistics]:
    """Return the scores by the value of an axis.

    Args:
        browsers: Of the archives.
        questions: What is asked of each; None where it has no such images.
        shown: Turns the position of an archive and one of its values into the page's value.
        score_range: Of all archives.
    """
    if score_range is None:
        return []
    asked = [(i, browsers[i], question) for i, question in enumerate(questions) if question is not None]
    sums = {i: browser.score_sums(question, score_range) for i, browser, question in asked}
    found: dict[Any, Sums] = {}
    for i, own in sums.items():
        for value, one in own.items():
            found[shown(i, value)] = found.get(shown(i, value), NO_SCORES) + one
    means = {value: one.moments()[0] for value, one in found.items()}
    known = {value: mean for value, mean in means.items() if mean is not None}
    best = max(known, key=lambda value: known[value], default=None)
    differences: dict[Any, Sums] = {}
    is_few = sum(one.n for one in found.values()) <= MAX_PAIRED
    if len(known) > 1 and is_few and asked[0][2].axis != "archive":  # images of two archives are not paired
        for i, browser, question in asked:
            for own_best in (value for value in sums[i] if shown(i, value) == best):
                for value, one in browser.difference_sums(question, own_best).items():
                    if shown(i, value) != best:
                        differences[shown(i, value)] = differences.get(shown(i, value), NO_SCORES) + one
    return [
        ValueStatistics(
            *(value, one.n, *one.moments(), list(one.counts)),
            (differences[value].n, *differences[value].moments()) if differences.get(value, NO_SCORES).n > 1 else None,
        )
        for value, one in found.items()
    ]


def data_version(archive: Archive) -> int:
    """Return a number that changes when another connection changes the archive."""
    return archive.connection.value("PRAGMA data_version")
