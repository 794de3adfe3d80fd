-- Metrics and logs. Times are microseconds since 1970, UTC. Bounded by the store, oldest rows dropped first.

CREATE TABLE metrics (
    sandbox      TEXT NOT NULL,
    at           INTEGER NOT NULL,
    cpu_count    INTEGER NOT NULL,
    cpu_used_pct REAL NOT NULL,
    memory_used  INTEGER NOT NULL,
    memory_total INTEGER NOT NULL,
    memory_cache INTEGER NOT NULL,
    disk_used    INTEGER NOT NULL,
    disk_total   INTEGER NOT NULL
) STRICT;
CREATE INDEX metrics_of ON metrics (sandbox, at);

-- scope is the id of a sandbox or of a build.
CREATE TABLE logs (
    scope       TEXT NOT NULL,
    at          INTEGER NOT NULL,
    level       INTEGER NOT NULL,
    message     TEXT NOT NULL,
    fields_json TEXT NOT NULL
) STRICT;
CREATE INDEX logs_of ON logs (scope, at);

-- How far an agent's own log has been read.
CREATE TABLE log_cursors (
    scope TEXT PRIMARY KEY,
    seq   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What was done with sandboxes, and what became of it. Kept beyond the sandboxes themselves.
CREATE TABLE events (
    id            INTEGER PRIMARY KEY,
    at            INTEGER NOT NULL,
    sandbox       TEXT NOT NULL,
    template      TEXT NOT NULL,
    template_name TEXT,
    kind          TEXT NOT NULL,
    error         TEXT
, failure TEXT) STRICT;
CREATE INDEX events_at ON events (at);
CREATE INDEX events_of ON events (sandbox, at);
