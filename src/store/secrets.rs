//! Rows of stored secrets.

use super::value::{json_in, micros, parsed_in, time_in, to_json};
use super::{Db, StoreError};
use crate::model::SecretRecord;
use rusqlite::{OptionalExtension, Row, params};

const COLUMNS: &str = "id, name, value, version, metadata_json, hosts_json, placeholder, description, created_at, updated_at";

fn from_row(row: &Row<'_>) -> Result<SecretRecord, StoreError> {
    Ok(SecretRecord {
        id: parsed_in(row, "id")?,
        name: row.get("name")?,
        value: row.get("value")?,
        version: row.get("version")?,
        metadata: json_in(row, "metadata_json")?,
        hosts: json_in(row, "hosts_json")?,
        placeholder: row.get("placeholder")?,
        description: row.get("description")?,
        created_at: time_in(row, "created_at")?,
        updated_at: time_in(row, "updated_at")?,
    })
}

/// A new row, or the new content of one. Its name must not be another's.
pub fn put(db: &Db<'_>, record: &SecretRecord) -> Result<(), StoreError> {
    let sql = format!(
        "INSERT INTO secrets ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10) ON CONFLICT (id) DO UPDATE SET \
         name = ?2, value = ?3, version = ?4, metadata_json = ?5, hosts_json = ?6, placeholder = ?7, description = ?8, updated_at = ?10"
    );
    db.0.prepare_cached(&sql)?.execute(params![
        record.id.as_str(),
        record.name,
        record.value,
        record.version,
        to_json(&record.metadata),
        to_json(&record.hosts),
        record.placeholder,
        record.description,
        micros(record.created_at),
        micros(record.updated_at),
    ])?;
    Ok(())
}

/// The secret with this id or name.
pub fn find(db: &Db<'_>, key: &str) -> Result<Option<SecretRecord>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM secrets WHERE id = ?1 OR name = ?1");
    let mut statement = db.0.prepare_cached(&sql)?;
    statement.query_row([key], |row| Ok(from_row(row))).optional()?.transpose()
}

/// All of them, oldest first.
pub fn all(db: &Db<'_>) -> Result<Vec<SecretRecord>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM secrets ORDER BY created_at, id");
    let mut statement = db.0.prepare_cached(&sql)?;
    let rows = statement.query_map([], |row| Ok(from_row(row)))?;
    rows.map(|row| row?).collect()
}

/// Removes the row with this id or name; what it was.
pub fn remove(db: &Db<'_>, key: &str) -> Result<Option<SecretRecord>, StoreError> {
    let found = find(db, key)?;
    if let Some(record) = &found {
        db.0.prepare_cached("DELETE FROM secrets WHERE id = ?1")?.execute([record.id.as_str()])?;
    }
    Ok(found)
}
