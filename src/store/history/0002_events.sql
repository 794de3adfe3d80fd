-- What was done with sandboxes, and what became of it. Kept beyond the sandboxes themselves.
CREATE TABLE events (
    id            INTEGER PRIMARY KEY,
    at            INTEGER NOT NULL,
    sandbox       TEXT NOT NULL,
    template      TEXT NOT NULL,
    template_name TEXT,
    kind          TEXT NOT NULL,
    error         TEXT
) STRICT;
CREATE INDEX events_at ON events (at);
CREATE INDEX events_of ON events (sandbox, at);
