"""One file of rows: JSON lines, CSV, or NumPy arrays. Rows are by the images' id, and are written as they are read.

    jsonl   an object a line, with TABLE_COLUMNS; `tokens` is a list
    csv     the same columns; `tokens` are numbers with spaces between, `scores` JSON
    npy     the tokens alone, (n, L) uint16
    npz     `tokens`; the numbers of _WHOLE (int64) and _REAL (float64, NaN where there is none), (n,) each; `prompts`
            and `sc_prompts`, each text once, and `prompt` and `sc_prompt`, (n,) places in them; -1 is no text

L: tokens of an image
"""

import contextlib
import csv
import io
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copyfileobj
from typing import Any, BinaryIO, Final

import numpy as np

from dm_generations.archive import Archive, ArchiveError
from dm_generations.archive.records import BYTES_PER_TOKEN, TOKEN_DTYPE
from dm_generations.archive.selection import Selection, compile_nonempty
from dm_generations.archive.tables import TABLE_COLUMNS, Table, TableReader
from dm_generations.atomic_io import remove_stale_temporaries, replacing
from dm_generations.errors import UserError

_ROWS: Final = 5_000
_WHOLE: Final = ("id", "top_k", "key0", "key1", "init_count")
_REAL: Final = ("top_p", "temperature", "cond_scale", "clip_score_input", "clip_score_tokenized", "log_prob")
_TEXTS: Final = ("prompt", "sc_prompt")
_MAX_TEXT_BYTES: Final = 1 << 30  # of an array of texts, in which all take the place of the longest

Tables = Iterator[Table]


def write_table(
    archive: Archive,
    path: Path,
    form: str,
    selection: Selection,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a file, all of it or nothing.

    Args:
        archive: The archive.
        path: A new file.
        form: A key of FORMS.
        selection: Which images.
        on_progress: Called with how many images are done, and of how many.

    Returns:
        How many images are in it.

    Raises:
        UserError: Nothing is selected, a row is damaged or does not fit the form, the file exists, or the disk takes no
            more.
    """
    where = compile_nonempty(archive, selection)
    total = archive.count(where)
    if not total:
        raise UserError(f"{archive.path} holds no images; `python -m dm_generations generate` adds some")
    if os.path.lexists(path):
        raise UserError(f"{path} exists already; remove it, or choose another --out")
    done = 0

    def tables() -> Tables:
        nonlocal done
        for table in TableReader(archive, where).read(_ROWS):
            yield table
            done += len(table["id"])
            on_progress(done, total)

    try:
        remove_stale_temporaries(path.parent)
        with replacing(path) as file:
            FORMS[form](file, tables(), total)
            if done != total:
                raise ArchiveError(f"{archive.path} changed while it was read; run the same command again")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return done


def _write_json_lines(file: BinaryIO, tables: Tables, total: int) -> None:
    for row in _rows(tables):
        values = dict(zip(TABLE_COLUMNS, row, strict=True))
        record = {name: _plain(value) for name, value in values.items()}
        record |= {"tokens": _numbers(values["tokens"]), "scores": _plain_scores(values["scores"])}
        file.write(json.dumps(record, separators=(",", ":")).encode("ascii") + b"\n")


def _write_csv(file: BinaryIO, tables: Tables, total: int) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(TABLE_COLUMNS)
    for row in _rows(tables):
        record = dict(zip(TABLE_COLUMNS, row, strict=True))
        record["tokens"] = " ".join(map(str, _numbers(record["tokens"])))
        record["scores"] = json.dumps(_plain_scores(record["scores"])) if record["scores"] else ""
        writer.writerow(record.values())
    text.flush()
    text.detach()


def _rows(tables: Tables) -> Iterator[tuple[Any, ...]]:
    for table in tables:
        yield from zip(*(table[name] for name in TABLE_COLUMNS), strict=True)


def _numbers(blob: bytes) -> list[int]:
    return np.frombuffer(blob, TOKEN_DTYPE).tolist()


def _plain(value: Any) -> Any:
    """Return a value for JSON, which has no infinity; a damaged archive can hold bytes."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.hex() if isinstance(value, bytes) else value


def _plain_scores(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: _plain(value) for name, value in score.items()} for score in scores]


def _write_npy(file: BinaryIO, tables: Tables, total: int) -> None:
    size = 0
    for table in tables:
        size = _write_tokens(file, table, size, total)


def _write_tokens(file: BinaryIO, table: Table, size: int, total: int) -> int:
    """Append the tokens of a table, after the header where `size` is 0; return the bytes of an image."""
    if not size:
        size = len(table["tokens"][0])
        _write_header(file, np.dtype(TOKEN_DTYPE), (total, size // BYTES_PER_TOKEN))
    for row_id, blob in zip(table["id"], table["tokens"], strict=True):
        if len(blob) != size:
            raise ArchiveError(
                f"image {row_id} has {len(blob) // BYTES_PER_TOKEN:,} tokens, others {size // BYTES_PER_TOKEN:,}, and "
                "the rows of an array have one length: select by --where codec=..., or choose another form"
            )
    file.write(b"".join(table["tokens"]))
    return size


def _write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})


def _write_npz(file: BinaryIO, tables: Tables, total: int) -> None:
    """Collect each array in a file of its own, as a zip takes one after the other."""
    dtypes = dict.fromkeys((*_WHOLE, *_TEXTS), np.dtype("<i8")) | dict.fromkeys(_REAL, np.dtype("<f8"))
    places: dict[str, dict[str, int]] = {name: {} for name in _TEXTS}
    with contextlib.ExitStack() as stack:
        names = ("tokens", *dtypes, *(f"{name}s" for name in _TEXTS))
        parts: dict[str, Any] = {name: stack.enter_context(tempfile.TemporaryFile(dir=_folder(file))) for name in names}
        for name, dtype in dtypes.items():
            _write_header(parts[name], dtype, (total,))
        size = 0
        for table in tables:
            size = _write_tokens(parts["tokens"], table, size, total)
            for name, dtype in dtypes.items():
                values = _find_places(places[name], table[name]) if name in _TEXTS else table[name]
                parts[name].write(_to_array(name, table, values, dtype))
        for name, found in places.items():
            np.save(parts[f"{name}s"], _text_array(name, list(found)), allow_pickle=False)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target:
            for name, part in parts.items():
                part.seek(0)
                with target.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    copyfileobj(part, member, 1 << 20)


def _folder(file: BinaryIO) -> str:
    return os.path.dirname(os.path.abspath(file.name))


def _find_places(places: dict[str, int], values: Any) -> list[int]:
    return [-1 if text is None else places.setdefault(text, len(places)) for text in values]


def _to_array(name: str, table: Table, values: Any, dtype: np.dtype) -> bytes:
    try:
        return np.array(values, dtype).tobytes()
    except (TypeError, ValueError, OverflowError) as error:
        ids = table["id"]
        raise ArchiveError(f"images {ids[0]} to {ids[-1]}: a value of {name} is not a number; run `verify`") from error


def _text_array(name: str, texts: list[str]) -> np.ndarray:
    if len(texts) * max(map(len, texts), default=0) * 4 > _MAX_TEXT_BYTES:
        raise UserError(f"{name}s are too many and too long for an array; choose --to parquet or jsonl")
    return np.array(texts, np.str_)


FORMS: Final[dict[str, Callable[[BinaryIO, Tables, int], None]]] = {
    "jsonl": _write_json_lines,
    "csv": _write_csv,
    "npy": _write_npy,
    "npz": _write_npz,
}
