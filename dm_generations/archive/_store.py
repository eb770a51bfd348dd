"""`Archive`: an SQLite file of pictures as tokens. Reads ours and the 2022 layout, writes ours.

Locking: the rollback journal, not WAL. So the archive is one file whenever no batch is in flight, works on
network disks, and is read from folders that cannot be written. The price, that a reader holds off a commit,
is kept small: no method leaves a query open between two rows. Programs that fill one archive together claim what
they are about to draw (`claim`), so that nobody holds a lock while it draws.
"""

import array
import contextlib
import json
import math
import os
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from types import TracebackType

from dm_generations.archive._files import check_writable, new_file
from dm_generations.archive._layout import IMAGE_COLUMNS, Layout, read_layout
from dm_generations.archive._queries import (
    CLAIM,
    COUNT_GROUPS,
    HAS_DRAW,
    IDS_BEST_FIRST,
    INDEX_2022,
    INSERT_IMAGE,
    KEYS_OF_GROUP,
    SELECT_IMAGES,
    SELECT_MODELS,
    SET_SCORES,
    TO_SCORE,
)
from dm_generations.archive._records import Group, ImageRow, ModelInfo, NewImage, Settings
from dm_generations.archive._schema import SCHEMA_VERSION, upgrade
from dm_generations.archive._sqlite import (
    APPLICATION_ID,
    ArchiveError,
    application_id,
    connect,
    is_damage,
    prepare_to_write,
    read_header,
    sqlite_errors,
    undo_interrupted_write,
)
from dm_generations.archive._tokens import check_init, check_tokens, quantvec_md5
from dm_generations.archive._values import image_row, settings_of, text_of

LOCK_TIMEOUT = 10.0  # seconds to wait for another program's lock
COMMIT_TIMEOUT = 60.0  # the same when finished work would be lost
CHUNK = 512  # rows read by one query


class Archive:
    """An open archive; a context manager. Use it from one thread at a time.

    path: the file. version: of the format, 0 for the layout of 2022. is_2022: it has that layout, and is open for
    reading only.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, mode: str, timeout: float, layout: Layout):
        """Not for callers, who use `open` or `create`."""
        self.path = path
        self.mode = mode
        self.version = layout.version
        self.is_2022 = layout.is_2022
        self.connection = connection
        self.sql = layout.sql
        self._timeout = timeout
        self._order = None if self.is_2022 else "images"  # the table that serves groups, best first

    @classmethod
    def create(cls, path: str | os.PathLike) -> "Archive":
        """A new, empty archive, open for writing. Refuses a path that exists."""
        path = Path(path)
        with new_file(path) as temporary, sqlite_errors(path):
            with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
                connection.execute("BEGIN")
                upgrade(connection)
                connection.execute("COMMIT")
        return cls.open(path, "w")

    @classmethod
    def open_or_create(cls, path: str | os.PathLike) -> "Archive":
        """The archive at `path`, open for writing; made if there is none, also when several programs do so at once."""
        path = Path(path)
        if not os.path.lexists(path):
            try:
                cls.create(path).close()
            except ArchiveError:
                if not os.path.exists(path):  # or else another program was quicker
                    raise
        return cls.open(path, "w")

    @classmethod
    def open(cls, path: str | os.PathLike, mode: str = "r", timeout: float = LOCK_TIMEOUT) -> "Archive":
        """An existing archive; "r" leaves the file as it is, "w" is for ours only and updates an older format.

        That step is one transaction: others find the old format or the new one. While this process writes to the
        file, use `duplicate` for a second connection: this reads the header by hand, and a file that is closed by
        hand loses SQLite's locks (https://www.sqlite.org/howtocorrupt.html, 2.2).
        timeout: seconds to wait, here and later, while another program has the file locked.
        ArchiveError: no such file, not a database, damaged, other tables, newer than this program, read-only.
        """
        assert mode in ("r", "w"), mode
        path = Path(path)
        header = read_header(path)
        if mode == "w":
            check_writable(path)
        with sqlite_errors(path), contextlib.ExitStack() as on_error:
            connection = connect(path, header, mode, timeout)
            on_error.callback(connection.close)
            try:
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorname != "SQLITE_READONLY_ROLLBACK":
                    raise
                _check_undoable(path, header)
                undo_interrupted_write(path, timeout)
            layout = read_layout(path, connection)
            if mode == "w":
                if layout.is_2022:
                    raise ArchiveError(
                        f"{path}: the 2022 layout is only read; `merge` it into a new archive to add to it"
                    )
                prepare_to_write(connection, header)
                if layout.version < SCHEMA_VERSION:
                    with cls(path, connection, mode, timeout, layout).transaction():
                        upgrade(connection)
                    layout = read_layout(path, connection)
            on_error.pop_all()
        return cls(path, connection, mode, timeout, layout)

    def duplicate(self) -> "Archive":
        """A second connection to an archive that is open for writing, for another thread, which closes it."""
        assert self.mode == "w", self.mode
        with sqlite_errors(self.path), contextlib.ExitStack() as on_error:
            connection = connect(self.path, b"", "w", self._timeout)
            on_error.callback(connection.close)
            prepare_to_write(connection, b"")
            layout = read_layout(self.path, connection)
            on_error.pop_all()
        return Archive(self.path, connection, "w", self._timeout, layout)

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Reading

    def prompts(self) -> dict[int, str | None]:
        """Text by id, in order of id. Bytes that are not UTF-8 come back as U+FFFD; only a 2022 archive has None."""
        return self._texts("prompts")

    def sc_prompts(self) -> dict[int, str | None]:
        """Text by id, in order of id; None is the model's own empty unconditional prompt."""
        return self._texts("sc_prompts")

    def models(self) -> dict[int, ModelInfo]:
        """Models by id; none in a 2022 archive, which does not say."""
        if self.is_2022:
            return {}
        models = {}
        for row_id, kind, name, sha256, config, *sizes in self._all(SELECT_MODELS):
            try:
                config = json.loads(config)
            except (TypeError, ValueError, RecursionError) as error:
                raise ArchiveError(f"{self.path}: the config of model {row_id} is not JSON; run `verify`") from error
            models[row_id] = ModelInfo(kind, name, sha256, config, *sizes)
        return models

    def count(self) -> int:
        """Number of pictures."""
        return self._all("SELECT count(*) FROM images")[0][0]

    def groups(
        self, prompt_ids: Collection[int] | None = None, sc_prompt_ids: Collection[int] | None = None
    ) -> list[Group]:
        """Groups with their sizes, ordered by prompt, sc prompt, top_k, top_p, temperature, cond_scale.

        The ids select; None selects all. Ids that do not exist select nothing.
        """
        parameters = {"prompt_ids": _json_ids(prompt_ids), "sc_prompt_ids": _json_ids(sc_prompt_ids)}
        rows = self._all(COUNT_GROUPS.format(order=self._order_table()), parameters)
        return [Group(settings_of(row[:-1], self.path), row[-1]) for row in rows]

    def rows(self, settings: Settings, limit: int | None = None) -> Iterator[ImageRow]:
        """The pictures of a group: highest clip_score_input first, unscored ones last, ties by id."""
        parameters = [*astuple(settings), -1 if limit is None else limit]
        query = IDS_BEST_FIRST.format(order=self._order_table())
        with sqlite_errors(self.path):
            ids = array.array("q", (row[0] for row in self.connection.execute(query, parameters)))
        return self.read_rows(ids)

    def read_rows(self, ids: Iterable[int]) -> Iterator[ImageRow]:
        """These pictures, in the order of `ids`; ids that do not exist are left out.

        Of a row on a damaged page come the id, no tokens, and None for all else: it must not pass its place in the
        order to the next.
        """
        for chunk in _chunks(ids):
            row_by_id = self._readable_rows(chunk)
            for row_id in chunk:
                if row_id in row_by_id:
                    yield image_row(row_by_id[row_id])

    def rows_to_score(self, rescore: bool = False, clip_id: int | None = None) -> Iterator[ImageRow]:
        """Pictures that lack a score, by id. Scores may be written while this runs.

        rescore: also those that have one, but for those that the model `clip_id` scored
        """
        return map(image_row, self.scan(IMAGE_COLUMNS, TO_SCORE, {"rescore": rescore, "clip_id": clip_id}))

    def count_to_score(self, rescore: bool = False, clip_id: int | None = None) -> int:
        """How many pictures `rows_to_score` gives."""
        sql = self.sql(f"SELECT count(*) FROM images WHERE {TO_SCORE}")
        return self._all(sql, {"rescore": rescore, "clip_id": clip_id})[0][0]

    def existing_keys(
        self, settings: Settings, generator_id: int | None, sampler_version: int | None = None, init_md5: str = ""
    ) -> set[tuple[int, int]]:
        """(key0, key1) of the pictures that this generator drew; sampler_version None: with any sampler.

        init_md5: of the codes that the pictures go on from; "" is for those that were drawn whole.
        """
        parameters = [*astuple(settings), generator_id, sampler_version, sampler_version, init_md5]
        return set(self._all(self.sql(KEYS_OF_GROUP), parameters))

    def has_draw(
        self,
        prompt: str,
        sc_prompt: str | None,
        top_k: int,
        top_p: float,
        temperature: float,
        cond_scale: float,
        key0: int,
        key1: int,
        generator_id: int,
        sampler_version: int,
        init_md5: str = "",
    ) -> bool:
        """Whether this draw is stored; one look into an index, however many pictures there are."""
        group = prompt, sc_prompt, top_k, top_p, temperature, cond_scale
        parameters = *group, key0, key1, generator_id, sampler_version, init_md5
        return bool(self._all(self.sql(HAS_DRAW), parameters)[0][0])

    def claims(self) -> dict[bytes, str]:
        """Who is at work on what: owner by digest, of the claims that have not expired."""
        if self.version < 2:
            return {}
        return dict(self._all("SELECT digest, owner FROM claims WHERE expires > ?", (time.time(),)))

    def claim_ends(self) -> dict[str, float]:
        """Until when the claims of each owner hold: UTC Unix seconds by the owner's clock, which may be wrong."""
        if self.version < 2:
            return {}
        return dict(self._all("SELECT owner, max(expires) FROM claims GROUP BY owner"))

    def scan(self, columns: Sequence[str], condition: str = "TRUE", parameters: dict | None = None) -> Iterator[tuple]:
        """These columns of the pictures that meet an SQL condition, by id; constant memory. See `query`."""
        names = ", ".join(f"{{{name}}}" for name in ("id", *columns))
        query = self.sql(
            f"SELECT {names} FROM images WHERE {{id}} > :after AND ({condition}) ORDER BY {{id}} LIMIT {CHUNK}"
        )
        after: float = -math.inf  # below every id
        while rows := self._all(query, {**(parameters or {}), "after": after}):
            yield from (row[1:] for row in rows)
            after = rows[-1][0]

    def query(self, template: str) -> list[tuple]:
        """All rows of a query; `{name}` stands for that column of images, or its default if an older file lacks it."""
        return self._all(self.sql(template))

    # Writing

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside lands together when the block ends, or not at all."""
        if self.mode != "w":
            raise ArchiveError(f"{self.path}: the archive is open for reading only")
        with sqlite_errors(self.path):
            self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            with sqlite_errors(self.path):
                self.connection.execute(f"PRAGMA busy_timeout = {COMMIT_TIMEOUT * 1000:.0f}")
                self.connection.execute("COMMIT")
        except BaseException:
            # SQLite has already rolled back after a full disk, for instance.
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise
        finally:
            self.connection.execute(f"PRAGMA busy_timeout = {self._timeout * 1000:.0f}")

    def prompt_id(self, text: str) -> int:
        """Id of a prompt, added if it is new. ArchiveError: a NUL byte or a lone surrogate in it."""
        return self.text_id("prompts", self._without_nul(text))

    def sc_prompt_id(self, text: str | None) -> int:
        """Id of an unconditional prompt, added if it is new; 1 for None."""
        return 1 if text is None else self.text_id("sc_prompts", self._without_nul(text))

    def model_id(self, model: ModelInfo) -> int:
        """Id of a model, added if it is new."""
        config = json.dumps(model.config, sort_keys=True, separators=(",", ":"))
        identity = (model.kind, model.sha256, config)
        found = self._all("SELECT id FROM models WHERE kind = ? AND sha256 = ? AND config = ?", identity)
        if found:
            return found[0][0]
        return self._insert(
            "INSERT INTO models (kind, sha256, config, name, grid, codebook_size, image_size)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*identity, model.name, model.grid, model.codebook_size, model.image_size),
        )

    def add_images(
        self,
        images: Iterable[NewImage],
        generator_id: int | None,
        codec_id: int | None,
        clip_id: int | None,
        sampler_version: int | None,
    ) -> int:
        """Stores pictures and returns how many were new: a draw that is there already is left as it is.

        Inside a transaction. `clip_id` is kept for the rows that have a score.
        ArchiveError: tokens that do not fit the codec, settings out of range, an `init_md5` of other codes.
        """
        assert self.connection.in_transaction, "add_images outside a transaction"
        codec = None if codec_id is None else self.models()[codec_id]
        prompt_ids: dict[str, int] = {}
        sc_prompt_ids: dict[str | None, int] = {}

        def values() -> Iterator[tuple]:
            for image in images:
                if (prompt_id := prompt_ids.get(image.prompt)) is None:
                    prompt_id = prompt_ids[image.prompt] = self.prompt_id(image.prompt)
                if (sc_prompt_id := sc_prompt_ids.get(image.sc_prompt)) is None:
                    sc_prompt_id = sc_prompt_ids[image.sc_prompt] = self.sc_prompt_id(image.sc_prompt)
                quantvec = image.quantvec
                if codec is not None:
                    check_tokens(quantvec, codec)
                check_init(quantvec, image.init_count, image.init_md5)
                is_scored = image.clip_score_input is not None
                yield (
                    prompt_id,
                    sc_prompt_id,
                    image.top_k,
                    image.top_p,
                    image.temperature,
                    image.cond_scale,
                    image.key0,
                    image.key1,
                    quantvec,
                    quantvec_md5(quantvec),
                    image.clip_score_input,
                    image.clip_score_tokenized,
                    image.time_start,
                    image.time_end,
                    image.time_scored,
                    generator_id,
                    codec_id,
                    clip_id if is_scored else None,
                    sampler_version,
                    image.log_prob,
                    image.dtype,
                    image.init_count,
                    image.init_md5,
                )

        return self._write_many(INSERT_IMAGE, values())

    def set_scores(self, rows: Iterable[tuple[int, float, float]], clip_id: int | None, time_scored: float) -> int:
        """Stores (id, clip_score_input, clip_score_tokenized) of pictures; returns how many there were."""
        assert self.connection.in_transaction, "set_scores outside a transaction"
        return self._write_many(
            SET_SCORES, ((score, back, clip_id, time_scored, row_id) for row_id, score, back in rows)
        )

    def claim(self, digests: Sequence[bytes], owner: str, until: float) -> list[bool]:
        """Claims what nobody else holds, until a UTC Unix time; says of each whether it is the owner's now.

        Inside a transaction. Expired claims, of anybody, are dropped first. A claim keeps nobody from writing: it is
        a word between programs that ask for it. `owner` is any text of at least one character, and who may use it
        is up to those programs, as is what a digest stands for.
        """
        assert self.connection.in_transaction, "claim outside a transaction"
        self._drop_expired_claims()
        with sqlite_errors(self.path):
            return [
                self.connection.execute(CLAIM, {"digest": digest, "owner": owner, "until": until}).rowcount == 1
                for digest in digests
            ]

    def renew_claims(self, owner: str, until: float) -> None:
        """Moves the end of all claims that an owner still has. Inside a transaction."""
        assert self.connection.in_transaction, "renew_claims outside a transaction"
        self._write_many("UPDATE claims SET expires = ? WHERE owner = ?", [(until, owner)])

    def release_claims(self, owner: str, digests: Iterable[bytes] | None = None) -> None:
        """Gives back an owner's claims, these or all of them, and expired ones of anybody. Inside a transaction."""
        assert self.connection.in_transaction, "release_claims outside a transaction"
        self._drop_expired_claims()
        if digests is None:
            self._write_many("DELETE FROM claims WHERE owner = ?", [(owner,)])
        else:
            mine = ((owner, digest) for digest in digests)
            self._write_many("DELETE FROM claims WHERE owner = ? AND digest = ?", mine)

    # Underneath

    def _drop_expired_claims(self) -> None:
        self._write_many("DELETE FROM claims WHERE expires <= ?", [(time.time(),)])

    def _without_nul(self, text: str) -> str:
        if "\x00" in text:
            raise ArchiveError(f"{self.path}: a prompt holds a NUL byte: {text!r:.100}")
        return text

    def _all(self, query: str, parameters: Collection = ()) -> list[tuple]:
        with sqlite_errors(self.path):
            return self.connection.execute(query, parameters).fetchall()

    def _texts(self, table: str) -> dict[int, str | None]:
        return {row_id: text_of(text) for row_id, text in self._all(f"SELECT id, desc FROM {table} ORDER BY id")}

    def _readable_rows(self, ids: list[int]) -> dict[int, tuple]:
        """Rows by id. Around a damaged page by halves, down to the rows that cannot be read."""
        try:
            query = self.sql(f"{SELECT_IMAGES} WHERE {{id}} IN (SELECT value FROM json_each(?))")
            return {row[0]: row for row in self._all(query, [json.dumps(ids)])}
        except ArchiveError as error:
            if not is_damage(error):
                raise
        if len(ids) == 1:
            return {ids[0]: (ids[0], *[None] * (len(IMAGE_COLUMNS) - 1))}
        middle = len(ids) // 2
        return self._readable_rows(ids[:middle]) | self._readable_rows(ids[middle:])

    def _insert(self, query: str, parameters: tuple) -> int:
        assert self.connection.in_transaction, "written outside a transaction"
        with sqlite_errors(self.path):
            return self.connection.execute(query, parameters).lastrowid

    def _write_many(self, query: str, values: Iterable[tuple]) -> int:
        with sqlite_errors(self.path):
            return self.connection.executemany(query, values).rowcount

    def text_id(self, table: str, text: str) -> int:
        """Id of a text in `prompts` or `sc_prompts`, added if it is new."""
        found = self._all(f"SELECT id FROM {table} WHERE desc = ?", (text,))
        return found[0][0] if found else self._insert(f"INSERT INTO {table} (desc) VALUES (?)", (text,))

    def _order_table(self) -> str:
        if self._order is None:
            with sqlite_errors(self.path):
                self.connection.executescript(self.sql(INDEX_2022))
            self._order = "temp.image_order"
        return self._order


def _check_undoable(path: Path, header: bytes) -> None:
    """ArchiveError where what a killed writer left is not for us to undo, or cannot be undone in this place."""
    if application_id(header) != APPLICATION_ID:
        remedy = "the program `sqlite3` does that when it reads the file; this one changes no archive of 2022"
    elif not (os.access(path, os.W_OK) and os.access(path.resolve().parent, os.W_OK | os.X_OK)):
        remedy = "copy the archive and its -journal to a folder of yours"
    else:
        return
    raise ArchiveError(f"{path}: another program was stopped while writing here; to undo its last batch: {remedy}")


def _json_ids(ids: Collection[int] | None) -> str | None:
    return None if ids is None else json.dumps(sorted(ids))


def _chunks(ids: Iterable[int]) -> Iterator[list[int]]:
    chunk = []
    for row_id in ids:
        chunk.append(row_id)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
