"""What to generate: the values of a sweep, their combinations, and which images of them an archive still lacks.

Reads archives, TOML files and lists of prompts; imports neither NumPy nor JAX. A sweep file has a key for each flag of
`generate`, with a value or a list of values:

prompts = ["a rocket", "a castle"]
top_k = [50, 256]
cond_scale = [1, 3, 10]
n = 8
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dm_generations.archive import Archive, GroupKey
from dm_generations.archive.records import ClassLabel, canonical_settings
from dm_generations.errors import UserError, one_line
from dm_generations.sampling.params import ExtraSetting, SamplingParams, check_range, complete_extra_settings
from dm_generations.sampling.prng import row_key

DEFAULT_PARAMS = SamplingParams(top_k=256, cond_scale=3.0)
DEFAULT_COUNT = 32  # images of each combination
DEFAULT_SEED = 0
DEFAULT_BATCH_SIZE = 32

MAX_IMAGES = 10_000_000  # of one command, so that a zero too many does not fill a disk
MAX_SEED = 2**64 - 1

# What each key of a sweep file holds, and whether it can list several values.
SWEEP_KEYS: dict[str, tuple[tuple[type, ...], bool]] = {
    "prompts": ((str,), True),
    "classes": ((str, int), True),
    "sc_prompts": ((str,), True),
    "top_k": ((int,), True),
    "top_p": ((int, float), True),
    "temperature": ((int, float), True),
    "cond_scale": ((int, float), True),
    "cfg_interval": ((int,), True),
    "steps": ((int,), True),
    "mask_temperature": ((int, float), True),
    "mask_temperature_end": ((int, float), True),
    "aesthetic_score": ((int, float), True),
    "crop_top": ((int, float), True),
    "crop_left": ((int, float), True),
    "keys": ((str,), True),
    "n": ((int,), False),
    "seed": ((int,), False),
    "same_seeds": ((bool,), False),
}
_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_PARAM_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))
# Of settings that only some models have.
_EXTRA_NAMES = (
    *("cfg_interval", "steps", "mask_temperature", "mask_temperature_end"),
    *("aesthetic_score", "crop_top", "crop_left"),
)


@dataclass(frozen=True)
class Combination:
    """One value of each axis: a group of the archive, before its prompts have ids."""

    prompt: str | ClassLabel
    sc_prompt: str | None  # None: the model's own empty prompt
    params: SamplingParams
    extra_settings: str = ""  # as an archive stores them


@dataclass(frozen=True)
class Sample:
    """One image to sample: a combination and the two words of its PRNG key."""

    combination: Combination
    key0: int
    key1: int


@dataclass(frozen=True)
class Shard:
    """The part of a sweep that one of several processes generates.

    Attributes:
        index: Number of this process, 1 to `count`.
        count: Number of processes that share the sweep.
    """

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read a shard written as "I/N".

        Raises:
            UserError: The text is not two whole numbers, or I is not from 1 to N.
        """
        try:
            index, count = map(int, text.split("/"))
        except ValueError:
            index = count = 0
        if not 1 <= index <= count:
            raise UserError(f"--shard {text!r:.60} is not I/N with I from 1 to N, as 1/4")
        return cls(index, count)


WHOLE_SWEEP = Shard()


@dataclass(frozen=True)
class Sweep:
    """All combinations of some values, with `count` images of each.

    With `same_seeds` image i has the key `row_key(seed, i)` in every combination, so that settings are compared on
    equal noise. Otherwise each combination has its own seed, derived from `seed` and its values. Repeated values are
    dropped. An empty text among `sc_prompts` is the model's own empty prompt.

    Attributes:
        extra_settings: Settings that only some models have, as an archive stores them.
        row_keys: The keys of the images of each combination; they replace `count` and `seed`.
        unset: Names of settings that the user left open, for which a model can have defaults of its own.

    Raises:
        UserError: A value is out of range, or an axis has no value.
    """

    prompts: Sequence[str | ClassLabel]
    sc_prompts: Sequence[str | None] = (None,)
    top_k: Sequence[int] = (DEFAULT_PARAMS.top_k,)
    top_p: Sequence[float] = (DEFAULT_PARAMS.top_p,)
    temperature: Sequence[float] = (DEFAULT_PARAMS.temperature,)
    cond_scale: Sequence[float] = (DEFAULT_PARAMS.cond_scale,)
    extra_settings: Sequence[str] = ("",)
    count: int = DEFAULT_COUNT
    seed: int = DEFAULT_SEED
    same_seeds: bool = True
    row_keys: Sequence[tuple[int, int]] | None = None
    unset: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        axes: dict[str, Sequence[Any]] = {
            "prompts": self.prompts,
            "sc_prompts": [text or None for text in self.sc_prompts],
            "top_k": self.top_k,
            "top_p": [_to_float(value) for value in self.top_p],
            "temperature": [_to_float(value) for value in self.temperature],
            "cond_scale": [_to_float(value) for value in self.cond_scale],
            "extra_settings": self.extra_settings,
        }
        for name, values in axes.items():
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
        _check_texts("prompt", [prompt for prompt in self.prompts if isinstance(prompt, str)])
        _check_texts("unconditional prompt", [text for text in self.sc_prompts if text is not None])
        check_range("n", self.count, 1, MAX_IMAGES)
        check_range("seed", self.seed, 0, MAX_SEED)
        for word in itertools.chain.from_iterable(self.row_keys or ()):
            check_range("a word of a key", word, 0, 2**32 - 1)
        for name in _PARAM_NAMES:
            for value in getattr(self, name):
                SamplingParams(**{name: value}).validate()
        if self.image_count > MAX_IMAGES:
            raise UserError(f"this sweep has {self.image_count:,} images, more than {MAX_IMAGES:,}; split it")

    @property
    def combination_count(self) -> int:
        """Number of combinations."""
        return math.prod(len(values) for values in self._axes())

    @property
    def image_count(self) -> int:
        """Images of all combinations."""
        return self.combination_count * self.count

    def combinations(self) -> Iterator[Combination]:
        """Yield the combinations in the order of the archive's groups: the last axis changes fastest."""
        for prompt, sc_prompt, *values, extra_settings in itertools.product(*self._axes()):
            yield Combination(prompt, sc_prompt, SamplingParams(*values), extra_settings)

    def keys(self, combination: Combination) -> Sequence[tuple[int, int]]:
        """Return (key0, key1) of each image of a combination, by its index."""
        if self.row_keys is not None:
            return self.row_keys
        return _derive_keys(self.seed if self.same_seeds else _derive_seed(self.seed, combination), self.count)

    def with_defaults(self, defaults: SamplingParams) -> "Sweep":
        """Return this sweep with other values for the settings that the user left open."""
        changes: dict[str, Any] = {name: (getattr(defaults, name),) for name in self.unset}
        return dataclasses.replace(self, **changes)

    def for_model(self, vocabulary: str, known: Mapping[str, ExtraSetting]) -> "Sweep":
        """Return this sweep for a model: its classes named, and its extra settings checked, defaults left out.

        Args:
            vocabulary: Name of the vocabulary of classes.
            known: The model's extra settings, by name.

        Raises:
            UserError: The model has no such setting, or a value is out of range.
        """
        prompts = [ClassLabel(vocabulary, p.label) if isinstance(p, ClassLabel) else p for p in self.prompts]
        extra_settings = []
        for text in self.extra_settings:
            completed = complete_extra_settings(known, json.loads(text or "{}"))
            changed = {name: value for name, value in completed.items() if value != known[name].default}
            extra_settings.append(canonical_settings(changed))
        return dataclasses.replace(self, prompts=prompts, extra_settings=extra_settings)

    def _axes(self) -> tuple[Sequence[Any], ...]:
        settings = self.top_k, self.top_p, self.temperature, self.cond_scale, self.extra_settings
        return self.prompts, self.sc_prompts, *settings


@dataclass(frozen=True)
class Plan:
    """The images of a sweep, or of a shard of it, that an archive lacks.

    Attributes:
        missing: Combinations with the indices of the images to generate, which are never empty.
        existing_count: Images of the sweep or shard that are in the archive.
    """

    sweep: Sweep
    missing: list[tuple[Combination, Sequence[int]]]
    existing_count: int

    @property
    def missing_count(self) -> int:
        """Images to generate."""
        return sum(len(indices) for _, indices in self.missing)

    def samples(self) -> Iterator[Sample]:
        """Yield the images to generate, combination by combination."""
        for combination, indices in self.missing:
            keys = self.sweep.keys(combination)
            yield from (Sample(combination, *keys[index]) for index in indices)


def load_sweep(flags: Mapping[str, Any], sweep_file: Path | None = None, prompts_file: Path | None = None) -> Sweep:
    """Build a sweep from flags, a sweep file and a file of prompts.

    Args:
        flags: Values by the keys of `SWEEP_KEYS`; they replace those of the sweep file.
        sweep_file: A TOML file, see `read_sweep_file`.
        prompts_file: Further prompts, see `read_prompts`.

    Raises:
        UserError: A file cannot be read, or a value is out of range.
    """
    values = ({} if sweep_file is None else read_sweep_file(sweep_file)) | dict(flags)
    prompts = [*values.pop("prompts", []), *([] if prompts_file is None else read_prompts(prompts_file))]
    if "classes" in values:
        if prompts:
            raise UserError("use just one of --classes and of prompts")
        prompts = parse_classes(values.pop("classes"))
    values["extra_settings"] = combine_settings({name: values.pop(name) for name in _EXTRA_NAMES if name in values})
    unset = frozenset(_PARAM_NAMES) - values.keys()
    if "keys" in values:
        values["row_keys"] = [parse_key(text) for text in values.pop("keys")]
    if "n" in values:
        values["count"] = values.pop("n")
    return Sweep(prompts, unset=unset, **values)


def read_sweep_file(path: Path) -> dict[str, Any]:
    """Read the values in a sweep file by key, as lists where the flag takes several. Ranges are not checked.

    Raises:
        UserError: The file cannot be read, is not TOML, or has an unknown key or a value of the wrong type.
    """
    try:
        values = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"--sweep {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, not UTF-8, a NUL byte in the name
        raise UserError(f"--sweep {str(path)!r}: not a TOML file: {one_line(error)}") from error
    return {key: _check_entry(path, key, value) for key, value in values.items()}


def read_prompts(path: Path) -> list[str]:
    """Read the lines of a UTF-8 file that are not blank.

    Raises:
        UserError: The file cannot be read, is not UTF-8, or has no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--prompts-file {str(path)!r}: {reason}") from error
    prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file {path}: it has no prompts")
    return prompts


def parse_key(text: str) -> tuple[int, int]:
    """Read a key written as "key0:key1".

    Raises:
        UserError: The text is not two whole numbers with a colon between them.
    """
    try:
        key0, key1 = map(int, text.split(":"))
    except ValueError:
        raise UserError(f"--keys {text!r:.60} is not two whole numbers with a colon between, as 12345:67890") from None
    return key0, key1


def combine_settings(values: Mapping[str, Sequence[float]]) -> list[str]:
    """Return every combination of some extra settings, as an archive stores them.

    >>> combine_settings({"steps": [8, 12]})
    ['{"steps":8}', '{"steps":12}']

    Args:
        values: By name.
    """
    combined = itertools.product(*values.values())
    return [canonical_settings(dict(zip(values, chosen, strict=True))) for chosen in combined]


def parse_classes(values: Sequence[str | int]) -> list[ClassLabel]:
    """Read classes written as numbers and ranges, "7" and "0-999"; their vocabulary is that of a model, see `Sweep`.

    Raises:
        UserError: A value is something else, or there are more than MAX_IMAGES.
    """
    labels: list[int] = []
    for value in values:
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", str(value))
        first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
        if last < first:
            raise UserError(f"--classes {str(value)!r:.60} is not a number or a range, as 207 or 0-999")
        if len(labels) + last - first >= MAX_IMAGES:
            raise UserError(f"--classes {value}: more than {MAX_IMAGES:,} classes")
        labels += range(first, last + 1)
    return [ClassLabel("", label) for label in labels]


def plan_sweep(
    sweep: Sweep,
    archive: Archive | None,
    generator_id: int | None,
    sampler_version: int,
    init_md5: str = "",
    shard: Shard = WHOLE_SWEEP,
) -> Plan:
    """Find the images of `sweep` that an archive lacks; the archive is only read.

    A shard has the images whose position in the whole sweep is `shard.index` - 1 modulo `shard.count`, whatever the
    archive holds. So processes that start at different times never share an image.

    Args:
        sweep: What is wanted.
        archive: None stands for an archive that does not exist yet.
        generator_id: The model's id in the archive; None if the archive does not have the model.
        sampler_version: Version of the sampling rules, as stored with each row.
        init_md5: MD5 of the initial tokens that the images continue; "" if there are none.
        shard: The part of the sweep to plan.
    """
    prompt_ids: dict[str | ClassLabel | None, int] = {}
    sc_prompt_ids: dict[str | None, int] = {}
    if archive is not None and generator_id is not None:
        has_classes = any(isinstance(prompt, ClassLabel) for prompt in sweep.prompts)
        classes = archive.classes() if has_classes else {}
        prompt_ids = {classes.get(row_id, text): row_id for row_id, text in archive.prompts().items()}
        sc_prompt_ids = {text: row_id for row_id, text in archive.sc_prompts().items()}
    missing: list[tuple[Combination, Sequence[int]]] = []
    existing_count = 0
    for number, combination in enumerate(sweep.combinations()):
        of_shard = range((shard.index - 1 - number * sweep.count) % shard.count, sweep.count, shard.count)
        indices: Sequence[int] = of_shard
        if archive is not None and combination.prompt in prompt_ids and combination.sc_prompt in sc_prompt_ids:
            ids = prompt_ids[combination.prompt], sc_prompt_ids[combination.sc_prompt]
            group_key = GroupKey(*ids, combination.params, combination.extra_settings)
            existing = archive.existing_keys(group_key, generator_id, sampler_version, init_md5)
            keys = sweep.keys(combination) if existing else ()
            indices = [index for index in of_shard if keys[index] not in existing] if existing else of_shard
        existing_count += len(of_shard) - len(indices)
        if indices:
            missing.append((combination, indices))
    return Plan(sweep, missing, existing_count)


@functools.lru_cache(maxsize=1)  # with the same seeds they are those of every combination
def _derive_keys(seed: int, count: int) -> tuple[tuple[int, int], ...]:
    return tuple(row_key(seed, index) for index in range(count))


def _derive_seed(seed: int, combination: Combination) -> int:
    """Return a seed for one combination, which the other values of a sweep do not change. See `schema/sampling.md`."""
    is_class = isinstance(combination.prompt, ClassLabel)
    prompt = str(combination.prompt) if is_class else combination.prompt
    values = [seed, prompt, combination.sc_prompt, *combination.params.values()]
    values += [combination.extra_settings] if combination.extra_settings else []
    text = json.dumps(values, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:8], "big")


def _to_float(value: float) -> float:
    """Convert to a float; a whole number too large for one becomes infinity, which is out of every range."""
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


def _check_entry(path: Path, key: str, value: Any) -> Any:
    if key not in SWEEP_KEYS:
        raise UserError(f"--sweep {path}: unknown key {key!r:.60}; known keys are {', '.join(SWEEP_KEYS)}")
    types, takes_several = SWEEP_KEYS[key]
    entries = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not takes_several:
        raise UserError(f"--sweep {path}: {key} takes one value, not a list")
    for entry in entries:
        if type(entry) not in types:  # a bool is an int to isinstance
            expected = " or ".join(_TYPE_NAMES[each] for each in types)
            raise UserError(f"--sweep {path}: {key} must be {expected}, not {entry!r:.60}")
    return entries if takes_several else value
