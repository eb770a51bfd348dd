"""Byte pair encoding: merging the neighbours that a table of rules ranks first."""

import heapq
from collections.abc import Hashable, Iterable, Mapping, Sequence

Rules = Mapping[tuple[Hashable, Hashable], tuple[int, Hashable]]


def rules_of(merges: Iterable[tuple[str, str]]) -> dict[tuple[str, str], tuple[int, str]]:
    """{pair: (rank, the two joined)}; where a pair comes twice, its last rank counts."""
    return {pair: (rank, "".join(pair)) for rank, pair in enumerate(merges)}


def merge(pieces: Sequence[Hashable], rules: Rules, *, whole_passes: bool = False) -> list[Hashable]:
    """`pieces` after merging, again and again, the pair of lowest rank (the leftmost of several).

    rules: {pair: (rank, what it becomes)}; no two pairs share a rank.
    whole_passes: merge every pair of that rank, from the left, before looking for the next rank. The two
    differ only for rules in an order that no training gives, such as a rule before the rules of its parts.

    Sennrich et al. 2016, https://arxiv.org/abs/1508.07909. O(n log n): a word may have 10,000 letters.
    """
    end = len(pieces)
    merged = list(pieces)
    before, after = list(range(-1, end - 1)), list(range(1, end + 1))
    is_gone = [False] * end

    def ranked(lefts: Iterable[int]) -> Iterable[tuple[int, int]]:
        for left in lefts:
            rule = rules.get((merged[left], merged[after[left]])) if left >= 0 and after[left] < end else None
            if rule is not None:
                yield rule[0], left

    queue = list(ranked(range(end)))
    heapq.heapify(queue)
    fresh: list[tuple[int, int]] = []  # pairs that the latest merges made
    rank = -1
    while queue or fresh:
        if fresh and not (whole_passes and queue and queue[0][0] == rank):
            for item in fresh:
                heapq.heappush(queue, item)
            fresh = []
        rank, left = heapq.heappop(queue)
        right = after[left]
        if is_gone[left] or right >= end:
            continue
        rule = rules.get((merged[left], merged[right]))
        if rule is None or rule[0] != rank:  # an earlier merge took one of the two
            continue
        merged[left] = rule[1]
        is_gone[right] = True
        after[left] = after[right]
        if after[left] < end:
            before[after[left]] = left
        fresh.extend(ranked((before[left], left)))
    return [piece for piece, gone in zip(merged, is_gone, strict=True) if not gone]


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's), by the byte's value.

    Visible Latin-1 characters stand for themselves; the others, in order, are U+0100 and up.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]
