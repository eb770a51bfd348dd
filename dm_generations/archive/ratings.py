"""What people said of images (table `ratings`): stored, and read in a form that any copy of an archive takes.

A judgement is a rating as JSON, as the page and its server exchange it:

    kind     "pair", "score", "favourite" or "tag"
    images   [image], of a pair [image, image]; an image is {md5 of its tokens or null, prompt, sc_prompt, top_k, top_p,
             temperature, cond_scale, extra_settings, model, sampler_version, key0, key1}, or just {id} in this archive
    value    of a pair "first", "second", "tie" or "bad"; a score 1 to 10; a favourite true or false; a tag
             {"name", "on"}: one that is off takes the rater's tag back
    order    of a pair which of `images` was shown on the left, then on the right: [0, 1] or [1, 0]; else null
    rater    a name, or "" for none
    time     UTC Unix seconds

A model is named "" if it ships with this package, and null if it is unknown.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from dm_generations.archive.connection import ArchiveError
from dm_generations.archive.database import Archive
from dm_generations.archive.judgements import wrong_rating
from dm_generations.archive.records import ImageRow, ModelInfo
from dm_generations.archive.records import quantvec_md5 as md5_of
from dm_generations.errors import short_repr
from dm_generations.paths import model_label
from dm_generations.sampling.params import SamplingParams

IDENTITY: Final = (
    *("md5", "prompt", "sc_prompt", *SamplingParams.__dataclass_fields__, "extra_settings"),
    *("model", "sampler_version", "key0", "key1"),
)
ANONYMOUS: Final = "anonymous"  # a rater without a name
MAX_TEXT: Final = 1000  # characters of a rater's name or a tag
CHUNK_ROWS: Final = 512
_INSERT: Final = """
INSERT INTO ratings (rater, kind, image_id, other_id, value, time) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING
"""
_TAKE_BACK: Final = "DELETE FROM ratings WHERE kind = 'tag' AND rater = ? AND image_id = ? AND value = ? AND time <= ?"
_SETTINGS: Final = (*SamplingParams.__dataclass_fields__, "extra_settings", "key0", "key1")
_FIND_IMAGES: Final = f"""
SELECT images.id, quantvec_md5, models.name, sampler_version
FROM images LEFT JOIN models ON models.id = generator_id
WHERE prompt_id = (SELECT id FROM prompts WHERE desc = :prompt)
  AND sc_prompt_id IN (SELECT id FROM sc_prompts WHERE desc = :sc_prompt OR (:sc_prompt = '' AND id = 1))
  AND {" AND ".join(f"{name} = :{name}" for name in _SETTINGS)}
ORDER BY images.id
"""
_COLUMNS: Final = ("rater", "kind", "image_id", "other_id", "value", "time")
_SWAPPED: Final = {"first": "second", "second": "first"}


@dataclass(frozen=True, slots=True)
class Rating:
    """What a person said of an image, or of a pair.

    Attributes:
        rater: Who.
        kind: One of `judgements.RATING_KINDS`.
        image: Its id in the archive, or a mapping with the keys IDENTITY; of a pair the one that was on the left.
        value: As the table stores it; see schema/README.md.
        time: UTC Unix seconds.
        other: Of a pair the image on the right.
        is_on: False takes the rater's tag back.
    """

    rater: str
    kind: str
    image: int | Mapping[str, Any]
    value: str | int
    time: float
    other: int | Mapping[str, Any] | None = None
    is_on: bool = True


def parse_judgement(judgement: object) -> Rating:
    """Read a judgement.

    Raises:
        ArchiveError: Something in it is wrong; the text says what.
    """
    if not isinstance(judgement, dict):
        raise ArchiveError(f"{short_repr(judgement)} is not an object")
    kind, value, images = judgement.get("kind"), judgement.get("value"), judgement.get("images")
    if not isinstance(images, list) or len(images) != (2 if kind == "pair" else 1):
        raise ArchiveError(f"images is {short_repr(images)}, not {'two images' if kind == 'pair' else 'one image'}")
    is_on = True
    if kind == "tag" and isinstance(value, dict):
        is_on, value = value.get("on") is not False, value.get("name")
    elif kind == "favourite" and isinstance(value, bool):
        value = int(value)
    elif kind == "pair" and isinstance(value, str):
        order = judgement.get("order")
        if order not in ([0, 1], [1, 0]):
            raise ArchiveError(f"order is {short_repr(order)}, not [0, 1] or [1, 0]")
        if order == [1, 0]:
            images, value = images[::-1], _SWAPPED.get(value, value)
    if (what := wrong_rating(kind, value)) is not None:
        raise ArchiveError(what)
    rater = judgement.get("rater") or ANONYMOUS
    for name, text in (("rater", rater), ("tag", value if kind == "tag" else "")):
        if not isinstance(text, str) or len(text) > MAX_TEXT or "\x00" in text:
            raise ArchiveError(f"{name} is {short_repr(text)}, not a text of at most {MAX_TEXT:,} characters")
    left, *right = map(_parse_image, images)
    other = right[0] if right else None
    return Rating(rater, str(kind), left, cast(Any, value), _parse_time(judgement.get("time")), other, is_on)


def _parse_time(time: object) -> float:
    try:
        seconds = float(time) if isinstance(time, int | float) and not isinstance(time, bool) else math.nan
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise ArchiveError(f"time is {short_repr(time)}, not a number of seconds")
    return seconds


def _parse_image(image: object) -> int | dict[str, Any]:
    if not isinstance(image, dict):
        raise ArchiveError(f"an image is {short_repr(image)}, not an object")
    if type(image.get("id")) is int and not image.keys() & {"md5", "prompt"}:
        return image["id"]
    identity = {name: image.get(name) for name in IDENTITY}
    if not all(isinstance(value, str | int | float | None) for value in identity.values()):
        raise ArchiveError(f"an image is {short_repr(image)}; its values are texts and numbers")
    return identity


def add_ratings(archive: Archive, ratings: Iterable[Rating]) -> int:
    """Store ratings in one transaction, all of them or none; one that is there already is left as it is.

    Args:
        archive: Open for writing.
        ratings: In the order in which they were given.

    Returns:
        How many were stored or taken back.

    Raises:
        ArchiveError: A value is wrong, or an image is not in the archive; the text says which rating.
    """
    changed_count = 0
    with archive.transaction():
        for number, rating in enumerate(ratings, 1):
            try:
                changed_count += _add(archive, rating)
            except ArchiveError as error:
                raise ArchiveError(f"rating {number}: {error}") from error
    return changed_count


def _add(archive: Archive, rating: Rating) -> int:
    if (what := wrong_rating(rating.kind, rating.value)) is not None:
        raise ArchiveError(what)
    if (rating.kind == "pair") != (rating.other is not None):
        raise ArchiveError("a pair has two images, any other rating one")
    image_id = find_image(archive, rating.image)
    other_id = None if rating.other is None else find_image(archive, rating.other)
    if image_id == other_id:
        raise ArchiveError("both images of a pair are the same one")
    if not rating.is_on:
        values: list[Any] = [rating.rater, image_id, rating.value, rating.time]
        return archive.connection.execute(_TAKE_BACK, values).rowcount
    values = [rating.rater, rating.kind, image_id, other_id, rating.value, rating.time]
    return archive.connection.execute(_INSERT, values).rowcount


def find_image(archive: Archive, image: int | Mapping[str, Any]) -> int:
    """Return the id of an image.

    Args:
        archive: Open.
        image: Its id, or a mapping with the keys IDENTITY. Without an MD5 its settings, key and model decide.

    Raises:
        ArchiveError: The archive does not have it, or several images are meant.
    """
    if isinstance(image, int):
        if archive.connection.value("SELECT id FROM images WHERE id = ?", (image,)) is None:
            raise ArchiveError(f"there is no image {image} in {archive.path}")
        return image
    wanted = dict(image) | {
        "sc_prompt": image["sc_prompt"] or "",
        "prompt": image["prompt"] or "",
        "extra_settings": image["extra_settings"] or "",
    }
    found = list(archive.connection.rows(_FIND_IMAGES, wanted))
    if image["md5"] is not None:
        found = [row for row in found if row[1] == image["md5"]]
    else:
        found = [row for row in found if image["model"] in (None, model_label(row[2]), row[2])]
        if len({md5 for _, md5, *_ in found}) > 1:
            raise ArchiveError(f"several images are meant: {_describe(image)}")
    if not found:
        raise ArchiveError(f"this image is not in {archive.path}: {_describe(image)}")
    # Equal tokens are the same image; of several that of the same sampler counts.
    wanted_sample = image["model"], image["sampler_version"]
    return min(found, key=lambda row: ((model_label(row[2]), row[3]) != wanted_sample, row[0]))[0]


def _describe(image: Mapping[str, Any]) -> str:
    return f"prompt {short_repr(image['prompt'])}, key {short_repr((image['key0'], image['key1']))}, " + (
        f"tokens {short_repr(image['md5'])}"
    )


def read_ratings(archive: Archive, kinds: Sequence[str] = (), last: int | None = None) -> Iterator[tuple[Any, ...]]:
    """Yield (rater, kind, image_id, other_id, value, time), in the order in which they were stored.

    Rows of a damaged archive that are not as the format demands are left out.

    Args:
        archive: Open.
        kinds: Only these; all by default.
        last: Only so many, the newest.
    """
    after = -1
    if last is not None:
        sql = "SELECT id FROM ratings ORDER BY id DESC LIMIT 1 OFFSET ?"
        after = archive.connection.value(sql, (last,)) or -1
    for row_id, *values in archive.scan(("id", *_COLUMNS), table="ratings"):
        if row_id > after and (not kinds or values[1] in kinds) and not _is_damaged(*values):
            yield tuple(values)


def _is_damaged(rater: object, kind: object, image_id: object, other_id: object, value: object, time: object) -> bool:
    """Return whether a row is not as the format demands; `verify` says what is wrong with it."""
    if not (isinstance(rater, str) and isinstance(time, float) and isinstance(image_id, int)):
        return True
    return wrong_rating(kind, value) is not None or isinstance(other_id, int) != (kind == "pair")


def read_judgements(archive: Archive, kinds: Sequence[str] = (), last: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield ratings as judgements; those of images that are missing, as in a damaged archive, are left out.

    Args:
        archive: Open.
        kinds: Only these; all by default.
        last: Only so many, the newest.
    """
    texts = archive.prompts(), archive.sc_prompts(), archive.models()
    ratings = read_ratings(archive, kinds, last)
    while chunk := list(itertools.islice(ratings, CHUNK_ROWS)):
        ids = {row_id for rating in chunk for row_id in rating[2:4] if row_id is not None}
        images = {row.id: identify(row, archive.path.name, *texts) for row in archive.read_rows(sorted(ids))}
        for rater, kind, image_id, other_id, value, time in chunk:
            shown = [images.get(row_id) for row_id in (image_id, other_id) if row_id is not None]
            if None in shown:
                continue
            if kind == "favourite":
                value = bool(value)
            elif kind == "tag":
                value = {"name": value, "on": True}
            order = [0, 1] if kind == "pair" else None
            yield {"kind": kind, "images": shown, "value": value, "order": order, "rater": rater, "time": time}


def identify(
    row: ImageRow,
    archive_name: str,
    prompts: Mapping[int, str | None],
    sc_prompts: Mapping[int, str | None],
    models: Mapping[int, ModelInfo],
) -> dict[str, Any]:
    """Return what names an image in any copy of its archive, with its id in this one."""
    model = None if row.generator_id is None else models.get(row.generator_id)
    params = row.params
    values = {
        "id": row.id,
        "md5": row.quantvec_md5 or md5_of(row.quantvec),
        "archive": archive_name,
        "prompt": prompts.get(row.prompt_id),
        "sc_prompt": sc_prompts.get(row.sc_prompt_id),
        **{name: getattr(params, name) for name in SamplingParams.__dataclass_fields__},
        "extra_settings": row.extra_settings,
        "model": model_label(model and model.name),
        "sampler_version": row.sampler_version,
        "key0": row.key0,
        "key1": row.key1,
    }
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    """Return a value that JSON has a form for; None in place of others, which only a damaged archive has."""
    is_plain = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_plain else None
