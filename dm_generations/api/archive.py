"""`Archive` for programs and notebooks: its images as records, and as tables of pandas and Arrow."""

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

from dm_generations import archive as store
from dm_generations.api.images import (
    SCORES,
    ImageList,
    ImageRecord,
    embedded_decoder,
    settings_label,
    table_html,
)
from dm_generations.archive import ArchiveError, Filters, ImageRow, Selection
from dm_generations.archive.grid import plan_grid
from dm_generations.archive.listing import LIST_COLUMNS, row_lister
from dm_generations.archive.records import BYTES_PER_TOKEN, PARAM_COLUMNS, TOKEN_DTYPE
from dm_generations.archive.selection import compile_selection
from dm_generations.errors import UserError, printable

if TYPE_CHECKING:
    import pandas
    import pyarrow
    from PIL.Image import Image

    from dm_generations.export.contact_sheet import ContactSheet
    from dm_generations.export.exporter import ExportReport
    from dm_generations.inference.decoder import Decoder

_MAX_ROWS, _MAX_COLUMNS = 40, 24  # of the table in a notebook
_ARROW_ROWS = 10_000  # of a batch


class Archive(store.Archive):
    """An SQLite file of images as tokens. `open` or `create` one; it is a context manager.

    >>> archive = Archive.open("archive/emoji.db")
    >>> archive
    <Archive emoji.db: format 3, 6,048 images>
    >>> best = archive.images(prompt="a rocket", top_k=256, top_p=1, temperature=1, cond_scale=3, best=4)
    >>> print(*(round(image.scores["clip_score_input"], 1) for image in best[:2]))
    20.4 20.3
    >>> best[0].tokens.shape
    (64,)
    >>> best[0].image().size
    (64, 64)
    >>> archive.close()
    """

    @classmethod
    def load(cls, source: str | os.PathLike[str] | None = None, folder: str | os.PathLike[str] = ".") -> "Archive":
        """Open an archive to read: a file, an address, a file on the hub, or the archive that ships.

        >>> Archive.load()
        <Archive emoji.db: format 3, 6,048 images>

        Args:
            source: A path; `https://...`; `hf://datasets/OWNER/NAME/FILE.db` on the Hugging Face hub, with `@REVISION`
                after NAME if it is to be a certain one; or None for the emoji archive that ships. An address may end in
                `#sha256=` and the hash that the file has to have.
            folder: Where a file from `https://` is stored. It is made if there is none. A file of this name that is
                there already is opened in place of a download.

        Raises:
            UserError: There is no such archive, or it cannot be downloaded.
        """
        from dm_generations.api.download import find_archive

        return cls.open(find_archive(source, Path(folder)))

    def images(self, selection: Selection | None = None, **filters: Unpack[Filters]) -> "SelectedImages":
        """Return images in the order of `groups`, the best of each group first. Rows are read when they are used.

        Args:
            selection: Which images; None is what the keyword arguments say.
            filters: See `Filters`.

        Raises:
            UserError: A prompt or a model is not in the archive, or a value is wrong.
        """
        where = compile_selection(self, selection or Selection.of(**filters))
        return SelectedImages(self, self.image_ids(where=where))

    def export(
        self,
        out_dir: str | os.PathLike[str],
        codec_path: str | os.PathLike[str] | None = None,
        **filters: Unpack[Filters],
    ) -> "ExportReport":
        """Write images as PNG files, with a page to look at them, as the command `decode` does.

        Args:
            out_dir: Folder to write into. What is in it already is not written again.
            codec_path: The codec that the images were made with: a folder, a file or a name on the hub; None is the
                one that ships.
            filters: Which images; see `Filters`.

        Returns:
            What was written, `page` to open in a browser, and a line for each of the `problems`.

        Raises:
            UserError: There are no such images, the codec does not decode them, or the folder cannot be written.
        """
        from dm_generations.export.exporter import ExportOptions, export_archive

        codec = None if codec_path is None else os.fspath(codec_path)
        return export_archive(self, ExportOptions(Path(out_dir), selection=Selection.of(**filters), codec=codec))

    def to_pandas(self, **filters: Unpack[Filters]) -> "pandas.DataFrame":
        """Return images as a table of pandas; see `SelectedImages.to_pandas`."""
        return self.images(**filters).to_pandas()

    def to_arrow(self, **filters: Unpack[Filters]) -> "pyarrow.Table":
        """Return images as a table of Arrow; see `SelectedImages.to_arrow`."""
        return self.images(**filters).to_arrow()

    def contact_sheet(
        self,
        rows: str,
        cols: str,
        pages: str | None = None,
        cell: str = "best1",
        *,
        scores: bool = False,
        theme: str = "light",
        font: str | None = None,
        decoder: "Decoder | None" = None,
        selection: Selection | None = None,
        **filters: Unpack[Filters],
    ) -> "ContactSheet":
        """Return a labelled grid of images, in pages which are rendered when they are used.

        >>> with Archive.open("archive/emoji.db") as archive:
        ...     sheet = archive.contact_sheet("temperature", "cond_scale", prompt="a rocket", top_k=256, top_p=1)
        ...     print(len(sheet), sheet[0].mode)
        1 RGB

        Args:
            rows: An axis: prompt, sc_prompt, top_k, top_p, temperature, cond_scale, extra_settings, model or seed.
            cols: Another one.
            pages: Another one, of whose values each gets a page.
            cell: "best1", "best4" or "best9" by `clip_score_input`, or "same-seed": the same seed in all cells.
            scores: Whether to write them below the images.
            theme: "light" or "dark".
            font: A font file; None is Pillow's, which has no accents and no other scripts.
            decoder: See `ImageRecord.image`.
            selection: Which images; None is what the keyword arguments say.
            filters: See `Filters`.

        Raises:
            UserError: Images differ in an axis that is not shown, something does not fit on a page, or images cannot be
                decoded.
        """
        from dm_generations.export.contact_sheet import ContactSheet, Style

        def decode(ids: Sequence[int]) -> "list[Image]":
            images = SelectedImages(self, ids).images(decoder)
            if len(images) < len(ids):
                raise UserError(f"{self.path}: images were deleted while they were read; repeat the command")
            return images

        axes = [rows, cols] if pages is None else [rows, cols, pages]
        grid = plan_grid(self, selection or Selection.of(**filters), axes, cell)
        return ContactSheet(grid, Style(theme, scores, font), decode)

    def __repr__(self) -> str:
        layout = f"format {self.version}" if self.version else "2022 layout"
        try:
            holds = f"{self.count():,} images"
        except ArchiveError:
            holds = "closed"
        return f"<Archive {printable(self.path.name)}: {layout}, {holds}>"

    def _repr_html_(self) -> str:
        try:
            groups = self.groups()
        except ArchiveError as error:
            return table_html(f"{self!r}: {error}", (), ())
        counts: Counter[tuple[int, Any]] = Counter()
        for group in groups:
            counts[group.key.prompt_id, group.key.params] += group.count
        params = sorted({params for _, params in counts}, key=lambda each: tuple(asdict(each).values()))
        values = [asdict(each) for each in params]
        varying = [name for name in PARAM_COLUMNS if len({each[name] for each in values}) > 1]
        prompts = self.prompts()
        used = [prompt_id for prompt_id in prompts if any((prompt_id, each) in counts for each in params)]
        shown = params[:_MAX_COLUMNS]
        header = ["id", "prompt", *(settings_label(each, varying) or "images" for each in values[:_MAX_COLUMNS])]
        rows = [
            [prompt_id, prompts[prompt_id], *(counts[prompt_id, each] or "" for each in shown)]
            for prompt_id in used[:_MAX_ROWS]
        ]
        left_out = [
            f"{count:,} more {what}"
            for count, what in ((len(used) - len(rows), "prompts"), (len(params) - len(shown), "settings"))
            if count > 0
        ]
        return table_html(repr(self), header, rows, f"and {' and '.join(left_out)}" if left_out else "")


class SelectedImages(ImageList):
    """Images of an archive, read when they are used; the archive must be open then."""

    def __init__(self, archive: store.Archive, ids: Sequence[int]):
        """Take the ids of images."""
        self._archive = archive
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> "SelectedImages": ...
    def __getitem__(self, index: int | slice) -> "ImageRecord | SelectedImages":
        """Return an image, or those of a slice."""
        if isinstance(index, slice):
            return SelectedImages(self._archive, self._ids[index])
        row_id = self._ids[index]
        for record in self._read([row_id]):
            return record
        raise UserError(f"{self._archive.path}: image {row_id} is not there any more")

    def __iter__(self) -> Iterator[ImageRecord]:
        """Read the images in little memory."""
        return self._read(self._ids)

    def __repr__(self) -> str:
        return f"<{len(self):,} images of {printable(self._archive.path.name)}>"

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a row for each image: prompt, settings, key, scores, models, and `tokens` as arrays of uint16.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("this needs pandas; install dm-generations[tables]") from error
        return pandas.DataFrame(self._values(), columns=[*LIST_COLUMNS, "tokens"])

    def to_arrow(self) -> "pyarrow.Table":
        """Return the table of `to_pandas` for Arrow, whose `tokens` are lists of uint16.

        Raises:
            UserError: pyarrow is not installed.
        """
        try:
            import pyarrow
        except ImportError as error:
            raise UserError("this needs pyarrow; install dm-generations[tables]") from error
        kinds = {"int": pyarrow.int64(), "float": pyarrow.float64(), "str": pyarrow.string()}
        fields = [(name, kinds[_COLUMN_KINDS.get(name, "str")]) for name in LIST_COLUMNS]
        schema = pyarrow.schema([*fields, ("tokens", pyarrow.list_(pyarrow.uint16()))])
        batches, values = [], self._values()
        while rows := list(itertools.islice(values, _ARROW_ROWS)):
            columns = [
                pyarrow.array(column, each.type) for column, each in zip(zip(*rows, strict=True), schema, strict=True)
            ]
            batches.append(pyarrow.RecordBatch.from_arrays(columns, schema=schema))
        return pyarrow.Table.from_batches(batches, schema)

    def _values(self) -> Iterator[tuple[Any, ...]]:
        import numpy as np

        values = row_lister(self._archive)
        for row in self._archive.read_rows(self._ids):
            whole = row.quantvec if len(row.quantvec) % BYTES_PER_TOKEN == 0 else b""
            yield *values(row), np.frombuffer(whole, TOKEN_DTYPE)

    def _read(self, ids: Iterable[int]) -> Iterator[ImageRecord]:
        return map(self._make_record, self._archive.read_rows(ids))

    @functools.cached_property
    def _make_record(self) -> Callable[[ImageRow], ImageRecord]:
        return _record_maker(self._archive)


_COLUMN_KINDS = dict.fromkeys(("id", "top_k", "key0", "key1", "init_count"), "int") | dict.fromkeys(
    ("top_p", "temperature", "cond_scale", *SCORES, "log_prob"), "float"
)


def _record_maker(archive: store.Archive) -> Callable[[ImageRow], ImageRecord]:
    prompts, sc_prompts, models = archive.prompts(), archive.sc_prompts(), archive.models()

    def make(row: ImageRow) -> ImageRecord:
        scores = {name: score for name in SCORES if isinstance(score := getattr(row, name), float)}
        return ImageRecord(
            *(row.id, prompts.get(row.prompt_id), sc_prompts.get(row.sc_prompt_id), row.params, (row.key0, row.key1)),
            *(scores, row.log_prob, row.dtype),
            model=None if row.generator_id is None else models.get(row.generator_id),
            codec=None if row.codec_id is None else models.get(row.codec_id),
            quantvec=row.quantvec,
            quantvec_md5=row.quantvec_md5,
            find_decoder=embedded_decoder,
        )

    return make
