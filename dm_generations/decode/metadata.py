"""A row of an archive as text that travels inside a picture, or beside it as JSON.

    png          chunks tEXt, or iTXt where Latin-1 does not do: Description, Software, Comment
    webp, jpeg   EXIF: ImageDescription (UTF-8), Software, UserComment

Description is the prompt; the comment is the record of the picture as JSON in ASCII: the row's columns by name, with
the texts of its prompts, the rank of the picture in its group, and the name and hash of the models. A gallery's
record has what its pictures share, and a list of `pictures` with the rest. Numbers that JSON lacks are null.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

from dm_generations import __version__
from dm_generations.archive import ImageRow, ModelInfo
from dm_generations.decode.png import chunk

Record = dict[str, Any]

SOFTWARE = f"dm_generations {__version__}"
_SHARED = ("prompt_id", "prompt", "sc_prompt_id", "sc_prompt", "top_k", "top_p", "temperature", "cond_scale")
_OWN = (
    *("key0", "key1", "sampler_version", "dtype", "init_count", "init_md5"),
    *("log_prob", "clip_score_input", "clip_score_tokenized", "quantvec_md5"),
)
_IMAGE_DESCRIPTION, _SOFTWARE, _EXIF_IFD, _USER_COMMENT = 0x010E, 0x0131, 0x8769, 0x9286
_ASCII = b"ASCII\0\0\0"  # the character code that a UserComment starts with
_JPEG_EXIF_BYTES = 65_000  # a JPEG segment holds 65,533 bytes
_JPEG_TEXT_CHARACTERS = 2_000  # up to 12 bytes each in JSON, and 4 in the description


def picture_record(
    row: ImageRow, prompt: str | None, sc_prompt: str | None, rank: int, models: Mapping[int, ModelInfo]
) -> Record:
    """The record of one picture; the values of a 2022 archive, which may be of any type, are made plain."""
    texts = {"prompt": prompt, "sc_prompt": sc_prompt}
    record = {"id": row.id}
    record |= {name: texts[name] if name in texts else plain(getattr(row, name)) for name in _SHARED}
    record |= {"rank": rank} | {name: plain(getattr(row, name)) for name in _OWN}
    return record | {"generator": _model(row.generator_id, models), "codec": _model(row.codec_id, models)}


def gallery_record(pictures: list[Record]) -> Record:
    """The record of a gallery of these pictures, which are of one group, best first."""
    shared = {name: pictures[0][name] for name in _SHARED}
    rest = [{name: value for name, value in record.items() if name not in shared} for record in pictures]
    return shared | {"pictures": rest}


def as_json(record: Record) -> bytes:
    """JSON in ASCII, the same bytes for the same record."""
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode("ascii")


def png_chunks(record: Record) -> list[bytes]:
    """The chunks of a PNG that hold `record`."""
    texts = {"Description": record["prompt"], "Software": SOFTWARE, "Comment": as_json(record).decode()}
    return [_text_chunk(keyword, text) for keyword, text in texts.items() if text]


def exif(record: Record, is_jpeg: bool) -> bytes:
    """EXIF that holds `record`; for a JPEG, which has 64 KB for it, long prompts are cut, and long lists left out."""
    block = _exif(record)
    if is_jpeg and len(block) > _JPEG_EXIF_BYTES:
        cut = {name: (record[name] or "")[:_JPEG_TEXT_CHARACTERS] or None for name in ("prompt", "sc_prompt")}
        block = _exif(record | cut)
        if len(block) > _JPEG_EXIF_BYTES:
            block = _exif({name: value for name, value in (record | cut).items() if name != "pictures"})
    return block


def _exif(record: Record) -> bytes:
    tags = Image.Exif()
    if record["prompt"]:
        tags[_IMAGE_DESCRIPTION] = _utf8(record["prompt"])
    tags[_SOFTWARE] = SOFTWARE
    tags.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII + as_json(record)
    return tags.tobytes()


def _text_chunk(keyword: str, text: str) -> bytes:
    """A chunk tEXt, or iTXt (not compressed, of no language); neither takes NUL."""
    name, text = keyword.encode("ascii"), text.replace("\0", "\ufffd")
    try:
        return chunk(b"tEXt", name + b"\0" + text.encode("latin-1"))
    except UnicodeEncodeError:
        return chunk(b"iTXt", name + b"\0" + b"\0\0" + b"\0" + b"\0" + _utf8(text))


def _utf8(text: str) -> bytes:
    """Without lone surrogates, which have no UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def plain(value: object) -> str | int | float | None:
    """What JSON has for a value of a 2022 archive, which may be of any type."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _model(model_id: int | None, models: Mapping[int, ModelInfo]) -> dict[str, str] | None:
    model = models.get(model_id)
    return None if model is None else {"name": model.name, "sha256": model.sha256}
