"""Give pictures that are in an archive their CLIP scores."""

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dm_generations import compile_cache
from dm_generations.archive import Archive, ImageRow
from dm_generations.decode.codec import Codec
from dm_generations.decode.tokens import BadTokens, tokens_of
from dm_generations.generate.run import finite, make_scorer, memory_errors
from dm_generations.models.loading import Checkpoint
from dm_generations.pipelines.model_records import known_model, model_info, record_model


@dataclass
class ScoreReport:
    """What was scored, and what was not."""

    scored_count: int = 0
    bad_rows: list[str] = field(default_factory=list)  # a line for each
    count_by_other_codec: Counter[str] = field(default_factory=Counter)  # by the codec's name


def score_archive(
    archive: Archive,
    codec: Checkpoint,
    clip: Checkpoint,
    batch_size: int,
    rescore: bool,
    on_rows: Callable[[int], None],
) -> ScoreReport:
    """Score the pictures that lack a score, with `rescore` also those that another CLIP scored, a transaction for each
    batch.

    A picture is judged as the codec that made it shows it: rows of another codec than `codec` are left alone
    and counted. Rows that name no codec are taken for rows of `codec`. `on_rows` hears of rows dealt with.
    """
    compile_cache.enable()
    codec_id = known_model(archive, dataclasses.replace(model_info(codec), grid=None))
    grid = None if codec_id is None else archive.models()[codec_id].grid
    decoder = Codec.from_checkpoint(codec, batch_size, grid=grid)
    scorer = make_scorer(clip, batch_size)
    clip_info = model_info(clip)
    name_by_model_id = {row_id: model.name for row_id, model in archive.models().items()}
    prompt_by_id = archive.prompts()
    report = ScoreReport()

    rows = archive.rows_to_score(rescore, known_model(archive, clip_info))
    while batch := list(itertools.islice(rows, batch_size * decoder.at_once)):
        usable: list[tuple[ImageRow, np.ndarray]] = []
        for row in batch:
            if row.codec_id is not None and row.codec_id != codec_id:
                report.count_by_other_codec[name_by_model_id.get(row.codec_id, f"id {row.codec_id}")] += 1
                continue
            try:
                tokens = tokens_of(row.quantvec, row.quantvec_md5, decoder.token_count, decoder.codebook_size)
            except BadTokens as error:
                report.bad_rows.append(f"picture {row.id} was not scored: {error}")
                continue
            usable.append((row, tokens))
        if usable:
            usable_rows, tokens = zip(*usable, strict=True)
            with memory_errors():
                pictures = decoder.start(np.stack(tokens))
                scores = scorer.score(pictures, [prompt_by_id.get(row.prompt_id) or "" for row in usable_rows])
            found = [
                (row.id, finite(score_input), finite(score_tokenized))
                for row, score_input, score_tokenized in zip(usable_rows, *scores, strict=True)
            ]
            with archive.transaction():
                clip_id = record_model(archive, clip_info)
                report.scored_count += archive.set_scores(found, clip_id, time.time())
        on_rows(len(batch))
    return report
