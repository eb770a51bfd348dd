"""Names of folders and files of decoded images: those of the 2022 script, made safe by the same library.

A name starts with ids, settings and rank, which are never cut. So no two images share a name, not even where file names
ignore case or normalise characters, and no name is empty, `..` or one that Windows reserves: `pathvalidate` alone
does not see to these.
"""

import re

from pathvalidate import sanitize_filename

NAME_BYTES = 255  # the longest name that common file systems take
STEM_CHARACTERS = 250  # where the 2022 script cut, before it added ".png"

_SURROGATE = re.compile("[\ud800-\udfff]")


def prompt_folder(prompt_id: int, prompt: str | None) -> str:
    """Return the folder of a prompt's images, `0001_a prompt`, at most 255 bytes; no prompt reads `None`."""
    return _sanitize(f"{prompt_id:04d}_{prompt}")


def image_file(
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
    """Return the name of an image's or gallery's file, `0001_k=50,p=1.0,t=1.0,c=10.0_00_None.png`.

    Galleries that the 2022 script could not write add a field to the settings: `,page=2` for the second page of a group
    and `,incomplete` where images are missing. Elsewhere `_` follows cond_scale, so these are never taken for a
    prompt's text.

    Args:
        rank: The image's rank in its group, from 0; None for a gallery, whose name has none.
        page: Of a gallery, from 0.
        is_incomplete: Whether the gallery lacks images because of bad rows.

    Returns:
        A name of at most 255 bytes.
    """
    settings = f"{sc_prompt_id:04d}_k={top_k},p={top_p},t={temperature},c={cond_scale}"
    if page:
        settings += f",page={page + 1}"
    if is_incomplete:
        settings += ",incomplete"
    rank_field = "" if rank is None else f"_{rank:02d}"
    return _with_extension(f"{settings}{rank_field}_{sc_prompt}", extension)


def step_file(combination: str, key0: int, key1: int, count: int, prompt: str) -> str:
    """Return the name of an image in progress, `<combination>_<key0>_<key1>_<count>_<prompt>.png`.

    Args:
        combination: Hex digits that stand for prompt and settings.
        count: Tokens sampled so far.

    Returns:
        A name of at most 255 bytes.
    """
    return _with_extension(f"{combination}_{key0}_{key1}_{count:04d}_{prompt}", ".png")


def _sanitize(text: str) -> str:
    """Return `text`, which starts with a digit or a letter, as a name; lone surrogates become U+FFFD."""
    # The encoding in which names are cut to 255 bytes must not depend on this machine's locale.
    return sanitize_filename(_SURROGATE.sub("\ufffd", text), fs_encoding="utf-8")


def _with_extension(text: str, extension: str) -> str:
    stem = _sanitize(text)[:STEM_CHARACTERS].encode()
    return stem[: NAME_BYTES - len(extension)].decode(errors="ignore") + extension
