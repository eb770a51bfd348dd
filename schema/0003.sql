-- Archive format, the step from version 2 to version 3; run as one transaction. README.md explains every column.

-- The identity of the file once more, as a row: tools that copy tables drop the identifiers of the header.
CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    format TEXT NOT NULL CHECK (format = 'dm-generations'),
    version INTEGER NOT NULL CHECK (typeof(version) = 'integer')
);
INSERT INTO meta (id, format, version) VALUES (1, 'dm-generations', 3);

DROP TABLE claims;

-- Shapes in place of the side of a square, and one more kind: judges that are not CLIP.
CREATE TABLE new_models (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('generator', 'codec', 'clip', 'scorer')),
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL CHECK (length(sha256) = 64 AND sha256 NOT GLOB '*[^0-9a-f]*'),
    config TEXT NOT NULL,
    token_shape TEXT CHECK (token_shape IS NULL OR token_shape GLOB '[[]*]'),
    codebook_size INTEGER CHECK (
        codebook_size IS NULL OR (typeof(codebook_size) = 'integer' AND codebook_size BETWEEN 1 AND 65536)
    ),
    image_shape TEXT CHECK (image_shape IS NULL OR image_shape GLOB '[[]*]'),
    UNIQUE (kind, sha256, config),
    CHECK ((kind = 'codec') = (token_shape IS NOT NULL AND codebook_size IS NOT NULL AND image_shape IS NOT NULL))
);
INSERT INTO new_models (id, kind, name, sha256, config, token_shape, codebook_size, image_shape)
SELECT id, kind, name, sha256, config, '[' || grid || ',' || grid || ']', codebook_size,
    '[' || image_size || ',' || image_size || ']'
FROM models;
DROP TABLE models;
ALTER TABLE new_models RENAME TO models;

-- Class labels: a prompt is a text, or a class of a vocabulary.
CREATE TABLE vocabularies (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE CHECK (typeof(name) = 'text' AND length(name) > 0),
    labels TEXT NOT NULL CHECK (labels GLOB '[[]*]')
);
ALTER TABLE prompts ADD COLUMN vocabulary_id INTEGER REFERENCES vocabularies (id);
ALTER TABLE prompts ADD COLUMN class_label INTEGER
    CHECK (class_label IS NULL OR (typeof(class_label) = 'integer' AND class_label >= 0))
    CHECK ((vocabulary_id IS NULL) = (class_label IS NULL));
CREATE UNIQUE INDEX prompts_class ON prompts (vocabulary_id, class_label);  -- texts have NULLs, which all differ

-- Settings beyond the four columns, as canonical JSON; '' where there are none.
ALTER TABLE images ADD COLUMN extra_settings TEXT NOT NULL DEFAULT ''
    CHECK (extra_settings = '' OR extra_settings GLOB '{"*}');
DROP INDEX images_by_group;
CREATE INDEX images_by_group ON images (
    prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, extra_settings, clip_score_input DESC
);
DROP INDEX images_draw;
CREATE UNIQUE INDEX images_draw ON images (
    prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, extra_settings, key0, key1,
    coalesce(generator_id, 0), coalesce(sampler_version, 0), init_md5,
    CASE WHEN generator_id IS NULL THEN quantvec_md5 ELSE '' END
);

-- Scores of any number of judges. The two CLIP columns of images stay as they are.
CREATE TABLE scorers (
    id INTEGER PRIMARY KEY,
    model_id INTEGER NOT NULL REFERENCES models (id),
    reads TEXT NOT NULL CHECK (reads IN ('input', 'tokenized', 'image')),
    UNIQUE (model_id, reads)
);
CREATE TABLE scores (
    id INTEGER PRIMARY KEY,
    image_id INTEGER NOT NULL REFERENCES images (id),
    scorer_id INTEGER NOT NULL REFERENCES scorers (id),
    value REAL NOT NULL CHECK (typeof(value) = 'real' AND value BETWEEN -1e308 AND 1e308),
    time REAL CHECK (time IS NULL OR typeof(time) = 'real'),
    UNIQUE (scorer_id, image_id)
);
CREATE INDEX scores_by_image ON scores (image_id);

CREATE TABLE vectors (
    id INTEGER PRIMARY KEY,
    image_id INTEGER NOT NULL REFERENCES images (id),
    model_id INTEGER NOT NULL REFERENCES models (id),
    vector BLOB NOT NULL CHECK (typeof(vector) = 'blob' AND length(vector) > 0 AND length(vector) % 2 = 0),
    UNIQUE (model_id, image_id)
);
CREATE INDEX vectors_by_image ON vectors (image_id);

-- What people said. Of a pair, image_id was shown first (left), other_id second.
CREATE TABLE ratings (
    id INTEGER PRIMARY KEY,
    rater TEXT NOT NULL CHECK (typeof(rater) = 'text' AND length(rater) > 0),
    kind TEXT NOT NULL CHECK (kind IN ('pair', 'score', 'favourite', 'tag')),
    image_id INTEGER NOT NULL REFERENCES images (id),
    other_id INTEGER REFERENCES images (id),
    value NOT NULL CHECK (
        CASE kind
            WHEN 'pair' THEN value IN ('first', 'second', 'tie', 'bad')
            WHEN 'score' THEN typeof(value) = 'integer' AND value BETWEEN 1 AND 10
            WHEN 'favourite' THEN typeof(value) = 'integer' AND value IN (0, 1)
            ELSE typeof(value) = 'text' AND length(value) > 0
        END
    ),
    time REAL NOT NULL CHECK (typeof(time) = 'real'),
    CHECK ((kind = 'pair') = (other_id IS NOT NULL)),
    CHECK (other_id IS NOT image_id)
);
CREATE UNIQUE INDEX ratings_once ON ratings (rater, kind, image_id, coalesce(other_id, 0), value, time);
CREATE INDEX ratings_by_image ON ratings (image_id);
CREATE INDEX ratings_by_other ON ratings (other_id) WHERE other_id IS NOT NULL;

-- Ready queries for people. No program of this project reads them.
CREATE VIEW view_images AS
SELECT images.id, prompts.desc AS prompt, sc_prompts.desc AS sc_prompt, top_k, top_p, temperature, cond_scale,
    extra_settings, key0, key1, clip_score_input, clip_score_tokenized,
    datetime(time_end, 'unixepoch') AS made, generators.name AS generator, codecs.name AS codec, quantvec_md5
FROM images
LEFT JOIN prompts ON prompts.id = images.prompt_id
LEFT JOIN sc_prompts ON sc_prompts.id = images.sc_prompt_id
LEFT JOIN models AS generators ON generators.id = images.generator_id
LEFT JOIN models AS codecs ON codecs.id = images.codec_id;

CREATE VIEW view_groups AS
SELECT prompts.desc AS prompt, sc_prompts.desc AS sc_prompt, top_k, top_p, temperature, cond_scale, extra_settings,
    count(*) AS image_count, count(DISTINCT quantvec_md5) AS distinct_count, avg(clip_score_input) AS mean_score,
    max(clip_score_input) AS best_score
FROM images
LEFT JOIN prompts ON prompts.id = images.prompt_id
LEFT JOIN sc_prompts ON sc_prompts.id = images.sc_prompt_id
GROUP BY prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, extra_settings;

CREATE VIEW view_scores AS
SELECT scores.image_id, models.name AS scorer, scorers.reads, scores.value
FROM scores JOIN scorers ON scorers.id = scores.scorer_id JOIN models ON models.id = scorers.model_id;

PRAGMA user_version = 3;
