"""Ratings as files: JSON as the page exports it, and pairs in the columns of preference data sets, as CSV or Parquet.

The columns are those of Pick-a-Pic, as far as an archive has them: `caption`, `image_0_uid`, `image_1_uid` (ids of the
archive), `label_0`, `label_1` (1 and 0; 0.5 each for a tie; 0 each where both are bad, and then `has_label` is false),
`best_image_uid`, `user_id`, `created_at` (UTC Unix seconds). Then for each image `md5_0`, `prompt_0`, ... what names it
in any copy of the archive; see `archive.ratings.IDENTITY`. Image 0 was shown on the left.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from dm_generations.archive import Archive, ArchiveError
from dm_generations.archive.ratings import IDENTITY, Rating, parse_judgement, read_judgements
from dm_generations.atomic_io import replacing
from dm_generations.errors import UserError, one_line, short_repr

FORMAT: Final = "dm-generations-ratings"
VERSION: Final = 1
CHUNK_ROWS: Final = 4096
_LABELS: Final[dict[str, tuple[float, float]]] = {
    "first": (1.0, 0.0),
    "second": (0.0, 1.0),
    "tie": (0.5, 0.5),
    "bad": (0.0, 0.0),
}
_VALUES: Final = {labels: value for value, labels in _LABELS.items()}
_PAIR_TYPES: Final[dict[str, type]] = {
    **{"caption": str, "image_0_uid": str, "image_1_uid": str, "label_0": float, "label_1": float},
    **{"has_label": bool, "best_image_uid": str, "user_id": str, "created_at": float},
}
_NUMBERS: Final[dict[str, type]] = {
    **{"top_k": int, "top_p": float, "temperature": float, "cond_scale": float},
    **{"sampler_version": int, "key0": int, "key1": int},
}
COLUMN_TYPES: Final = _PAIR_TYPES | {f"{name}_{i}": _NUMBERS.get(name, str) for i in (0, 1) for name in IDENTITY}


def read_ratings_file(path: Path) -> list[Rating]:
    """Read the ratings of a JSON or CSV file.

    Raises:
        UserError: It cannot be read, or something in it is wrong; the text says where.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL byte in the name
        raise UserError(f"{str(path)!r:.300}: cannot be read: {one_line(error)}") from error
    judgements = _parse_csv(path, text) if path.suffix.lower() == ".csv" else iter(_parse_json(path, text))
    ratings: list[Rating] = []
    for number in itertools.count(1):
        try:
            if (judgement := next(judgements, None)) is None:
                return ratings
            ratings.append(parse_judgement(judgement))
        except ArchiveError as error:
            raise UserError(f"{path}: rating {number}: {error}") from error
    raise AssertionError


def _parse_json(path: Path, text: str) -> list[Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: this is not JSON ({one_line(error)}); export the ratings again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: this is not a file of ratings, whose `format` is {FORMAT!r}")
    if content.get("version") != VERSION:
        found = short_repr(content.get("version"))
        raise UserError(f"{path}: its version is {found}, this program reads {VERSION}; install a newer dm_generations")
    if not isinstance(content.get("judgements"), list) or None in content["judgements"]:
        raise UserError(f"{path}: its judgements are {short_repr(content.get('judgements'))}, not a list of objects")
    return content["judgements"]


def _parse_csv(path: Path, text: str) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        missing = {"image_0_uid", "image_1_uid", "label_0", "label_1"} - set(reader.fieldnames or ())
        if missing:
            raise UserError(
                f"{path}: this is not a CSV file of pairs: it lacks the columns {', '.join(sorted(missing))}"
            )
        for row in reader:
            yield _parse_pair(row)
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is not CSV: {one_line(error)}") from error


def _parse_pair(row: dict[str, str]) -> dict[str, Any]:
    """Return a row of a CSV file as a judgement."""
    try:
        labels = float(row["label_0"]), float(row["label_1"])
        time = float(row.get("created_at") or 0.0)
        images = [_parse_identity(row, i) for i in (0, 1)]
    except (TypeError, ValueError) as error:
        raise ArchiveError(one_line(error)) from error
    if labels not in _VALUES:
        raise ArchiveError(f"label_0 and label_1 are {labels}, not 1 and 0, 0 and 1, 0.5 each or 0 each")
    rater = row.get("user_id") or ""
    return {"kind": "pair", "images": images, "value": _VALUES[labels], "order": [0, 1], "rater": rater, "time": time}


def _parse_identity(row: dict[str, str], i: int) -> dict[str, Any]:
    if not row.get(f"prompt_{i}"):
        return {"id": int(row[f"image_{i}_uid"])}
    found: dict[str, Any] = {}
    for name in IDENTITY:
        text = row.get(f"{name}_{i}") or None  # CSV has no NULL
        found[name] = None if text is None else COLUMN_TYPES[f"{name}_{i}"](text)
    return found


def write_ratings_file(archive: Archive, path: Path) -> int:
    """Write the ratings of an archive: `.csv` and `.parquet` pairs, `.json` all.

    Returns:
        How many ratings were written.

    Raises:
        UserError: The file exists, its name ends in something else, or pyarrow is not installed.
        OSError: It cannot be written.
    """
    writers = {".json": _write_json, ".csv": _write_csv, ".parquet": _write_parquet}
    if path.suffix.lower() not in writers:
        raise UserError(f"{path}: choose a name that ends in {', '.join(writers)}")
    if path.exists() or path.is_symlink():
        raise UserError(f"{path}: this file exists already; choose another name")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; create it first")
    with replacing(path) as file:
        return writers[path.suffix.lower()](archive, file)


def _write_json(archive: Archive, file: BinaryIO) -> int:
    head = {"format": FORMAT, "version": VERSION, "archives": [archive.path.name]}
    file.write(json.dumps(head)[:-1].encode() + b', "judgements": [')
    count = 0
    for judgement in read_judgements(archive):
        file.write((b",\n" if count else b"\n") + json.dumps(judgement).encode())
        count += 1
    file.write(b"\n]}\n")
    return count


def _write_csv(archive: Archive, file: BinaryIO) -> int:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, COLUMN_TYPES)
    writer.writeheader()
    count = 0
    for row in _pair_rows(archive):
        writer.writerow(row)
        count += 1
    text.flush()
    text.detach()
    return count


def _write_parquet(archive: Archive, file: BinaryIO) -> int:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("Parquet needs pyarrow: pip install pyarrow, or export .csv") from error
    types = {str: pyarrow.string(), float: pyarrow.float64(), int: pyarrow.int64(), bool: pyarrow.bool_()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in COLUMN_TYPES.items()])
    count, rows = 0, _pair_rows(archive)
    with parquet.ParquetWriter(file, schema) as writer:
        while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
            writer.write_table(pyarrow.Table.from_pylist(chunk, schema))
            count += len(chunk)
    return count


def _pair_rows(archive: Archive) -> Iterator[dict[str, Any]]:
    for judgement in read_judgements(archive, ("pair",)):
        images, value = judgement["images"], judgement["value"]
        uids = [str(image["id"]) for image in images]
        labels = _LABELS[value]
        yield {
            "caption": images[0]["prompt"],
            **{"image_0_uid": uids[0], "image_1_uid": uids[1], "label_0": labels[0], "label_1": labels[1]},
            "has_label": value != "bad",
            "best_image_uid": {"first": uids[0], "second": uids[1]}.get(value, value if value == "tie" else ""),
            **{"user_id": judgement["rater"], "created_at": judgement["time"]},
            **{f"{name}_{i}": image[name] for i, image in enumerate(images) for name in IDENTITY},
        }
