"""Tables of images as Arrow, which Parquet files hold: the types of their columns, and conversion both ways.

The schema's metadata has two entries in JSON: `dm_generations`, the facts of the set (see `tables`), and `huggingface`,
by which the Hugging Face hub and the package `datasets` show the column `image` as images.
"""

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from dm_generations.archive.connection import ArchiveError
from dm_generations.archive.records import BYTES_PER_TOKEN, TOKEN_DTYPE
from dm_generations.archive.tables import NEEDED_COLUMNS, SCORE_FIELDS, TABLE_COLUMNS, Table
from dm_generations.errors import UserError, one_line

if TYPE_CHECKING:
    import pyarrow

IMAGE: Final = "image"  # the column of encoded images
_FACTS: Final = b"dm_generations"
_HUB: Final = b"huggingface"
_WHOLE: Final = frozenset(
    {"id", "top_k", "key0", "key1", "codebook_size", "init_count", "sampler_version", "class_label"}
)
_REAL: Final = frozenset(
    {"top_p", "temperature", "cond_scale", "clip_score_input", "clip_score_tokenized", "log_prob", "value", "time"}
)


def import_pyarrow() -> Any:
    """Return the package pyarrow. Raises UserError if it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise UserError("Parquet needs pyarrow: pip install 'dm-generations[tables]'") from error
    return pyarrow


def make_schema(facts: dict[str, Any], has_images: bool) -> "pyarrow.Schema":
    """Return the schema of a set of tables.

    Args:
        facts: Of the set.
        has_images: Whether there is a column of images.
    """
    pyarrow = import_pyarrow()
    fields = [(name, _type_of(name)) for name in TABLE_COLUMNS]
    metadata = {_FACTS: json.dumps(facts)}
    if has_images:
        fields.insert(0, (IMAGE, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])))
        metadata[_HUB] = json.dumps({"info": {"features": {IMAGE: {"_type": "Image"}}}})
    return pyarrow.schema(fields, metadata)


def read_facts(schema: "pyarrow.Schema") -> dict[str, Any] | None:
    """Return the facts of a set, None if its schema has none, as after another program has written it."""
    text = (schema.metadata or {}).get(_FACTS)
    try:
        facts = None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"its metadata {_FACTS.decode()} are not JSON") from error
    if facts is not None and not isinstance(facts, dict):
        raise ArchiveError(f"its metadata {_FACTS.decode()} are not a JSON object")
    return facts


def to_arrow(table: Table, schema: "pyarrow.Schema", images: Sequence[dict[str, Any]] = ()) -> "pyarrow.Table":
    """Return a table of a schema.

    Args:
        table: With TABLE_COLUMNS.
        schema: Of `make_schema`.
        images: Files with their names, {"bytes", "path"}, if the schema has a column for them.

    Raises:
        ArchiveError: A value has another type than its column.
    """
    pyarrow = import_pyarrow()
    columns = []
    for field in schema:
        try:
            if field.name == "tokens":
                columns.append(_to_lists(table["tokens"]))
                continue
            values = images if field.name == IMAGE else table[field.name]
            if field.type == pyarrow.int64():
                _check_whole(values)
            columns.append(pyarrow.array(values, field.type))
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            ids = table["id"]
            what = f"images {ids[0]} to {ids[-1]}: {field.name}: {one_line(error)}; run `verify`"
            raise ArchiveError(what) from error
    return pyarrow.Table.from_arrays(columns, schema=schema)


def from_arrow(batch: "pyarrow.RecordBatch") -> Table:
    """Return a table with NEEDED_COLUMNS.

    Raises:
        ArchiveError: A column has another type.
    """
    pyarrow = import_pyarrow()
    table: dict[str, Sequence[Any]] = {}
    for name in NEEDED_COLUMNS:
        column, wanted = batch.column(name), _type_of(name)
        try:
            column = column if column.type == wanted else column.cast(wanted)
            table[name] = _from_lists(column) if name == "tokens" else column.to_pylist()
        except (pyarrow.ArrowException, ValueError) as error:
            raise ArchiveError(f"column {name}: {one_line(error)}") from error
    return table


def _type_of(name: str) -> "pyarrow.DataType":
    pyarrow = import_pyarrow()
    if name == "tokens":
        return pyarrow.list_(pyarrow.uint16())
    if name == "scores":
        return pyarrow.list_(pyarrow.struct([(field, _type_of(field)) for field in SCORE_FIELDS]))
    if name in _WHOLE or name.endswith("_id"):
        return pyarrow.int64()
    return pyarrow.float64() if name in _REAL or name.startswith("time_") else pyarrow.string()


def _check_whole(values: Sequence[Any]) -> None:
    """Check that numbers are whole, which an archive of 2022 may store as reals; Arrow would cut them. ValueError."""
    if float in set(map(type, values)) and any(isinstance(value, float) and value % 1 for value in values):
        raise ValueError("a number is not whole")


def _to_lists(blobs: Sequence[bytes]) -> "pyarrow.ListArray":
    """Return blobs of tokens as lists of uint16."""
    import numpy as np

    pyarrow = import_pyarrow()
    ends = np.cumsum([0, *map(len, blobs)]) // BYTES_PER_TOKEN
    tokens = np.frombuffer(b"".join(blobs), TOKEN_DTYPE).astype(np.uint16, copy=False)
    return pyarrow.ListArray.from_arrays(pyarrow.array(ends, pyarrow.int32()), pyarrow.array(tokens))


def _from_lists(lists: "pyarrow.ListArray") -> list[bytes]:
    """Return lists of uint16 as blobs of tokens. Raises ValueError if a list or a token is missing."""
    ends = lists.offsets.to_numpy()
    tokens = lists.values.slice(ends[0], ends[-1] - ends[0])
    if lists.null_count or tokens.null_count:
        raise ValueError("some tokens are missing")
    content = tokens.to_numpy().astype(TOKEN_DTYPE, copy=False).tobytes()
    places = ((ends - ends[0]) * BYTES_PER_TOKEN).tolist()
    return [content[start:end] for start, end in itertools.pairwise(places)]
