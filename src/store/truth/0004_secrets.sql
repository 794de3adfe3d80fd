-- Values that sandboxes' requests carry; like the tokens' key they are as safe as the file, which is its owner's only.
CREATE TABLE secrets (
    id            TEXT PRIMARY KEY,
    name          TEXT NOT NULL UNIQUE,
    value         TEXT NOT NULL,
    version       INTEGER NOT NULL,
    metadata_json TEXT NOT NULL,
    hosts_json    TEXT NOT NULL,
    placeholder   TEXT NOT NULL,
    description   TEXT,
    created_at    INTEGER NOT NULL,
    updated_at    INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
