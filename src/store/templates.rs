//! Rows of templates, their names, tags and builds.

use super::value::{corrupt, json_in, micros, optional_parsed_in, optional_time_in, parsed_in, signed, time_in, to_json, unsigned_in};
use super::{Db, StoreError};
use crate::model::{BuildId, BuildRecord, BuildSource, BuildState, SandboxId, SnapshotId, TemplateId, TemplateRecord};
use rusqlite::{OptionalExtension, Row, named_params, params};
use std::collections::BTreeMap;
use time::OffsetDateTime;

const STATES: [(BuildState, &str); 4] =
    [(BuildState::Waiting, "waiting"), (BuildState::Building, "building"), (BuildState::Ready, "ready"), (BuildState::Error, "error")];

pub(super) fn state_word(state: BuildState) -> &'static str {
    match state {
        BuildState::Waiting => "waiting",
        BuildState::Building => "building",
        BuildState::Ready => "ready",
        BuildState::Error => "error",
    }
}

const BUILD_COLUMNS: &str = "id, template, state, layers_json, env_json, user_name, workdir, start_command, ready_command, \
                             resources_json, source_sandbox, origin, dump, created_at, finished_at";

fn build_from_row(row: &Row<'_>) -> Result<BuildRecord, StoreError> {
    let word: String = row.get("state")?;
    let state = STATES.into_iter().find(|(_, known)| *known == word).ok_or_else(|| corrupt("builds.state", &word, "a build's state"))?;
    Ok(BuildRecord {
        id: parsed_in(row, "id")?,
        template: parsed_in(row, "template")?,
        state: state.0,
        layers: json_in(row, "layers_json")?,
        env: json_in(row, "env_json")?,
        user: row.get("user_name")?,
        workdir: row.get("workdir")?,
        start_command: row.get("start_command")?,
        ready_command: row.get("ready_command")?,
        resources: json_in(row, "resources_json")?,
        source: optional_parsed_in(row, "source_sandbox")?.map_or(BuildSource::Recipe, BuildSource::Sandbox),
        origin: row.get("origin")?,
        dump: optional_parsed_in(row, "dump")?,
        created_at: time_in(row, "created_at")?,
        finished_at: optional_time_in(row, "finished_at")?,
    })
}

/// A new template with its aliases; builds and tags follow. An alias that another template has moves here.
pub fn insert(db: &Db<'_>, record: &TemplateRecord) -> Result<(), StoreError> {
    let sql = "INSERT INTO templates (id, public, created_at, updated_at, last_spawned_at, spawn_count, build_count) \
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
    db.0.prepare_cached(sql)?.execute(params![
        record.id.as_str(),
        record.public,
        micros(record.created_at),
        micros(record.updated_at),
        record.last_spawned_at.map(micros),
        signed(record.spawn_count),
        signed(record.build_count),
    ])?;
    for alias in &record.aliases {
        add_alias(db, record.id, alias)?;
    }
    Ok(())
}

/// The last name given is the last in order.
pub fn add_alias(db: &Db<'_>, template: TemplateId, alias: &str) -> Result<(), StoreError> {
    let sql = "INSERT OR REPLACE INTO template_aliases (alias, template, position) \
               VALUES (?1, ?2, (SELECT coalesce(max(position), 0) + 1 FROM template_aliases WHERE template = ?2))";
    db.0.prepare_cached(sql)?.execute(params![alias, template.as_str()])?;
    Ok(())
}

/// The template that has this name.
pub fn id_of_alias(db: &Db<'_>, alias: &str) -> Result<Option<TemplateId>, StoreError> {
    let mut statement = db.0.prepare_cached("SELECT template FROM template_aliases WHERE alias = ?1")?;
    statement.query_row([alias], |row| Ok(parsed_in(row, "template"))).optional()?.transpose()
}

const TEMPLATE_COLUMNS: &str = "id, public, created_at, updated_at, last_spawned_at, spawn_count, build_count";

/// The template with its names and tags.
pub fn by_id(db: &Db<'_>, id: TemplateId) -> Result<Option<TemplateRecord>, StoreError> {
    let sql = format!("SELECT {TEMPLATE_COLUMNS} FROM templates WHERE id = ?1");
    let mut statement = db.0.prepare_cached(&sql)?;
    statement.query_row([id.as_str()], |row| Ok(template_from_row(db, row))).optional()?.transpose()
}

/// All templates that hold a build from a recipe, newest first; stored snapshots are not among them.
pub fn built(db: &Db<'_>) -> Result<Vec<TemplateRecord>, StoreError> {
    let sql = format!(
        "SELECT {TEMPLATE_COLUMNS} FROM templates t WHERE NOT EXISTS \
         (SELECT 1 FROM builds WHERE template = t.id AND source_sandbox IS NOT NULL) ORDER BY created_at DESC, id"
    );
    let mut statement = db.0.prepare_cached(&sql)?;
    let rows = statement.query_map([], |row| Ok(template_from_row(db, row)))?;
    rows.map(|row| row?).collect()
}

fn template_from_row(db: &Db<'_>, row: &Row<'_>) -> Result<TemplateRecord, StoreError> {
    let id: TemplateId = parsed_in(row, "id")?;
    Ok(TemplateRecord {
        id,
        aliases: aliases(db, id)?,
        tags: tags(db, id)?,
        public: row.get("public")?,
        created_at: time_in(row, "created_at")?,
        updated_at: time_in(row, "updated_at")?,
        last_spawned_at: optional_time_in(row, "last_spawned_at")?,
        spawn_count: unsigned_in(row, "spawn_count")?,
        build_count: unsigned_in(row, "build_count")?,
    })
}

fn aliases(db: &Db<'_>, template: TemplateId) -> Result<Vec<String>, StoreError> {
    let sql = "SELECT alias FROM template_aliases WHERE template = ?1 ORDER BY position";
    let mut statement = db.0.prepare_cached(sql)?;
    let rows = statement.query_map([template.as_str()], |row| row.get(0))?;
    rows.map(|row| Ok(row?)).collect()
}

fn tags(db: &Db<'_>, template: TemplateId) -> Result<BTreeMap<String, BuildId>, StoreError> {
    let mut statement = db.0.prepare_cached("SELECT tag, build FROM template_tags WHERE template = ?1")?;
    let rows = statement.query_map([template.as_str()], |row| Ok((row.get("tag")?, parsed_in(row, "build"))))?;
    rows.map(|row| row.map(|(tag, build)| Ok((tag, build?)))?).collect()
}

/// Names with the build they lead to and since when, oldest first.
pub fn tags_with_times(db: &Db<'_>, template: TemplateId) -> Result<Vec<(String, BuildId, OffsetDateTime)>, StoreError> {
    let mut statement =
        db.0.prepare_cached("SELECT tag, build, created_at FROM template_tags WHERE template = ?1 ORDER BY created_at, tag")?;
    let rows =
        statement.query_map([template.as_str()], |row| Ok((row.get("tag")?, parsed_in(row, "build"), time_in(row, "created_at"))))?;
    rows.map(|row| row.map(|(tag, build, at)| Ok((tag, build?, at?)))?).collect()
}

/// Lets a tag lead to this build, wherever it led before.
pub fn set_tag(db: &Db<'_>, template: TemplateId, tag: &str, build: BuildId, at: OffsetDateTime) -> Result<(), StoreError> {
    let sql = "INSERT OR REPLACE INTO template_tags (template, tag, build, created_at) VALUES (?1, ?2, ?3, ?4)";
    db.0.prepare_cached(sql)?.execute(params![template.as_str(), tag, build.to_string(), micros(at)])?;
    touch(db, template, at)
}

/// Whether there was such a tag.
pub fn remove_tag(db: &Db<'_>, template: TemplateId, tag: &str, at: OffsetDateTime) -> Result<bool, StoreError> {
    let sql = "DELETE FROM template_tags WHERE template = ?1 AND tag = ?2";
    let removed = db.0.prepare_cached(sql)?.execute(params![template.as_str(), tag])?;
    touch(db, template, at)?;
    Ok(removed > 0)
}

/// Whether others may use it.
#[expect(clippy::fn_params_excessive_bools, reason = "it is the column's own value, not a choice between two behaviours")]
pub fn set_public(db: &Db<'_>, template: TemplateId, public: bool, at: OffsetDateTime) -> Result<(), StoreError> {
    db.0.prepare_cached("UPDATE templates SET public = ?2 WHERE id = ?1")?.execute(params![template.as_str(), public])?;
    touch(db, template, at)
}

fn touch(db: &Db<'_>, template: TemplateId, at: OffsetDateTime) -> Result<(), StoreError> {
    let sql = "UPDATE templates SET updated_at = ?2 WHERE id = ?1";
    db.0.prepare_cached(sql)?.execute(params![template.as_str(), micros(at)])?;
    Ok(())
}

/// Counts a create.
pub fn count_spawn(db: &Db<'_>, template: TemplateId, at: OffsetDateTime) -> Result<(), StoreError> {
    let sql = "UPDATE templates SET spawn_count = spawn_count + 1, last_spawned_at = ?2 WHERE id = ?1";
    db.0.prepare_cached(sql)?.execute(params![template.as_str(), micros(at)])?;
    Ok(())
}

/// Removes a template with its names, tags and builds. Layers and dumps stay until they are swept.
pub fn remove(db: &Db<'_>, template: TemplateId) -> Result<bool, StoreError> {
    let removed = db.0.prepare_cached("DELETE FROM templates WHERE id = ?1")?.execute([template.as_str()])?;
    Ok(removed > 0)
}

/// A new build; counts it.
pub fn insert_build(db: &Db<'_>, record: &BuildRecord) -> Result<(), StoreError> {
    let sql = "INSERT INTO builds (id, template, state, layers_json, env_json, user_name, workdir, start_command, ready_command, \
               resources_json, source_sandbox, origin, dump, created_at, finished_at) \
               VALUES (:id, :template, :state, :layers, :env, :user, :workdir, :start, :ready, :resources, :source, :origin, :dump, \
               :created_at, :finished_at)";
    write_build(db, sql, record)?;
    let sql = "UPDATE templates SET build_count = build_count + 1, updated_at = ?2 WHERE id = ?1";
    db.0.prepare_cached(sql)?.execute(params![record.template.as_str(), micros(record.created_at)])?;
    Ok(())
}

/// Replaces a build's row.
pub fn update_build(db: &Db<'_>, record: &BuildRecord) -> Result<(), StoreError> {
    let sql = "UPDATE builds SET template = :template, state = :state, layers_json = :layers, env_json = :env, user_name = :user, \
               workdir = :workdir, start_command = :start, ready_command = :ready, resources_json = :resources, \
               source_sandbox = :source, origin = :origin, dump = :dump, created_at = :created_at, finished_at = :finished_at \
               WHERE id = :id";
    write_build(db, sql, record)
}

fn write_build(db: &Db<'_>, sql: &str, record: &BuildRecord) -> Result<(), StoreError> {
    let source = match record.source {
        BuildSource::Recipe => None,
        BuildSource::Sandbox(id) => Some(id.to_string()),
    };
    db.0.prepare_cached(sql)?.execute(named_params! {
        ":id": record.id.to_string(),
        ":template": record.template.as_str(),
        ":state": state_word(record.state),
        ":layers": to_json(&record.layers),
        ":env": to_json(&record.env),
        ":user": record.user,
        ":workdir": record.workdir,
        ":start": record.start_command,
        ":ready": record.ready_command,
        ":resources": to_json(&record.resources),
        ":source": source,
        ":origin": record.origin,
        ":dump": record.dump.map(|id| id.to_string()),
        ":created_at": micros(record.created_at),
        ":finished_at": record.finished_at.map(micros),
    })?;
    Ok(())
}

/// One build.
pub fn build(db: &Db<'_>, id: BuildId) -> Result<Option<BuildRecord>, StoreError> {
    let sql = format!("SELECT {BUILD_COLUMNS} FROM builds WHERE id = ?1");
    let mut statement = db.0.prepare_cached(&sql)?;
    statement.query_row([id.to_string()], |row| Ok(build_from_row(row))).optional()?.transpose()
}

/// A template's builds, newest first.
pub fn builds_of(db: &Db<'_>, template: TemplateId) -> Result<Vec<BuildRecord>, StoreError> {
    let sql = format!("SELECT {BUILD_COLUMNS} FROM builds WHERE template = ?1 ORDER BY created_at DESC, id");
    let mut statement = db.0.prepare_cached(&sql)?;
    let rows = statement.query_map([template.as_str()], |row| Ok(build_from_row(row)))?;
    rows.map(|row| row?).collect()
}

/// The newest ready build with this origin, so that an unchanged recipe is not built twice.
pub fn ready_build_from(db: &Db<'_>, origin: &str) -> Result<Option<BuildRecord>, StoreError> {
    let sql = format!("SELECT {BUILD_COLUMNS} FROM builds WHERE origin = ?1 AND state = 'ready' ORDER BY created_at DESC LIMIT 1");
    let mut statement = db.0.prepare_cached(&sql)?;
    statement.query_row([origin], |row| Ok(build_from_row(row))).optional()?.transpose()
}

/// Names the dump that creates from this build are restored from.
pub fn set_dump(db: &Db<'_>, build: BuildId, dump: SnapshotId) -> Result<(), StoreError> {
    let sql = "UPDATE builds SET dump = ?2 WHERE id = ?1";
    db.0.prepare_cached(sql)?.execute(params![build.to_string(), dump.as_str()])?;
    Ok(())
}

/// Layers that a build or a remembered build step names; the others may be removed.
pub fn layers_in_use(db: &Db<'_>) -> Result<std::collections::BTreeSet<String>, StoreError> {
    let mut statement = db.0.prepare_cached("SELECT DISTINCT layers_json FROM builds")?;
    let rows = statement.query_map([], |row| Ok(json_in::<Vec<String>>(row, "layers_json")))?;
    let lists: Vec<Vec<String>> = rows.map(|row| row?).collect::<Result<_, StoreError>>()?;
    let mut statement = db.0.prepare_cached("SELECT layer FROM step_cache WHERE layer IS NOT NULL")?;
    let cached: Vec<String> = statement.query_map([], |row| row.get(0))?.collect::<Result<_, rusqlite::Error>>()?;
    Ok(lists.into_iter().flatten().chain(cached).collect())
}

/// Which page of stored snapshots is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredQuery {
    /// Taken of this sandbox only.
    pub sandbox: Option<SandboxId>,
    /// With this name only.
    pub name: Option<String>,
    /// At most this many rows.
    pub limit: u32,
    /// Rows older than this one only.
    pub after: Option<(OffsetDateTime, SnapshotId)>,
}

/// Builds that are stored snapshots, with the first name of their template and the tag that leads to each; newest
/// first. A build that no tag leads to any more was replaced and is not shown.
pub fn stored(db: &Db<'_>, query: &StoredQuery) -> Result<Vec<(BuildRecord, Option<String>, String)>, StoreError> {
    let sql = format!(
        "SELECT {}, g.tag AS tag, (SELECT alias FROM template_aliases a WHERE a.template = b.template ORDER BY position LIMIT 1) AS alias \
         FROM builds b JOIN template_tags g ON g.build = b.id \
         WHERE b.source_sandbox IS NOT NULL AND b.dump IS NOT NULL AND b.state = 'ready' \
         AND (:sandbox IS NULL OR b.source_sandbox = :sandbox) \
         AND (:name IS NULL OR EXISTS (SELECT 1 FROM template_aliases a WHERE a.template = b.template AND a.alias = :name)) \
         AND (:at IS NULL OR (b.created_at, b.dump) < (:at, :dump)) \
         GROUP BY b.id ORDER BY b.created_at DESC, b.dump DESC LIMIT :limit",
        BUILD_COLUMNS.split(", ").map(|column| format!("b.{column}")).collect::<Vec<_>>().join(", ")
    );
    let mut statement = db.0.prepare_cached(&sql)?;
    let rows = statement.query_map(
        named_params! {
            ":sandbox": query.sandbox.map(|id| id.to_string()),
            ":name": query.name,
            ":at": query.after.map(|(at, _)| micros(at)),
            ":dump": query.after.map(|(_, dump)| dump.to_string()),
            ":limit": query.limit,
        },
        |row| Ok((build_from_row(row), row.get("alias")?, row.get("tag")?)),
    )?;
    rows.map(|row| row.map(|(build, alias, tag)| Ok((build?, alias, tag)))?).collect()
}
