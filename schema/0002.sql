-- Archive format, the step from version 1 to version 2; run as one transaction. README.md explains every column.

-- SQLite reads all rows for each added column that has a CHECK, so the last one has the checks of all.
ALTER TABLE images ADD COLUMN log_prob REAL;
ALTER TABLE images ADD COLUMN dtype TEXT;
ALTER TABLE images ADD COLUMN init_count INTEGER NOT NULL DEFAULT 0;
ALTER TABLE images ADD COLUMN init_md5 TEXT NOT NULL DEFAULT ''
    CHECK (log_prob IS NULL OR log_prob BETWEEN -1e308 AND 1e308)
    CHECK (dtype IS NULL OR dtype IN ('float32', 'bfloat16', 'float16'))
    CHECK (typeof(init_count) = 'integer' AND init_count BETWEEN 0 AND length(quantvec) / 2)
    CHECK (
        CASE WHEN init_count = 0 THEN init_md5 = ''
        ELSE length(init_md5) = 32 AND init_md5 NOT GLOB '*[^0-9a-f]*' END
    );

-- As in version 1, and the same key after other initial tokens makes another sample.
DROP INDEX images_draw;
CREATE UNIQUE INDEX images_draw ON images (
    prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, key0, key1,
    coalesce(generator_id, 0), coalesce(sampler_version, 0), init_md5,
    CASE WHEN generator_id IS NULL THEN quantvec_md5 ELSE '' END
);

-- Unused since no program leases what it samples any more; it stays until the next version of the format.
CREATE TABLE claims (
    digest BLOB PRIMARY KEY NOT NULL CHECK (typeof(digest) = 'blob' AND length(digest) > 0),
    owner TEXT NOT NULL CHECK (length(owner) > 0),
    expires REAL NOT NULL CHECK (typeof(expires) = 'real')
) WITHOUT ROWID;

PRAGMA user_version = 2;
