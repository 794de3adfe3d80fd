//! Rows of builds under way: what was asked, how it went, and what their steps left for the next build.

use super::value::{json_in, micros, to_json};
use super::{Db, StoreError, templates};
use crate::model::{BuildFailure, BuildId, BuildRecord, BuildState};
use rusqlite::{OptionalExtension, params};
use time::OffsetDateTime;

/// A registered build that will get these tags once it is ready.
pub fn insert(db: &Db<'_>, record: &BuildRecord, tags: &[String]) -> Result<(), StoreError> {
    templates::insert_build(db, record)?;
    let sql = "INSERT INTO build_orders (build, tags_json) VALUES (?1, ?2)";
    db.0.prepare_cached(sql)?.execute(params![record.id.to_string(), to_json(&tags)])?;
    Ok(())
}

/// The tags that it gets; `None` of a build that nobody ordered.
pub fn tags_of(db: &Db<'_>, build: BuildId) -> Result<Option<Vec<String>>, StoreError> {
    let mut statement = db.0.prepare_cached("SELECT tags_json FROM build_orders WHERE build = ?1")?;
    statement.query_row([build.to_string()], |row| Ok(json_in(row, "tags_json"))).optional()?.transpose()
}

/// Moves a build from one state to another; `false` when it is in neither of them or not there.
pub fn change_state(db: &Db<'_>, build: BuildId, from: BuildState, to: BuildState) -> Result<bool, StoreError> {
    let sql = "UPDATE builds SET state = ?3 WHERE id = ?1 AND state = ?2";
    let words = (templates::state_word(from), templates::state_word(to));
    Ok(db.0.prepare_cached(sql)?.execute(params![build.to_string(), words.0, words.1])? > 0)
}

/// Keeps what a build under way has become, whatever else is in its row.
pub fn set_result(db: &Db<'_>, record: &BuildRecord) -> Result<(), StoreError> {
    let sql = "UPDATE builds SET layers_json = ?2, env_json = ?3, user_name = ?4, workdir = ?5, start_command = ?6, \
               ready_command = ?7, origin = ?8 WHERE id = ?1 AND state = 'building'";
    db.0.prepare_cached(sql)?.execute(params![
        record.id.to_string(),
        to_json(&record.layers),
        to_json(&record.env),
        record.user,
        record.workdir,
        record.start_command,
        record.ready_command,
        record.origin,
    ])?;
    Ok(())
}

/// Ends a build that is not ready.
pub fn fail(db: &Db<'_>, build: BuildId, failure: &BuildFailure, at: OffsetDateTime) -> Result<(), StoreError> {
    let sql = "UPDATE builds SET state = 'error', finished_at = ?2 WHERE id = ?1 AND state <> 'ready'";
    if db.0.prepare_cached(sql)?.execute(params![build.to_string(), micros(at)])? > 0 {
        let sql = "UPDATE build_orders SET failure_json = ?2 WHERE build = ?1";
        db.0.prepare_cached(sql)?.execute(params![build.to_string(), to_json(failure)])?;
    }
    Ok(())
}

/// Why it failed.
pub fn failure_of(db: &Db<'_>, build: BuildId) -> Result<Option<BuildFailure>, StoreError> {
    let mut statement = db.0.prepare_cached("SELECT failure_json FROM build_orders WHERE build = ?1 AND failure_json IS NOT NULL")?;
    statement.query_row([build.to_string()], |row| Ok(json_in(row, "failure_json"))).optional()?.transpose()
}

/// Lets a build that was under way be used, by its tags too. `false` when it is gone: its template was removed meanwhile.
pub fn finish(db: &Db<'_>, build: BuildId, at: OffsetDateTime) -> Result<bool, StoreError> {
    let sql = "UPDATE builds SET state = 'ready', finished_at = ?2 WHERE id = ?1 AND state = 'building'";
    if db.0.prepare_cached(sql)?.execute(params![build.to_string(), micros(at)])? == 0 {
        return Ok(false);
    }
    let Some(record) = templates::build(db, build)? else { return Ok(false) };
    for tag in tags_of(db, build)?.unwrap_or_default() {
        templates::set_tag(db, record.template, &tag, build, at)?;
    }
    Ok(true)
}

/// Builds that somebody works on, or did when the server died.
pub fn under_way(db: &Db<'_>) -> Result<Vec<BuildId>, StoreError> {
    let mut statement = db.0.prepare_cached("SELECT id FROM builds WHERE state = 'building'")?;
    let rows = statement.query_map([], |row| Ok(super::value::parsed_in(row, "id")))?;
    rows.map(|row| row?).collect()
}

/// Builds that were registered before then and never started.
pub fn waiting_since(db: &Db<'_>, at: OffsetDateTime) -> Result<Vec<BuildId>, StoreError> {
    let mut statement = db.0.prepare_cached("SELECT id FROM builds WHERE state = 'waiting' AND created_at < ?1")?;
    let rows = statement.query_map([micros(at)], |row| Ok(super::value::parsed_in(row, "id")))?;
    rows.map(|row| row?).collect()
}

/// What a step with this key made: `Some(None)` when it changed no file. Asking keeps it from being forgotten.
pub fn cached_step(db: &Db<'_>, key: &str, now: OffsetDateTime) -> Result<Option<Option<String>>, StoreError> {
    db.0.prepare_cached("UPDATE step_cache SET used_at = ?2 WHERE key = ?1")?.execute(params![key, micros(now)])?;
    let mut statement = db.0.prepare_cached("SELECT layer FROM step_cache WHERE key = ?1")?;
    Ok(statement.query_row([key], |row| row.get(0)).optional()?)
}

/// Keeps what a step made, in place of what an earlier run of it made.
pub fn remember_step(db: &Db<'_>, key: &str, layer: Option<&str>, now: OffsetDateTime) -> Result<(), StoreError> {
    let sql = "INSERT OR REPLACE INTO step_cache (key, layer, used_at) VALUES (?1, ?2, ?3)";
    db.0.prepare_cached(sql)?.execute(params![key, layer, micros(now)])?;
    Ok(())
}

/// Forgets what no build has used since then; returns how many.
pub fn forget_steps_before(db: &Db<'_>, at: OffsetDateTime) -> Result<usize, StoreError> {
    Ok(db.0.prepare_cached("DELETE FROM step_cache WHERE used_at < ?1")?.execute([micros(at)])?)
}
