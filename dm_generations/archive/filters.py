"""`Filters`: conditions on images as people write them, and how their values are read."""

import datetime
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypedDict

from dm_generations.errors import UserError
from dm_generations.sampling.prng import WORD

MAX_VALUES: Final = 1000  # of one name; SQLite limits how long a statement can be

Interval = tuple[float, float]  # both ends belong to it; infinite where it is open
Number = float | str  # "3..10" is a range
Time = str | datetime.date | datetime.datetime


class Filters(TypedDict, total=False):
    """Which images, as keyword arguments; all have to hold, and the values of one add up.

    Attributes:
        prompt: Whole texts, or ids.
        sc_prompt: The same for unconditional prompts; id 1 is the model's own empty one.
        top_k: Numbers, or ranges as "50..256" or "50..".
        top_p: The same.
        temperature: The same.
        cond_scale: The same.
        model: What sampled them: a name, or the first digits of its SHA-256.
        codec: What decodes them, likewise.
        seed: Seeds of `generate`, whose images have the same keys under all settings.
        key: Keys, as (key0, key1) or "key0:key1".
        score: Of the judge that `rank_by` names, or `clip_score_input`: numbers or ranges.
        min_score: The same as a score of "min_score..".
        max_score: The same as a score of "..max_score".
        score_tokenized: `clip_score_tokenized`: numbers or ranges.
        time: When their batch started: UTC days as "2026-01-31", times as "2026-01-31T12:00", or ranges of them.
        rating: Mean of the ratings from 1 to 10: numbers or ranges.
        tag: Tags that people gave.
        favourite: True for images that someone calls a favourite, False for the others.
        distinct: Images with equal tokens only once: the one with the highest score.
        best: So many of each prompt and setting, by score.
        rank_by: Whose score orders the images of a prompt and setting: the name, the id or the first digits of the hash
            of a judge, as `scores.find_scorer` takes it.
    """

    prompt: str | int | Sequence[str | int]
    sc_prompt: str | int | Sequence[str | int]
    top_k: Number | Sequence[Number]
    top_p: Number | Sequence[Number]
    temperature: Number | Sequence[Number]
    cond_scale: Number | Sequence[Number]
    model: str | Sequence[str]
    codec: str | Sequence[str]
    seed: int | str | Sequence[int | str]
    key: str | tuple[int, int] | Sequence[str | tuple[int, int]]
    score: Number | Sequence[Number]
    min_score: float
    max_score: float
    score_tokenized: Number | Sequence[Number]
    time: Time | Sequence[Time]
    rating: Number | Sequence[Number]
    tag: str | Sequence[str]
    favourite: bool | int | str
    distinct: bool
    best: int
    rank_by: str


def list_values_of(value: Any) -> Sequence[Any]:
    """Return one value, or several, as a sequence."""
    return [value] if isinstance(value, str | int | float | datetime.date) else list(value)


def split_values(value: Any) -> Iterator[Any]:
    """Yield values one by one; a text can list several, with commas between."""
    for piece in list_values_of(value):
        if isinstance(piece, str):
            yield from (part.strip() for part in piece.split(","))
        else:
            yield piece


def as_keys(value: Any) -> Any:
    """Return one key, a pair of numbers, or several, as a sequence."""
    is_key = isinstance(value, tuple) and len(value) == 2 and all(isinstance(word, int) for word in value)
    return [value] if is_key else value


def split_ids(values: Sequence[str | int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the ids and the texts among values that name prompts. Raises UserError."""
    ids, texts = ([value for value in values if isinstance(value, kind)] for kind in (int, str))
    if len(ids) + len(texts) < len(values):
        wrong = next(value for value in values if not isinstance(value, int | str))
        raise UserError(f"a prompt is its text or its id, not {wrong!r:.60}")
    return tuple(ids), tuple(texts)  # type: ignore[arg-type]


def parse_intervals(name: str, value: Any) -> tuple[Interval, ...]:
    """Read values and ranges of a name of RANGE_COLUMNS."""
    found = tuple(dict.fromkeys(_interval(name, piece) for piece in split_values(value)))
    if not 1 <= len(found) <= MAX_VALUES:
        raise UserError(f"{name} needs 1 to {MAX_VALUES:,} values, not {len(found):,}")
    return found


def _interval(name: str, value: Any) -> Interval:
    read = _read_time if name == "time" else _read_number
    if not isinstance(value, str) or ".." not in value:
        return read(name, value)
    first, _, last = value.partition("..")
    low = read(name, first)[0] if first.strip() else -math.inf
    high = read(name, last)[1] if last.strip() else math.inf
    if low > high:
        raise UserError(f"{name}={value!r:.60}: the range is empty, as its first value is the larger one")
    return low, high


def _read_number(name: str, value: Any) -> Interval:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name}: {value!r:.60} is not a number or a range as 1..3, 3.. or ..3")
    return number, number


def _read_time(name: str, value: Any) -> Interval:
    """Return the first and last second of a day, or twice a time, in UTC Unix seconds."""
    try:
        when = value if isinstance(value, datetime.date) else datetime.datetime.fromisoformat(value.strip())
        is_day = not isinstance(when, datetime.datetime) or (isinstance(value, str) and len(value.strip()) <= 10)
        if not isinstance(when, datetime.datetime):
            when = datetime.datetime.combine(when, datetime.time())
        start = (when if when.tzinfo else when.replace(tzinfo=datetime.UTC)).timestamp()
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise UserError(
            f"{name}: {value!r:.60} is not a day as 2026-01-31, a time as 2026-01-31T12:00 or a range of them"
        ) from None
    return start, math.nextafter(start + 24 * 60 * 60, 0) if is_day else start


def parse_seed(value: Any) -> int:
    """Read a seed. Raises UserError."""
    try:
        seed = int(value)
    except (TypeError, ValueError, OverflowError):
        seed = -1
    if not 0 <= seed < 2**64:
        raise UserError(f"seed: {value!r:.60} is not a whole number from 0 to 2^64 - 1")
    return seed


def parse_key(value: Any) -> tuple[int, int]:
    """Read a key. Raises UserError."""
    try:
        key0, key1 = map(int, value.split(":") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        key0 = key1 = -1
    if not (0 <= key0 <= WORD and 0 <= key1 <= WORD):
        raise UserError(f"key: {value!r:.60} is not KEY0:KEY1, two whole numbers below 2^32")
    return key0, key1


def parse_flag(name: str, value: Any) -> bool:
    """Read a value that is true or false. Raises UserError."""
    pieces = list(split_values(value))
    found = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(str(pieces[0]).lower())
    if len(pieces) != 1 or found is None:
        raise UserError(f"{name}: {value!r:.60} is not yes or no")
    return found
