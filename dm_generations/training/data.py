"""Training examples straight from archives: an index in memory, and the tokens of a batch read when it is its turn.

n: rows of a batch   L: tokens of an image, row-major over its grid
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from dm_generations.archive import Archive, Selection
from dm_generations.archive.examples import read_examples, read_pairs
from dm_generations.archive.records import BadTokensError, ClassLabel, ModelInfo, tokens_from_blob
from dm_generations.archive.selection import check_known, compile_known
from dm_generations.errors import UserError
from dm_generations.models.loading import Checkpoint

WEIGHTS: Final = ("score", "rating")  # what examples can be weighted by
PREFERENCES: Final = ("score", "rating", "pairs")  # what pairs can be made of
_ROW: Final = [("id", "i8"), ("prompt", "i8"), ("codec", "i8"), ("score", "f8"), ("rating", "f8")]
_TEXT_CHUNK: Final = 1000  # captions that are counted at a time

logger = logging.getLogger(__name__)


def choose_rows(seed: int, step: int, count: int, total: int) -> np.ndarray:
    """Choose the rows (count,) of a step. Each epoch has all rows once, in an order of its own."""
    epochs, places = np.divmod(step * count + np.arange(count), total)
    rows = np.empty_like(places)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, epoch, 1]).permutation(total)
        rows[epochs == epoch] = order[places[epochs == epoch]]
    return rows


def choose_held_out(digests: Sequence[bytes], share: float, what: str) -> np.ndarray:
    """Choose the share of things with the smallest digests; their places are returned.

    Raises:
        UserError: Nothing would be left; `what` names the things.
    """
    count = max(1, round(share * len(digests))) if share else 0
    if count >= len(digests):
        raise UserError(
            f"{len(digests):,} {what} with --held-out {share:g} leave none to learn from; use more, a smaller "
            "share, or --held-out 0"
        )
    return np.array(sorted(range(len(digests)), key=digests.__getitem__)[:count], np.int64)


class Examples:
    """The images of a selection of archives that a model can learn from. A context manager.

    Attributes:
        rows: A structured array: `archive` (its number), `id`, `prompt` (its number in `texts`), `score` and `rating`
            (NaN where there is none) of each image.
        texts: The prompts: texts or classes.
    """

    def __init__(self, paths: Sequence[Path], selection: Selection, codec: Checkpoint, token_count: int):
        """Index the images.

        Args:
            paths: Of the archives.
            selection: Which images. Its `n_best` counts the images of a prompt, of all settings and archives.
            codec: What the model's tokens are of.
            token_count: L.

        Raises:
            UserError: An archive cannot be read, has tokens of another codec, or nothing is left; or images have no
                score, which `n_best` needs.
        """
        self._codec, self._token_count = codec, token_count
        self._archives: list[Archive] = []
        self.texts: list[str | ClassLabel] = []
        try:
            for path in paths:
                self._archives.append(Archive.open(path))
            check_known(selection, self._archives)
            every = replace(selection, n_best=None)
            numbers: dict[str | ClassLabel, int] = {}
            parts = [self._index(number, every, numbers) for number in range(len(paths))]
            self.rows = np.concatenate(parts)
            self.texts = list(numbers)
            if not len(self.rows):
                raise UserError(_nothing_selected(paths, selection))
            if selection.n_best is not None:
                self.require("score", "--n-best")
                self.rows = _best_of_each_prompt(self.rows, selection.n_best)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Examples":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the archives."""
        for archive in self._archives:
            archive.close()

    def require(self, name: str, flag: str) -> None:
        """Check that every image has a value of `name`, "score" or "rating". Raises UserError for one that has none."""
        lacking = self.rows[np.isnan(self.rows[name])]
        if len(lacking):
            path = self._archives[lacking["archive"][0]].path
            remedy = f"`score {path}` adds them" if name == "score" else "choose rated images with --where rating=1.."
            raise UserError(f"{path}: {len(lacking):,} of these images have no {name}, which {flag} needs; {remedy}")

    def split(self, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Split the images by prompt.

        A prompt's place depends on its text alone, so that it stays on its side when an archive grows.

        Args:
            share: Of the prompts that are held out, 0 to below 1.

        Returns:
            Numbers of the images to learn from, and of those held out.

        Raises:
            UserError: One of both is empty.
        """
        used = np.unique(self.rows["prompt"])
        digests = [hashlib.sha256(str(self.texts[number]).encode("utf-8", "replace")).digest() for number in used]
        held_out = used[choose_held_out(digests, share, "prompts")]
        is_held_out = np.isin(self.rows["prompt"], held_out)
        return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)

    def weights(self, name: str | None) -> np.ndarray:
        """Return the weight of each image in the loss, float32 with mean 1.

        Args:
            name: "score" or "rating": exp(z) with z the standard score of the image among those of its prompt. None
                gives all the weight 1.
        """
        if name is None:
            return np.ones(len(self.rows), np.float32)
        self.require(name, "--weight-by")
        _, groups = np.unique(self.rows["prompt"], return_inverse=True)
        counts = np.bincount(groups)
        centred = self.rows[name] - (np.bincount(groups, self.rows[name]) / counts)[groups]
        deviation = np.sqrt(np.bincount(groups, centred**2) / counts)[groups]
        weights = np.exp(np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0))
        return (weights / weights.mean()).astype(np.float32)

    def pairs(self, among: np.ndarray, name: str, gap: float) -> np.ndarray:
        """Make pairs of a better and a worse image of the same prompt.

        Args:
            among: Numbers of images.
            name: "score" or "rating": the best with the worst of a prompt, the second with the second last, and so on.
                "pairs" are those that people judged.
            gap: The smallest difference of scores or ratings; equal ones make no pair.

        Returns:
            Numbers of images (pairs, 2), the better first.

        Raises:
            UserError: There are none.
        """
        found = self._judged(among) if name == "pairs" else self._by_gap(among, name, gap)
        if not len(found):
            if name != "pairs":
                self.require(name, f"--prefer {name}")
            what = (
                "no pair that someone judged" if name == "pairs" else f"no two images with a gap of {gap:g} in {name}"
            )
            raise UserError(f"{self._archives[0].path}: {what} among these images of a prompt; choose another --prefer")
        return found

    def read(self, numbers: Iterable[int]) -> tuple[list[str | ClassLabel], np.ndarray]:
        """Read the prompts and the tokens (n, L) int32 of these images.

        Raises:
            UserError: An image is not there any more, or its tokens are damaged.
        """
        rows = self.rows[np.asarray(numbers)]
        tokens = np.empty((len(rows), self._token_count), np.int32)
        for number in np.unique(rows["archive"]):
            places = np.flatnonzero(rows["archive"] == number)
            archive = self._archives[number]
            found = list(archive.read_rows(rows["id"][places].tolist()))
            if len(found) != len(places):
                raise UserError(f"{archive.path}: images have been removed meanwhile; begin another --run")
            for place, image in zip(places, found, strict=True):
                try:
                    tokens[place] = tokens_from_blob(
                        image.quantvec, image.quantvec_md5, self._token_count, self._codec.config.codebook_size
                    )
                except BadTokensError as error:
                    raise UserError(f"{archive.path}: image {image.id}: {error}; `verify` lists such images") from error
        return [self.texts[number] for number in rows["prompt"]], tokens

    def count_cut(self, tokenizer: Any, length: int) -> int:
        """Count the captions that are longer than the `length` ids that a model reads."""
        used = [self.texts[number] for number in np.unique(self.rows["prompt"])]
        count = 0
        for first in range(0, len(used), _TEXT_CHUNK):
            _, mask = tokenizer.encode(used[first : first + _TEXT_CHUNK], length + 1)
            count += int((mask.sum(axis=1) > length).sum())
        return count

    # Private

    def _index(self, number: int, selection: Selection, numbers: dict[str | ClassLabel, int]) -> np.ndarray:
        """Index the images of one archive; `numbers` are those of the prompts so far."""
        archive = self._archives[number]
        where = compile_known(archive, selection)
        found = np.fromiter(read_examples(archive, where), _ROW)
        self._check_codecs(archive, np.unique(found["codec"]))
        prompts: dict[int, str | ClassLabel | None] = {**archive.prompts(), **archive.classes()}
        ids, inverse = np.unique(found["prompt"], return_inverse=True)
        if unknown := [prompt_id for prompt_id in ids.tolist() if prompt_id not in prompts]:
            raise UserError(f"{archive.path}: images refer to prompt {unknown[0]}, which is missing; run `verify`")
        places = [numbers.setdefault(prompts[prompt_id] or "", len(numbers)) for prompt_id in ids.tolist()]
        rows = np.empty(len(found), [("archive", "i4"), *_ROW])
        for name, _ in _ROW:
            rows[name] = found[name]
        rows["archive"] = number
        rows["prompt"] = np.array(places, np.int64)[inverse] if len(ids) else 0
        return rows

    def _check_codecs(self, archive: Archive, codec_ids: np.ndarray) -> None:
        models, ours = archive.models(), self._codec
        for codec_id in codec_ids.tolist():
            recorded: ModelInfo | None = models.get(codec_id)
            if recorded is not None and recorded.sha256 != ours.sha256:
                theirs = f"{recorded.name!r:.100} ({recorded.sha256[:8]})"
                raise UserError(
                    f"{archive.path} holds tokens of codec {theirs}, the model takes those of {ours.name!r:.100} "
                    f"({ours.sha256[:8]}): choose images with --where codec={ours.sha256[:8]}, name the model's codec "
                    "with --codec, or encode the images anew with `encode`"
                )

    def _by_gap(self, among: np.ndarray, name: str, gap: float) -> np.ndarray:
        rows = self.rows[among]
        order = np.lexsort((rows["id"], -rows[name], rows["prompt"]))
        order = order[~np.isnan(rows[name][order])]
        starts = np.flatnonzero(np.diff(rows["prompt"][order], prepend=-1))
        pairs = []
        for group in np.split(order, starts[1:]):
            half = len(group) // 2
            better, worse = group[:half], group[::-1][:half]
            difference = rows[name][better] - rows[name][worse]
            is_apart = (difference >= gap) & (difference > 0)
            pairs.append(np.stack([among[better[is_apart]], among[worse[is_apart]]], axis=1))
        return np.concatenate(pairs) if pairs else np.empty((0, 2), np.int64)

    def _judged(self, among: np.ndarray) -> np.ndarray:
        places = {(int(self.rows["archive"][i]), int(self.rows["id"][i])): int(i) for i in among}
        pairs = [
            (places[number, better], places[number, worse])
            for number, archive in enumerate(self._archives)
            for better, worse in read_pairs(archive)
            if (number, better) in places and (number, worse) in places
        ]
        of_prompt = self.rows["prompt"]
        return np.array([pair for pair in pairs if of_prompt[pair[0]] == of_prompt[pair[1]]], np.int64).reshape(-1, 2)


def _best_of_each_prompt(rows: np.ndarray, count: int) -> np.ndarray:
    order = np.lexsort((rows["id"], rows["archive"], -rows["score"], rows["prompt"]))
    prompts = rows["prompt"][order]
    starts = np.flatnonzero(np.diff(prompts, prepend=-1))
    lengths = np.diff(starts, append=len(prompts))
    ranks = np.arange(len(prompts)) - np.repeat(starts, lengths)
    return rows[np.sort(order[ranks < count])]


def _nothing_selected(paths: Sequence[Path], selection: Selection) -> str:
    listed = ", ".join(map(str, paths))
    if any(name == "score" for name, _ in selection.ranges):
        return f"{listed}: no image has such a score; `score` adds scores, `info` lists what there is"
    return f"{listed}: no images of this selection; `info` lists what there is"
