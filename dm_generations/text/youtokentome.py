"""Models of YouTokenToMe: byte pairs of characters with "▁" before every word, in a text file of numbers.

File and rules after YouTokenToMe (https://github.com/VKCOM/YouTokenToMe). The file, all decimal numbers:

    <characters> <rules>
    <code point> <id>               a line a character
    <left id> <right id> <id>       a line a rule, the first to be applied first
    <unknown> <pad> <bos> <eos>     -1 for one that there is not
"""

import itertools
import re
from pathlib import Path

from dm_generations.errors import UserError
from dm_generations.text.bpe import merge
from dm_generations.text.files import MAX_ID, read_bytes

SPACE = "▁"
SPACES = re.compile(f"[ \\t\\n\\v\\f\\r{SPACE}]+")
NUMBER = re.compile(rb"-?[0-9]{1,10}")
UNKNOWN = -1  # a run of characters that the model lacks, while it is merged: in no rule


class YouTokenToMe:
    """Raises UserError if the file is missing, or is not what its first line says."""

    def __init__(self, path: Path):
        counts, numbers = _read(path)
        rules_start = 2 * counts[0]
        ends = rules_start + 3 * counts[1]
        characters = list(zip(numbers[0:rules_start:2], numbers[1:rules_start:2], strict=True))
        rules = numbers[rules_start:ends]
        self._unknown_id = numbers[ends]

        known = {index for _, index in characters}
        if not all(0 <= point <= 0x10FFFF and 0 <= index <= MAX_ID for point, index in characters):
            raise UserError(f"{path}: lists a character that is no Unicode code point, or an id out of range")
        self._ids = {chr(point): index for point, index in characters}
        if SPACE not in self._ids:
            raise UserError(f"{path}: has no {SPACE!r}, which begins every word of a YouTokenToMe model")
        if not 0 <= self._unknown_id <= MAX_ID:
            raise UserError(f"{path}: has no id for unknown characters")
        self._rules: dict[tuple[int, int], tuple[int, int]] = {}
        for rank, (left, right, joined) in enumerate(zip(*[iter(rules)] * 3, strict=True)):
            if left not in known or right not in known or not 0 <= joined <= MAX_ID:
                raise UserError(f"{path}: rule {rank + 1} joins {left} and {right} to {joined}, ids it does not know")
            known.add(joined)
            self._rules[left, right] = rank, joined

    def ids(self, text: str, limit: int) -> list[int]:
        """The ids of a text's words, without start and end; those after the first `limit` may be missing."""
        ids: list[int] = []
        for word in SPACES.split(text):
            if word and len(ids) < limit:
                pieces = [self._ids[SPACE]]
                for is_known, run in itertools.groupby(word, self._ids.__contains__):
                    pieces += [self._ids[character] for character in run] if is_known else [UNKNOWN]
                merged = merge(pieces, self._rules)
                ids += [self._unknown_id if index == UNKNOWN else index for index in merged]
        return ids


def _read(path: Path) -> tuple[tuple[int, int], list[int]]:
    """(characters, rules) as the first line counts them, and all numbers after it, as many as that makes."""
    data = read_bytes(path)
    head, _, body = data.partition(b"\n")
    counts = head.split()
    if len(counts) != 2 or not all(count.isdigit() and len(count) <= 8 for count in counts):
        raise UserError(f"{path}: not a YouTokenToMe model, its first line must be two counts")
    character_count, rule_count = map(int, counts)
    expected = 2 * character_count + 3 * rule_count + 4
    if len(body) < 2 * expected - 1:  # before the body is taken apart
        raise UserError(f"{path}: cut off, it promises {character_count:,} characters and {rule_count:,} rules")
    words = body.split(None, expected)
    if len(words) != expected or not all(NUMBER.fullmatch(word) for word in words):
        raise UserError(
            f"{path}: damaged, its first line promises {character_count:,} characters and {rule_count:,} rules"
        )
    return (character_count, rule_count), [int(word) for word in words]
