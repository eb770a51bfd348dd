"""The layout of 2022: read only, and shown with the tables and columns of the newest version.

Such files have `prompts`, `sc_prompts` and `images` without identifiers, indexes, constraints or models, and whatever
other columns. No other module knows them: after `normalise` the same queries read these files and ours.
"""

from typing import Final

from dm_generations.archive.connection import ArchiveError, Connection
from dm_generations.archive.records import GROUP_COLUMNS, ModelInfo
from dm_generations.archive.schema import ADDED, ALL_COLUMNS, create_images_view, read_columns

# Nothing is impossible without the others.
NEEDED_COLUMNS: Final = {
    "prompts": frozenset({"id", "desc"}),
    "sc_prompts": frozenset({"id", "desc"}),
    "images": frozenset({*GROUP_COLUMNS, "key0", "key1", "quantvec"}),
}
_MODEL_COLUMNS: Final = ", ".join(f"NULL AS {name}" for name in ("id", *ModelInfo.__dataclass_fields__))
# Without an index each group would cost a pass over all tokens. Temporary tables lie outside the archive.
_GROUP_INDEX: Final = f"""
CREATE TEMP TABLE image_order AS SELECT id, {", ".join(GROUP_COLUMNS)}, clip_score_input FROM images;
CREATE INDEX temp.image_order_by_group ON image_order ({", ".join(GROUP_COLUMNS)}, clip_score_input DESC, id);
"""


def normalise(connection: Connection) -> None:
    """Shows a file of 2022 with the columns of the newest version, and an empty table of models.

    Args:
        connection: open for reading, with at least NEEDED_COLUMNS.

    Raises:
        ArchiveError: the rows of images cannot be told apart.
    """
    columns = read_columns(connection, "images")
    # The row's own number: `id` need not have been declared as such, or at all.
    row_id = next((name for name in ("rowid", "_rowid_", "oid") if name not in columns), None)
    if row_id is None:
        raise ArchiveError(f"{connection.path}: this database is not an archive: images hides its row numbers")
    known = columns.intersection(ALL_COLUMNS) - ADDED.keys()
    create_images_view(connection, {name: name for name in known} | {"id": row_id})
    connection.execute(f"CREATE TEMP VIEW models AS SELECT {_MODEL_COLUMNS} WHERE FALSE")


def create_group_index(connection: Connection) -> str:
    """Indexes the images by group, best first; returns the table to ask."""
    connection.script(_GROUP_INDEX)
    return "temp.image_order"
