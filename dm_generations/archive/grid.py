"""A grid over an archive: two axes, or three with pages, and the images that each of its cells shows."""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dm_generations.archive.records import PARAM_COLUMNS
from dm_generations.archive.selection import Selection, compile_nonempty
from dm_generations.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from dm_generations.archive.database import Archive

# Columns by the name of their axis. Images of one cell may differ in their seed (key), but in no other of these.
AXES: Final[Mapping[str, tuple[str, ...]]] = {
    "prompt": ("prompt_id",),
    "sc_prompt": ("sc_prompt_id",),
    **{name: (name,) for name in PARAM_COLUMNS},
    "extra_settings": ("extra_settings",),
    "model": ("generator_id",),
    "seed": ("key0", "key1"),
}
SAME_SEED: Final = "same-seed"
CELLS: Final[Mapping[str, int]] = {"best1": 1, "best4": 4, "best9": 9, SAME_SEED: 1}  # with the images that they hold

_NO_SCORE: Final = -math.inf
_MAX_LISTED: Final = 8  # values in a message
_MAX_LABEL: Final = 60  # characters of one in a message

Value = tuple[Any, ...]  # of the columns of an axis
Place = tuple[Value, ...]  # the value of each axis
Labels = dict[Value, str]
_Found = tuple[float, int, Any]  # score, negative id, codec: the best image is the greatest


@dataclass(frozen=True)
class Axis:
    """One side of a grid.

    Attributes:
        name: A key of AXES.
        labels: By value, in order.
    """

    name: str
    labels: Labels


@dataclass(frozen=True)
class Grid:
    """Which images to show where.

    Attributes:
        axes: Rows, columns, and pages if there are any.
        cell: A key of CELLS.
        fixed: The label of each axis that is not shown, by its name.
        cells: Ids of images by place, best first; a cell without images is not there.
        scores: By id; None where there is none.
        id_by_codec: Of one image for each codec among them.
    """

    axes: Sequence[Axis]
    cell: str
    fixed: Mapping[str, str]
    cells: Mapping[Place, Sequence[int]]
    scores: Mapping[int, float | None]
    id_by_codec: Mapping[Any, int]


def plan_grid(archive: "Archive", selection: Selection, axes: Sequence[str], cell: str = "best1") -> Grid:
    """Choose the images of a grid.

    Args:
        archive: The archive.
        selection: Which images; they have to agree in each axis that is not shown, except in the key.
        axes: Names of AXES for rows, columns and, if wanted, pages.
        cell: A key of CELLS: the best images by `clip_score_input`, or those with the key that most cells have.

    Raises:
        UserError: Nothing is selected, or images differ in an axis that is not shown.
    """
    _check_names(axes, cell)
    values: dict[str, dict[Value, None]] = {name: {} for name in AXES}
    rows = _read(archive, selection, axes, values)
    if cell == SAME_SEED:
        key, cells = _with_one_key(rows)
        values["seed"] = {key: None}
    else:
        cells = _best_of_each(rows, CELLS[cell])
    labels = {name: _label(archive, name, found) for name, found in values.items()}
    hidden = {name: labels[name] for name in AXES if name not in axes and (name != "seed" or cell == SAME_SEED)}
    _check_fixed(archive, hidden, has_pages=len(axes) > 2)
    found = [image for images in cells.values() for image in images]
    return Grid(
        axes=[Axis(name, labels[name]) for name in axes],
        cell=cell,
        fixed={name: next(iter(found.values())) for name, found in hidden.items()},
        cells={place: [-minus_id for _, minus_id, _ in images] for place, images in cells.items()},
        scores={-minus_id: None if score == _NO_SCORE else score for score, minus_id, _ in found},
        id_by_codec={codec: -minus_id for _, minus_id, codec in found},
    )


def _check_names(axes: Sequence[str], cell: str) -> None:
    for name, kind, known in (*((axis, "axis", AXES) for axis in axes), (cell, "kind of cell", CELLS)):
        if name not in known:
            similar = did_you_mean(name, known)
            raise UserError(f"a contact sheet has no {kind} {name!r:.60}; there are {', '.join(known)}{similar}")
    if len(set(axes)) < len(axes):
        raise UserError(f"the axes of the contact sheet are {', '.join(axes)}; choose another one for each side")
    if cell == SAME_SEED and "seed" in axes:
        raise UserError(f"cells of {SAME_SEED} share one seed, so the seed cannot be an axis; use best1")


def _read(
    archive: "Archive", selection: Selection, axes: Sequence[str], values: dict[str, dict[Value, None]]
) -> Iterator[tuple[Place, Value, _Found]]:
    """Yield place, key and image of each row, and add to the values of each axis."""
    where = compile_nonempty(archive, selection)
    names = [name for name, columns in AXES.items() for _ in columns]
    columns = [column for columns in AXES.values() for column in columns]
    slices = {name: slice(names.index(name), names.index(name) + names.count(name)) for name in AXES}
    for *row, row_id, score, codec in archive.scan((*columns, "id", "clip_score_input", "codec_id"), where=where):
        own = {name: tuple(row[part]) for name, part in slices.items()}
        for name, value in own.items():
            values[name].setdefault(value)
        is_scored = isinstance(score, int | float) and math.isfinite(score)
        yield tuple(own[name] for name in axes), own["seed"], (score if is_scored else _NO_SCORE, -row_id, codec)
    if not values["prompt"]:
        raise UserError(f"{archive.path} holds no images")


def _best_of_each(rows: Iterable[tuple[Place, Value, _Found]], count: int) -> dict[Place, list[_Found]]:
    cells: dict[Place, list[_Found]] = defaultdict(list)
    for place, _, image in rows:
        if len(cells[place]) < count:
            heapq.heappush(cells[place], image)
        else:
            heapq.heappushpop(cells[place], image)
    return {place: sorted(images, reverse=True) for place, images in cells.items()}


def _with_one_key(rows: Iterable[tuple[Place, Value, _Found]]) -> tuple[Value, dict[Place, list[_Found]]]:
    """Return the key that most cells have, of several the one with the best scores, and its images."""
    by_key: dict[Value, dict[Place, _Found]] = defaultdict(dict)
    for place, key, image in rows:
        by_key[key][place] = max(image, by_key[key].get(place, image))
    key = max(by_key, key=lambda each: (len(by_key[each]), sum(score for score, _, _ in by_key[each].values())))
    return key, {place: [image] for place, image in by_key[key].items()}


def _check_fixed(archive: "Archive", hidden: Mapping[str, Labels], has_pages: bool) -> None:
    varying = {name: labels for name, labels in hidden.items() if len(labels) > 1}
    if not varying:
        return
    listed = "; ".join(f"{name} ({_list_labels(list(labels.values()))})" for name, labels in varying.items())
    flags = _flags(archive, {name: next(iter(labels)) for name, labels in varying.items()})
    advice = [f"choose one of each, as with {flags}"] if flags else []
    advice += [] if has_pages else [f"show one with --pages {next(iter(varying))}"]
    raise UserError(f"the images of a cell differ in {listed}; {', or '.join(advice) or 'choose other axes'}")


def _list_labels(labels: Sequence[str]) -> str:
    listed = ", ".join(f"{label[:_MAX_LABEL]}{'…' * (len(label) > _MAX_LABEL)}" for label in labels[:_MAX_LISTED])
    return listed + (f" and {len(labels) - _MAX_LISTED:,} more" if len(labels) > _MAX_LISTED else "")


def _flags(archive: "Archive", values: Mapping[str, Value]) -> str:
    """Return flags that select these values of axes."""
    flags, conditions = [], []
    for name, (value, *_) in values.items():
        if name in ("prompt", "sc_prompt"):
            flags.append(f"--{name.replace('_', '-')}-ids {value}")
        elif name == "model" and (model := archive.models().get(value)):
            conditions.append(f"model={model.sha256[:8]}")
        elif name in PARAM_COLUMNS:
            conditions.append(f"{name}={_number(value)}")
    return " ".join([*flags, *(["--where", *conditions] if conditions else [])])


def _label(archive: "Archive", name: str, values: Iterable[Value]) -> Labels:
    """Return the values of an axis with what people call them, in order: of ids, of numbers, or for keys of images."""
    if name == "seed":
        return {key: ": ".join(map(str, key)) for key in values}  # with a space to wrap at
    label = _labeller(archive, name)
    return {value: label(value[0]) for value in sorted(values, key=_order)}


def _labeller(archive: "Archive", name: str) -> Any:
    if name in ("prompt", "sc_prompt"):
        texts = archive.prompts() if name == "prompt" else archive.sc_prompts()
        nothing = "prompt {}" if name == "prompt" else "(none)"
        return lambda value: texts.get(value) or nothing.format(value)
    if name == "model":
        models = archive.models()
        counts = Counter(model.name for model in models.values())
        names = {
            row_id: model.name + (f" {model.sha256[:8]}" if counts[model.name] > 1 else "")
            for row_id, model in models.items()
        }
        return lambda value: names.get(value, "(unknown)")
    if name == "extra_settings":
        return lambda value: str(value or "(none)")
    return _number


def _number(value: object) -> str:
    """Return a setting as text; a damaged archive can hold anything there."""
    is_whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if is_whole else value)  # type: ignore[call-overload]


def _order(value: Value) -> tuple[bool, float, str]:
    (first,) = value
    is_number = isinstance(first, int | float)
    return not is_number, first if is_number else 0, str(first)
