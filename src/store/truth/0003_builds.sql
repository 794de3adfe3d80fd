-- What was asked of a build that comes through the API, and why it failed. A built-in template's build has no row here.
CREATE TABLE build_orders (
    build        TEXT PRIMARY KEY REFERENCES builds (id) ON DELETE CASCADE,
    tags_json    TEXT NOT NULL,
    failure_json TEXT
) STRICT, WITHOUT ROWID;

-- The layer that a build step made of what was there before it; NULL when the step changed no file.
CREATE TABLE step_cache (
    key     TEXT PRIMARY KEY,
    layer   TEXT,
    used_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX step_cache_by_use ON step_cache (used_at);
