//! What an earlier server left: rows against what the kernel and the disk hold.
//!
//! | row | found | becomes |
//! |---|---|---|
//! | creating | anything | removed: its creator never heard of it |
//! | running | processes | taken over; an open init is sent again |
//! | running, init open | no processes or no answer, its dump | paused with its dump; its log says that files went on |
//! | running | no processes | removed, reason: the agent died |
//! | pausing | processes | running: the dump did not end, its folder is removed |
//! | pausing | no processes, a finished dump (or files only) | paused |
//! | pausing | neither | removed, reason: the agent died |
//! | paused | its dump | paused |
//! | resuming | restored whole, an agent that answers | running: memory and files go on together |
//! | resuming | processes that ran, no answer | paused with its dump; its log says that files went on |
//! | resuming | nothing that ran | paused, its dump intact |
//! | killing | anything | removed |
//!
//! Every step may run twice: a server that dies here leaves what the next one reads the same way.

use super::core::Core;
use super::driver::Driver;
use super::dump_folder::{self, DumpFolder};
use super::error::{StoreFailure, chain};
use super::pause::{record_paused, snapshot_row, sync_later};
use super::start::Started;
use crate::model::{EndReason, Keep, LogEntry, LogLevel, SandboxId, SandboxRecord, SandboxState};
use crate::runtime::{Restored, RuntimeError};
use crate::store::{StoreError, idempotency, sandboxes, snapshots, templates};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Why the core could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
    /// Leftovers could not be swept.
    #[error("could not take over what an earlier server left")]
    Recover(#[source] crate::runtime::RuntimeError),
}

/// What became of a row.
enum Found {
    Running(Box<SandboxRecord>),
    Paused(Box<SandboxRecord>),
    Gone,
}

/// Brings rows, kernel and disk together and starts the drivers of what is left.
pub(super) async fn recover(core: &Arc<Core>) -> Result<(), OpenError> {
    let rows = core.store.read(sandboxes::unfinished).await.map_err(StoreFailure::from)?;
    let mut kept = Vec::new();
    for record in rows {
        let (id, state) = (record.id, record.state);
        let found = recover_one(core, record).await.map_err(StoreFailure::from)?;
        match &found {
            Found::Running(_) => tracing::info!(sandbox.id = %id, "Took over sandbox {id}: was {state}, is running"),
            Found::Paused(_) => tracing::info!(sandbox.id = %id, "Kept sandbox {id}: was {state}, is paused"),
            Found::Gone => tracing::info!(sandbox.id = %id, "Removed sandbox {id}: was {state}"),
        }
        kept.push(found);
    }
    sweep(core, &kept).await?;
    sync_dumps(core).await.map_err(StoreFailure::from)?;
    for found in kept {
        match found {
            Found::Running(record) => {
                let place = core.places.take_anyway(record.spec.resources);
                Driver::spawn_running(core, *record, place).await;
            }
            Found::Paused(record) => Driver::spawn_paused(core, *record),
            Found::Gone => {}
        }
    }
    Ok(())
}

async fn recover_one(core: &Arc<Core>, record: SandboxRecord) -> Result<Found, StoreError> {
    match record.state {
        SandboxState::Creating => give_up(core, record, EndReason::CreateFailed { detail: "the server ended meanwhile".into() }).await,
        SandboxState::Running => take_over(core, record).await,
        SandboxState::Pausing => finish_or_undo_pause(core, record).await,
        SandboxState::Paused => Ok(Found::Paused(Box::new(record))),
        SandboxState::Resuming => finish_or_undo_resume(core, record).await,
        SandboxState::Killing => {
            let reason = record.end_reason.clone().unwrap_or(EndReason::Killed);
            give_up(core, record, reason).await
        }
        SandboxState::Killed | SandboxState::Failed => Ok(Found::Gone),
    }
}

/// Whether its processes live and are ours now.
async fn adopted(core: &Core, record: &SandboxRecord) -> bool {
    let Some(kernel) = &record.kernel else { return false };
    match core.runtime.adopt(record.id, kernel, &record.spec.network).await {
        Ok(()) => true,
        Err(RuntimeError::NotRunning { .. }) => false,
        Err(
            error @ (RuntimeError::Exhausted(_)
            | RuntimeError::BadMountPath { .. }
            | RuntimeError::VolumeFile { .. }
            | RuntimeError::NotDumpable { .. }
            | RuntimeError::Step { .. }),
        ) => {
            tracing::error!(sandbox.id = %record.id, error = chain(&error), "Could not take over sandbox {}", record.id);
            false
        }
    }
}

async fn take_over(core: &Arc<Core>, record: SandboxRecord) -> Result<Found, StoreError> {
    let is_open = record.next_control_secret.is_some();
    match (adopted(core, &record).await, is_open) {
        (true, false) => Ok(Found::Running(Box::new(record))),
        (true, true) => finish_init(core, record).await,
        (false, true) if record.paused.is_some() => undo_resume(core, record, Files::WentOn).await,
        (false, true | false) => give_up(core, record, died()).await,
    }
}

fn died() -> EndReason {
    EndReason::AgentDied { detail: "its processes ended while no server was running (host restarted, or ended from outside)".into() }
}

/// A resume whose last row was not written: the agent knows one of two secrets.
async fn finish_init(core: &Arc<Core>, mut record: SandboxRecord) -> Result<Found, StoreError> {
    let build_id = record.spec.build;
    let build = core.store.read(move |db| templates::build(db, build_id)).await?;
    let (Some(build), Some(kernel)) = (build, record.kernel.clone()) else { return undo_resume(core, record, Files::WentOn).await };
    let started = Started::again(core, &record, &build, kernel);
    match started.introduce(Arc::clone(core), record.id).await {
        Ok(ready) => {
            (record.control_secret, record.next_control_secret) = (ready.control_secret, None);
            // The dump is dropped by the driver, once nothing reads it.
            record.paused = None;
            write(core, &record).await?;
            Ok(Found::Running(Box::new(record)))
        }
        Err(error) => {
            tracing::warn!(sandbox.id = %record.id, error = chain(&error), "Could not finish the resume of sandbox {}", record.id);
            undo_resume(core, record, Files::WentOn).await
        }
    }
}

/// The server died before the row named the processes. If they are there, they are what the user has: an older memory
/// would not fit the files that they went on to write.
async fn finish_or_undo_resume(core: &Arc<Core>, mut record: SandboxRecord) -> Result<Found, StoreError> {
    if record.snapshot.is_none() {
        // A cold boot reads its files anew, whatever became of them.
        return undo_resume(core, record, Files::AsTheyWere).await;
    }
    match core.runtime.restored(record.id).await {
        Ok(Restored::Nothing) => undo_resume(core, record, Files::AsTheyWere).await,
        Ok(Restored::Whole(kernel)) => {
            record.kernel = Some(kernel);
            if !adopted(core, &record).await {
                return undo_resume(core, record, Files::WentOn).await;
            }
            record.state = SandboxState::Running;
            finish_init(core, record).await
        }
        Ok(Restored::Torn) => undo_resume(core, record, Files::WentOn).await,
        Err(error) => {
            tracing::error!(sandbox.id = %record.id, error = chain(&error), "Could not look for what was restored of sandbox {}", record.id);
            undo_resume(core, record, Files::WentOn).await
        }
    }
}

/// Whether a disk still belongs to the memory in the dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Files {
    AsTheyWere,
    /// Processes ran on it after the dump.
    WentOn,
}

async fn finish_or_undo_pause(core: &Arc<Core>, mut record: SandboxRecord) -> Result<Found, StoreError> {
    if adopted(core, &record).await {
        (record.state, record.snapshot) = (SandboxState::Running, None);
        write(core, &record).await?;
        return Ok(Found::Running(Box::new(record)));
    }
    let keep = if record.snapshot.is_some() { Keep::Memory } else { Keep::FilesOnly };
    let dump = match record.snapshot {
        None => None,
        Some(id) => {
            let folder = DumpFolder::of(core, id);
            let Some(dumped) = folder.dumped().await else { return give_up(core, record, died()).await };
            folder.put_in_place().await;
            Some(snapshot_row(core, id, &record, &dumped).await)
        }
    };
    stop(core, record.id).await;
    (record.state, record.paused, record.kernel) = (SandboxState::Paused, Some(keep), None);
    record.end_at = core.clock.now();
    record_paused(core, record.clone(), dump).await?;
    Ok(Found::Paused(Box::new(record)))
}

/// Puts on stable storage what the earlier server had no time for: dumps of paused sandboxes, snapshots, templates'.
async fn sync_dumps(core: &Arc<Core>) -> Result<(), StoreError> {
    for dump in core.store.read(snapshots::all).await?.iter().filter(|dump| !dump.synced) {
        sync_later(core, dump.id);
    }
    Ok(())
}

/// Back to where it was: paused, its dump as it is. The memory is kept even if the files went on without it: which of
/// the two to give up is the user's to say.
async fn undo_resume(core: &Arc<Core>, mut record: SandboxRecord, files: Files) -> Result<Found, StoreError> {
    stop(core, record.id).await;
    if files == Files::WentOn {
        tell_files_went_on(core, record.id);
    }
    record.state = SandboxState::Paused;
    (record.kernel, record.next_control_secret) = (None, None);
    record.end_at = core.clock.now();
    write(core, &record).await?;
    Ok(Found::Paused(Box::new(record)))
}

async fn stop(core: &Core, id: SandboxId) {
    if let Err(error) = core.runtime.stop(id).await {
        tracing::error!(sandbox.id = %id, error = chain(&error), "Could not stop what is left of sandbox {id}");
    }
}

/// Removes what is left of it and says why. What cannot be removed is swept, having no live row.
async fn give_up(core: &Core, mut record: SandboxRecord, reason: EndReason) -> Result<Found, StoreError> {
    let id = record.id;
    if let Err(error) = core.runtime.destroy(id).await {
        tracing::error!(sandbox.id = %id, error = chain(&error), "Could not remove what is left of sandbox {id}");
    }
    let (message, state) = match &reason {
        EndReason::AgentDied { detail } => (Some(format!("sandbox ended because its agent died: {detail}")), SandboxState::Killed),
        EndReason::CreateFailed { detail } => (Some(format!("sandbox could not be created: {detail}")), SandboxState::Failed),
        EndReason::Killed | EndReason::TimedOut | EndReason::Idle => (None, SandboxState::Killed),
    };
    if let Some(message) = message {
        tracing::warn!(sandbox.id = %id, "Sandbox {id} was lost: {message}");
        log_line(core, id, LogLevel::Error, message);
    }
    let now = core.clock.now();
    (record.state, record.end_reason, record.ended_at) = (state, Some(reason), Some(now));
    (record.kernel, record.snapshot) = (None, None);
    let written = core.store.write(move |db| {
        sandboxes::update(db, &record)?;
        if record.state == SandboxState::Failed { idempotency::forget(db, id) } else { Ok(()) }
    });
    written.await?;
    Ok(Found::Gone)
}

/// Said where a resume ended after its processes had run.
pub(super) fn tell_files_went_on(core: &Core, id: SandboxId) {
    tracing::warn!(sandbox.id = %id, "Files of sandbox {id} are newer than its memory: its processes ran for a moment before the resume failed");
    let message = "the resume failed after the sandbox's processes had run for a moment: its files are newer than its memory; \
                   resume it without its memory to start from the files alone";
    log_line(core, id, LogLevel::Warn, message.to_owned());
}

fn log_line(core: &Core, id: SandboxId, level: LogLevel, message: String) {
    let fields = BTreeMap::from([("logger".to_owned(), "stillbox".to_owned())]);
    core.store.keep_logs(id.to_string(), vec![LogEntry { at: core.clock.now(), level, message, fields }], None);
}

async fn write(core: &Core, record: &SandboxRecord) -> Result<(), StoreError> {
    let record = record.clone();
    core.store.write(move |db| sandboxes::update(db, &record)).await
}

/// Kernel objects, disks and dumps that no row names.
async fn sweep(core: &Core, found: &[Found]) -> Result<(), OpenError> {
    let keep: Vec<SandboxId> = found
        .iter()
        .filter_map(|found| match found {
            Found::Running(record) | Found::Paused(record) => Some(record.id),
            Found::Gone => None,
        })
        .collect();
    core.runtime.sweep(&keep).await.map_err(OpenError::Recover)?;
    super::snapshot::remove_unused(core).await;
    let dumps = core.store.read(snapshots::all).await.map_err(StoreFailure::from)?;
    let swept = dump_folder::sweep(core, dumps.into_iter().map(|row| row.id).collect()).await;
    if let Err(error) = swept {
        tracing::warn!(error = chain(&error), "Could not sweep dumps that nothing names");
    }
    Ok(())
}
