"""Plots of an archive: CLIP score by setting, use of the codebook, time per image. Needs matplotlib, not JAX.

n: images   V: tokens of the codebook
"""

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dm_generations.archive import Archive
from dm_generations.archive.records import BYTES_PER_TOKEN, PARAM_COLUMNS, TOKEN_DTYPE
from dm_generations.archive.selection import Selection, compile_nonempty
from dm_generations.atomic_io import write_atomic
from dm_generations.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
_NORMAL_95 = 1.96  # standard errors on each side that hold 95% of a normal distribution


def mean_intervals(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[float, float, float, int]]:
    """Return the mean of the values of each x, with the half width of its 95% interval.

    The interval is that of a normal mean, 1.96 standard errors; values that are not finite numbers are left out.

    Args:
        pairs: (x, value) of each image.

    Returns:
        (x, mean, half width, number of values) by x. The half width of a single value is 0.
    """
    values_by_x: dict[float, list[float]] = defaultdict(list)
    for x, value in pairs:
        if all(isinstance(number, int | float) and math.isfinite(number) for number in (x, value)):
            values_by_x[x].append(value)
    found = []
    for x, values in sorted(values_by_x.items()):
        count = len(values)
        error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
        found.append((x, float(np.mean(values)), _NORMAL_95 * error, count))
    return found


def token_counts(blobs: Iterable[Any], codebook_size: int) -> np.ndarray:
    """Return how often each token occurs, int64 (V,). Blobs that are not tokens of this codebook are left out."""
    counts = np.zeros(codebook_size, np.int64)
    for blob in blobs:
        if isinstance(blob, bytes) and len(blob) % BYTES_PER_TOKEN == 0:
            tokens = np.frombuffer(blob, TOKEN_DTYPE)
            if len(tokens) and tokens.max() < codebook_size:
                counts += np.bincount(tokens, minlength=codebook_size)
    return counts


def seconds_per_image(times: Iterable[tuple[Any, Any]]) -> list[tuple[int, float]]:
    """Return (images, seconds of each) of every batch: images with equal start and end were sampled together."""
    counts: dict[tuple[float, float], int] = defaultdict(int)
    for start, end in times:
        if all(isinstance(time, int | float) and math.isfinite(time) for time in (start, end)) and end > start:
            counts[start, end] += 1
    return [(count, (end - start) / count) for (start, end), count in sorted(counts.items())]


def plot_scores(archive: Archive, selection: Selection) -> "Figure":
    """Plot the mean CLIP score by each setting that has several values. Raises UserError if there are no scores."""
    where = compile_nonempty(archive, selection)
    rows = list(archive.scan([*PARAM_COLUMNS, "clip_score_input"], where=where))
    axes = {name: mean_intervals((row[i], row[-1]) for row in rows) for i, name in enumerate(PARAM_COLUMNS)}
    found = {name: points for name, points in axes.items() if len(points) > 1} or {"cond_scale": axes["cond_scale"]}
    if not any(found.values()):
        raise UserError(f"{archive.path}: no scores; run `score` first")
    figure, panels = _panels(len(found), f"CLIP score by setting, mean and 95% interval: {archive.path.name}")
    for panel, (name, points) in zip(panels, found.items(), strict=True):
        positions = range(len(points))  # one step for each value: 0 is "off", next to any number
        _, means, widths, _ = zip(*points, strict=True)
        panel.errorbar(positions, means, yerr=widths, marker="o", capsize=4)
        panel.set_xticks(positions, [f"{x:g}\nn={count:,}" for x, _, _, count in points], fontsize=8)
        panel.set_xlabel(name)
    panels[0].set_ylabel("CLIP score")
    return figure


def plot_tokens(archive: Archive, selection: Selection) -> "Figure":
    """Plot how often each token of the codebook is used, most frequent first."""
    where = compile_nonempty(archive, selection)
    sizes = [
        model.codebook_size for model in archive.models().values() if model.kind == "codec" and model.codebook_size
    ]
    blobs = [blob for (blob,) in archive.scan(["quantvec"], where=where)]
    counts = token_counts(blobs, max(sizes, default=1 << 16))
    used, total = int((counts > 0).sum()), int(counts.sum())
    if not total:
        raise UserError(f"{archive.path}: the tokens of these images cannot be read; `verify` it")
    shares = np.sort(counts[counts > 0])[::-1] / total
    entropy = -float((shares * np.log2(shares)).sum())
    of_all = f"of {len(counts):,} tokens ({used / len(counts):.0%})" if sizes else "tokens"
    title = f"{used:,} {of_all} are used, perplexity {2**entropy:,.0f}: {archive.path.name}"
    figure, (panel,) = _panels(1, title)
    panel.loglog(np.arange(1, used + 1), shares)
    panel.set_xlabel("token, most frequent first")
    panel.set_ylabel("share of all tokens")
    return figure


def plot_times(archive: Archive, selection: Selection) -> "Figure":
    """Plot the time per image against the size of its batch. Raises UserError if no times are recorded."""
    where = compile_nonempty(archive, selection)
    batches = seconds_per_image(archive.scan(["time_start", "time_end"], where=where))
    if not batches:
        raise UserError(f"{archive.path}: no times are recorded for these images")
    figure, (panel,) = _panels(1, f"Sampling time per image: {archive.path.name}")
    counts, seconds = zip(*batches, strict=True)
    panel.scatter(counts, seconds, s=12, alpha=0.6)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("images sampled together")
    panel.set_ylabel("seconds per image")
    return figure


PLOTS = {"score": plot_scores, "tokens": plot_tokens, "time": plot_times}


def write_plot(archive: Archive, kind: str, selection: Selection, path: Path) -> None:
    """Write a plot as PNG or SVG.

    Args:
        archive: The archive.
        kind: A key of PLOTS.
        selection: Which images.
        path: Its extension, one of FORMATS, says which.

    Raises:
        UserError: There is nothing to plot, matplotlib is missing, or the file cannot be written.
    """
    extension = path.suffix.lower()
    if extension not in FORMATS:
        raise UserError(f"{path} does not end in {' or '.join(FORMATS)}")
    buffer = io.BytesIO()
    PLOTS[kind](archive, selection).savefig(buffer, format=extension[1:], dpi=150)
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another file with --out") from error


def _panels(count: int, title: str) -> tuple["Figure", Sequence[Any]]:
    """Return a figure with panels side by side, which share the vertical axis."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib; install 'dm-generations[plot]'") from error
    figure = Figure(figsize=(max(6.4, 3.2 * count), 4.0), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure, panels
