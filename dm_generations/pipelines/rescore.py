"""Give the images of an archive scores of a CLIP or an aesthetic head, and vectors."""

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

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


@dataclass(frozen=True)
class Judges:
    """What images are to get.

    Attributes:
        clip: What scores images by their prompts.
        rescore: Whether images are included that another CLIP scored; its scores are replaced.
        adds: Whether they are included, and keep those scores: the new ones are added to the table of scores.
        head: An aesthetic head on the CLIP's vectors, whose scores are added too.
        vectors: Whether the CLIP's vectors are stored.
        diffusion: What decodes the images, in place of their codec's own decoder; see `judge_of_decoder`.
        decoding: Which of its decodings of an image is scored, from 0.
    """

    clip: Checkpoint
    rescore: bool = False
    adds: bool = False
    head: Checkpoint | None = None
    vectors: bool = False
    diffusion: "Diffusion | None" = None
    decoding: int = 0


def judge_of_decoder(clip: Checkpoint, diffusion: "Diffusion", decoding: int) -> Checkpoint:
    """Return a CLIP as the judge that it is of the images of a diffusion decoder: archives keep its scores apart."""
    number = f", decoding {decoding + 1}" if decoding else ""
    name = f"{clip.name} of {diffusion.checkpoint.name} {diffusion.steps.text}{number}"
    return dataclasses.replace(clip, name=name, sha256=diffusion.hash_with(clip.sha256, decoding))


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

    Raises:
        UserError: Memory does not hold a batch, CLIP's tokenizer is missing, or the head reads vectors of another
            width.
    """
    panel = _Panel(archive, judges)
    report = ScoreReport(archive.count_to_score(*panel.due, where))
    if not report.due_count:
        return report
    compile_cache.enable()
    codec_id = archive.find_model(dataclasses.replace(codec.model_info(), token_shape=None))
    grid = None if codec_id is None else square_side(archive.models()[codec_id].token_shape)
    size: int | Literal["auto"] = batch_size if judges.diffusion is None else "auto"
    decoder = Decoder.from_checkpoint(codec, size, grid=grid, diffusion=judges.diffusion)
    decoder.on_step = on_step
    scorer = Scorer.from_checkpoint(judges.clip, batch_size)
    model_names = {row_id: model.name for row_id, model in archive.models().items()}
    on_progress(done := 0, report.due_count)
    rows = archive.rows_to_score(*panel.due, where)
    while batch := list(itertools.islice(rows, batch_size * decoder.concurrency)):
        own_rows = []
        for row in batch:
            if row.codec_id in (None, codec_id):
                own_rows.append(row)
            else:
                report.count_by_other_codec[model_names.get(row.codec_id, f"id {row.codec_id}")] += 1
        if usable := _read_tokens(own_rows, decoder, report):
            with memory_errors(SMALLER_BATCH):
                keys = [RowKey(*row.key, judges.decoding, panel.prompt_of(row)) for row, _ in usable]
                features = scorer.image_features(decoder.start(np.stack([tokens for _, tokens in usable]), keys))
                panel.store([row for row, _ in usable], features, scorer)
            report.scored_count += len(usable)
        done += len(batch)
        on_progress(done, report.due_count)
    return report


class _Panel:
    """The judges of an archive: what they have not seen, and how what they say is stored."""

    def __init__(self, archive: Archive, judges: Judges):
        self._archive, self._judges = archive, judges
        self._head = None if judges.head is None else AestheticScorer(judges.head, judges.clip)
        self._clip_info = judges.clip.model_info()
        self._prompts = archive.prompts()

    @property
    def due(self) -> tuple[bool, int | None, Due]:
        """The arguments of `Archive.rows_to_score`."""
        head_id = None if self._head is None else self._archive.find_model(self._head.model_info) or 0
        due = Due(self._judges.adds, head_id, self._judges.vectors)
        return self._judges.rescore, self._archive.find_model(self._clip_info), due

    def prompt_of(self, row: ImageRow) -> str:
        """Return the prompt of an image."""
        return self._prompts.get(row.prompt_id) or ""

    def store(self, rows: list[ImageRow], features: np.ndarray, scorer: Scorer) -> None:
        """Store what the judges say of images, in one transaction.

        Args:
            rows: n images.
            features: Of them, float32 (n, P), of unit length.
            scorer: Of the CLIP.
        """
        archive, judges = self._archive, self._judges
        ids = [row.id for row in rows]
        flags = (archive.find_model(self._clip_info), f"({COLUMNS_DUE} OR {SCORES_DUE})", judges.rescore, judges.adds)
        due = set(find_due(archive, ids, *flags))
        places = [place for place, row_id in enumerate(ids) if row_id in due]
        prompts = [self.prompt_of(rows[place]) for place in places]
        scores = scorer.score_features(features[places], prompts) if places else ((), ())
        found = [
            (ids[place], finite_or_none(score_input), finite_or_none(score_tokenized))
            for place, score_input, score_tokenized in zip(places, *scores, strict=True)
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


def _read_tokens(rows: list[ImageRow], decoder: Decoder, report: ScoreReport) -> list[tuple[ImageRow, np.ndarray]]:
    """Return rows with their tokens (L,) uint16; bad rows go to the report."""
    usable = []
    for row in rows:
        try:
            tokens = tokens_from_blob(row.quantvec, row.quantvec_md5, decoder.token_count, decoder.codebook_size)
        except BadTokensError as error:
            report.bad_rows.append(f"image {row.id} was not scored: {error}")
        else:
            usable.append((row, tokens))
    return usable
