//! Stored snapshots: a copy of a running sandbox as a template of its own.
//!
//! A snapshot is a build whose dump is all there is: creating from it restores the dump on a copy of its disk, or starts
//! cold there if it keeps files only. Names and tags are those of templates.

use super::copy::CopySource;
use super::core::Core;
use super::dump_folder::DumpFolder;
use super::error::{StoreFailure, chain};
use super::fork::{ForkError, source_of, to_its_end};
use super::pause::{PauseError, sync_later};
use crate::model::{
    BuildId, BuildRecord, BuildSource, BuildState, ByteSize, Keep, SandboxId, SandboxState, SnapshotId, SnapshotRecord, TemplateId,
    TemplateRecord,
};
use crate::store::templates::StoredQuery;
use crate::store::{Db, StoreError, snapshots, templates};
use std::io;
use std::path::Path;
use std::sync::Arc;
use time::OffsetDateTime;

/// The tag when none is given.
const DEFAULT_TAG: &str = "default";

/// A stored copy of a sandbox, from which others can be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// The template id under which it can be created from.
    pub template: TemplateId,
    /// Its dump.
    pub snapshot: SnapshotId,
    /// The sandbox it was taken of.
    pub sandbox: SandboxId,
    /// The name without its tag; `None` for an unnamed one.
    pub name: Option<String>,
    /// The tag that leads to this build of it; `default` unless another was asked for.
    pub tag: String,
    /// When it was taken.
    pub created_at: OffsetDateTime,
}

/// Which stored snapshots to list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SnapshotQuery {
    /// Taken of this sandbox only.
    pub sandbox: Option<SandboxId>,
    /// With this name only (no tag).
    pub name: Option<String>,
    /// Rows per page.
    pub limit: u32,
    /// Where the page before ended: (created_at, snapshot) of its last row.
    pub after: Option<(OffsetDateTime, SnapshotId)>,
}

/// One page of stored snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotPage {
    /// At most `limit` rows.
    pub snapshots: Vec<SnapshotInfo>,
    /// Where the next page begins; `None` on the last.
    pub next: Option<(OffsetDateTime, SnapshotId)>,
}

/// Stores a copy of a running sandbox. Goes on when the caller vanishes.
pub(super) async fn snapshot(core: &Arc<Core>, id: SandboxId, name: Option<String>, keep: Keep) -> Result<SnapshotInfo, ForkError> {
    let task_core = Arc::clone(core);
    to_its_end(core, id, async move { store_copy(&task_core, id, name, keep).await }).await
}

async fn store_copy(core: &Arc<Core>, id: SandboxId, name: Option<String>, keep: Keep) -> Result<SnapshotInfo, ForkError> {
    let state = core.live(id).map_err(PauseError::from)?.view.borrow().record.state;
    if state != SandboxState::Running {
        return Err(PauseError::InTransition { id, state }.into());
    }
    let source = source_of(core, id, keep).await?;
    let stored = store_source(core, id, &source, name).await?;
    stored.ok_or_else(|| PauseError::InTransition { id, state: SandboxState::Paused }.into())
}

/// Makes a template of what copies start from; `None` when it has no memory. The dump of a paused sandbox belongs to it:
/// the template gets a copy.
pub(super) async fn store_source(
    core: &Arc<Core>,
    id: SandboxId,
    source: &CopySource,
    name: Option<String>,
) -> Result<Option<SnapshotInfo>, ForkError> {
    let Some(dump) = &source.dump else { return Ok(None) };
    let dump = match source.disk.starts_with(core.snapshots_dir()) {
        true => dump.clone(),
        false => duplicate(core, dump, &source.disk).await.map_err(|error| PauseError::Dump { id, source: Box::new(error) })?,
    };
    let info = record(core, id, source, &dump, name).await?;
    source.keep_files();
    sync_later(core, dump.id);
    tracing::info!(sandbox.id = %id, snapshot = %dump.id, "Stored a snapshot of sandbox {id}");
    Ok(Some(info))
}

/// A dump of its own with the same images, which nobody ever writes to, and a copy of the disk.
async fn duplicate(core: &Core, dump: &SnapshotRecord, disk: &Path) -> io::Result<SnapshotRecord> {
    let copy = SnapshotRecord { id: SnapshotId::random(), created_at: core.clock.now(), synced: false, ..dump.clone() };
    let folder = DumpFolder::of(core, copy.id);
    folder.make().await?;
    let copied = folder.copy_of(&DumpFolder::of(core, dump.id), disk).await;
    if let Err(error) = copied {
        folder.remove().await;
        return Err(error);
    }
    folder.put_in_place().await;
    let disk_bytes = ByteSize(folder.bytes().await.saturating_sub(copy.memory_bytes.bytes()));
    Ok(SnapshotRecord { disk_bytes, ..copy })
}

async fn record(
    core: &Core,
    id: SandboxId,
    source: &CopySource,
    dump: &SnapshotRecord,
    name: Option<String>,
) -> Result<SnapshotInfo, PauseError> {
    let now = core.clock.now();
    let build = BuildRecord {
        id: BuildId::random(),
        template: TemplateId::random(),
        state: BuildState::Ready,
        resources: source.spec.resources,
        source: BuildSource::Sandbox(id),
        origin: format!("snapshot {}", dump.id),
        dump: Some(dump.id),
        created_at: now,
        finished_at: Some(now),
        ..source.build.clone()
    };
    let ((name, tag), dump) = (split_name(name), dump.clone());
    let rows = core.store.write(move |db| insert_rows(db, build, &dump, name, tag));
    rows.await.map_err(|error| PauseError::Store(StoreFailure::from(error)))
}

fn split_name(name: Option<String>) -> (Option<String>, String) {
    match name {
        None => (None, DEFAULT_TAG.to_owned()),
        Some(name) => match name.split_once(':') {
            Some((name, tag)) => (Some(name.to_owned()), tag.to_owned()),
            None => (Some(name), DEFAULT_TAG.to_owned()),
        },
    }
}

/// A name that exists gets a new build, if it is a snapshot's; a template that was built keeps its name.
fn insert_rows(
    db: &Db<'_>,
    build: BuildRecord,
    dump: &SnapshotRecord,
    name: Option<String>,
    tag: String,
) -> Result<SnapshotInfo, StoreError> {
    let at = build.created_at;
    let known = match &name {
        Some(name) => templates::id_of_alias(db, name)?,
        None => None,
    };
    snapshots::insert(db, dump)?;
    let template = match known {
        Some(template) => template,
        None => insert_template(db, build.template, name.clone(), at)?,
    };
    let build = BuildRecord { template, ..build };
    templates::insert_build(db, &build)?;
    templates::set_tag(db, template, &tag, build.id, at)?;
    let BuildSource::Sandbox(sandbox) = build.source else { unreachable!("made from a sandbox, a few lines above") };
    Ok(SnapshotInfo { template, snapshot: dump.id, sandbox, name, tag, created_at: at })
}

fn insert_template(db: &Db<'_>, id: TemplateId, name: Option<String>, at: OffsetDateTime) -> Result<TemplateId, StoreError> {
    let record = TemplateRecord::new(id, name.into_iter().collect(), at);
    templates::insert(db, &record)?;
    Ok(id)
}

/// One page, newest first.
pub(super) async fn list(core: &Core, query: SnapshotQuery) -> Result<SnapshotPage, StoreFailure> {
    let limit = usize::try_from(query.limit).unwrap_or(usize::MAX);
    // One row more than asked for tells whether there is a next page.
    let ask = StoredQuery { sandbox: query.sandbox, name: query.name, limit: query.limit.saturating_add(1), after: query.after };
    let mut rows = core.store.read(move |db| templates::stored(db, &ask)).await?;
    let more = rows.len() > limit;
    rows.truncate(limit);
    let snapshots: Vec<SnapshotInfo> = rows.into_iter().filter_map(|(build, name, tag)| info(&build, name, tag)).collect();
    let next = snapshots.last().filter(|_| more).map(|last| (last.created_at, last.snapshot));
    Ok(SnapshotPage { snapshots, next })
}

fn info(build: &BuildRecord, name: Option<String>, tag: String) -> Option<SnapshotInfo> {
    let (snapshot, BuildSource::Sandbox(sandbox)) = (build.dump?, build.source) else { return None };
    Some(SnapshotInfo { template: build.template, snapshot, sandbox, name, tag, created_at: build.created_at })
}

/// Removes dumps that nothing needs any more: a paused sandbox's, a build's.
pub(super) async fn remove_unused(core: &Core) {
    let unused = match core.store.read(snapshots::unused).await {
        Ok(unused) => unused,
        Err(error) => return tracing::warn!(error = chain(&error), "Could not look for unused dumps"),
    };
    for id in unused {
        remove(core, id).await;
    }
}

async fn remove(core: &Core, id: SnapshotId) {
    match core.store.write(move |db| snapshots::remove(db, id)).await {
        Ok(()) => super::dump_folder::DumpFolder::of(core, id).remove().await,
        Err(error) => tracing::warn!(snapshot = %id, error = chain(&error), "Could not forget an unused dump"),
    }
}
