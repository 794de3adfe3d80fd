//! Rows of dumps.

use super::value::{json_in, micros, parsed_in, signed, time_in, to_json, unsigned_in};
use super::{Db, StoreError};
use crate::model::{ByteSize, Keeper, SnapshotId, SnapshotRecord};
use rusqlite::{OptionalExtension, Row, params};
use std::collections::BTreeMap;

const COLUMNS: &str = "id, sandbox, key_json, control_secret, memory_bytes, disk_bytes, created_at, synced, \
     (SELECT json_group_array(json_object('volume', v.id, 'name', v.name, 'path', m.path) ORDER BY m.path) \
      FROM snapshot_volumes m JOIN volumes v ON v.id = m.volume WHERE m.snapshot = snapshots.id) AS volumes_json";

fn from_row(row: &Row<'_>) -> Result<SnapshotRecord, StoreError> {
    Ok(SnapshotRecord {
        id: parsed_in(row, "id")?,
        sandbox: parsed_in(row, "sandbox")?,
        key: json_in(row, "key_json")?,
        control_secret: row.get("control_secret")?,
        memory_bytes: ByteSize(unsigned_in(row, "memory_bytes")?),
        disk_bytes: ByteSize(unsigned_in(row, "disk_bytes")?),
        created_at: time_in(row, "created_at")?,
        synced: row.get("synced")?,
        volumes: json_in(row, "volumes_json")?,
    })
}

/// A new row; its folder is in place already.
pub fn insert(db: &Db<'_>, record: &SnapshotRecord) -> Result<(), StoreError> {
    let sql = "INSERT OR REPLACE INTO snapshots (id, sandbox, key_json, control_secret, memory_bytes, disk_bytes, created_at, synced) \
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    db.0.prepare_cached(sql)?.execute(params![
        record.id.as_str(),
        record.sandbox.as_str(),
        to_json(&record.key),
        record.control_secret,
        signed(record.memory_bytes.bytes()),
        signed(record.disk_bytes.bytes()),
        micros(record.created_at),
        record.synced,
    ])?;
    let mut statement = db.0.prepare_cached("INSERT INTO snapshot_volumes (snapshot, volume, path) VALUES (?1, ?2, ?3)")?;
    for mount in &record.volumes {
        statement.execute(params![record.id.as_str(), mount.volume.to_string(), mount.path.as_str()])?;
    }
    Ok(())
}

/// The row.
pub fn by_id(db: &Db<'_>, id: SnapshotId) -> Result<Option<SnapshotRecord>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM snapshots WHERE id = ?1");
    let mut statement = db.0.prepare_cached(&sql)?;
    statement.query_row([id.as_str()], |row| Ok(from_row(row))).optional()?.transpose()
}

/// All rows, oldest first.
pub fn all(db: &Db<'_>) -> Result<Vec<SnapshotRecord>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM snapshots ORDER BY created_at, id");
    let mut statement = db.0.prepare_cached(&sql)?;
    let rows = statement.query_map([], |row| Ok(from_row(row)))?;
    rows.map(|row| row?).collect()
}

/// Bytes of all dumps together.
pub fn bytes_used(db: &Db<'_>) -> Result<ByteSize, StoreError> {
    let sql = "SELECT coalesce(sum(memory_bytes + disk_bytes), 0) FROM snapshots";
    let bytes: i64 = db.0.prepare_cached(sql)?.query_row([], |row| row.get(0))?;
    Ok(ByteSize(bytes.unsigned_abs()))
}

/// Everything of it is on stable storage now.
pub fn mark_synced(db: &Db<'_>, id: SnapshotId) -> Result<(), StoreError> {
    db.0.prepare_cached("UPDATE snapshots SET synced = 1 WHERE id = ?1")?.execute([id.as_str()])?;
    Ok(())
}

/// Removes the row; its folder goes afterwards. A build that named it starts cold from now on.
pub fn remove(db: &Db<'_>, id: SnapshotId) -> Result<(), StoreError> {
    db.0.prepare_cached("UPDATE builds SET dump = NULL WHERE dump = ?1")?.execute([id.as_str()])?;
    db.0.prepare_cached("DELETE FROM snapshots WHERE id = ?1")?.execute([id.as_str()])?;
    Ok(())
}

/// Why each dump is kept; those that nothing needs any more are absent.
pub fn keepers(db: &Db<'_>) -> Result<BTreeMap<SnapshotId, Keeper>, StoreError> {
    let sql = "SELECT dump AS id, coalesce((SELECT alias FROM template_aliases a WHERE a.template = b.template \
               ORDER BY position LIMIT 1), template) AS template, NULL AS sandbox FROM builds b WHERE dump IS NOT NULL \
               UNION ALL SELECT snapshot, NULL, id FROM sandboxes WHERE snapshot IS NOT NULL AND state NOT IN ('killed', 'failed')";
    let mut statement = db.0.prepare_cached(sql)?;
    let rows = statement.query_map([], |row| {
        let id = parsed_in(row, "id");
        let template: Option<String> = row.get("template")?;
        Ok((id, template.map_or_else(|| parsed_in(row, "sandbox").map(Keeper::Sandbox), |name| Ok(Keeper::Template(name)))))
    })?;
    rows.map(|row| row.map_err(StoreError::from).and_then(|(id, keeper)| Ok((id?, keeper?)))).collect()
}

/// Dumps that no paused sandbox and no build needs any more.
pub fn unused(db: &Db<'_>) -> Result<Vec<SnapshotId>, StoreError> {
    let sql = "SELECT id FROM snapshots s WHERE NOT EXISTS (SELECT 1 FROM builds WHERE dump = s.id) \
               AND NOT EXISTS (SELECT 1 FROM sandboxes WHERE snapshot = s.id AND state NOT IN ('killed', 'failed'))";
    let mut statement = db.0.prepare_cached(sql)?;
    let rows = statement.query_map([], |row| Ok(parsed_in(row, "id")))?;
    rows.map(|row| row?).collect()
}
