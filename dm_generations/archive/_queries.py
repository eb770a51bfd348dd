"""The SQL of an archive's rows. In braces: columns and tables that our layout and that of 2022 have differently."""

from dm_generations.archive._layout import IMAGE_COLUMNS, INSERT_COLUMNS

SELECT_IMAGES = f"SELECT {', '.join(f'{{{name}}}' for name in IMAGE_COLUMNS)} FROM images"
TO_SCORE = """
{clip_score_input} IS NULL OR {clip_score_tokenized} IS NULL
    OR (:rescore AND (:clip_id IS NULL OR {clip_id} IS NOT :clip_id))
"""
SELECT_MODELS = "SELECT id, kind, name, sha256, config, grid, codebook_size, image_size FROM models ORDER BY id"
KEYS_OF_GROUP = """
SELECT key0, key1 FROM images
WHERE prompt_id = ? AND sc_prompt_id = ? AND top_k = ? AND top_p = ? AND temperature = ? AND cond_scale = ?
    AND {generator_id} IS ? AND (? IS NULL OR {sampler_version} = ?) AND {init_md5} = ?
"""
# Written as the index images_draw has it, to be answered from there.
HAS_DRAW = """
SELECT EXISTS (
    SELECT 1 FROM images
    WHERE prompt_id = (SELECT id FROM prompts WHERE desc = ?)
        AND sc_prompt_id = (SELECT id FROM sc_prompts WHERE desc IS ?)
        AND top_k = ? AND top_p = ? AND temperature = ? AND cond_scale = ? AND key0 = ? AND key1 = ?
        AND coalesce({generator_id}, 0) = ? AND coalesce({sampler_version}, 0) = ? AND {init_md5} = ?
)
"""
# The same draw again is left out; unlike OR IGNORE, this still refuses bad values.
INSERT_IMAGE = f"""
INSERT INTO images ({", ".join(INSERT_COLUMNS)}) VALUES ({", ".join("?" * len(INSERT_COLUMNS))})
ON CONFLICT DO NOTHING
"""
SET_SCORES = """
UPDATE images SET clip_score_input = ?, clip_score_tokenized = ?, clip_id = ?, time_scored = ? WHERE id = ?
"""
# Nobody's claim, an expired one or one's own.
CLAIM = """
INSERT INTO claims (digest, owner, expires) VALUES (:digest, :owner, :until)
ON CONFLICT (digest) DO UPDATE SET expires = excluded.expires WHERE owner = excluded.owner
"""
COUNT_GROUPS = """
SELECT prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, count(*) FROM {order}
WHERE (:prompt_ids IS NULL OR prompt_id IN (SELECT value FROM json_each(:prompt_ids)))
  AND (:sc_prompt_ids IS NULL OR sc_prompt_id IN (SELECT value FROM json_each(:sc_prompt_ids)))
GROUP BY prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale
ORDER BY prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale
"""
IDS_BEST_FIRST = """
SELECT id FROM {order}
WHERE prompt_id = ? AND sc_prompt_id = ? AND top_k = ? AND top_p = ? AND temperature = ? AND cond_scale = ?
ORDER BY clip_score_input DESC, id  -- NULL comes last; id breaks ties, so a rerun picks the same pictures
LIMIT ?
"""
# A file in the 2022 layout has no index, and without one each group would cost a pass over all tokens.
# Temporary tables live outside the archive.
INDEX_2022 = """
CREATE TEMP TABLE image_order AS
SELECT {id} AS id, prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale,
    {clip_score_input} AS clip_score_input
FROM main.images;
CREATE INDEX temp.image_order_by_group ON image_order (
    prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, clip_score_input DESC, id
);
"""
