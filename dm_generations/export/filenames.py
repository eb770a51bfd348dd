"""Names of folders and files of decoded images: those of the 2022 script, made safe by the same library.

A name starts with ids, settings and rank, which are never cut. So no two images share a name, not even where file names
ignore case or normalise characters, and no name is empty, `..` or one that Windows reserves: `pathvalidate` alone
does not see to these.
"""

from dm_generations.paths import sanitize_file_name, sanitize_name


def prompt_folder(prompt_id: int, prompt: str | None) -> str:
    """Return the folder of a prompt's images, `0001_a prompt`, at most 255 bytes; no prompt reads `None`."""
    return sanitize_name(f"{prompt_id:04d}_{prompt}")


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
    return sanitize_file_name(f"{settings}{rank_field}_{sc_prompt}", extension)
