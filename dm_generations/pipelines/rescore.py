"""Give the images of an archive their CLIP scores."""

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dm_generations.archive import Archive, ImageRow
from dm_generations.archive.records import BadTokensError, square_side, tokens_from_blob
from dm_generations.archive.selection import EVERY, Where
from dm_generations.inference.decoder import Decoder
from dm_generations.inference.scorer import Scorer
from dm_generations.models.loading import Checkpoint
from dm_generations.pipelines.generate import SMALLER_BATCH, finite_or_none
from dm_generations.runtime import compile_cache
from dm_generations.runtime.device import memory_errors


@dataclass
class ScoreReport:
    """What was scored, and what was not.

    Attributes:
        due_count: Images that lacked a score, or had one of another CLIP.
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
    clip: Checkpoint,
    batch_size: int,
    rescore: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    where: Where = EVERY,
) -> ScoreReport:
    """Score the images that lack a score, each batch in a transaction.

    An image is scored as its own codec decodes it: rows of another codec than `codec` are counted and left alone. Rows
    without a codec are taken for rows of `codec`.

    Args:
        archive: Opened for writing.
        codec: What decodes the tokens.
        clip: What scores the images.
        batch_size: Images at a time.
        rescore: Whether images are included that another CLIP scored.
        on_progress: Called with (done, total) images at the start and after every batch.
        where: Which images, a compiled selection.

    Raises:
        UserError: Memory does not hold a batch, or CLIP's tokenizer is missing.
    """
    clip_info = clip.model_info()
    clip_id = archive.find_model(clip_info)
    report = ScoreReport(archive.count_to_score(rescore, clip_id, where))
    if not report.due_count:
        return report
    compile_cache.enable()
    codec_id = archive.find_model(dataclasses.replace(codec.model_info(), token_shape=None))
    grid = None if codec_id is None else square_side(archive.models()[codec_id].token_shape)
    decoder = Decoder.from_checkpoint(codec, batch_size, grid=grid)
    scorer = Scorer.from_checkpoint(clip, batch_size)
    model_names = {row_id: model.name for row_id, model in archive.models().items()}
    prompts = archive.prompts()
    on_progress(done := 0, report.due_count)
    rows = archive.rows_to_score(rescore, clip_id, where)
    while batch := list(itertools.islice(rows, batch_size * decoder.concurrency)):
        own_rows = []
        for row in batch:
            if row.codec_id in (None, codec_id):
                own_rows.append(row)
            else:
                report.count_by_other_codec[model_names.get(row.codec_id, f"id {row.codec_id}")] += 1
        if usable := _read_tokens(own_rows, decoder, report):
            with memory_errors(SMALLER_BATCH):
                decoding = decoder.start(np.stack([tokens for _, tokens in usable]))
                scores = scorer.score(decoding, [prompts.get(row.prompt_id) or "" for row, _ in usable])
            found = [
                (row.id, finite_or_none(score_input), finite_or_none(score_tokenized))
                for (row, _), score_input, score_tokenized in zip(usable, *scores, strict=True)
            ]
            with archive.transaction():
                report.scored_count += archive.set_scores(found, archive.add_model(clip_info), time.time())
        done += len(batch)
        on_progress(done, report.due_count)
    return report


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
