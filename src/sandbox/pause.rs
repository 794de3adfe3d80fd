//! pause: the processes of a sandbox are written to disk and ended, or only ended.
//!
//! ```text
//!  findings ──> row pausing ──> cut ──> dump aside ──> renamed ──> row paused
//!      │              any failure up to the dump: runs on, nothing lost
//!      └──> refused, nothing touched
//! ```
//! A server that dies in between leaves a row `pausing`: recover.rs finds the sandbox alive (and forgets the dump) or
//! dead beside a finished dump (and finishes the pause).

use super::config::SnapshotSync;
use super::core::Core;
use super::driver::Driver;
use super::dump_folder::DumpFolder;
use super::error::{Cause, StoreFailure, UnknownSandbox, chain};
use super::places::Place;
use crate::model::{ByteSize, DumpKey, Keep, SandboxId, SandboxRecord, SandboxState, SnapshotId, SnapshotRecord};
use crate::runtime::{AfterDump, DumpRequest, Dumped, Exhausted, Finding, RuntimeError, Writing};
use crate::store::{StoreError, sandboxes, snapshots};
use std::sync::Arc;
use std::time::Duration;

/// Why a pause did not happen. The sandbox runs on.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// Not there.
    #[error(transparent)]
    Unknown(#[from] UnknownSandbox),
    /// Paused before.
    #[error("sandbox {0} is already paused")]
    AlreadyPaused(SandboxId),
    /// Between two states.
    #[error("sandbox {id} is {state}; try again when it is running")]
    InTransition {
        /// The sandbox.
        id: SandboxId,
        /// Where it stands.
        state: SandboxState,
    },
    /// It holds what cannot be dumped; nothing was touched.
    #[error("cannot pause sandbox {id}: {}", findings.iter().map(|f| format!("{} (pid {}): {}", f.command, f.pid, f.reason)).collect::<Vec<_>>().join("; "))]
    NotDumpable {
        /// The sandbox.
        id: SandboxId,
        /// At least one.
        findings: Vec<Finding>,
    },
    /// Snapshots take all the space they may.
    #[error("snapshots use {used} of {limit}; delete some or raise snapshots.disk_bytes_max")]
    SnapshotSpace {
        /// In use.
        used: ByteSize,
        /// The bound.
        limit: ByteSize,
    },
    /// The host's disk has no room for it; nothing was touched.
    #[error("sandbox {id} keeps running: {exhausted}")]
    Exhausted {
        /// The sandbox.
        id: SandboxId,
        /// Of what.
        exhausted: Exhausted,
    },
    /// CRIU or the disk failed; the sandbox runs on.
    #[error("could not pause sandbox {id}; it keeps running")]
    Dump {
        /// The sandbox.
        id: SandboxId,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
}

/// A dump that is used up soon is never written to the disk, and its restore has no rival there. A server that stops
/// before leaves the sync to the next one.
const SYNC_AFTER: Duration = Duration::from_secs(1);

/// How long it may take until a dead pid 1 is known to be dead.
const DEATH_SHOWS_WITHIN: Duration = Duration::from_millis(200);

/// Why a pause or a dump for copies failed; answers everybody who waits.
#[derive(Debug, Clone)]
pub(super) enum PauseFailure {
    Gone,
    NotDumpable(Vec<Finding>),
    Space { used: ByteSize, limit: ByteSize },
    Exhausted(Exhausted),
    Dump(Cause),
    Store(Cause),
}

impl PauseFailure {
    pub(super) fn error(&self, id: SandboxId) -> PauseError {
        match self {
            Self::Gone => UnknownSandbox(id).into(),
            Self::NotDumpable(findings) => PauseError::NotDumpable { id, findings: findings.clone() },
            Self::Exhausted(exhausted) => PauseError::Exhausted { id, exhausted: exhausted.clone() },
            Self::Space { used, limit } => PauseError::SnapshotSpace { used: *used, limit: *limit },
            Self::Dump(cause) => PauseError::Dump { id, source: Box::new(Arc::clone(cause)) },
            Self::Store(cause) => StoreFailure(Box::new(Arc::clone(cause))).into(),
        }
    }
}

impl From<RuntimeError> for PauseFailure {
    fn from(error: RuntimeError) -> Self {
        match error {
            RuntimeError::NotDumpable { findings, .. } => Self::NotDumpable(findings),
            RuntimeError::Exhausted(exhausted) => Self::Exhausted(exhausted),
            other @ (RuntimeError::BadMountPath { .. }
            | RuntimeError::VolumeFile { .. }
            | RuntimeError::NotRunning { .. }
            | RuntimeError::Step { .. }) => Self::Dump(Arc::new(other)),
        }
    }
}

impl From<StoreError> for PauseFailure {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

/// The row of a dump that was just made of `sandbox`.
pub(super) async fn snapshot_row(core: &Core, id: SnapshotId, sandbox: &SandboxRecord, dumped: &Dumped) -> SnapshotRecord {
    let key = DumpKey { criu: dumped.criu.clone(), agent: dumped.agent.clone(), ..core.runtime.dump_key() };
    let bytes = DumpFolder::of(core, id).bytes().await;
    SnapshotRecord {
        id,
        sandbox: sandbox.id,
        key,
        control_secret: sandbox.control_secret.clone(),
        memory_bytes: ByteSize(dumped.images_bytes),
        disk_bytes: ByteSize(bytes.saturating_sub(dumped.images_bytes)),
        created_at: core.clock.now(),
        synced: false,
        volumes: sandbox.spec.volumes.clone(),
    }
}

/// Puts a dump on stable storage in the background and says so in its row.
pub(super) fn sync_later(core: &Arc<Core>, id: SnapshotId) {
    let task_core = Arc::clone(core);
    core.spawn(async move {
        tokio::time::sleep(SYNC_AFTER).await;
        let folder = DumpFolder::of(&task_core, id);
        if folder.is_gone() {
            return;
        }
        match folder.sync().await {
            Ok(()) => {
                let marked = task_core.store.write(move |db| snapshots::mark_synced(db, id)).await;
                if let Err(error) = marked {
                    tracing::warn!(snapshot = %id, error = chain(&error), "Could not record that a dump is on stable storage");
                }
            }
            Err(error) => tracing::error!(snapshot = %id, error = chain(&error), "Could not put a dump on stable storage"),
        }
    });
}

impl Driver {
    pub(super) async fn pause(&mut self, keep: Keep) -> Result<(), PauseFailure> {
        let begun = std::time::Instant::now();
        match keep {
            Keep::Memory => self.pause_with_memory().await?,
            Keep::FilesOnly => self.pause_files().await?,
        }
        tracing::info!(sandbox.id = %self.id, took_ms = begun.elapsed().as_millis(), "Paused sandbox {}", self.id);
        Ok(())
    }

    async fn pause_with_memory(&mut self) -> Result<(), PauseFailure> {
        if self.core.config.unmount_fuse {
            self.clear_fuse().await?;
        }
        self.require_dumpable(Writing::Pause).await?;
        let snapshot = SnapshotId::random();
        let place = self.enter_pausing(Some(snapshot)).await?;
        let dumped = match self.dump(snapshot, AfterDump::Stop).await {
            Ok(dumped) => dumped,
            Err(failure) => return Err(self.run_on(failure, snapshot, place).await),
        };
        // From here on there are no processes: whatever fails, it is paused, and recovery would say so too.
        self.core.failpoints.pass("pause.dumped").await;
        let folder = DumpFolder::of(&self.core, snapshot);
        let synced = self.core.config.snapshot_sync == SnapshotSync::BeforeReply && sync_now(&folder).await;
        folder.put_in_place().await;
        self.core.failpoints.pass("pause.renamed").await;
        let row = SnapshotRecord { synced, ..snapshot_row(&self.core, snapshot, &self.record, &dumped).await };
        self.enter_paused(Keep::Memory, Some(row), place).await;
        if !synced {
            sync_later(&self.core, snapshot);
        }
        Ok(())
    }

    async fn pause_files(&mut self) -> Result<(), PauseFailure> {
        let place = self.enter_pausing(None).await?;
        let (runtime, id) = (Arc::clone(&self.core.runtime), self.id);
        if let Err(error) = self.serve_during(runtime.stop(id)).await {
            // Half a stop leaves nothing that could run on; the exit that follows removes the sandbox with its reason.
            let failure = PauseFailure::from(error);
            self.record.state = SandboxState::Running;
            self.open_run_again(place).await;
            return Err(failure);
        }
        self.core.failpoints.pass("pause.dumped").await;
        self.enter_paused(Keep::FilesOnly, None, place).await;
        Ok(())
    }

    /// Refuses before anything is touched: space, then what CRIU cannot write. How long the looks take is for the sandbox
    /// to say, so a kill does not wait for them.
    pub(super) async fn require_dumpable(&mut self, writing: Writing) -> Result<(), PauseFailure> {
        self.require_room(writing).await?;
        let (runtime, id) = (Arc::clone(&self.core.runtime), self.id);
        // A dump during a lazy restore's fill would silently lack pages.
        self.serve_until_killed(runtime.filled(id)).await.ok_or(PauseFailure::Gone)??;
        self.drop_used_dump();
        let findings = self.serve_until_killed(runtime.findings(id)).await.ok_or(PauseFailure::Gone)??;
        match (findings.is_empty(), self.is_killing()) {
            (_, true) => Err(PauseFailure::Gone),
            (true, false) => Ok(()),
            (false, false) => Err(PauseFailure::NotDumpable(findings)),
        }
    }

    pub(super) async fn require_room(&self, writing: Writing) -> Result<(), PauseFailure> {
        let limit = self.core.config.snapshots_bytes_max;
        let used = self.core.store.read(snapshots::bytes_used).await?;
        match used >= limit {
            true => Err(PauseFailure::Space { used, limit }),
            false => Ok(self.core.runtime.require_room(self.id, writing).await?),
        }
    }

    /// Intent first; then nobody reaches it any more.
    async fn enter_pausing(&mut self, snapshot: Option<SnapshotId>) -> Result<Option<Place>, PauseFailure> {
        (self.record.state, self.record.snapshot) = (SandboxState::Pausing, snapshot);
        if let Err(error) = self.write_row().await {
            (self.record.state, self.record.snapshot) = (SandboxState::Running, None);
            return Err(error.into());
        }
        let place = self.close_run().await;
        self.core.failpoints.pass("pause.intended").await;
        Ok(place)
    }

    /// Makes the folder and dumps into it. Requests are accepted meanwhile.
    pub(super) async fn dump(&mut self, snapshot: SnapshotId, after: AfterDump) -> Result<Dumped, PauseFailure> {
        let folder = DumpFolder::of(&self.core, snapshot);
        folder.make().await.map_err(|error| PauseFailure::Dump(Arc::new(error)))?;
        let disk_copy = match after {
            AfterDump::Stop => None,
            AfterDump::KeepRunning => Some(folder.disk()),
        };
        let request = DumpRequest { id: self.id, after, images: folder.images(), disk_copy };
        let runtime = Arc::clone(&self.core.runtime);
        let failed = match self.serve_during(runtime.dump(request)).await {
            Ok(dumped) => return Ok(dumped),
            Err(error) => error,
        };
        if after == AfterDump::Stop
            && let Some(dumped) = self.dumped_and_dead(&folder).await
        {
            tracing::warn!(sandbox.id = %self.id, error = chain(&failed), "Sandbox {} was dumped, but not cleaned up after", self.id);
            return Ok(dumped);
        }
        folder.remove().await;
        Err(failed.into())
    }

    /// What failed came after the dump: its tasks are gone, and the images are all there is of them.
    async fn dumped_and_dead(&mut self, folder: &DumpFolder) -> Option<Dumped> {
        let dumped = folder.dumped().await?;
        let (runtime, id) = (Arc::clone(&self.core.runtime), self.id);
        let dead = tokio::time::timeout(DEATH_SHOWS_WITHIN, runtime.exited(id)).await.is_ok();
        if dead && let Err(error) = self.serve_during(runtime.stop(id)).await {
            tracing::error!(sandbox.id = %self.id, error = chain(&error), "Could not clean up after the dump of sandbox {}", self.id);
        }
        dead.then_some(dumped)
    }

    /// The dump failed and the sandbox runs on, as its row says again.
    async fn run_on(&mut self, failure: PauseFailure, snapshot: SnapshotId, place: Option<Place>) -> PauseFailure {
        (self.record.state, self.record.snapshot) = (SandboxState::Running, None);
        if let Err(error) = self.write_row().await {
            tracing::error!(sandbox.id = %self.id, %snapshot, error = chain(&error), "Could not record that sandbox {} runs on", self.id);
        }
        self.open_run_again(place).await;
        failure
    }

    async fn open_run_again(&mut self, place: Option<Place>) {
        let place = place.unwrap_or_else(|| self.core.places.take_anyway(self.record.spec.resources));
        self.open_run(place).await;
    }

    async fn enter_paused(&mut self, keep: Keep, snapshot: Option<SnapshotRecord>, place: Option<Place>) {
        self.record.state = SandboxState::Paused;
        self.record.paused = Some(keep);
        self.record.kernel = None;
        self.not_overdue();
        self.record.end_at = self.core.clock.now();
        self.record.snapshot = snapshot.as_ref().map(|row| row.id);
        if let Err(error) = record_paused(&self.core, self.record.clone(), snapshot).await {
            tracing::error!(sandbox.id = %self.id, error = chain(&error), "Could not record that sandbox {} is paused", self.id);
        }
        drop(place);
        self.publish();
    }
}

/// The dump's row and the sandbox's in one transaction.
pub(super) async fn record_paused(core: &Core, record: SandboxRecord, snapshot: Option<SnapshotRecord>) -> Result<(), StoreError> {
    let written = core.store.write(move |db| {
        if let Some(row) = &snapshot {
            snapshots::insert(db, row)?;
        }
        sandboxes::update(db, &record)
    });
    written.await
}

async fn sync_now(folder: &DumpFolder) -> bool {
    let synced = folder.sync().await;
    if let Err(error) = &synced {
        tracing::error!(error = chain(error), "Could not put a dump on stable storage");
    }
    synced.is_ok()
}
