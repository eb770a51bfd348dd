"""The SQL of an archive. Older files are read through views with the same columns, so each query has one form."""

from typing import Final

from dm_generations.archive.records import GROUP_COLUMNS, IMAGE_COLUMNS, INSERT_COLUMNS, ModelInfo

_GROUP: Final = ", ".join(GROUP_COLUMNS)
_IN_GROUP: Final = " AND ".join(f"{name} = ?" for name in GROUP_COLUMNS)
_VALUES: Final = ", ".join("?" * len(INSERT_COLUMNS))
_INSERT_IMAGE: Final = f"INSERT INTO images ({', '.join(INSERT_COLUMNS)}) VALUES ({_VALUES})"

SELECT_MODELS: Final = f"SELECT id, {', '.join(ModelInfo.__dataclass_fields__)} FROM models ORDER BY id"
SELECT_CLASSES: Final = """
SELECT id, vocabulary_id, class_label FROM prompts WHERE vocabulary_id IS NOT NULL OR class_label IS NOT NULL
"""
FIND_MODEL: Final = "SELECT id FROM models WHERE kind = ? AND sha256 = ? AND config = ?"
INSERT_MODEL: Final = """
INSERT INTO models (kind, sha256, config, name, codebook_size, token_shape, image_shape) VALUES (?, ?, ?, ?, ?, ?, ?)
"""

# By group. `{table}` is images, or a temporary table with the same index where a file has none.
COUNT_GROUPS: Final = f"""
SELECT {_GROUP}, count(*) FROM {{table}}
WHERE (:prompt_ids IS NULL OR prompt_id IN (SELECT value FROM json_each(:prompt_ids)))
  AND (:sc_prompt_ids IS NULL OR sc_prompt_id IN (SELECT value FROM json_each(:sc_prompt_ids)))
GROUP BY {_GROUP} ORDER BY {_GROUP}
"""
IDS_BEST_FIRST: Final = f"""
SELECT id FROM {{table}} WHERE {_IN_GROUP}
ORDER BY clip_score_input DESC, id  -- NULL comes last; id breaks ties, so a rerun picks the same images
LIMIT ?
"""
# The score of any judge: of the table, or of the columns if they are a CLIP's own.
SCORE_OF_IMAGE: Final = """coalesce(
    (SELECT value FROM scores WHERE scorer_id = ? AND image_id = images.id), CASE clip_id WHEN ? THEN {column} END
)"""
IDS_BEST_FIRST_BY: Final = f"SELECT id FROM images WHERE {_IN_GROUP} ORDER BY {{value}} DESC, id LIMIT ?"
KEYS_OF_GROUP: Final = f"""
SELECT key0, key1 FROM images
WHERE {_IN_GROUP} AND generator_id IS ? AND (? IS NULL OR sampler_version = ?) AND init_md5 = ?
"""

# By id.
SELECT_IMAGES: Final = f"SELECT {', '.join(IMAGE_COLUMNS)} FROM images WHERE id IN (SELECT value FROM json_each(?))"
_HAS_SCORE: Final = """EXISTS (
    SELECT 1 FROM scores JOIN scorers ON scorers.id = scorer_id
    WHERE image_id = images.id AND model_id = {model_id} AND reads = '{reads}'
)"""
_LACKS_SCORE: Final = "(clip_score_input IS NULL OR clip_score_tokenized IS NULL)"
# Whether the columns of an image take scores of the CLIP :clip_id: they are empty, or they are its own and not whole.
COLUMNS_DUE: Final = f"""(
    (clip_score_input IS NULL AND clip_score_tokenized IS NULL) OR ({_LACKS_SCORE} AND clip_id = :clip_id)
    OR (:rescore AND clip_id IS NOT :clip_id)
)"""
# Whether the table of scores takes them: the columns are another CLIP's.
SCORES_DUE: Final = f"""(
    ({_LACKS_SCORE} OR :adds) AND clip_id IS NOT :clip_id
    AND NOT {_HAS_SCORE.format(model_id=":clip_id", reads="input")}
)"""
TO_SCORE: Final = f"""(
    {COLUMNS_DUE} OR {SCORES_DUE}
    OR (:head_id IS NOT NULL AND NOT {_HAS_SCORE.format(model_id=":head_id", reads="image")})
    OR (:vectors AND NOT EXISTS (SELECT 1 FROM vectors WHERE model_id = :clip_id AND image_id = images.id))
)"""
COUNT_TO_SCORE: Final = f"SELECT count(*) FROM images WHERE {TO_SCORE}"

# Writing. The same sample is stored once; unlike OR IGNORE, this still refuses bad values.
INSERT_IMAGE: Final = f"{_INSERT_IMAGE} ON CONFLICT DO NOTHING"
# A sample that the target has without scores gets the source's, if the tokens are the same: on other hardware, or with
# another dtype, the same key can give other tokens.
INSERT_OR_FILL_SCORES: Final = f"""
{_INSERT_IMAGE}
ON CONFLICT DO UPDATE SET clip_score_input = excluded.clip_score_input,
    clip_score_tokenized = excluded.clip_score_tokenized, clip_id = excluded.clip_id,
    time_scored = excluded.time_scored
WHERE clip_score_input IS NULL AND excluded.clip_score_input IS NOT NULL AND quantvec_md5 = excluded.quantvec_md5
"""
SET_SCORES: Final = """
UPDATE images SET clip_score_input = ?, clip_score_tokenized = ?, clip_id = ?, time_scored = ? WHERE id = ?
"""

# About all images.
COUNT_LENGTHS: Final = """
SELECT length(quantvec), count(*) FROM images WHERE typeof(quantvec) = 'blob' GROUP BY 1 ORDER BY 1
"""
RANGE: Final = """
SELECT count({column}), min({column}), avg({column}), max({column}) FROM images
WHERE typeof({column}) IN ('real', 'integer')
"""
COUNT_DTYPES: Final = "SELECT dtype, count(*) FROM images WHERE typeof(dtype) = 'text' GROUP BY 1 ORDER BY 1"
COUNT_CONTINUED: Final = "SELECT count(*) FROM images WHERE init_count > 0"
COUNT_BY_MODEL: Final = "SELECT {column}, count(*) FROM images GROUP BY 1"
FIRST_TIME: Final = "SELECT min(time_start) FROM images WHERE typeof(time_start) = 'real'"
LAST_TIME: Final = "SELECT max(time_end) FROM images WHERE typeof(time_end) = 'real'"
USUAL_LENGTH: Final = """
SELECT length(quantvec) FROM images WHERE typeof(quantvec) = 'blob' AND codec_id IS NULL
GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1
"""
