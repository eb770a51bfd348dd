"""Prompts that are classes, not texts: vocabularies of labels, and the rows of `prompts` that name one of them."""

import json
from collections.abc import Sequence
from typing import Final

from dm_generations.archive.connection import ArchiveError, Connection
from dm_generations.archive.records import ClassLabel, parse_text

MAX_LABELS_BYTES: Final = 2**24
_CLASSES: Final = """
SELECT prompts.id, vocabularies.name, prompts.class_label FROM prompts
JOIN vocabularies ON vocabularies.id = prompts.vocabulary_id ORDER BY prompts.id
"""


def add_vocabulary(connection: Connection, name: str, labels: Sequence[str]) -> int:
    """Return the id of a vocabulary, which is added if it is new. Call it inside a transaction.

    Args:
        connection: Of an archive that is open for writing.
        name: As `imagenet-1k`.
        labels: The classes' names; class 0 is the first.

    Raises:
        ArchiveError: The archive has other labels under this name.
    """
    assert connection.in_transaction, "written outside a transaction"
    text = json.dumps(list(labels), separators=(",", ":"))
    row = next(connection.rows("SELECT id, labels FROM vocabularies WHERE name = ?", (name,)), None)
    if row is None:
        return connection.insert("INSERT INTO vocabularies (name, labels) VALUES (?, ?)", (name, text))
    if row[1] != text:
        raise ArchiveError(f"{connection.path}: its vocabulary {name!r:.100} has other labels; give yours another name")
    return row[0]


def read_vocabularies(connection: Connection) -> dict[str, list[str]]:
    """Return the labels of each vocabulary by its name.

    Raises:
        ArchiveError: The labels of one are not a JSON array of texts.
    """
    rows = connection.rows("SELECT name, labels FROM vocabularies ORDER BY id")
    return {parse_text(name) or "": parse_labels(connection, name, labels) for name, labels in rows}


def parse_labels(connection: Connection, name: object, text: object) -> list[str]:
    """Read the labels of a vocabulary.

    Raises:
        ArchiveError: They are not a JSON array of texts.
    """
    try:
        labels = json.loads(text) if isinstance(text, str) and len(text) <= MAX_LABELS_BYTES else None
    except (ValueError, RecursionError):
        labels = None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ArchiveError(f"{connection.path}: the labels of vocabulary {name!r:.100} are not a JSON array of texts")
    return labels


def read_classes(connection: Connection) -> dict[int, ClassLabel]:
    """Return the classes by the id of their prompt; prompts that are texts are left out."""
    return {row_id: ClassLabel(name, label) for row_id, name, label in connection.rows(_CLASSES)}


def class_text(prompt: ClassLabel, labels: Sequence[str]) -> str:
    """Return what stands for a class in the table of prompts: vocabulary, number and label."""
    return f"{prompt.vocabulary} {prompt.label}: {labels[prompt.label]}"


def class_prompt_id(connection: Connection, prompt: ClassLabel) -> int:
    """Return the id of a class's prompt, which is added if it is new; its `desc` names vocabulary, number and label.

    Raises:
        ArchiveError: The archive does not have the vocabulary, or this has fewer classes; or a text prompt is the same.
    """
    sql = "SELECT id, labels FROM vocabularies WHERE name = ?"
    vocabulary_id, text = next(connection.rows(sql, (prompt.vocabulary,)), (None, None))
    if vocabulary_id is None:
        raise ArchiveError(f"{connection.path}: it has no vocabulary {prompt.vocabulary!r:.100}; add it first")
    labels = parse_labels(connection, prompt.vocabulary, text)
    if not 0 <= prompt.label < len(labels):
        raise ArchiveError(
            f"{connection.path}: vocabulary {prompt.vocabulary!r:.100} has no class {prompt.label}: it ends at "
            f"{len(labels) - 1}"
        )
    find = "SELECT id FROM prompts WHERE vocabulary_id = ? AND class_label = ?"
    found = connection.value(find, (vocabulary_id, prompt.label))
    if found is None:
        desc = class_text(prompt, labels)
        if connection.value("SELECT id FROM prompts WHERE desc = ?", (desc,)) is not None:
            raise ArchiveError(f"{connection.path}: it has a text prompt {desc!r:.100}, which reads like a class")
        insert = "INSERT INTO prompts (desc, vocabulary_id, class_label) VALUES (?, ?, ?)"
        found = connection.insert(insert, (desc, vocabulary_id, prompt.label))
    return found
