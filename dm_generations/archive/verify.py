"""`verify`: checks every row of an archive and the file itself, and changes nothing."""

import math
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Final

from dm_generations.archive.connection import ArchiveError
from dm_generations.archive.database import Archive
from dm_generations.archive.judgements import find_wrong_judgements
from dm_generations.archive.queries import SELECT_CLASSES, SELECT_MODELS, USUAL_LENGTH
from dm_generations.archive.records import (
    ALL_MODEL_KINDS,
    BYTES_PER_TOKEN,
    DTYPES,
    INSERT_COLUMNS,
    MODEL_KINDS,
    ModelInfo,
    count_tokens,
    format_shape,
    grid_side,
    init_md5,
    is_canonical,
    max_token,
    parse_config,
    parse_image_shape,
    parse_token_shape,
    quantvec_md5,
    tokens_below,
)
from dm_generations.archive.schema import ADDED_TABLES, INDEXES
from dm_generations.archive.selection import EVERY, Where
from dm_generations.archive.vocabulary import parse_labels

PROBLEM_LIMIT: Final = 100  # of one kind in one table; one slip of a tool can spoil every row
INTEGRITY_LIMIT: Final = 20  # lines of SQLite's own report; a broken page can cause thousands
UINT32_MAX: Final = 2**32 - 1
SCORES: Final = ("clip_score_input", "clip_score_tokenized")
TIMES: Final = ("time_start", "time_end", "time_scored")
CHECKED_COLUMNS: Final = ("id", *INSERT_COLUMNS)
TEXT_ENCODINGS: Final = {"UTF-8": "utf-8", "UTF-16le": "utf-16-le", "UTF-16be": "utf-16-be"}

Found = Iterator[tuple[str, str]]  # kind and text of what is wrong with one row


@dataclass(frozen=True)
class Problem:
    """Something wrong in row `id` of `table`; in the whole table if `id` is None, in the file if both are."""

    table: str | None
    id: int | None
    what: str
    kind: str  # the column, or part of the file, that is wrong
    count: int = 1  # of problems of this kind and table; more than 1 for those that are not listed

    def __str__(self) -> str:
        where = "file" if self.table is None else self.table if self.id is None else f"{self.table} {self.id}"
        return f"{where}: {self.what}"


def verify(archive: Archive, where: Where = EVERY) -> Iterator[Problem]:
    """Yield what is wrong with an archive, as it is found; nothing if it is sound.

    Of the images only those of `where` are checked, a compiled selection.

    Checks SQLite's own integrity, ids without a row, types and ranges of every value, the length of each token vector
    (its codec's grid, or a square like the others if no codec is known), its tokens (below the codec's codebook size),
    its MD5 and that of its initial tokens. Damage of the file is yielded too, not raised. After PROBLEM_LIMIT problems
    of a kind in a table the others are counted, and yielded as one at the end.
    """
    counts: Counter[tuple[str | None, str]] = Counter()
    for problem in _find_problems(archive, where):
        counts[problem.table, problem.kind] += 1
        if counts[problem.table, problem.kind] <= PROBLEM_LIMIT:
            yield problem
    for (table, kind), count in counts.items():
        if (more := count - PROBLEM_LIMIT) > 0:
            yield Problem(table, None, f"and {more:,} more with a wrong {kind}", kind, more)


def _find_problems(archive: Archive, where: Where) -> Iterator[Problem]:
    try:
        yield from _check_file(archive)
        # Images that are added from now on may refer to prompts and models that are added after these are read.
        last_id = archive.connection.value("SELECT max(id) FROM images")
        if not isinstance(last_id, int | None):
            raise ArchiveError(f"the id of an image is {last_id!r:.40}, not a whole number")
        prompt_ids = yield from _check_texts(archive, "prompts")
        sc_prompt_ids = yield from _check_texts(archive, "sc_prompts")
        models = yield from _check_models(archive)
        yield from _check_classes(archive)
        if last_id is not None:
            yield from _check_images(archive, where, last_id, prompt_ids, sc_prompt_ids, models)
        model_kinds = {row_id: model.kind for row_id, model in models.items()}
        for table, row_id, what, kind in find_wrong_judgements(archive, model_kinds):
            yield Problem(table, row_id, what, kind)
    except ArchiveError as error:
        yield Problem(None, None, f"reading stopped: {error}", "reading")


def _check_file(archive: Archive) -> Iterator[Problem]:
    for (line,) in archive.connection.rows(f"PRAGMA integrity_check({INTEGRITY_LIMIT})"):
        if line != "ok":
            yield Problem(None, None, f"SQLite: {line}", "integrity")
    present = {name for (name,) in archive.connection.rows("SELECT name FROM main.sqlite_master WHERE type = 'index'")}
    for name in sorted(INDEXES - present) if archive.version else ():
        what = f"index {name} is missing; `merge` into a new archive makes it"
        yield Problem(None, None, what, "index")


def _check_texts(archive: Archive, table: str) -> Generator[Problem, None, set[int]]:
    """Yield problems of a table of texts; return its ids."""
    connection = archive.connection
    encoding = TEXT_ENCODINGS[connection.value("PRAGMA encoding")]
    ids: set[int] = set()
    query = f"SELECT id, typeof(desc), CAST(desc AS BLOB) FROM {table} ORDER BY id"
    for row_id, kind, raw in connection.bounded_rows(query):
        if not isinstance(row_id, int):
            yield Problem(table, None, f"an id is {row_id!r:.40}, not a whole number", "id")
        elif row_id in ids:
            yield Problem(table, row_id, "this id occurs twice", "id")
        else:
            ids.add(row_id)
        if (what := _wrong_text(table, row_id, kind, raw, encoding)) is not None:
            yield Problem(table, row_id, what, "desc")
    if table == "sc_prompts" and 1 not in ids:
        yield Problem(table, 1, "missing; it means the model's own empty prompt", "id")
    return ids


def _wrong_text(table: str, row_id: int, kind: str, raw: bytes, encoding: str) -> str | None:
    is_empty_prompt = table == "sc_prompts" and row_id == 1
    if kind == "null" and table == "sc_prompts":
        return None if is_empty_prompt else "the text is NULL; only in row 1 it means the model's own empty prompt"
    if kind != "text":
        return f"the text is {kind}"
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return f"the text is not valid {encoding.upper()}"
    return "row 1 has a text; it must be NULL, the model's own empty prompt" if is_empty_prompt else None


def _check_models(archive: Archive) -> Generator[Problem, None, dict[int, ModelInfo]]:
    """Yield problems of the models; return them by id, with sizes where these can be used to check images."""
    models = {}
    for row_id, kind, name, sha256, config, *shapes in archive.connection.bounded_rows(SELECT_MODELS):
        if kind not in ALL_MODEL_KINDS:
            yield Problem("models", row_id, f"unknown kind {kind!r:.40}", "kind")
        if not isinstance(name, str):
            yield Problem("models", row_id, f"name is {name!r:.40}, not a text", "name")
        if not (isinstance(sha256, str) and len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")):
            yield Problem("models", row_id, f"sha256 is {sha256!r:.80}, not 64 hex digits", "sha256")
        try:
            parse_config(config)
        except ArchiveError:
            yield Problem("models", row_id, "config is not a JSON object", "config")
        models[row_id] = ModelInfo(kind, name, sha256, {})
        if kind == "codec":
            token_shape, codebook_size, image_shape = shapes
            try:
                parse_image_shape(image_shape)
                shape = parse_token_shape(token_shape)
            except ArchiveError as error:
                yield Problem("models", row_id, str(error), "sizes")
                continue
            if not _is_whole(codebook_size, 1):
                yield Problem("models", row_id, f"codebook_size {codebook_size!r:.40} is not above 0", "sizes")
                continue
            models[row_id] = ModelInfo(kind, name, sha256, {}, shape, codebook_size)
    return models


def _check_classes(archive: Archive) -> Iterator[Problem]:
    """Yield problems of vocabularies, and of prompts that are classes."""
    counts: dict[Any, int] = {}
    for row_id, name, labels in archive.scan(ADDED_TABLES["vocabularies"], table="vocabularies"):
        try:
            counts[row_id] = len(parse_labels(archive.connection, name, labels))
        except ArchiveError:
            yield Problem("vocabularies", row_id, "labels is not a JSON array of texts", "labels")
            counts[row_id] = 0
    if archive.version < 3:
        return
    for row_id, vocabulary_id, label in archive.connection.rows(SELECT_CLASSES):
        if vocabulary_id not in counts:
            what = f"vocabulary_id {vocabulary_id!r:.40} is not in vocabularies"
            yield Problem("prompts", row_id, what, "vocabulary_id")
        elif not _is_whole(label, 0) or label >= counts[vocabulary_id]:
            yield Problem("prompts", row_id, f"class_label {label!r:.40} is outside its vocabulary", "class_label")


def _check_images(
    archive: Archive,
    where: Where,
    last_id: int,
    prompt_ids: set[int],
    sc_prompt_ids: set[int],
    models: dict[int, ModelInfo],
) -> Iterator[Problem]:
    usual_bytes = archive.connection.value(USUAL_LENGTH)  # where the codec is unknown
    for values in archive.scan(CHECKED_COLUMNS, last_id, where):
        row = dict(zip(CHECKED_COLUMNS, values, strict=True))
        for kind, what in _wrong_ids(row, prompt_ids, sc_prompt_ids, models):
            yield Problem("images", row["id"], what, kind)
        for kind, what in _wrong_values(row):
            yield Problem("images", row["id"], what, kind)
        codec = models.get(row["codec_id"])
        for what in _wrong_tokens(row["quantvec"], codec, usual_bytes):
            yield Problem("images", row["id"], what, "quantvec")
        for kind, what in _wrong_md5s(row["quantvec"], row["quantvec_md5"], row["init_count"], row["init_md5"]):
            yield Problem("images", row["id"], what, kind)


def _wrong_ids(
    row: dict[str, Any], prompt_ids: set[int], sc_prompt_ids: set[int], models: dict[int, ModelInfo]
) -> Found:
    for name, ids in (("prompt_id", prompt_ids), ("sc_prompt_id", sc_prompt_ids)):
        if row[name] not in ids:
            yield name, f"{name} {row[name]!r:.40} is not in {name.removesuffix('_id')}s"
    for name, kind in MODEL_KINDS.items():
        model_id = row[name]
        if model_id is not None and (model_id not in models or models[model_id].kind != kind):
            yield name, f"{name} {model_id!r:.40} is not a {kind} in models"


def _wrong_values(row: dict[str, Any]) -> Found:
    if not _is_whole(row["top_k"], 0):
        yield "top_k", f"top_k is {row['top_k']!r:.40}, not a whole number from 0"
    for name, low, high in (
        ("top_p", 0, 1),
        ("temperature", 0, math.inf),
        ("cond_scale", -math.inf, math.inf),
    ):
        if not _is_finite(row[name]) or not low <= row[name] <= high:
            bounds = "" if low == -math.inf else f" from {low}" if high == math.inf else f" from {low} to {high}"
            yield name, f"{name} is {row[name]!r:.40}, not a finite number{bounds}"
    for name in ("key0", "key1"):
        if not _is_whole(row[name], 0) or row[name] > UINT32_MAX:
            yield name, f"{name} is {row[name]!r:.40}, not a uint32"
    for name in (*SCORES, *TIMES, "log_prob"):
        if row[name] is not None and not _is_finite(row[name]):
            yield name, f"{name} is {row[name]!r:.40}, not a number"
    if _is_finite(row["time_start"]) and _is_finite(row["time_end"]) and row["time_end"] < row["time_start"]:
        yield "time_end", "time_end is before time_start"
    if row["sampler_version"] is not None and not isinstance(row["sampler_version"], int):
        yield "sampler_version", f"sampler_version is {row['sampler_version']!r:.40}, not a whole number"
    if not is_canonical(row["extra_settings"]):
        yield "extra_settings", f"extra_settings is {row['extra_settings']!r:.100}, not canonical JSON"
    if row["dtype"] is not None and row["dtype"] not in DTYPES:
        yield "dtype", f"dtype is {row['dtype']!r:.40}, not one of {', '.join(DTYPES)}"


def _wrong_tokens(quantvec: object, codec: ModelInfo | None, usual_bytes: int | None) -> Iterator[str]:
    if quantvec is None:
        yield "quantvec is NULL"
    elif not isinstance(quantvec, bytes):
        yield f"quantvec is of type {type(quantvec).__name__}, not a blob"
    elif codec is None or codec.token_shape is None or codec.codebook_size is None:
        if grid_side(len(quantvec)) is None:
            yield f"quantvec has {len(quantvec)} bytes, not a square grid of uint16"
        elif codec is None and len(quantvec) != usual_bytes:
            yield f"quantvec has {len(quantvec)} bytes, most of the others {usual_bytes}"
    elif len(quantvec) != (expected := BYTES_PER_TOKEN * count_tokens(codec.token_shape)):
        yield f"quantvec has {len(quantvec)} bytes, not the {expected} of {format_shape(codec.token_shape)} uint16"
    elif not tokens_below(quantvec, codec.codebook_size):
        yield f"token {max_token(quantvec)} is not below the codebook size {codec.codebook_size}"


def _wrong_md5s(quantvec: object, md5: object, init_count: Any, initial_md5: object) -> Found:
    blob = quantvec if isinstance(quantvec, bytes) else b""
    # NULL: a file of 2022 need not record it.
    if isinstance(quantvec, bytes) and md5 is not None and md5 != (expected := quantvec_md5(blob)):
        yield "quantvec_md5", f"quantvec_md5 is {md5!r:.40}, the tokens have {expected}"
    token_count = len(blob) // BYTES_PER_TOKEN
    if not _is_whole(init_count, 0) or init_count > token_count:
        yield "init_count", f"init_count is {init_count!r:.40}, not from 0 to the {token_count} tokens of the image"
    elif initial_md5 != (expected := init_md5(blob, init_count)):
        yield "init_md5", f"init_md5 is {initial_md5!r:.40}, the first {init_count} tokens have {expected!r}"


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_whole(value: object, low: int) -> bool:
    return isinstance(value, int) and value >= low
