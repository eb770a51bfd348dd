"""Is an archive sound? `verify` looks at every row and at the file itself, and changes nothing."""

import json
import math
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

from dm_generations.archive._layout import INSERT_COLUMNS, MODEL_KINDS, columns_of
from dm_generations.archive._queries import SELECT_MODELS
from dm_generations.archive._records import DTYPES, ModelInfo
from dm_generations.archive._sqlite import ArchiveError
from dm_generations.archive._store import Archive
from dm_generations.archive._tokens import BYTES_PER_TOKEN, codes_fit, grid_side, init_md5, largest_code, quantvec_md5

INTEGRITY_LIMIT = 20  # lines of SQLite's own report; a broken page can cause thousands
UINT32_MAX = 2**32 - 1
INDEXES = frozenset({"images_by_group", "images_draw"})
SCORES = ("clip_score_input", "clip_score_tokenized")
TIMES = ("time_start", "time_end", "time_scored")
CHECKED_COLUMNS = ("id", *INSERT_COLUMNS)
USUAL_BYTE_COUNT = """
SELECT length(quantvec) FROM images WHERE typeof(quantvec) = 'blob' AND {codec_id} IS NULL
GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1
"""
TEXT_CODECS = {"UTF-8": "utf-8", "UTF-16le": "utf-16-le", "UTF-16be": "utf-16-be"}


@dataclass(frozen=True)
class Problem:
    """Something wrong: in row `id` of `table`, or in the whole table or file where these are None."""

    table: str | None
    id: int | None
    what: str

    def __str__(self) -> str:
        where = "file" if self.table is None else self.table if self.id is None else f"{self.table} {self.id}"
        return f"{where}: {self.what}"


def verify(archive: Archive) -> Iterator[Problem]:
    """What is wrong with the archive, as it is found; nothing if all is well.

    Looks at SQLite's own integrity, ids that point nowhere, types and ranges of every value, the length of
    each token vector (its codec's grid, or where no codec is known, a square like the others), its codes
    (below the codec's codebook size), its MD5 and that of its given codes. Damage of the file is reported, never
    raised.
    """
    try:
        yield from _check_file(archive)
        # Pictures that are added from here on may belong to prompts and models that are not read any more.
        last_id = archive.query("SELECT max({id}) FROM images")[0][0]
        prompt_ids = yield from _check_texts(archive, "prompts")
        sc_prompt_ids = yield from _check_texts(archive, "sc_prompts")
        models = {} if archive.is_2022 else (yield from _check_models(archive))
        yield from _check_images(archive, last_id, prompt_ids, sc_prompt_ids, models)
    except (sqlite3.Error, ArchiveError) as error:
        yield Problem(None, None, f"reading stopped: {error}")


def _check_file(archive: Archive) -> Iterator[Problem]:
    connection = archive.connection
    for (line,) in connection.execute(f"PRAGMA integrity_check({INTEGRITY_LIMIT})"):
        if line != "ok":
            yield Problem(None, None, f"SQLite: {line}")
    if not archive.is_2022:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
        for name in sorted(INDEXES - names):
            yield Problem(None, None, f"index {name} is missing; `merge` into a new archive makes it again")


def _check_texts(archive: Archive, table: str) -> Iterator[Problem]:
    """Returns the ids of the table."""
    connection = archive.connection
    encoding = TEXT_CODECS[connection.execute("PRAGMA encoding").fetchone()[0]]
    ids = set()
    query = f"SELECT id, typeof(desc), CAST(desc AS BLOB) FROM {table} ORDER BY id"
    for row_id, kind, raw in connection.execute(query):
        if not isinstance(row_id, int):
            yield Problem(table, None, f"an id is {row_id!r:.40}, not a whole number")
        elif row_id in ids:
            yield Problem(table, row_id, "this id occurs twice")
        ids.add(row_id)
        if kind == "null" and table == "sc_prompts":
            if row_id != 1:
                yield Problem(table, row_id, "the text is NULL; only row 1 stands for the model's own empty prompt")
        elif kind != "text":
            yield Problem(table, row_id, f"the text is {kind}")
        else:
            try:
                raw.decode(encoding)
            except UnicodeDecodeError:
                yield Problem(table, row_id, f"the text is not valid {encoding.upper()}")
            if table == "sc_prompts" and row_id == 1:
                yield Problem(table, row_id, "row 1 has a text; NULL stands there for the model's own empty prompt")
    if table == "sc_prompts" and 1 not in ids:
        yield Problem(table, 1, "missing; it stands for the model's own empty prompt")
    return ids


def _check_models(archive: Archive) -> Iterator[Problem]:
    """Returns the models by id, those only that can be used to check pictures."""
    models = {}
    for row_id, kind, name, sha256, config, *sizes in archive.connection.execute(SELECT_MODELS):
        if kind not in MODEL_KINDS.values():
            yield Problem("models", row_id, f"unknown kind {kind!r:.40}")
        if not (isinstance(sha256, str) and len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")):
            yield Problem("models", row_id, f"sha256 is {sha256!r:.80}, not 64 hex digits")
        try:
            is_object = isinstance(json.loads(config), dict)
        except (TypeError, ValueError, RecursionError):
            is_object = False
        if not is_object:
            yield Problem("models", row_id, "config is not a JSON object")
        if kind != "codec":
            sizes = [None] * 3
        elif not all(isinstance(size, int) and size > 0 for size in sizes):
            yield Problem("models", row_id, f"grid, codebook_size, image_size {sizes} are not all above 0")
            sizes = [None] * 3
        models[row_id] = ModelInfo(kind, name, sha256, {}, *sizes)
    return models


def _check_images(
    archive: Archive, last_id: int | None, prompt_ids: set[int], sc_prompt_ids: set[int], models: dict[int, ModelInfo]
) -> Iterator[Problem]:
    usual_bytes = _usual_byte_count(archive)
    has_md5 = "quantvec_md5" in columns_of(archive.connection, "images")
    for values in archive.scan(CHECKED_COLUMNS, "{id} <= :last_id", {"last_id": last_id}):
        row = dict(zip(CHECKED_COLUMNS, values, strict=True))
        if row["prompt_id"] not in prompt_ids:
            yield Problem("images", row["id"], f"prompt_id {row['prompt_id']!r:.40} is not in prompts")
        if row["sc_prompt_id"] not in sc_prompt_ids:
            yield Problem("images", row["id"], f"sc_prompt_id {row['sc_prompt_id']!r:.40} is not in sc_prompts")
        for what in _wrong_values(row, models):
            yield Problem("images", row["id"], what)
        codec = models.get(row["codec_id"])
        for what in _wrong_tokens(row["quantvec"], codec, usual_bytes):
            yield Problem("images", row["id"], what)
        if has_md5 and isinstance(row["quantvec"], bytes):
            md5 = quantvec_md5(row["quantvec"])
            if row["quantvec_md5"] != md5:
                found = row["quantvec_md5"]
                yield Problem("images", row["id"], f"quantvec_md5 is {found!r:.40}, the tokens have {md5}")
        for what in _wrong_init(row["quantvec"], row["init_count"], row["init_md5"]):
            yield Problem("images", row["id"], what)


def _usual_byte_count(archive: Archive) -> int | None:
    """The commonest length of token vectors whose codec is unknown."""
    found = archive.connection.execute(archive.sql(USUAL_BYTE_COUNT)).fetchone()
    return found[0] if found else None


def _wrong_values(row: dict, models: dict[int, ModelInfo]) -> Iterator[str]:
    if not _is_whole(row["top_k"], 0):
        yield f"top_k is {row['top_k']!r:.40}, not a whole number from 0"
    for name, low, high in (
        ("top_p", 0, 1),
        ("temperature", 0, math.inf),
        ("cond_scale", -math.inf, math.inf),
    ):
        if not _is_finite(row[name]) or not low <= row[name] <= high:
            bounds = "" if low == -math.inf else f" from {low}" if high == math.inf else f" from {low} to {high}"
            yield f"{name} is {row[name]!r:.40}, not a finite number{bounds}"
    for name in ("key0", "key1"):
        if not _is_whole(row[name], 0) or row[name] > UINT32_MAX:
            yield f"{name} is {row[name]!r:.40}, not a uint32"
    for name in (*SCORES, *TIMES, "log_prob"):
        if row[name] is not None and not _is_finite(row[name]):
            yield f"{name} is {row[name]!r:.40}, not a number"
    if _is_finite(row["time_start"]) and _is_finite(row["time_end"]) and row["time_end"] < row["time_start"]:
        yield "time_end lies before time_start"
    for name, kind in MODEL_KINDS.items():
        model_id = row[name]
        if model_id is not None and (model_id not in models or models[model_id].kind != kind):
            yield f"{name} {model_id!r:.40} is not a {kind} in models"
    if row["sampler_version"] is not None and not isinstance(row["sampler_version"], int):
        yield f"sampler_version is {row['sampler_version']!r:.40}, not a whole number"
    if row["dtype"] is not None and row["dtype"] not in DTYPES:
        yield f"dtype is {row['dtype']!r:.40}, not one of {', '.join(DTYPES)}"


def _wrong_tokens(quantvec: object, codec: ModelInfo | None, usual_bytes: int | None) -> Iterator[str]:
    if quantvec is None:
        yield "quantvec is NULL"
    elif not isinstance(quantvec, bytes):
        yield f"quantvec is of type {type(quantvec).__name__}, not a blob"
    elif codec is None or codec.grid is None:
        if grid_side(len(quantvec)) is None:
            yield f"quantvec has {len(quantvec)} bytes, which is no square grid of uint16"
        elif codec is None and len(quantvec) != usual_bytes:
            yield f"quantvec has {len(quantvec)} bytes, most of the others {usual_bytes}"
    elif len(quantvec) != (expected := BYTES_PER_TOKEN * codec.grid * codec.grid):
        yield f"quantvec has {len(quantvec)} bytes, not the {expected} of {codec.grid}x{codec.grid} uint16"
    elif not codes_fit(quantvec, codec.codebook_size):
        yield f"code {largest_code(quantvec)} is not below the codebook size {codec.codebook_size}"


def _wrong_init(quantvec: object, init_count: object, md5: object) -> Iterator[str]:
    token_count = len(quantvec) // BYTES_PER_TOKEN if isinstance(quantvec, bytes) else 0
    if not _is_whole(init_count, 0) or init_count > token_count:
        yield f"init_count is {init_count!r:.40}, not from 0 to the {token_count} codes of the picture"
    elif md5 != (expected := init_md5(quantvec, init_count)):
        yield f"init_md5 is {md5!r:.40}, the first {init_count} codes have {expected!r}"


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_whole(value: object, low: int) -> bool:
    return isinstance(value, int) and value >= low
