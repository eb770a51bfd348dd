"""`Archive`: an SQLite file of images as tokens. Reads all versions and the layout of 2022, writes the newest."""

import array
import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, Unpack

from dm_generations.archive import legacy_2022, queries, vocabulary
from dm_generations.archive.connection import (
    ArchiveError,
    Connection,
    Mode,
    Row,
    connect,
    connect_new,
    new_file,
)
from dm_generations.archive.records import (
    GROUP_COLUMNS,
    IMAGE_COLUMNS,
    ClassLabel,
    Group,
    GroupKey,
    ImageRow,
    ModelInfo,
    NewImage,
    check_init,
    check_tokens,
    is_canonical,
    model_values,
    parse_group_key,
    parse_image,
    parse_model,
    parse_text,
    quantvec_md5,
)
from dm_generations.archive.schema import (
    ADDED_TABLES,
    ALL_COLUMNS,
    SCHEMA_VERSION,
    check_tables,
    check_to_read,
    check_to_write,
    create_views,
    is_newest,
    needed_columns,
    read_version,
    upgrade,
)
from dm_generations.archive.scores import BASIC, Due
from dm_generations.archive.selection import EVERY, Filters, Selection, Where, compile_selection

LOCK_TIMEOUT: Final = 10.0  # seconds to wait for another program's lock


class Archive:
    """An open archive; a context manager. Use it from one thread at a time.

    Attributes:
        path: The file.
        mode: "r" or "w".
        version: Of the format, 0 for the layout of 2022.
        connection: For the modules of this package; others use the methods.
    """

    def __init__(self, path: Path, connection: Connection, mode: Mode, version: int):
        """Wrap an open connection; callers use `open` or `create`."""
        self.path = path
        self.mode = mode
        self.version = version
        self.connection = connection
        self._group_table = None if version == 0 else "images"
        self._checked_schema: int | None = None  # see `check_to_write`

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Self:
        """Make a new, empty archive and open it for writing.

        Args:
            path: A path that does not exist, in a folder that does.

        Returns:
            The archive, to be closed by the caller.

        Raises:
            ArchiveError: The path exists, or its folder cannot be written.
        """
        path = Path(path)
        with (
            new_file(path) as temporary,
            contextlib.closing(connect_new(temporary, path, LOCK_TIMEOUT)) as connection,
        ):
            upgrade(connection)
        return cls.open(path, "w")

    @classmethod
    def open_or_create(cls, path: str | os.PathLike[str]) -> Self:
        """Open an archive for writing, and make it if there is none. Several programs may do so at once."""
        path = Path(path)
        if not os.path.lexists(path):
            try:
                cls.create(path).close()
            except ArchiveError:
                if not os.path.exists(path):  # otherwise another program has made it in the meantime
                    raise
        return cls.open(path, "w")

    @classmethod
    def open(cls, path: str | os.PathLike[str], mode: Mode = "r", timeout: float = LOCK_TIMEOUT) -> Self:
        """Open an existing archive.

        Do not open a file that this process is writing to: the header is read without SQLite, and closing a file that
        way drops SQLite's locks on it (https://www.sqlite.org/howtocorrupt.html, 2.2).

        Args:
            path: The file.
            mode: "r" leaves the file as it is. "w" updates an older version of the format in one transaction, so that
                other programs find the old version or the new one; it refuses the layout of 2022.
            timeout: Seconds to wait, here and later, while another program has the file locked.

        Raises:
            ArchiveError: There is no such file, or it is not an archive, damaged, locked, newer than this program, or
                cannot be written.
        """
        assert mode in ("r", "w"), mode
        path = Path(path)
        connection = connect(path, mode, timeout)
        try:
            with connection.snapshot():  # another program may be updating it to the newest version
                check_to_read(connection)
                version = read_version(connection)
                check_tables(connection, needed_columns(version) if version else legacy_2022.NEEDED_COLUMNS)
            archive = cls(path, connection, mode, version)
            if mode == "w":
                archive._prepare_to_write()
            elif version == 0:
                legacy_2022.normalise(connection)
            elif version < SCHEMA_VERSION:
                create_views(connection, version)
        except BaseException:
            connection.close()
            raise
        return archive

    def _prepare_to_write(self) -> None:
        self.check_appendable()
        self._checked_schema = check_to_write(self.connection)
        if not is_newest(self.connection):
            upgrade(self.connection)
        # Also where another program updated it since its version was read.
        self.version = read_version(self.connection)
        check_tables(self.connection, needed_columns(self.version))

    def check_appendable(self) -> None:
        """Check that images can be added to this file, once it is open for writing.

        Raises:
            ArchiveError: It has the layout of 2022.
        """
        if self.version == 0:
            raise ArchiveError(f"{self.path}: the 2022 layout is only read; `merge` it into a new archive to add to it")

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Reading

    def prompts(self) -> dict[int, str | None]:
        """Return texts by id, in order of id.

        Bytes that are not UTF-8 come back as U+FFFD; only an archive of 2022 has None.
        """
        return self._texts("prompts")

    def sc_prompts(self) -> dict[int, str | None]:
        """Return texts by id, in order of id; None is the model's own empty unconditional prompt."""
        return self._texts("sc_prompts")

    def classes(self) -> dict[int, ClassLabel]:
        """Return the classes among the prompts, by id."""
        return vocabulary.read_classes(self.connection) if self.version >= 3 else {}

    def add_vocabulary(self, name: str, labels: Sequence[str]) -> int:
        """Return the id of a vocabulary of classes, which is added if it is new; inside a transaction.

        Args:
            name: As `imagenet-1k`.
            labels: The classes' names; class 0 is the first.

        Raises:
            ArchiveError: The archive has other labels under this name.
        """
        return vocabulary.add_vocabulary(self.connection, name, labels)

    def models(self) -> dict[int, ModelInfo]:
        """Return models by id; none for an archive of 2022, which does not record them."""
        models = {}
        for row_id, *values in self.connection.bounded_rows(queries.SELECT_MODELS):
            try:
                models[row_id] = parse_model(tuple(values))
            except ArchiveError as error:
                raise ArchiveError(f"{self.path}: model {row_id!r:.40}: {error}; run `verify`") from error
        return models

    def find_model(self, model: ModelInfo) -> int | None:
        """Return the id of the first model that matches; see `ModelInfo.matches`."""
        return next((row_id for row_id, stored in self.models().items() if stored.matches(model)), None)

    def count(self, where: Where = EVERY) -> int:
        """Return the number of images."""
        # Not count(*), which would not hear Ctrl-C.
        return self.connection.value(f"SELECT count(id) FROM images WHERE {where.sql}", where.parameters)

    def groups(self, selection: Selection | None = None, **filters: Unpack[Filters]) -> list[Group]:
        """Return the groups with the number of their selected images.

        >>> with Archive.open("archive/emoji.db") as archive:
        ...     groups = archive.groups(prompt="a rocket", top_k=256, top_p=1, temperature=1, cond_scale="3..")
        >>> [(group.key.params.cond_scale, group.count) for group in groups]
        [(3.0, 8), (10.0, 8)]

        Args:
            selection: Which images to count; None is what the keyword arguments say.
            filters: See `Filters`.

        Returns:
            In the order of prompt, unconditional prompt, top_k, top_p, temperature and cond_scale.

        Raises:
            UserError: A prompt or a model is not in the archive.
        """
        return self.count_groups(compile_selection(self, selection or Selection.of(**filters)))

    def count_groups(self, where: Where) -> list[Group]:
        """Return the groups of a compiled selection, as `groups` does."""
        query = queries.COUNT_GROUPS.format(table=self.indexed_table(), where=where.sql)
        rows = self.connection.bounded_rows(query, where.parameters)
        try:
            return [Group(parse_group_key(row[:-1]), row[-1]) for row in rows]
        except ArchiveError as error:
            raise ArchiveError(f"{self.path}: {error}") from error

    def image_ids(self, key: GroupKey | None = None, limit: int | None = None, where: Where = EVERY) -> Sequence[int]:
        """Return ids of a group's images: the highest score first, unscored ones last, ties by id.

        Args:
            key: The group; None is all groups, in the order of `groups`.
            limit: At most so many.
            where: Which images, and whose score.
        """
        parameters = {**where.parameters, "limit": -1 if limit is None else limit}
        if key is not None:
            parameters.update(zip(GROUP_COLUMNS, key.values(), strict=True))
        query = queries.ALL_IDS_BEST_FIRST if key is None else queries.IDS_BEST_FIRST
        ids = array.array("q")
        query = query.format(table=self.indexed_table(), where=where.sql, rank=where.rank)
        for (row_id,) in self.connection.rows(query, parameters):
            if not isinstance(row_id, int):
                raise ArchiveError(f"{self.path}: the id of an image is {row_id!r:.40}, not a whole number")
            ids.append(row_id)
        return ids

    def rows(self, key: GroupKey, limit: int | None = None, where: Where = EVERY) -> Iterator[ImageRow]:
        """Yield a group's images, in the order of `image_ids`."""
        return self.read_rows(self.image_ids(key, limit, where))

    def read_rows(self, ids: Iterable[int]) -> Iterator[ImageRow]:
        """Yield these images, in the order of `ids`, without unknown ids.

        A row on a damaged page is yielded with its id, no tokens, and None for all else, so that the rank of the next
        ones stays the same.
        """
        return queries.read_rows(self.connection, ids)

    def rows_to_score(
        self, rescore: bool = False, clip_id: int | None = None, due: Due = BASIC, where: Where = EVERY
    ) -> Iterator[ImageRow]:
        """Yield images that lack a score, by id. Scores may be written while this runs.

        Args:
            rescore: Also images that have one, except those that the model `clip_id` scored.
            clip_id: None for a model that the archive does not have.
            due: What else they may lack.
            where: Which images.
        """
        parameters = {**where.parameters, **due.parameters(rescore, clip_id)}
        condition = f"{queries.TO_SCORE} AND {where.sql}"
        return map(parse_image, queries.scan(self.connection, IMAGE_COLUMNS, condition, parameters))

    def count_to_score(
        self, rescore: bool = False, clip_id: int | None = None, due: Due = BASIC, where: Where = EVERY
    ) -> int:
        """Return how many images `rows_to_score` yields."""
        parameters = {**where.parameters, **due.parameters(rescore, clip_id)}
        return self.connection.value(
            f"SELECT count(id) FROM images WHERE {queries.TO_SCORE} AND {where.sql}", parameters
        )

    def existing_keys(
        self, key: GroupKey, generator_id: int | None, sampler_version: int | None = None, init_md5: str = ""
    ) -> set[tuple[int, int]]:
        """Return (key0, key1) of the images of a group that this generator sampled.

        Args:
            key: The group.
            generator_id: The model's id.
            sampler_version: Version of the sampling rules, None for any.
            init_md5: MD5 of the initial tokens; "" for images without.
        """
        parameters = [*key.values(), generator_id, sampler_version, sampler_version, init_md5]
        return {(key0, key1) for key0, key1 in self.connection.rows(queries.KEYS_OF_GROUP, parameters)}

    def scan(
        self, columns: Sequence[str], last_id: int | None = None, where: Where = EVERY, table: str = "images"
    ) -> Iterator[Row]:
        """Yield these columns of the rows of a table, by id, in constant memory.

        Args:
            columns: Names of columns; a column that an older file lacks has its default value.
            last_id: The last row to read; None reads to the end.
            where: Which images; EVERY for other tables.
            table: `images`, or one that version 3 added.

        Raises:
            ArchiveError: The ids do not ascend, as they do in any archive that is not damaged.
        """
        assert set(columns) <= set(ADDED_TABLES.get(table, ALL_COLUMNS)), columns
        condition = f"(:last_id IS NULL OR id <= :last_id) AND {where.sql}"
        return queries.scan(self.connection, columns, condition, {**where.parameters, "last_id": last_id}, table)

    # Writing

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what the block writes when it ends, or undo all of it.

        Raises:
            ArchiveError: The archive is open for reading, or another program holds the lock.
        """
        if self.mode != "w":
            raise ArchiveError(f"{self.path}: the archive is open for reading only")
        with self.connection.transaction():
            self._checked_schema = check_to_write(self.connection, self._checked_schema)
            yield

    def prompt_id(self, prompt: str | ClassLabel) -> int:
        """Return the id of a prompt, which is added if it is new.

        Raises:
            ArchiveError: The text has a NUL byte or a lone surrogate, or the vocabulary does not have the class.
        """
        if isinstance(prompt, ClassLabel):
            return vocabulary.class_prompt_id(self.connection, prompt)
        return self.text_id("prompts", self._without_nul(prompt))

    def sc_prompt_id(self, text: str | None) -> int:
        """Return the id of an unconditional prompt, which is added if it is new; 1 for None."""
        return 1 if text is None else self.text_id("sc_prompts", self._without_nul(text))

    def text_id(self, table: str, text: str) -> int:
        """Return the id of a text in `prompts` or `sc_prompts`, which is added if it is new."""
        find = f"SELECT id FROM {table} WHERE desc = ?"
        return self._find_or_insert(find, (text,), f"INSERT INTO {table} (desc) VALUES (?)", (text,))

    def add_model(self, model: ModelInfo) -> int:
        """Return the id of a model that matches, which is added if there is none; see `ModelInfo.matches`."""
        found = self.find_model(model)
        return self.model_id(model) if found is None else found

    def model_id(self, model: ModelInfo) -> int:
        """Return the id of a model, which is added if it is new."""
        values = model_values(model)
        return self._find_or_insert(queries.FIND_MODEL, values[:3], queries.INSERT_MODEL, values)

    def add_images(
        self,
        images: Iterable[NewImage],
        generator_id: int | None,
        codec_id: int | None,
        clip_id: int | None,
        sampler_version: int | None,
    ) -> int:
        """Store images, inside a transaction.

        Args:
            images: The images; one that the archive has already is left as it is.
            generator_id: Id of the model that sampled them, None if unknown.
            codec_id: Id of the model that decodes them, None if unknown.
            clip_id: Id of the model that scored those that have a score.
            sampler_version: Version of the sampling rules.

        Returns:
            How many were new.

        Raises:
            ArchiveError: The codec cannot decode the tokens, a setting is out of range, or `init_md5` is wrong.
        """
        assert self.connection.in_transaction, "add_images outside a transaction"
        codec = None if codec_id is None else self.models()[codec_id]
        prompt_ids: dict[str | ClassLabel, int] = {}
        sc_prompt_ids: dict[str | None, int] = {}

        def insert_values() -> Iterator[tuple[Any, ...]]:
            for image in images:
                if (prompt_id := prompt_ids.get(image.prompt)) is None:
                    prompt_id = prompt_ids[image.prompt] = self.prompt_id(image.prompt)
                if (sc_prompt_id := sc_prompt_ids.get(image.sc_prompt)) is None:
                    sc_prompt_id = sc_prompt_ids[image.sc_prompt] = self.sc_prompt_id(image.sc_prompt)
                quantvec = image.quantvec
                if codec is not None:
                    check_tokens(quantvec, codec)
                check_init(quantvec, image.init_count, image.init_md5)
                if not is_canonical(image.extra_settings):
                    raise ArchiveError(f"extra settings {image.extra_settings!r:.100} are not canonical JSON")
                yield (
                    *(prompt_id, sc_prompt_id, *image.params.values()),
                    *(image.key0, image.key1, quantvec, quantvec_md5(quantvec)),
                    *(image.clip_score_input, image.clip_score_tokenized),
                    *(image.time_start, image.time_end, image.time_scored),
                    *(generator_id, codec_id, None if image.clip_score_input is None else clip_id),
                    *(sampler_version, image.log_prob, image.dtype, image.init_count, image.init_md5),
                    image.extra_settings,
                )

        return self.connection.write_many(queries.INSERT_IMAGE, insert_values())

    def set_scores(
        self, rows: Iterable[tuple[int, float | None, float | None]], clip_id: int | None, time_scored: float
    ) -> int:
        """Store scores, inside a transaction.

        Args:
            rows: (id, clip_score_input, clip_score_tokenized) of each image.
            clip_id: Id of the model that scored them.
            time_scored: When, in UTC Unix seconds.

        Returns:
            How many of the images the archive has.
        """
        assert self.connection.in_transaction, "set_scores outside a transaction"
        values = ((score, tokenized, clip_id, time_scored, row_id) for row_id, score, tokenized in rows)
        return self.connection.write_many(queries.SET_SCORES, values)

    # Private

    def _without_nul(self, text: str) -> str:
        if "\x00" in text:
            raise ArchiveError(f"{self.path}: a prompt holds a NUL byte: {text!r:.100}")
        return text

    def _find_or_insert(self, find: str, identity: Row, insert: str, values: Row) -> int:
        """Return the id that `find` selects, after `insert` where there is none."""
        found = self.connection.value(find, identity)
        if found is None:
            assert self.connection.in_transaction, "written outside a transaction"
            self.connection.execute(insert, values)
            found = self.connection.value(find, identity)
        if found is None:
            raise ArchiveError(f"{self.path}: a new row of this file cannot be found; `verify` it")
        return found

    def _texts(self, table: str) -> dict[int, str | None]:
        rows = self.connection.bounded_rows(f"SELECT id, desc FROM {table} ORDER BY id")
        return {row_id: parse_text(text) for row_id, text in rows if isinstance(row_id, int)}

    def indexed_table(self) -> str:
        """Return the table that has an index by group, best first."""
        if self._group_table is None:
            self._group_table = legacy_2022.create_group_index(self.connection)
        return self._group_table
