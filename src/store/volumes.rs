//! Rows of volumes, and who has them mounted.

use super::value::{micros, parsed_in, signed, time_in, unsigned_in};
use super::{Db, StoreError};
use crate::model::{ByteSize, SandboxId, TemplateId, VolumeId, VolumeMount, VolumeName, VolumeRecord};
use rusqlite::{OptionalExtension, Row, params};

const COLUMNS: &str = "id, name, size_bytes, created_at";

/// Who would miss a volume.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VolumeUsers {
    /// Sandboxes that have it mounted, paused ones included.
    pub sandboxes: Vec<SandboxId>,
    /// Stored snapshots that have it mounted, by the templates that they are deleted as.
    pub snapshots: Vec<TemplateId>,
}

impl VolumeUsers {
    /// Whether nobody would.
    pub fn is_empty(&self) -> bool {
        self.sandboxes.is_empty() && self.snapshots.is_empty()
    }
}

fn from_row(row: &Row<'_>) -> Result<VolumeRecord, StoreError> {
    Ok(VolumeRecord {
        id: parsed_in(row, "id")?,
        name: parsed_in(row, "name")?,
        size: ByteSize(unsigned_in(row, "size_bytes")?),
        created_at: time_in(row, "created_at")?,
    })
}

/// A new row; its folder is in place already. No other volume has its name.
pub fn insert(db: &Db<'_>, record: &VolumeRecord) -> Result<(), StoreError> {
    let sql = "INSERT INTO volumes (id, name, size_bytes, created_at) VALUES (?1, ?2, ?3, ?4)";
    let row = params![record.id.to_string(), record.name.as_str(), signed(record.size.bytes()), micros(record.created_at)];
    db.0.prepare_cached(sql)?.execute(row)?;
    Ok(())
}

/// The row.
pub fn by_id(db: &Db<'_>, id: VolumeId) -> Result<Option<VolumeRecord>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM volumes WHERE id = ?1");
    let mut statement = db.0.prepare_cached(&sql)?;
    statement.query_row([id.to_string()], |row| Ok(from_row(row))).optional()?.transpose()
}

/// The row with this name.
pub fn by_name(db: &Db<'_>, name: &VolumeName) -> Result<Option<VolumeRecord>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM volumes WHERE name = ?1");
    let mut statement = db.0.prepare_cached(&sql)?;
    statement.query_row([name.as_str()], |row| Ok(from_row(row))).optional()?.transpose()
}

/// All rows, oldest first.
pub fn all(db: &Db<'_>) -> Result<Vec<VolumeRecord>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM volumes ORDER BY created_at, id");
    let mut statement = db.0.prepare_cached(&sql)?;
    let rows = statement.query_map([], |row| Ok(from_row(row)))?;
    rows.map(|row| row?).collect()
}

/// It has grown.
pub fn set_size(db: &Db<'_>, id: VolumeId, size: ByteSize) -> Result<(), StoreError> {
    let sql = "UPDATE volumes SET size_bytes = ?2 WHERE id = ?1";
    db.0.prepare_cached(sql)?.execute(params![id.to_string(), signed(size.bytes())])?;
    Ok(())
}

/// Removes the row; its folder goes afterwards. Nobody uses it; dumps that nothing needs any more may still name it.
pub fn remove(db: &Db<'_>, id: VolumeId) -> Result<(), StoreError> {
    db.0.prepare_cached("DELETE FROM snapshot_volumes WHERE volume = ?1")?.execute([id.to_string()])?;
    db.0.prepare_cached("DELETE FROM volumes WHERE id = ?1")?.execute([id.to_string()])?;
    Ok(())
}

/// Who has it mounted.
pub fn users(db: &Db<'_>, id: VolumeId) -> Result<VolumeUsers, StoreError> {
    let sql = "SELECT DISTINCT s.id FROM sandboxes s, json_each(s.spec_json, '$.volumes') m \
               WHERE s.state NOT IN ('killed', 'failed') AND m.value ->> 'volume' = ?1";
    let mut statement = db.0.prepare_cached(sql)?;
    let rows = statement.query_map([id.to_string()], |row| Ok(parsed_in(row, "id")))?;
    let sandboxes = rows.map(|row| row?).collect::<Result<_, StoreError>>()?;
    // The dump of a paused sandbox is spoken for by that sandbox.
    let sql = "SELECT DISTINCT b.template FROM snapshot_volumes m JOIN builds b ON b.dump = m.snapshot WHERE m.volume = ?1";
    let mut statement = db.0.prepare_cached(sql)?;
    let rows = statement.query_map([id.to_string()], |row| Ok(parsed_in(row, "template")))?;
    let snapshots = rows.map(|row| row?).collect::<Result<_, StoreError>>()?;
    Ok(VolumeUsers { sandboxes, snapshots })
}

/// The first of these mounts whose volume is gone.
pub fn missing<'a>(db: &Db<'_>, mounts: &'a [VolumeMount]) -> Result<Option<&'a VolumeMount>, StoreError> {
    for mount in mounts {
        if by_id(db, mount.volume)?.is_none() {
            return Ok(Some(mount));
        }
    }
    Ok(None)
}
