-- Storage that sandboxes share and that outlives them. Its bytes are in volumes/<id>.
CREATE TABLE volumes (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    size_bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What the processes in a dump have mounted. Sandboxes keep theirs in spec_json.
CREATE TABLE snapshot_volumes (
    snapshot TEXT NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    volume   TEXT NOT NULL REFERENCES volumes (id),
    path     TEXT NOT NULL,
    PRIMARY KEY (snapshot, path)
) STRICT, WITHOUT ROWID;
CREATE INDEX snapshot_volumes_by_volume ON snapshot_volumes (volume);
