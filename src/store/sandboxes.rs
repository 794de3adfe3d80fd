//! Rows of sandboxes.

use super::value::{
    json_in, micros, optional_json_in, optional_parsed_in, optional_time_in, parsed_in, signed, time_in, to_json, unsigned_in,
};
use super::{Db, StoreError};
use crate::model::{SandboxId, SandboxRecord, SandboxState, SnapshotId, TemplateId};
use rusqlite::{OptionalExtension, Row, named_params, params};
use std::collections::BTreeMap;
use time::OffsetDateTime;

/// Which page of live sandboxes is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct PageQuery {
    /// All of these pairs must match exactly.
    pub metadata: BTreeMap<String, String>,
    /// Rows in these states.
    pub states: Vec<SandboxState>,
    /// By (started_at, id).
    pub order: Order,
    /// Started at this moment or later.
    pub started_after: Option<OffsetDateTime>,
    /// Of this template only.
    pub template: Option<TemplateId>,
    /// At most this many rows.
    pub limit: u32,
    /// Rows beyond this one only.
    pub after: Option<(OffsetDateTime, SandboxId)>,
}

/// Direction of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Newest first.
    Descending,
    /// Oldest first.
    Ascending,
}

const COLUMNS: &str = "id, state, spec_json, created_at, started_at, end_at, kernel_json, control_secret, next_control_secret, \
                       generation, paused_json, snapshot, end_reason_json, ended_at, boot_id";

fn from_row(row: &Row<'_>) -> Result<SandboxRecord, StoreError> {
    let state: String = row.get("state")?;
    Ok(SandboxRecord {
        id: parsed_in(row, "id")?,
        state: SandboxState::from_word(&state).ok_or_else(|| super::value::corrupt("sandboxes.state", &state, "a state"))?,
        spec: json_in(row, "spec_json")?,
        created_at: time_in(row, "created_at")?,
        started_at: time_in(row, "started_at")?,
        end_at: time_in(row, "end_at")?,
        kernel: optional_json_in(row, "kernel_json")?,
        control_secret: row.get("control_secret")?,
        next_control_secret: row.get("next_control_secret")?,
        generation: unsigned_in(row, "generation")?,
        paused: optional_json_in(row, "paused_json")?,
        snapshot: optional_parsed_in(row, "snapshot")?,
        end_reason: optional_json_in(row, "end_reason_json")?,
        ended_at: optional_time_in(row, "ended_at")?,
        boot_id: row.get("boot_id")?,
    })
}

/// A new row with its metadata.
pub fn insert(db: &Db<'_>, record: &SandboxRecord) -> Result<(), StoreError> {
    let sql = "INSERT INTO sandboxes (id, state, template, spec_json, created_at, started_at, end_at, kernel_json, control_secret, \
               next_control_secret, generation, paused_json, snapshot, end_reason_json, ended_at, boot_id) \
               VALUES (:id, :state, :template, :spec, :created_at, :started_at, :end_at, :kernel, :secret, :next_secret, :generation, \
               :paused, :snapshot, :end_reason, :ended_at, :boot_id)";
    write_row(db, sql, record)?;
    let mut statement = db.0.prepare_cached("INSERT INTO sandbox_metadata (sandbox, key, value) VALUES (?1, ?2, ?3)")?;
    for (key, value) in &record.spec.metadata {
        statement.execute(params![record.id.as_str(), key, value])?;
    }
    Ok(())
}

/// Replaces everything but the metadata, which never changes. The row exists: a driver's first act is to insert it.
pub fn update(db: &Db<'_>, record: &SandboxRecord) -> Result<(), StoreError> {
    let sql = "UPDATE sandboxes SET state = :state, template = :template, spec_json = :spec, created_at = :created_at, \
               started_at = :started_at, end_at = :end_at, kernel_json = :kernel, control_secret = :secret, \
               next_control_secret = :next_secret, generation = :generation, paused_json = :paused, snapshot = :snapshot, \
               end_reason_json = :end_reason, ended_at = :ended_at, boot_id = :boot_id WHERE id = :id";
    write_row(db, sql, record)
}

fn write_row(db: &Db<'_>, sql: &str, record: &SandboxRecord) -> Result<(), StoreError> {
    db.0.prepare_cached(sql)?.execute(named_params! {
        ":id": record.id.as_str(),
        ":state": record.state.as_str(),
        ":template": record.spec.template.as_str(),
        ":spec": to_json(&record.spec),
        ":created_at": micros(record.created_at),
        ":started_at": micros(record.started_at),
        ":end_at": micros(record.end_at),
        ":kernel": record.kernel.as_ref().map(to_json),
        ":secret": record.control_secret,
        ":next_secret": record.next_control_secret,
        ":generation": signed(record.generation),
        ":paused": record.paused.as_ref().map(to_json),
        ":snapshot": record.snapshot.map(|id| id.to_string()),
        ":end_reason": record.end_reason.as_ref().map(to_json),
        ":ended_at": record.ended_at.map(micros),
        ":boot_id": record.boot_id,
    })?;
    Ok(())
}

/// The row, whatever its state.
pub fn by_id(db: &Db<'_>, id: SandboxId) -> Result<Option<SandboxRecord>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM sandboxes WHERE id = ?1");
    let mut statement = db.0.prepare_cached(&sql)?;
    let record = statement.query_row([id.as_str()], |row| Ok(from_row(row))).optional()?;
    record.transpose()
}

/// Rows that a server has to take over: all but the final ones.
pub fn unfinished(db: &Db<'_>) -> Result<Vec<SandboxRecord>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM sandboxes WHERE state NOT IN ('killed', 'failed') ORDER BY created_at");
    let mut statement = db.0.prepare_cached(&sql)?;
    let rows = statement.query_map([], |row| Ok(from_row(row)))?;
    rows.map(|row| row?).collect()
}

/// One page of live sandboxes. Rows that come or go meanwhile neither repeat nor hide others: a page begins strictly
/// beyond the last row of the one before.
pub fn page(db: &Db<'_>, query: &PageQuery) -> Result<Vec<SandboxRecord>, StoreError> {
    let mut conditions = vec!["state IN ('running', 'pausing', 'paused', 'resuming')".to_owned()];
    let mut values: Vec<rusqlite::types::Value> = Vec::new();
    let mut place = |value: rusqlite::types::Value| {
        values.push(value);
        format!("?{}", values.len())
    };
    let states: Vec<String> = query.states.iter().map(|state| place(state.as_str().to_owned().into())).collect();
    conditions.push(format!("state IN ({})", states.join(", ")));
    if let Some(at) = query.started_after {
        conditions.push(format!("started_at >= {}", place(micros(at).into())));
    }
    if let Some(template) = query.template {
        conditions.push(format!("template = {}", place(template.to_string().into())));
    }
    if let Some((at, id)) = query.after {
        let beyond = match query.order {
            Order::Descending => "<",
            Order::Ascending => ">",
        };
        conditions.push(format!("(started_at, id) {beyond} ({}, {})", place(micros(at).into()), place(id.to_string().into())));
    }
    for (key, value) in &query.metadata {
        let (key, value) = (place(key.clone().into()), place(value.clone().into()));
        conditions.push(format!("EXISTS (SELECT 1 FROM sandbox_metadata m WHERE m.key = {key} AND m.value = {value} AND m.sandbox = sandboxes.id)"));
    }
    let direction = match query.order {
        Order::Descending => "DESC",
        Order::Ascending => "ASC",
    };
    let limit = place(i64::from(query.limit).into());
    let sql = format!(
        "SELECT {COLUMNS} FROM sandboxes INDEXED BY sandboxes_live WHERE {} ORDER BY started_at {direction}, id {direction} LIMIT {limit}",
        conditions.join(" AND ")
    );
    let mut statement = db.0.prepare_cached(&sql)?;
    let rows = statement.query_map(rusqlite::params_from_iter(values), |row| Ok(from_row(row)))?;
    rows.map(|row| row?).collect()
}

/// How many rows are in this state.
pub fn count_in(db: &Db<'_>, state: SandboxState) -> Result<u64, StoreError> {
    let count: i64 = db.0.prepare_cached("SELECT count(*) FROM sandboxes WHERE state = ?1")?.query_row([state.as_str()], |row| row.get(0))?;
    Ok(count.unsigned_abs())
}

/// How many live sandboxes were made from this template.
pub fn count_live_of(db: &Db<'_>, template: TemplateId) -> Result<u64, StoreError> {
    let sql = "SELECT count(*) FROM sandboxes WHERE template = ?1 AND state NOT IN ('killed', 'failed', 'killing')";
    let count: i64 = db.0.prepare_cached(sql)?.query_row([template.as_str()], |row| row.get(0))?;
    Ok(count.unsigned_abs())
}

/// Which of the dumps in `candidates` a sandbox still needs.
pub fn uses_snapshot(db: &Db<'_>, snapshot: SnapshotId) -> Result<bool, StoreError> {
    let sql = "SELECT EXISTS (SELECT 1 FROM sandboxes WHERE snapshot = ?1 AND state NOT IN ('killed', 'failed'))";
    Ok(db.0.prepare_cached(sql)?.query_row([snapshot.as_str()], |row| row.get(0))?)
}

/// Removes rows that ended before `limit`; answers whose, so that their history can go as well.
pub fn remove_ended_before(db: &Db<'_>, limit: OffsetDateTime) -> Result<Vec<SandboxId>, StoreError> {
    let sql = "DELETE FROM sandboxes WHERE ended_at IS NOT NULL AND ended_at < ?1 RETURNING id";
    let mut statement = db.0.prepare_cached(sql)?;
    let rows = statement.query_map([micros(limit)], |row| Ok(parsed_in(row, "id")))?;
    rows.map(|row| row?).collect()
}
