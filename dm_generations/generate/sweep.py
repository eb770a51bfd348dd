"""What to draw: combinations of values, checked, and which pictures of them an archive still lacks.

Reads archives and draws nothing; imports neither NumPy nor JAX.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dm_generations.archive import Archive, Settings
from dm_generations.errors import UserError
from dm_generations.threefry import row_key

# What is drawn where a flag is not given.
DEFAULT_TOP_K = 256
DEFAULT_TOP_P = 1.0
DEFAULT_TEMPERATURE = 1.0
DEFAULT_COND_SCALE = 3.0
DEFAULT_COUNT = 32  # pictures of each combination
DEFAULT_SEED = 0
DEFAULT_BATCH_SIZE = 32

MAX_PICTURES = 10_000_000  # of one command: a slip of a zero should not fill a disk
MAX_TOP_K = 2**31 - 1
MAX_REAL = 3.0e38  # settings are used as float32
MAX_SEED = 2**64 - 1
_SHOWN_DIGITS = 40  # of a number in a message; Python refuses to write the longest ones


@dataclass(frozen=True)
class Combination:
    """One value of each axis: a group of the archive, before its prompts have ids."""

    prompt: str
    sc_prompt: str | None  # None: the model's own empty prompt
    top_k: int
    top_p: float
    temperature: float
    cond_scale: float


@dataclass(frozen=True)
class Draw:
    """One picture to draw."""

    combination: Combination
    key0: int
    key1: int


@dataclass(frozen=True)
class Sweep:
    """Every combination of the values, `count` pictures of each, under one seed; or a picture for each of `row_keys`.

    With `same_seeds` picture i has the key `row_key(seed, i)` in every combination, so that settings are compared on
    equal noise; without, each combination has a seed of its own, made of `seed` and its values. Values may repeat;
    repetitions are dropped. An empty text among `sc_prompts` means the model's own empty prompt. Raises UserError for
    values out of range.
    """

    prompts: Sequence[str]
    sc_prompts: Sequence[str | None] = (None,)
    top_k: Sequence[int] = (DEFAULT_TOP_K,)
    top_p: Sequence[float] = (DEFAULT_TOP_P,)
    temperature: Sequence[float] = (DEFAULT_TEMPERATURE,)
    cond_scale: Sequence[float] = (DEFAULT_COND_SCALE,)
    count: int = DEFAULT_COUNT
    seed: int = DEFAULT_SEED
    same_seeds: bool = True
    row_keys: Sequence[tuple[int, int]] | None = None  # these are the keys: `count` and `seed` have no meaning

    def __post_init__(self):
        columns = {
            "prompts": self.prompts,
            "sc_prompts": [text or None for text in self.sc_prompts],
            "top_k": self.top_k,
            "top_p": [_real(value) for value in self.top_p],
            "temperature": [_real(value) for value in self.temperature],
            "cond_scale": [_real(value) for value in self.cond_scale],
        }
        for name, values in columns.items():
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))
            if not values:
                raise UserError(f"{name} needs at least one value")
        if self.row_keys is not None:
            if not self.row_keys:
                raise UserError("keys needs at least one value")
            object.__setattr__(self, "row_keys", tuple(dict.fromkeys(self.row_keys)))
            object.__setattr__(self, "count", len(self.row_keys))
        self._check()

    def _check(self) -> None:
        _check_texts("prompt", self.prompts)
        _check_texts("unconditional prompt", [text for text in self.sc_prompts if text is not None])
        _check_range("n", [self.count], 1, MAX_PICTURES)
        _check_range("seed", [self.seed], 0, MAX_SEED)
        _check_range("a word of a key", [word for key in self.row_keys or () for word in key], 0, 2**32 - 1)
        _check_range("top_k", self.top_k, 0, MAX_TOP_K)
        _check_range("temperature", self.temperature, 0, MAX_REAL)
        _check_range("cond_scale", self.cond_scale, 0, MAX_REAL)
        for top_p in self.top_p:
            if not 0 < top_p <= 1:  # NaN too
                raise UserError(f"top_p must be above 0 and at most 1, not {top_p}")
        if self.picture_count > MAX_PICTURES:
            raise UserError(f"this sweep has {self.picture_count:,} pictures, more than {MAX_PICTURES:,}; split it")

    @property
    def combination_count(self) -> int:
        return math.prod(len(values) for values in self._axes())

    @property
    def picture_count(self) -> int:
        return self.combination_count * self.count

    def combinations(self) -> Iterator[Combination]:
        """In the order of the archive's groups: the last axis changes fastest."""
        return (Combination(*values) for values in itertools.product(*self._axes()))

    def keys(self, combination: Combination) -> Sequence[tuple[int, int]]:
        """(key0, key1) of each picture of a combination, by its index."""
        if self.row_keys is not None:
            return self.row_keys
        return _keys(self.seed if self.same_seeds else _own_seed(self.seed, combination), self.count)

    def _axes(self) -> tuple[Sequence, ...]:
        return self.prompts, self.sc_prompts, self.top_k, self.top_p, self.temperature, self.cond_scale


@dataclass(frozen=True)
class Plan:
    """The part of a sweep that an archive lacks."""

    sweep: Sweep
    missing: list[tuple[Combination, Sequence[int]]]  # and the indices of the pictures to draw; never empty

    @property
    def missing_count(self) -> int:
        """Pictures to draw."""
        return sum(len(indices) for _, indices in self.missing)

    @property
    def existing_count(self) -> int:
        """Pictures that are there already."""
        return self.sweep.picture_count - self.missing_count

    def draws(self) -> Iterator[Draw]:
        for combination, indices in self.missing:
            keys = self.sweep.keys(combination)
            yield from (Draw(combination, *keys[index]) for index in indices)


def plan(
    sweep: Sweep, archive: Archive | None, generator_id: int | None, sampler_version: int, init_md5: str = ""
) -> Plan:
    """What of `sweep` is missing in `archive`, which is only read; None stands for an archive yet to be made.

    generator_id: the model's id in the archive, None where the archive does not know the model   init_md5: of the
    codes that the pictures go on from
    """
    if archive is None or generator_id is None:
        every = range(sweep.count)
        return Plan(sweep, [(combination, every) for combination in sweep.combinations()])
    prompt_id = {text: row_id for row_id, text in archive.prompts().items()}
    sc_prompt_id = {text: row_id for row_id, text in archive.sc_prompts().items()}
    missing = []
    for combination in sweep.combinations():
        ids = prompt_id.get(combination.prompt), sc_prompt_id.get(combination.sc_prompt)
        existing: set[tuple[int, int]] = set()
        if None not in ids:
            axes = (combination.top_k, combination.top_p, combination.temperature, combination.cond_scale)
            existing = archive.existing_keys(Settings(*ids, *axes), generator_id, sampler_version, init_md5)
        indices = [index for index, key in enumerate(sweep.keys(combination)) if key not in existing]
        if indices:
            missing.append((combination, indices))
    return Plan(sweep, missing)


@functools.lru_cache(maxsize=1)  # with the same seeds they are those of every combination
def _keys(seed: int, count: int) -> tuple[tuple[int, int], ...]:
    return tuple(row_key(seed, index) for index in range(count))


def _own_seed(seed: int, combination: Combination) -> int:
    """A seed for one combination, which the other values of a sweep do not change. See `schema/sampling.md`."""
    text = json.dumps([seed, *dataclasses.astuple(combination)], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:8], "big")


def _real(value: float) -> float:
    """As a float; infinity, which no range has, for a whole number that is too large for one."""
    try:
        return float(value) + 0.0  # makes -0.0 the 0.0 that it equals
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _check_texts(what: str, texts: Sequence[str]) -> None:
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(f"{what} {number} is empty")
        if "\x00" in text:
            raise UserError(f"{what} {number} holds a NUL byte: {text!r:.60}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{what} {number} is not valid Unicode: {text!r:.60}") from error


def _check_range(name: str, values: Sequence[float], lowest: int, highest: float) -> None:
    for value in values:
        if not lowest <= value <= highest:  # NaN too
            limit = f"{highest:,}" if isinstance(highest, int) else f"{highest:g}"
            is_long = isinstance(value, int) and abs(value) >= 10**_SHOWN_DIGITS
            found = f"a number of more than {_SHOWN_DIGITS} digits" if is_long else value
            raise UserError(f"{name} must be from {lowest} to {limit}, not {found}")
