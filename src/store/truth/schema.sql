-- Times are microseconds since 1970, UTC. Columns ending in _json hold serde_json of the model's type.

CREATE TABLE sandboxes (
    id                  TEXT PRIMARY KEY,
    state               TEXT NOT NULL,
    template            TEXT NOT NULL,
    spec_json           TEXT NOT NULL,
    created_at          INTEGER NOT NULL,
    started_at          INTEGER NOT NULL,
    end_at              INTEGER NOT NULL,
    kernel_json         TEXT,
    control_secret      TEXT NOT NULL,
    next_control_secret TEXT,
    generation          INTEGER NOT NULL,
    paused_json         TEXT,
    snapshot            TEXT,
    end_reason_json     TEXT,
    ended_at            INTEGER,
    boot_id             TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Lists walk this index: live rows only, in the order of pages. State and template are in it as well, so that rows
-- which do not match are never fetched.
CREATE INDEX sandboxes_live ON sandboxes (started_at, id, state, template)
    WHERE state IN ('running', 'pausing', 'paused', 'resuming');
CREATE INDEX sandboxes_by_state ON sandboxes (state);
CREATE INDEX sandboxes_ended ON sandboxes (ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX sandboxes_by_template ON sandboxes (template);
CREATE INDEX sandboxes_by_snapshot ON sandboxes (snapshot) WHERE snapshot IS NOT NULL;

-- One row per pair of a sandbox's metadata, for filters.
CREATE TABLE sandbox_metadata (
    sandbox TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    key     TEXT NOT NULL,
    value   TEXT NOT NULL,
    PRIMARY KEY (key, value, sandbox)
) STRICT, WITHOUT ROWID;
CREATE INDEX sandbox_metadata_by_sandbox ON sandbox_metadata (sandbox);

CREATE TABLE idempotency_keys (
    key          TEXT PRIMARY KEY,
    request_hash TEXT NOT NULL,
    sandbox      TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    created_at   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_keys_by_sandbox ON idempotency_keys (sandbox);

CREATE TABLE templates (
    id              TEXT PRIMARY KEY,
    public          INTEGER NOT NULL,
    created_at      INTEGER NOT NULL,
    updated_at      INTEGER NOT NULL,
    last_spawned_at INTEGER,
    spawn_count     INTEGER NOT NULL,
    build_count     INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- position orders a template's names: the first one is shown.
CREATE TABLE template_aliases (
    alias    TEXT PRIMARY KEY,
    template TEXT NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    position INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX template_aliases_by_template ON template_aliases (template);

CREATE TABLE snapshots (
    id             TEXT PRIMARY KEY,
    sandbox        TEXT NOT NULL,
    key_json       TEXT NOT NULL,
    control_secret TEXT NOT NULL,
    memory_bytes   INTEGER NOT NULL,
    disk_bytes     INTEGER NOT NULL,
    created_at     INTEGER NOT NULL,
    synced         INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE builds (
    id             TEXT PRIMARY KEY,
    template       TEXT NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    state          TEXT NOT NULL,
    layers_json    TEXT NOT NULL,
    env_json       TEXT NOT NULL,
    user_name      TEXT NOT NULL,
    workdir        TEXT NOT NULL,
    start_command  TEXT,
    ready_command  TEXT,
    resources_json TEXT NOT NULL,
    source_sandbox TEXT,
    origin         TEXT NOT NULL,
    dump           TEXT REFERENCES snapshots (id),
    created_at     INTEGER NOT NULL,
    finished_at    INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX builds_by_template ON builds (template, created_at);
CREATE INDEX builds_by_origin ON builds (origin);
CREATE INDEX builds_by_dump ON builds (dump) WHERE dump IS NOT NULL;
CREATE INDEX builds_of_sandboxes ON builds (created_at, dump) WHERE source_sandbox IS NOT NULL;

CREATE TABLE template_tags (
    template   TEXT NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    tag        TEXT NOT NULL,
    build      TEXT NOT NULL REFERENCES builds (id) ON DELETE CASCADE,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (template, tag)
) STRICT, WITHOUT ROWID;
CREATE INDEX template_tags_by_build ON template_tags (build);

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
