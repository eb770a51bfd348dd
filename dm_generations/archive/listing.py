"""Rows of an archive with their texts and models in place of ids, for tables: `list`, pandas, Arrow."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from dm_generations.archive.records import PARAM_COLUMNS, ImageRow
from dm_generations.archive.selection import Selection, compile_nonempty

if TYPE_CHECKING:
    from dm_generations.archive.database import Archive

# In the archive's own words; prompt, sc_prompt, model and codec are texts in place of ids.
LIST_COLUMNS: Final = (
    *("id", "prompt", "sc_prompt", *PARAM_COLUMNS, "key0", "key1"),
    *("clip_score_input", "clip_score_tokenized", "log_prob", "dtype", "init_count", "model", "codec"),
    "quantvec_md5",
)


def list_rows(archive: "Archive", selection: Selection, limit: int | None = None) -> Iterator[tuple[Any, ...]]:
    """Yield the values of LIST_COLUMNS of the selected images, group by group, best first, in little memory.

    Args:
        archive: The archive.
        selection: Which images.
        limit: At most so many.

    Raises:
        UserError: Nothing is selected, or a prompt or a model is not in the archive.
    """
    where = compile_nonempty(archive, selection)
    return map(row_lister(archive), archive.read_rows(archive.image_ids(limit=limit, where=where)))


def row_lister(archive: "Archive") -> Callable[[ImageRow], tuple[Any, ...]]:
    """Return a function from a row to the values of LIST_COLUMNS."""
    prompts, sc_prompts = archive.prompts(), archive.sc_prompts()
    names: dict[int | None, str] = {row_id: model.name for row_id, model in archive.models().items()}

    def values(row: ImageRow) -> Sequence[Any]:
        return (
            *(row.id, prompts.get(row.prompt_id), sc_prompts.get(row.sc_prompt_id), *row.params.values()),
            *(row.key0, row.key1, row.clip_score_input, row.clip_score_tokenized, row.log_prob, row.dtype),
            *(row.init_count, names.get(row.generator_id), names.get(row.codec_id), row.quantvec_md5),
        )

    return lambda row: tuple(values(row))
