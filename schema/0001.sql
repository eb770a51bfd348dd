-- Archive format, version 1. schema/README.md explains every column.
-- No STRICT tables and no generated columns: any SQLite since 3.9 (2015) can read the file.

PRAGMA application_id = 1145915185;  -- 0x444D4731, "DMG1"
PRAGMA user_version = 1;

CREATE TABLE prompts (
    id INTEGER PRIMARY KEY,
    desc TEXT NOT NULL UNIQUE CHECK (typeof(desc) = 'text')
);

-- Row 1 is the empty prompt that the model was trained with for its unconditional half.
CREATE TABLE sc_prompts (
    id INTEGER PRIMARY KEY,
    desc TEXT UNIQUE CHECK (typeof(desc) IN ('text', 'null')),
    CHECK ((desc IS NULL) = (id = 1))
);
INSERT INTO sc_prompts (id, desc) VALUES (1, NULL);

CREATE TABLE models (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('generator', 'codec', 'clip')),
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL CHECK (length(sha256) = 64 AND sha256 NOT GLOB '*[^0-9a-f]*'),
    config TEXT NOT NULL,
    grid INTEGER CHECK (grid IS NULL OR (typeof(grid) = 'integer' AND grid > 0)),
    codebook_size INTEGER CHECK (
        codebook_size IS NULL OR (typeof(codebook_size) = 'integer' AND codebook_size BETWEEN 1 AND 65536)
    ),
    image_size INTEGER CHECK (image_size IS NULL OR (typeof(image_size) = 'integer' AND image_size > 0)),
    UNIQUE (kind, sha256, config),
    CHECK ((kind = 'codec') = (grid IS NOT NULL AND codebook_size IS NOT NULL AND image_size IS NOT NULL))
);

CREATE TABLE images (
    id INTEGER PRIMARY KEY,
    prompt_id INTEGER NOT NULL REFERENCES prompts (id),
    sc_prompt_id INTEGER NOT NULL REFERENCES sc_prompts (id),
    top_k INTEGER NOT NULL CHECK (typeof(top_k) = 'integer' AND top_k >= 0),
    top_p REAL NOT NULL CHECK (typeof(top_p) = 'real' AND top_p BETWEEN 0.0 AND 1.0),
    temperature REAL NOT NULL CHECK (typeof(temperature) = 'real' AND temperature BETWEEN 0.0 AND 1e308),
    cond_scale REAL NOT NULL CHECK (typeof(cond_scale) = 'real' AND cond_scale BETWEEN -1e308 AND 1e308),
    key0 INTEGER NOT NULL CHECK (typeof(key0) = 'integer' AND key0 BETWEEN 0 AND 4294967295),
    key1 INTEGER NOT NULL CHECK (typeof(key1) = 'integer' AND key1 BETWEEN 0 AND 4294967295),
    quantvec BLOB NOT NULL CHECK (
        typeof(quantvec) = 'blob' AND length(quantvec) > 0 AND length(quantvec) % 2 = 0
    ),
    quantvec_md5 TEXT NOT NULL CHECK (length(quantvec_md5) = 32 AND quantvec_md5 NOT GLOB '*[^0-9a-f]*'),
    clip_score_input REAL CHECK (clip_score_input IS NULL OR clip_score_input BETWEEN -1e308 AND 1e308),
    clip_score_tokenized REAL CHECK (
        clip_score_tokenized IS NULL OR clip_score_tokenized BETWEEN -1e308 AND 1e308
    ),
    time_start REAL CHECK (time_start IS NULL OR typeof(time_start) = 'real'),
    time_end REAL CHECK (time_end IS NULL OR typeof(time_end) = 'real'),
    time_scored REAL CHECK (time_scored IS NULL OR typeof(time_scored) = 'real'),
    generator_id INTEGER REFERENCES models (id),
    codec_id INTEGER REFERENCES models (id),
    clip_id INTEGER REFERENCES models (id),
    sampler_version INTEGER CHECK (sampler_version IS NULL OR typeof(sampler_version) = 'integer')
);

-- Serves "this prompt, these settings, best first" (ties by id, which ends every index), and counts per group.
CREATE INDEX images_by_group ON images (
    prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, clip_score_input DESC
);

-- What makes a sample: the same one is never stored twice. NULLs differ from each other in a UNIQUE index,
-- hence the coalesce; where the generator is unknown the key alone says little, so the tokens' MD5 joins in.
CREATE UNIQUE INDEX images_draw ON images (
    prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, key0, key1,
    coalesce(generator_id, 0), coalesce(sampler_version, 0),
    CASE WHEN generator_id IS NULL THEN quantvec_md5 ELSE '' END
);
