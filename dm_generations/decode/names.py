"""Names of folders and files of decoded pictures: the 2022 decode script's, made safe.

Ids, settings and ranks come first and are never cut, so no two pictures share a name, not even where file
names ignore case or normalise characters; prompts only decorate. A name has no separator and never starts
with a dot or a space, so it stays in its folder.
"""

import re

NAME_BYTES = 255  # the longest name common file systems take
STEM_CHARACTERS = 250  # where the 2022 script cut, before it added ".png"

# What pathvalidate.sanitize_filename deletes by default: control characters, and what Windows forbids.
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
_SURROGATE = re.compile("[\ud800-\udfff]")


def prompt_folder(prompt_id: int, prompt: str | None) -> str:
    """`0001_a prompt`, at most 255 bytes; None prints as `None`."""
    return _sanitize(f"{prompt_id:04d}_{prompt}")


def picture_file(
    sc_prompt_id: int,
    top_k: int,
    top_p: float,
    temperature: float,
    cond_scale: float,
    sc_prompt: str | None,
    *,
    rank: int | None = None,
    page: int = 0,
    is_incomplete: bool = False,
    extension: str = ".png",
) -> str:
    """`0001_k=50,p=1.0,t=1.0,c=10.0_00_None.png`, or without the rank for a gallery; at most 255 bytes.

    Galleries that the 2022 script could not write add a field to the settings: `,page=2` for the second page
    of a group and `,incomplete` where pictures are missing. Elsewhere `_` follows cond_scale, so these cannot
    be mistaken for a prompt's text.
    """
    settings = f"{sc_prompt_id:04d}_k={top_k},p={top_p},t={temperature},c={cond_scale}"
    if page:
        settings += f",page={page + 1}"
    if is_incomplete:
        settings += ",incomplete"
    rank_field = "" if rank is None else f"_{rank:02d}"
    stem = _sanitize(f"{settings}{rank_field}_{sc_prompt}")[:STEM_CHARACTERS]
    return _cut(stem, NAME_BYTES - len(extension)) + extension


def step_file(combination: str, key0: int, key1: int, count: int, prompt: str) -> str:
    """`<combination>_<key0>_<key1>_<count>_<prompt>.png`: a picture that is being drawn, after `count` codes.

    combination: hex digits that stand for prompt and settings; at most 255 bytes in all
    """
    stem = _sanitize(f"{combination}_{key0}_{key1}_{count:04d}_{prompt}")[:STEM_CHARACTERS]
    return _cut(stem, NAME_BYTES - len(".png")) + ".png"


def _sanitize(text: str) -> str:
    """What pathvalidate.sanitize_filename makes of a text that starts with a digit or a letter.

    Lone surrogates, at which that fails, become U+FFFD.
    """
    text = _SURROGATE.sub("\ufffd", _FORBIDDEN.sub("", text))
    return _cut(text, NAME_BYTES).rstrip(" .")


def _cut(text: str, byte_count: int) -> str:
    """The longest start of `text` of whole characters that fits into `byte_count` bytes of UTF-8."""
    return text.encode()[:byte_count].decode(errors="ignore")
