"""A plugin of Datasette that shows the tokens of an archive, `quantvec` of its table `images`, as images.

Datasette finds it by its entry point when `dm-generations[datasette]` is installed. Images are decoded by the codec
that they record, if it is the embedded one or that of the plugin's configuration:

    {"plugins": {"dm_generations": {"codec": "FOLDER"}}}

All other values stay as Datasette shows them.
"""

import asyncio
import functools
import logging
import math
import threading
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any

from datasette import hookimpl

from dm_generations.api.images import data_url
from dm_generations.archive.records import BYTES_PER_TOKEN, BadTokensError, tokens_from_blob
from dm_generations.errors import UserError, printable

if TYPE_CHECKING:
    from dm_generations.inference.decoder import Decoder
    from dm_generations.models.loading import Checkpoint

_MAX_TOKENS = 64**2  # of an image that a page of a table shows
_CACHED_IMAGES = 1024
_CODEC_OF_IMAGE = "SELECT models.sha256 FROM images JOIN models ON models.id = images.codec_id WHERE images.id = ?"

_log = logging.getLogger(__name__)
_lock = threading.Lock()  # a device decodes for one request at a time


@hookimpl
def render_cell(
    row: Any, value: object, column: str, table: str | None, database: str, datasette: Any
) -> Awaitable[str | None] | None:
    """Return the HTML of a cell with tokens; None for all others, which Datasette shows itself."""
    if table != "images" or column != "quantvec" or not isinstance(value, bytes):
        return None
    return _render(row, value, database, datasette)


async def _render(row: Any, quantvec: bytes, database: str, datasette: Any) -> str | None:
    from markupsafe import Markup

    try:
        row_id = row["id"]
        tables = datasette.get_database(database)
        sha256 = None
        if await tables.table_exists("models"):  # not in the layout of 2022
            found = (await tables.execute(_CODEC_OF_IMAGE, [row_id])).first()
            sha256 = None if found is None else found[0]
        config: Mapping[str, Any] = datasette.plugin_config("dm_generations") or {}
        url, side = await asyncio.to_thread(_decode, quantvec, sha256, config.get("codec"))
    except (BadTokensError, UserError) as error:
        _log.info("%s", printable(str(error)))
        return None
    except Exception as error:  # an archive can hold anything, and the page has more than this cell
        _log.warning("%s of %s: %s", "quantvec", printable(database), printable(repr(error)))
        return None
    return Markup('<img src="{}" alt="image {}" width="{}" height="{}">').format(url, row_id, side, side)


def _decode(quantvec: bytes, sha256: str | None, codec: str | None) -> tuple[str, int]:
    with _lock:
        return _decode_cached(quantvec, sha256, codec)


@functools.lru_cache(maxsize=_CACHED_IMAGES)
def _decode_cached(quantvec: bytes, sha256: str | None, codec: str | None) -> tuple[str, int]:
    """Return a data URL of an image, and its pixels a side.

    Args:
        quantvec: Its tokens.
        sha256: Of the codec that it records; None for none.
        codec: That of the configuration.

    Raises:
        BadTokensError: They are not the tokens of a square grid.
        UserError: There is no codec for them.
    """
    from PIL import Image

    grid = math.isqrt(len(quantvec) // BYTES_PER_TOKEN)
    if not 1 <= grid**2 <= _MAX_TOKENS or len(quantvec) != grid**2 * BYTES_PER_TOKEN:
        raise BadTokensError(f"a blob of {len(quantvec):,} bytes is not the tokens of a square image")
    for path in dict.fromkeys((codec, None)):
        checkpoint = _load(path)
        if checkpoint.sha256 == sha256 or (sha256 is None and checkpoint.config.grid == grid):
            decoder = _load_decoder(path, grid)
            tokens = tokens_from_blob(quantvec, None, grid**2, decoder.codebook_size)
            return data_url(Image.fromarray(decoder(tokens)[0])), decoder.image_size
    raise UserError("the codec of the image is not at hand; set it in the configuration of the plugin")


@functools.cache
def _load(codec: str | None) -> "Checkpoint":
    from dm_generations.models.loading import load_checkpoint

    return load_checkpoint(codec, "codec")


@functools.lru_cache(maxsize=4)
def _load_decoder(codec: str | None, grid: int) -> "Decoder":
    from dm_generations.inference.decoder import Decoder

    return Decoder.load(codec, batch_size=1, grid=grid)
