"""Give the images of an archive scores of a CLIP or an aesthetic head, and vectors."""

import dataclasses
import itertools
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from dm_generations.archive import Archive, ImageRow
from dm_generations.archive.queries import COLUMNS_DUE, SCORES_DUE
from dm_generations.archive.records import BadTokensError, square_side, tokens_from_blob
from dm_generations.archive.scores import Due, add_clip_scores, add_scores, find_due, scorer_id
from dm_generations.archive.selection import EVERY, Where
from dm_generations.archive.vectors import VECTOR_DTYPE, add_vectors
from dm_generations.inference.decoder import Decoder, RowKey
from dm_generations.inference.scorer import AestheticScorer, Scorer
from dm_generations.models.loading import Checkpoint
from dm_generations.pipelines.generate import SMALLER_BATCH, finite_or_none
from dm_generations.runtime import compile_cache
from dm_generations.runtime.device import memory_errors

if TYPE_CHECKING:
    from dm_generations.inference.diffusion import Diffusion
    from dm_generations.runtime.ray_pool import RayPool

# Of n images: tokens (n, L) uint16, their keys, and the places of those that CLIP is to score.
_Work = tuple[np.ndarray, list[RowKey], list[int]]
# Features of the n images, float32 (n, P), and the two scores of those images, float32.
_Judged = tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]
_BATCHES = 2  # of decoding, in what is scored at a time: as many as a CPU computes together


class _Batch(NamedTuple):
    rows: list[ImageRow]
    places: list[int]  # of those that CLIP is to score
    work: _Work
    done_count: int  # rows up to here


@dataclass(frozen=True)
class Judges:
    """What images are to get.

    Attributes:
        clip: The CLIP that scores images by their prompts.
        rescore: Whether images are included that another CLIP scored; its scores are replaced.
        adds: Whether they are included, and keep those scores: the new ones are added to the table of scores.
        head: An aesthetic head on the CLIP's vectors, whose scores are added too.
        vectors: Whether the CLIP's vectors are stored.
        diffusion: What decodes the images, in place of their codec's own decoder.
        decoding: Which of its decodings of an image is scored, from 0.
    """

    clip: Checkpoint
    rescore: bool = False
    adds: bool = False
    head: Checkpoint | None = None
    vectors: bool = False
    diffusion: "Diffusion | None" = None
    decoding: int = 0

    @property
    def judge(self) -> Checkpoint:
        """The CLIP by the name and hash of the judge that it is here: archives keep scores of each decoding apart."""
        if self.diffusion is None:
            return self.clip
        number = f", decoding {self.decoding + 1}" if self.decoding else ""
        name = f"{self.clip.name} of {self.diffusion.checkpoint.name} {self.diffusion.steps.text}{number}"
        digest = self.diffusion.hash_with(self.clip.sha256, self.decoding)
        return dataclasses.replace(self.clip, name=name, sha256=digest)


@dataclass
class ScoreReport:
    """What was scored, and what was not.

    Attributes:
        due_count: Images that lacked something.
        bad_rows: A line for each row that cannot be decoded.
        count_by_other_codec: Images of other codecs, by the codec's name.
    """

    due_count: int = 0
    scored_count: int = 0
    bad_rows: list[str] = field(default_factory=list)
    count_by_other_codec: Counter[str] = field(default_factory=Counter)


def score_archive(
    archive: Archive,
    codec: Checkpoint,
    judges: Judges,
    batch_size: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    where: Where = EVERY,
    on_step: Callable[[int, int], None] | None = None,
    pool: "RayPool | None" = None,
) -> ScoreReport:
    """Score the images that lack a score, each batch in a transaction.

    An image is scored as its own codec decodes it: rows of another codec than `codec` are counted and left alone. Rows
    without a codec are taken for rows of `codec`.

    Args:
        archive: Opened for writing.
        codec: What decodes the tokens.
        judges: What the images are to get.
        batch_size: Images at a time.
        on_progress: Called with (done, total) images at the start and after every batch.
        where: Which images, a compiled selection.
        on_step: Called with how many steps of a batch a diffusion decoder has taken, and of how many.
        pool: What decodes and scores; None is this process. The archive is written here in any case.

    Raises:
        UserError: Memory does not hold a batch, CLIP's tokenizer is missing, or the head reads vectors of another
            width.
    """
    panel = _Panel(archive, judges)
    report = ScoreReport(archive.count_to_score(*panel.due, where))
    if not report.due_count:
        return report
    codec_id = archive.find_model(dataclasses.replace(codec.model_info(), token_shape=None))
    grid = (None if codec_id is None else square_side(archive.models()[codec_id].token_shape)) or codec.config.grid
    rows = archive.rows_to_score(*panel.due, where)
    count = batch_size if judges.diffusion is not None else _BATCHES * batch_size
    batches, sent = itertools.tee(panel.read(rows, count, codec, codec_id, grid, report))
    work = (batch.work for batch in sent)
    make = partial(_make_judge, codec, judges.clip, judges.diffusion, batch_size, grid)
    results = map(make(on_step), work) if pool is None else pool.map(make, work)
    on_progress(0, report.due_count)
    for judged, batch in zip(results, batches, strict=False):
        panel.store(batch, *judged)
        report.scored_count += len(batch.rows)
        on_progress(batch.done_count, report.due_count)
    return report


def _make_judge(
    codec: Checkpoint,
    clip: Checkpoint,
    diffusion: "Diffusion | None",
    batch_size: int,
    grid: int,
    on_step: Callable[[int, int], None] | None = None,
) -> Callable[[_Work], _Judged]:
    """Return what decodes and scores, with its models on the devices of this process."""
    compile_cache.enable()
    size: int | Literal["auto"] = batch_size if diffusion is None else "auto"
    decoder = Decoder.from_checkpoint(codec, size, grid=grid, diffusion=diffusion)
    decoder.on_step = on_step
    scorer = Scorer.from_checkpoint(clip, batch_size)
    nothing = np.empty(0, np.float32)

    def judge(work: _Work) -> _Judged:
        tokens, keys, places = work
        with memory_errors(SMALLER_BATCH):
            features = scorer.image_features(decoder.start(tokens, keys))
            prompts = [keys[place].prompt or "" for place in places]
            return features, scorer.score_features(features[places], prompts) if places else (nothing, nothing)

    return judge


class _Panel:
    """The judges of an archive: what they have not seen, and how what they say is stored."""

    def __init__(self, archive: Archive, judges: Judges):
        self._archive, self._judges = archive, judges
        self._head = None if judges.head is None else AestheticScorer(judges.head, judges.judge)
        self._clip_info = judges.judge.model_info()
        self._prompts = archive.prompts()

    @property
    def due(self) -> tuple[bool, int | None, Due]:
        """The arguments of `Archive.rows_to_score`."""
        head_id = None if self._head is None else self._archive.find_model(self._head.model_info) or 0
        due = Due(self._judges.adds, head_id, self._judges.vectors)
        return self._judges.rescore, self._archive.find_model(self._clip_info), due

    def read(
        self,
        rows: Iterator[ImageRow],
        count: int,
        codec: Checkpoint,
        codec_id: int | None,
        grid: int,
        report: ScoreReport,
    ) -> Iterator[_Batch]:
        """Yield what is to be scored, from `count` rows at a time; the report gets the other rows."""
        names: dict[int | None, str] = {row_id: model.name for row_id, model in self._archive.models().items()}
        done = 0
        while batch := list(itertools.islice(rows, count)):
            done += len(batch)
            is_own = [row.codec_id in (None, codec_id) for row in batch]
            others = itertools.compress(batch, map(operator.not_, is_own))
            report.count_by_other_codec.update(names.get(row.codec_id, f"id {row.codec_id}") for row in others)
            own_rows = list(itertools.compress(batch, is_own))
            if usable := _read_tokens(own_rows, grid**2, codec.config.codebook_size, report):
                usable_rows = [row for row, _ in usable]
                places = self._find_due(usable_rows)
                tokens = np.stack([tokens for _, tokens in usable])
                yield _Batch(usable_rows, places, (tokens, list(map(self._key, usable_rows)), places), done)

    def _key(self, row: ImageRow) -> RowKey:
        return RowKey(*row.key, self._judges.decoding, self._prompts.get(row.prompt_id) or "")

    def _find_due(self, rows: list[ImageRow]) -> list[int]:
        """Return the places of those images that CLIP is to score."""
        ids = [row.id for row in rows]
        clip_id = self._archive.find_model(self._clip_info)
        condition = f"({COLUMNS_DUE} OR {SCORES_DUE})"
        due = set(find_due(self._archive, ids, clip_id, condition, self._judges.rescore, self._judges.adds))
        return [place for place, row_id in enumerate(ids) if row_id in due]

    def store(self, batch: _Batch, features: np.ndarray, scores: tuple[np.ndarray, np.ndarray]) -> None:
        """Store what the judges say of n images, in one transaction.

        Args:
            batch: The images.
            features: Of all, float32 (n, P), of unit length.
            scores: Of those at `places`, for the prompt as typed and as CLIP reads it back.
        """
        archive, judges = self._archive, self._judges
        ids = [row.id for row in batch.rows]
        found = [
            (ids[place], finite_or_none(score_input), finite_or_none(score_tokenized))
            for place, score_input, score_tokenized in zip(batch.places, *scores, strict=True)
        ]
        now = time.time()
        with archive.transaction():
            clip_id = archive.add_model(self._clip_info)
            add_clip_scores(archive, found, clip_id, now, judges.rescore, judges.adds)
            if self._head is not None:
                head_scores = map(finite_or_none, self._head.score_features(features))
                head_id = scorer_id(archive, archive.add_model(self._head.model_info), "image")
                add_scores(archive, head_id, zip(ids, head_scores, strict=True), now)
            if judges.vectors:
                blobs = (vector.tobytes() for vector in features.astype(VECTOR_DTYPE))
                add_vectors(archive, clip_id, zip(ids, blobs, strict=True))


def _read_tokens(
    rows: list[ImageRow], token_count: int, codebook_size: int, report: ScoreReport
) -> list[tuple[ImageRow, np.ndarray]]:
    """Return rows with their tokens (L,) uint16; bad rows go to the report."""
    usable = []
    for row in rows:
        try:
            tokens = tokens_from_blob(row.quantvec, row.quantvec_md5, token_count, codebook_size)
        except BadTokensError as error:
            report.bad_rows.append(f"image {row.id} was not scored: {error}")
        else:
            usable.append((row, tokens))
    return usable
