"""The layout of 2022, which is only read, through views with the tables and columns of the newest version.

Such files have `prompts`, `sc_prompts` and `images` without identifiers, indexes, constraints or models, and any other
columns. No other module knows this layout: after `normalise` the same queries read these files and newer ones.
"""

from typing import Final

from dm_generations.archive.connection import ArchiveError, Connection
from dm_generations.archive.records import GROUP_COLUMNS
from dm_generations.archive.schema import create_views, read_columns

# Other columns may be missing, and then are NULL.
NEEDED_COLUMNS: Final = {
    "prompts": frozenset({"id", "desc"}),
    "sc_prompts": frozenset({"id", "desc"}),
    "images": frozenset({*GROUP_COLUMNS[:-1], "key0", "key1", "quantvec"}),
}
# Without an index each group would cost a pass over all tokens. Temporary tables are not in the archive's file.
_GROUP_INDEX: Final = f"""
CREATE TEMP TABLE image_order AS SELECT id, {", ".join(GROUP_COLUMNS)}, clip_score_input FROM images;
CREATE INDEX temp.image_order_by_group ON image_order ({", ".join(GROUP_COLUMNS)}, clip_score_input DESC, id);
"""


def normalise(connection: Connection) -> None:
    """Make views of a file of 2022 with the tables and columns of the newest version.

    Args:
        connection: Open for reading, with at least NEEDED_COLUMNS.

    Raises:
        ArchiveError: The rows of images have no number.
    """
    columns = read_columns(connection, "images")
    # The row's own number: `id` need not have been declared as such, or at all.
    row_id = next((name for name in ("rowid", "_rowid_", "oid") if name not in columns), None)
    if row_id is None:
        raise ArchiveError(f"{connection.path}: this database is not an archive: images hides its row numbers")
    create_views(connection, version=0, row_id=row_id)


def create_group_index(connection: Connection) -> str:
    """Index the images by group, best first; return the name of the indexed table."""
    connection.script(_GROUP_INDEX)
    return "temp.image_order"
