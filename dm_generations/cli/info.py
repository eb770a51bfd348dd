"""`info`: what an archive holds."""

import argparse
import dataclasses
import json
from collections.abc import Iterator

from dm_generations.archive import Archive, ArchiveInfo, PromptInfo, ValueRange, info
from dm_generations.archive.records import format_shape
from dm_generations.cli.common import (
    add_archive,
    add_selection_options,
    archive_path,
    counted,
    file_size,
    print_line,
    printable,
    selection_from,
    utc_time,
)

HELP = "show what an archive holds"
DESCRIPTION = """\
Print what an archive holds: prompts, sampling settings and their values, how many images, which models
made them, CLIP scores, log-probabilities, sizes. Archives in the 2022 layout are read too. Nothing is changed.
"""
EPILOG = """\
example:
  python -m dm_generations info archive/emoji.db
  python -m dm_generations info archive/emoji.db --where cond_scale=3.. score=25..
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_archive(parser, "archive to describe")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    add_selection_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    selection = selection_from(args)
    with Archive.open(archive_path(args)) as archive:
        found = info(archive, selection)
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        for line in _lines(found):
            print_line(line)
    return 0


def _lines(found: ArchiveInfo) -> Iterator[str]:
    layout = "2022 layout" if found.layout == "2022" else f"format {found.layout}"
    yield f"{found.path}: {layout}, {file_size(found.file_bytes)}"
    sizes = f"{found.smallest_group:,}"
    if found.largest_group != found.smallest_group:
        sizes += f" to {found.largest_group:,}"
    each = f", {sizes} in each" if found.group_count else ""
    yield f"{counted(found.image_count, 'image')} in {counted(found.group_count, 'group')}{each}"
    if found.first_time is not None and found.last_time is not None:
        yield f"sampled from {utc_time(found.first_time)} to {utc_time(found.last_time)}"

    yield from _prompt_lines("prompts", found.prompts)
    yield from _prompt_lines("unconditional prompts", found.sc_prompts)

    yield ""
    yield "settings"
    for name, values in found.axes.items():
        yield f"  {name:<12} {' '.join(str(value) for value in values)}"

    yield ""
    yield "tokens"
    for token in found.tokens:
        grid = f"{token.grid}x{token.grid} tokens" if token.grid else "no square grid"
        yield f"  {grid} ({token.byte_count:,} bytes)  {counted(token.image_count, 'image')}"

    yield ""
    yield "CLIP scores: smallest, mean, largest"
    for name, score in found.scores.items():
        if score.image_count:
            yield f"  {name:<21} {_range(score)}  ({counted(score.image_count, 'image')})"
        else:
            yield f"  {name:<21} none"

    if found.log_prob.image_count:
        yield ""
        yield "log-probability of the tokens: smallest, mean, largest"
        yield f"  {'log_prob':<21} {_range(found.log_prob)}  ({counted(found.log_prob.image_count, 'image')})"
    if found.image_count_by_dtype:
        yield ""
        yield "computed in"
        for dtype, count in found.image_count_by_dtype.items():
            yield f"  {printable(dtype):<21} ({counted(count, 'image')})"
    if found.continued_count:
        yield ""
        yield f"with initial tokens: {counted(found.continued_count, 'image')}"

    yield ""
    yield "models" if found.models else "models: not recorded"
    for model in found.models:
        use = counted(model.image_count, "image")
        shape = model.token_shape
        tokens = f", {format_shape(shape)} of {model.codebook_size:,} tokens" if shape else ""
        pixels = f", {format_shape(model.image_shape)} px" if model.image_shape else ""
        name, digest, kind = (printable(str(text)) for text in (model.name, model.sha256, model.kind))
        yield f"  {_id(model.id)}  {kind:<9}  {name}  sha256 {digest[:12]}{tokens}{pixels}  ({use})"


def _id(value: object) -> str:
    """Return an id, which in a damaged archive can be of any type."""
    return f"{printable(str(value), 20):>3}"


def _range(values: ValueRange) -> str:
    return f"{values.smallest:.2f}  {values.mean:.2f}  {values.largest:.2f}"


def _prompt_lines(title: str, prompts: list[PromptInfo]) -> Iterator[str]:
    yield ""
    yield title
    for prompt in prompts:
        text = "(empty: the model's own)" if prompt.text is None else printable(prompt.text)
        yield f"  {_id(prompt.id)}  {text}  ({counted(prompt.image_count, 'image')})"
