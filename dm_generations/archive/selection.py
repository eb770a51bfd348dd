"""`Selection`: which images of an archive, as one SQL condition for everything that selects.

In Python the conditions are keyword arguments (`Filters`), on the command line `--where NAME=VALUES` and a few flags.
VALUES are written the same in both: one value, several with commas between, or a range `LOW..HIGH` of which one end may
be left out. There are no operators: `score>20` unquoted would make a shell write to a file named `20`, and a language
of expressions would be one more to learn. No text of a user becomes SQL: names are looked up in a table, and values
are bound.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Unpack

from dm_generations.archive.filters import (
    Filters,
    Interval,
    as_keys,
    list_values_of,
    parse_flag,
    parse_intervals,
    parse_key,
    parse_seed,
    split_ids,
    split_values,
)
from dm_generations.archive.records import GROUP_COLUMNS, MODEL_KINDS, PARAM_COLUMNS, ModelInfo
from dm_generations.archive.scores import DEFAULT_RANK, find_scorer
from dm_generations.errors import UserError, did_you_mean
from dm_generations.sampling.prng import WORD, key_index

if TYPE_CHECKING:
    from dm_generations.archive.database import Archive

# SQL of what takes values and ranges, by the name that people write.
RANGE_COLUMNS: Final[Mapping[str, str]] = {
    **{name: name for name in PARAM_COLUMNS},
    "score": "clip_score_input",
    "score_tokenized": "clip_score_tokenized",
    "time": "time_start",
    "rating": "(SELECT avg(value) FROM ratings WHERE image_id = images.id AND kind = 'score')",
}
MODEL_COLUMNS: Final[Mapping[str, str]] = {"model": "generator_id", "codec": "codec_id"}
WHERE_NAMES: Final = (*RANGE_COLUMNS, *MODEL_COLUMNS, "seed", "key", "tag", "favourite")

_MAX_INDEX: Final = 10_000_000  # of an image of a seed; no sweep has more
_LEAST_DIGEST: Final = 6  # hex digits that stand for a model
_MAX_LISTED: Final = 20
_TAGGED: Final = "SELECT image_id FROM ratings WHERE kind = 'tag' AND value IN (SELECT value FROM json_each({tags}))"
# What each rater said last; SQLite takes the value from the row with the largest time.
_FAVOURITES: Final = """
SELECT image_id FROM (
    SELECT image_id, value, max(time) FROM ratings WHERE kind = 'favourite' GROUP BY image_id, rater
) WHERE value = 1
"""
_INDEXED: Final = frozenset({*PARAM_COLUMNS, "clip_score_input"})  # also in the index of a file of 2022


@dataclass(frozen=True)
class Selection:
    """Which images: by default all. Values of one kind add up, and all kinds have to match.

    Attributes:
        prompt_ids: Of prompts; ids and texts add up.
        prompt_texts: Whole texts of prompts.
        sc_prompt_ids: Of unconditional prompts.
        sc_prompt_texts: Whole texts of unconditional prompts.
        n_best: At most so many of each group, by score; None for all.
        distinct: Images with equal tokens only once, the one with the highest score. Counted before `n_best`.
        ranges: (name, intervals) for names of RANGE_COLUMNS.
        models: (name, texts) for names of MODEL_COLUMNS; a text is a model's name or starts its SHA-256.
        seeds: Seeds of `generate` with the same keys under all settings.
        keys: (key0, key1) of images.
        tags: That people gave.
        favourite: Whether someone calls it a favourite; None for both.
        rank_by: Whose score orders the images of a group, as `scores.find_scorer` takes it; None is clip_score_input.
    """

    prompt_ids: Sequence[int] = ()
    prompt_texts: Sequence[str] = ()
    sc_prompt_ids: Sequence[int] = ()
    sc_prompt_texts: Sequence[str] = ()
    n_best: int | None = None
    distinct: bool = False
    ranges: Sequence[tuple[str, Sequence[Interval]]] = ()
    models: Sequence[tuple[str, Sequence[str]]] = ()
    seeds: Sequence[int] = ()
    keys: Sequence[tuple[int, int]] = ()
    tags: Sequence[str] = ()
    favourite: bool | None = None
    rank_by: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "prompt_texts", "sc_prompt_ids", "sc_prompt_texts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.n_best is not None and self.n_best < 1:
            raise UserError(f"the number of best images must be at least 1, not {self.n_best}")

    @classmethod
    def of(cls, **filters: Unpack[Filters]) -> "Selection":
        """Make a selection from keyword arguments.

        >>> Selection.of(prompt="a rocket", cond_scale="3..", best=4).n_best
        4

        Raises:
            UserError: A name is unknown, or a value is not what the name takes.
        """
        given: dict[str, Any] = dict(filters)
        if unknown := given.keys() - Filters.__annotations__.keys():
            raise _unknown_name(min(unknown), Filters.__annotations__)
        score = [*list_values_of(given.pop("score", ()))]
        low, high = given.pop("min_score", None), given.pop("max_score", None)
        if low is not None or high is not None:
            score.append("..".join("" if end is None else str(end) for end in (low, high)))
        if score:
            given["score"] = score
        prompts, sc_prompts = (list_values_of(given.get(name, ())) for name in ("prompt", "sc_prompt"))
        return cls(
            *split_ids(prompts),
            *split_ids(sc_prompts),
            n_best=given.get("best"),
            distinct=bool(given.get("distinct", False)),
            ranges=tuple((name, parse_intervals(name, given[name])) for name in RANGE_COLUMNS if name in given),
            models=tuple((name, tuple(map(str, split_values(given[name])))) for name in MODEL_COLUMNS if name in given),
            seeds=tuple(parse_seed(value) for value in split_values(given.get("seed", ()))),
            keys=tuple(parse_key(value) for value in split_values(as_keys(given.get("key", ())))),
            tags=tuple(map(str, split_values(given.get("tag", ())))),
            favourite=parse_flag("favourite", given["favourite"]) if "favourite" in given else None,
            rank_by=given.get("rank_by"),
        )

    @property
    def is_all(self) -> bool:
        """Whether it leaves out no image."""
        return self == ALL


ALL: Final = Selection()


@dataclass(frozen=True, slots=True)
class Where:
    """A selection as SQL.

    Attributes:
        sql: A condition on the columns of `images`.
        parameters: The named parameters of both.
        rank: The score of a row of `images` that orders the images of a group.
    """

    sql: str = "1"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rank: str = DEFAULT_RANK

    @property
    def images(self) -> str:
        """SQL of a table: `images` with these rows alone."""
        return "images" if self.sql == "1" else f"(SELECT * FROM images WHERE {self.sql})"


EVERY: Final = Where()


def parse_where(conditions: Iterable[str]) -> dict[str, Any]:
    """Read conditions written as NAME=VALUES; return them as keyword arguments of `Selection.of`.

    >>> parse_where(["top_k=50,256", "score=20.."])
    {'top_k': ['50,256'], 'score': ['20..']}

    Raises:
        UserError: A name is unknown, or there is no `=` after it.
    """
    found: dict[str, Any] = {}
    for text in conditions:
        name, sign, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if name in ("prompt", "sc_prompt"):
            raise UserError(f"--where {text!r:.100}: use --{name.replace('_', '-')}-texts or --{name}-ids for prompts")
        if not sign or not name.isidentifier():
            raise UserError(
                f"--where {text!r:.100} is not NAME=VALUES, as top_k=50,256 or score=20.. (20 or more) or "
                "cond_scale=1..3 (from 1 to 3)"
            )
        if name not in WHERE_NAMES:
            raise _unknown_name(name, WHERE_NAMES)
        found.setdefault(name, []).append(values)
    return found


def compile_selection(archive: "Archive", selection: Selection) -> Where:
    """Turn a selection into SQL.

    Args:
        archive: Whose prompts and models it names.
        selection: What is wanted.

    Raises:
        UserError: A prompt or a model is not in the archive.
    """
    check_known(selection, [archive])
    return compile_known(archive, selection)


def compile_known(archive: "Archive", selection: Selection) -> Where:
    """Turn a selection into SQL; prompts and models that the archive lacks match nothing."""
    if selection.is_all:
        return EVERY
    parts: list[str] = []
    parameters: dict[str, Any] = {}

    def bind(value: Any) -> str:
        parameters[name := f"w{len(parameters)}"] = value
        return f":{name}"

    for table, ids, texts in _text_filters(selection):
        if ids or texts:
            found = _find_texts(archive, table, ids, texts)
            parts.append(f"{table[:-1]}_id IN (SELECT value FROM json_each({bind(json.dumps(found))}))")
    scorer = None if selection.rank_by is None else find_scorer(archive, selection.rank_by)
    rank, rank_parameters = (DEFAULT_RANK, {}) if scorer is None else scorer.value_sql()
    parameters.update(rank_parameters)
    for name, intervals in selection.ranges:
        parts.append(_range_sql(rank if name == "score" else RANGE_COLUMNS[name], intervals, bind))
    if selection.tags:
        parts.append(f"id IN ({_TAGGED.format(tags=bind(json.dumps(selection.tags)))})")
    if selection.favourite is not None:
        parts.append(f"id {'' if selection.favourite else 'NOT '}IN ({_FAVOURITES})")
    for name, wanted in selection.models:
        model_ids = [row_id for text in wanted for row_id in _find_models(archive.models(), name, text)]
        parts.append(f"{MODEL_COLUMNS[name]} IN (SELECT value FROM json_each({bind(json.dumps(model_ids))}))")
    if selection.keys:
        parts.append(_keys_sql(bind(json.dumps(selection.keys))))
    if selection.seeds:
        keys = _find_keys(archive, selection.seeds, " AND ".join(parts) or "1", parameters)
        parts.append(_keys_sql(bind(json.dumps(keys))))
    where = Where(" AND ".join(parts) or "1", parameters, rank)
    columns = {RANGE_COLUMNS[name] for name, _ in selection.ranges}
    is_by_index = columns <= _INDEXED and not (selection.models or selection.keys or selection.seeds)
    if selection.distinct or selection.n_best is not None or (archive.version == 0 and not is_by_index):
        return _store_ids(archive, selection, where)
    return where


def check_known(selection: Selection, archives: Iterable["Archive"]) -> None:
    """Check that each prompt and each model of a selection is in one of the archives.

    Raises:
        UserError: One is in none of them. The message names it, and what is like it.
    """
    errors = [dict(_find_unknown(selection, archive)) for archive in archives]
    for what, message in errors[0].items() if errors else ():
        if all(what in others for others in errors):
            raise UserError(message)


def compile_nonempty(archive: "Archive", selection: Selection) -> Where:
    """Turn a selection into SQL, as `compile_selection`, and check that it has an image.

    Raises:
        UserError: It has none. Where no image has a setting, the message lists the values that there are.
    """
    where = compile_selection(archive, selection)
    if selection.is_all or archive.connection.value(f"SELECT 1 FROM images WHERE {where.sql}", where.parameters):
        return where
    for name, intervals in selection.ranges:
        if name in PARAM_COLUMNS:
            values = sorted({getattr(group.key.params, name) for group in archive.groups()})
            if not any(low <= value <= high for value in values for low, high in intervals):
                raise UserError(
                    f"{archive.path} holds no image with this {name}; it holds {name} {_list_values(values)}"
                )
    raise UserError(
        f"{archive.path} holds no images of this selection; `python -m dm_generations info` lists what it holds"
    )


# Implementation: SQL.


def _text_filters(selection: Selection) -> Iterator[tuple[str, Sequence[int], Sequence[str]]]:
    yield "prompts", selection.prompt_ids, selection.prompt_texts
    yield "sc_prompts", selection.sc_prompt_ids, selection.sc_prompt_texts


def _texts(archive: "Archive", table: str) -> dict[int, str | None]:
    return archive.prompts() if table == "prompts" else archive.sc_prompts()


def _find_texts(archive: "Archive", table: str, ids: Sequence[int], texts: Sequence[str]) -> list[int]:
    wanted = set(texts)  # a sweep may ask for thousands
    known = _texts(archive, table)
    return sorted(known.keys() & set(ids) | {row_id for row_id, text in known.items() if text in wanted})


def _find_models(models: Mapping[int, ModelInfo], name: str, text: str) -> list[int]:
    """Return the ids of the models of a column that have this name, or a SHA-256 that starts so."""
    kind = MODEL_KINDS[MODEL_COLUMNS[name]]
    return [
        row_id
        for row_id, model in models.items()
        if model.kind == kind
        and (model.name == text or (len(text) >= _LEAST_DIGEST and model.sha256.startswith(text.lower())))
    ]


def _find_keys(
    archive: "Archive", seeds: Sequence[int], sql: str, parameters: Mapping[str, Any]
) -> list[tuple[int, int]]:
    """Return the keys of the archive's images that belong to one of the seeds, by undoing how they are derived."""
    rows = archive.connection.rows(f"SELECT DISTINCT key0, key1 FROM images WHERE {sql}", parameters)
    words = range(WORD + 1)
    keys = [key for key in rows if all(isinstance(word, int) and word in words for word in key)]
    return [key for key in keys if any(key_index(seed, *key) < _MAX_INDEX for seed in seeds)]


def _keys_sql(parameter: str) -> str:
    pairs = f"SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each({parameter})"
    return f"(key0, key1) IN ({pairs})"


def _range_sql(column: str, intervals: Sequence[Interval], bind: Any) -> str:
    values = [bind(low) for low, high in intervals if low == high]
    # The plus keeps SQLite from searching for the range and then sorting: the index has groups and scores in order.
    parts = [f"+{column} IN ({', '.join(values)})"] if values else []
    # A text in a damaged file is above every number, but not between two of them.
    parts += [f"+{column} BETWEEN {bind(low)} AND {bind(high)}" for low, high in intervals if low != high]
    return f"({' OR '.join(parts)})"


def _store_ids(archive: "Archive", selection: Selection, where: Where) -> Where:
    """Put the ids of a selection into temporary tables, which are not in the archive's file; return where they are."""
    name = hashlib.sha256(repr(selection).encode("utf-8", "replace")).hexdigest()[:32]

    def store(step: str, ids: str) -> Where:
        table, connection = f"temp.{step}_{name}", archive.connection
        connection.execute(f"CREATE TABLE IF NOT EXISTS {table} (id INTEGER PRIMARY KEY)")
        connection.execute(f"DELETE FROM {table}")
        connection.execute(f"INSERT INTO {table} {ids}", where.parameters)
        # The plus keeps SQLite from reading the whole table for each group.
        return Where(f"+id IN (SELECT id FROM {table})", where.parameters, where.rank)

    def first_of(columns: str, count: int) -> str:
        place = f"row_number() OVER (PARTITION BY {columns} ORDER BY {where.rank} DESC, id)"
        return f"SELECT id FROM (SELECT id, {place} AS place FROM images WHERE {where.sql}) WHERE place <= {count}"

    if selection.distinct:
        where = store("distinct", first_of("coalesce(quantvec_md5, quantvec)", 1))
    if selection.n_best is not None:
        where = store("best", first_of(", ".join(GROUP_COLUMNS), int(selection.n_best)))
    elif not selection.distinct:
        where = store("selected", f"SELECT id FROM images WHERE {where.sql}")
    return where


# Implementation: messages.


def _unknown_name(name: str, known: Iterable[str]) -> UserError:
    names = list(known)
    return UserError(f"there is no filter {name!r:.60}; filters are {', '.join(names)}{did_you_mean(name, names)}")


def _find_unknown(selection: Selection, archive: "Archive") -> Iterator[tuple[tuple[str, Any], str]]:
    """Yield what an archive lacks, and a message about it."""
    for table, ids, texts in _text_filters(selection):
        if not ids and not texts:
            continue
        kind, known = table[:-1].replace("_", " "), _texts(archive, table)
        unknown_ids = sorted(set(ids) - known.keys())
        message = f"{archive.path} has no {kind} with id {_list_values(unknown_ids)}"
        message += f"; its {kind} ids are {_list_values(known)}"
        yield from (((table, unknown), message) for unknown in unknown_ids)
        known_texts = {text for text in known.values() if text is not None}
        for text in texts:
            if text not in known_texts:
                similar = did_you_mean(text, known_texts)
                message = f"{archive.path} has no {kind} {text!r:.200}{similar or '; use the whole text, or its id'}"
                yield (table, text), message
    for name, wanted in selection.models:
        models = archive.models()
        for text in wanted:
            if not _find_models(models, name, text):
                names = [model.name for model in models.values() if model.kind == MODEL_KINDS[MODEL_COLUMNS[name]]]
                listed = ", ".join(f"{known!r:.80}" for known in names[:_MAX_LISTED]) or "none"
                message = f"{archive.path} has no {name} {text!r:.80} by name or first digits of SHA-256 (at least "
                message += f"{_LEAST_DIGEST}); it has {listed}{did_you_mean(text, names)}"
                yield (name, text), message


def _list_values(values: Collection[object]) -> str:
    listed = ", ".join(str(value) for value in list(values)[:_MAX_LISTED])
    return listed + (f" and {len(values) - _MAX_LISTED:,} more" if len(values) > _MAX_LISTED else "")
