//! resume: a paused sandbox gets its processes back, from its dump or by a cold boot of its files.
//!
//! ```text
//!  place ──> row resuming ──> start ──> row running, init open ──> init ──> running
//!      any failure: stopped, row paused, the dump intact
//! ```
//! Once there are processes, the row names them and both secrets that the agent may know: the next server adopts them
//! and sends /init again. The dump stays until the init is confirmed and nothing reads the images any more.

use super::driver::Driver;
use super::dump_folder::DumpFolder;
use super::error::{Cause, StoreFailure, UnknownSandbox, chain};
use super::places::{Full, Place};
use super::start::{Prepared, Ready, StartError, Started, random_boot_id, random_secret};
use crate::model::{
    BuildRecord, Fit, Keep, LogLevel, MountPath, OnTimeout, SandboxId, SandboxRecord, SandboxState, SnapshotId, SnapshotRecord,
};
use crate::runtime::{DiskSource, Exhausted, Restored, RuntimeError};
use crate::store::{StoreError, sandboxes, snapshots, templates};
use std::sync::Arc;
use std::time::Duration;

/// Why a sandbox is not running after connect or resume.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Not there.
    #[error(transparent)]
    Unknown(#[from] UnknownSandbox),
    /// A resume that insists on a paused one met a running one (E2B's old `/resume`).
    #[error("sandbox {0} is already running")]
    AlreadyRunning(SandboxId),
    /// Longer than allowed.
    #[error("timeout {asked:?} is longer than {limit:?} (sandbox.timeout_max)")]
    TooLong {
        /// What was asked.
        asked: Duration,
        /// The bound.
        limit: Duration,
    },
    /// All places are taken.
    #[error(transparent)]
    TooMany(Full),
    /// Too many verbs wait for it already.
    #[error("sandbox {id} is {state} and busy; try again")]
    InTransition {
        /// The sandbox.
        id: SandboxId,
        /// Where it stands.
        state: SandboxState,
    },
    /// The machine has no room for it; it is still paused.
    #[error("sandbox {id} stays paused: {exhausted}")]
    Exhausted {
        /// The sandbox.
        id: SandboxId,
        /// Of what.
        exhausted: Exhausted,
    },
    /// It starts on its files, and something else than a folder is where a volume is to be mounted.
    #[error("sandbox {id} stays paused: no volume can be mounted at '{path}': {wrong}")]
    BadMountPath {
        /// The sandbox.
        id: SandboxId,
        /// Where.
        path: MountPath,
        /// What is in the way.
        wrong: String,
    },
    /// Its processes had a file open on a volume that is not there as it was; it is still paused, its snapshot intact.
    #[error(
        "sandbox {id} stays paused: '{path}' was open on a volume, and cannot be opened any more: {why}; put it back, or start \
         the sandbox on its files alone (`stillbox sandbox resume --files-only {id}`, memory: false in a connect)"
    )]
    VolumeFile {
        /// The sandbox.
        id: SandboxId,
        /// Where the file was, inside.
        path: String,
        /// The kernel's reason.
        why: String,
    },
    /// The restore failed; it is still paused, its snapshot intact.
    #[error("could not resume sandbox {id}; it stays paused and can be tried again")]
    Restore {
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

/// What connect did.
#[derive(Debug, Clone, PartialEq)]
pub enum Connected {
    /// It ran already; its end may have been extended.
    WasRunning(Box<SandboxRecord>),
    /// It was paused and was restored or booted.
    Resumed(Box<SandboxRecord>),
}

/// What a resume is asked to bring about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ResumeAsk {
    /// Its end is now + this.
    pub(super) timeout: Duration,
    /// Replaces the lifecycle's when given.
    pub(super) on_timeout: Option<OnTimeout>,
    /// `FilesOnly`: what memory a paused one has is given up.
    pub(super) keep: Keep,
}

/// Why a resume failed; answers everybody who waits. It stays paused.
#[derive(Debug, Clone)]
pub(super) enum ResumeFailure {
    Gone,
    TooMany(Full),
    Exhausted(Exhausted),
    BadMountPath(MountPath, String),
    VolumeFile { path: String, why: String },
    Restore(Cause),
    Store(Cause),
}

impl ResumeFailure {
    pub(super) fn error(&self, id: SandboxId) -> ConnectError {
        match self {
            Self::Gone => UnknownSandbox(id).into(),
            Self::TooMany(full) => ConnectError::TooMany(*full),
            Self::Exhausted(exhausted) => ConnectError::Exhausted { id, exhausted: exhausted.clone() },
            Self::BadMountPath(path, wrong) => ConnectError::BadMountPath { id, path: path.clone(), wrong: wrong.clone() },
            Self::VolumeFile { path, why } => ConnectError::VolumeFile { id, path: path.clone(), why: why.clone() },
            Self::Restore(cause) => ConnectError::Restore { id, source: Box::new(Arc::clone(cause)) },
            Self::Store(cause) => StoreFailure(Box::new(Arc::clone(cause))).into(),
        }
    }
}

impl From<Full> for ResumeFailure {
    fn from(full: Full) -> Self {
        Self::TooMany(full)
    }
}

impl From<StartError> for ResumeFailure {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Killed => Self::Gone,
            StartError::Runtime(RuntimeError::Exhausted(exhausted)) => Self::Exhausted(exhausted),
            StartError::Runtime(RuntimeError::BadMountPath { path, wrong }) => Self::BadMountPath(path, wrong),
            StartError::Runtime(RuntimeError::VolumeFile { path, why }) => Self::VolumeFile { path, why },
            other @ (StartError::Runtime(_)
            | StartError::Agent(_)
            | StartError::Commands(_)
            | StartError::Ended(_)
            | StartError::Misfit(_)) => Self::Restore(Arc::new(other)),
        }
    }
}

impl From<StoreError> for ResumeFailure {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

/// The build is gone although a sandbox was made from it.
#[derive(Debug, thiserror::Error)]
#[error("build {0} of the sandbox is gone")]
struct BuildGone(crate::model::BuildId);

/// The row says that there is a dump, and there is none.
#[derive(Debug, thiserror::Error)]
#[error("dump {0} of the sandbox is gone")]
struct DumpGone(SnapshotId);

impl Driver {
    /// Gives it processes and opens it to requests; a failure leaves it paused.
    pub(super) async fn resume(&mut self, ask: &ResumeAsk) -> Result<(), ResumeFailure> {
        let begun = std::time::Instant::now();
        let place = self.core.places.take(self.record.spec.resources)?;
        // Only now, when it can be started.
        if ask.keep == Keep::FilesOnly && self.record.snapshot.is_some() {
            self.record.paused = Some(Keep::FilesOnly);
            self.forget_dump().await;
        }
        let before = self.record.clone();
        match self.resume_into(ask, place).await {
            Ok(()) => {
                tracing::info!(sandbox.id = %self.id, took_ms = begun.elapsed().as_millis(), "Resumed sandbox {}", self.id);
                Ok(())
            }
            Err(failure) => {
                self.stay_paused(before, &failure).await;
                Err(failure)
            }
        }
    }

    async fn resume_into(&mut self, ask: &ResumeAsk, place: Place) -> Result<(), ResumeFailure> {
        let build = self.build().await?;
        let dump = self.own_dump().await?;
        self.enter_resuming(ask, dump.as_ref()).await?;
        let prepared = match &dump {
            Some(dump) => Prepared::from_dump(&self.core, &self.record, &build, DiskSource::Own, dump),
            None => Prepared::cold(&self.core, &self.record, &build, DiskSource::Own),
        };
        let core = Arc::clone(&self.core);
        let turn = self.serve_until_killed(core.turns.take()).await.ok_or(ResumeFailure::Gone)?;
        let ready = turn.spend_on(self.resume_in_turn(prepared)).await?;
        core.failpoints.pass("resume.initialised").await;
        self.enter_running(ready, place).await;
        Ok(())
    }

    async fn resume_in_turn(&mut self, prepared: Prepared) -> Result<Ready, ResumeFailure> {
        let core = Arc::clone(&self.core);
        let started = self.serve_during(prepared.start(Arc::clone(&core))).await?;
        core.failpoints.pass("resume.started").await;
        self.introduce(started).await
    }

    async fn build(&self) -> Result<BuildRecord, ResumeFailure> {
        let id = self.record.spec.build;
        let build = self.core.store.read(move |db| templates::build(db, id)).await?;
        build.ok_or_else(|| ResumeFailure::Restore(Arc::new(BuildGone(id))))
    }

    /// The dump that it was paused into, if memory was kept. Refused when it cannot work here.
    async fn own_dump(&self) -> Result<Option<SnapshotRecord>, ResumeFailure> {
        let Some(id) = self.record.snapshot else { return Ok(None) };
        let dump = self.core.store.read(move |db| snapshots::by_id(db, id)).await?;
        let dump = dump.ok_or_else(|| ResumeFailure::Restore(Arc::new(DumpGone(id))))?;
        match dump.key.fit(&self.core.runtime.dump_key()) {
            Fit::Same => Ok(Some(dump)),
            Fit::Likely { change } => {
                tracing::info!(sandbox.id = %self.id, change, "Sandbox {} was paused under another kernel or stillbox; what it runs and lives within stays as it was", self.id);
                Ok(Some(dump))
            }
            Fit::Impossible { reason } => Err(StartError::Misfit(reason).into()),
        }
    }

    async fn enter_resuming(&mut self, ask: &ResumeAsk, dump: Option<&SnapshotRecord>) -> Result<(), ResumeFailure> {
        let record = &mut self.record;
        record.state = SandboxState::Resuming;
        record.next_control_secret = Some(random_secret());
        record.generation += 1;
        if dump.is_none() {
            (record.control_secret, record.boot_id) = (random_secret(), random_boot_id());
        }
        if let Some(on_timeout) = ask.on_timeout {
            record.spec.lifecycle.on_timeout = on_timeout;
        }
        let now = self.core.clock.now();
        let end = self.record.spec.lifecycle.end_of_run(now, ask.timeout);
        (self.record.started_at, self.record.end_at) = (now, end);
        if dump.is_none() {
            // A new agent counts its log lines from the beginning.
            self.core.store.keep_logs(self.id.to_string(), Vec::new(), Some(0));
        }
        self.write_row().await?;
        self.publish();
        self.core.failpoints.pass("resume.intended").await;
        Ok(())
    }

    /// Row and /init side by side: the row's fsync is not on the caller's path twice.
    async fn introduce(&mut self, started: Started) -> Result<Ready, ResumeFailure> {
        let row = SandboxRecord { state: SandboxState::Running, kernel: Some(started.kernel.clone()), ..self.record.clone() };
        self.record.kernel = Some(started.kernel.clone());
        let (core, id) = (Arc::clone(&self.core), self.id);
        let both = async {
            let written = core.store.write(move |db| sandboxes::update(db, &row));
            tokio::join!(written, started.introduce(Arc::clone(&core), id))
        };
        match self.serve_until_killed(both).await {
            None => Err(ResumeFailure::Gone),
            Some((written, ready)) => {
                written?;
                Ok(ready?)
            }
        }
    }

    async fn enter_running(&mut self, ready: Ready, place: Place) {
        self.record.state = SandboxState::Running;
        self.record.paused = None;
        (self.record.control_secret, self.record.next_control_secret) = (ready.control_secret, None);
        // Not awaited: until it is written, the row's two secrets and its dump still describe a sandbox to take over.
        self.write_row_later();
        self.open_run(place).await;
    }

    /// The memory is complete: the dump that it came from is of the past.
    pub(super) fn drop_used_dump(&mut self) {
        let Some(snapshot) = self.record.snapshot.take() else { return };
        let record = self.record.clone();
        let written = self.core.store.write(move |db| {
            sandboxes::update(db, &record)?;
            snapshots::remove(db, snapshot)
        });
        let (core, id) = (Arc::clone(&self.core), self.id);
        self.core.spawn(async move {
            match written.await {
                Ok(()) => DumpFolder::of(&core, snapshot).remove().await,
                Err(error) => tracing::error!(sandbox.id = %id, error = chain(&error), "Could not forget the dump of sandbox {id}"),
            }
        });
    }

    /// Its memory will never be complete: what runs is ended, and the dump, which is whole, is restored again.
    pub(super) async fn tear_down_torn(&mut self, error: RuntimeError) -> ResumeAsk {
        tracing::error!(sandbox.id = %self.id, error = chain(&error), "Sandbox {} lost memory while it was filled; restoring it again", self.id);
        self.log_line(LogLevel::Error, "memory was lost while it was filled in; the sandbox is restored from its dump again".to_owned());
        let left = (self.record.end_at - self.core.clock.now()).try_into().unwrap_or(Duration::ZERO);
        let place = self.close_run().await;
        let (runtime, id) = (Arc::clone(&self.core.runtime), self.id);
        if let Err(error) = self.serve_during(runtime.stop(id)).await {
            tracing::error!(sandbox.id = %self.id, error = chain(&error), "Could not stop the torn sandbox {}", self.id);
        }
        drop(place);
        (self.record.state, self.record.paused, self.record.kernel) = (SandboxState::Paused, Some(Keep::Memory), None);
        self.write_row_later();
        self.publish();
        ResumeAsk { timeout: left, on_timeout: None, keep: Keep::Memory }
    }

    /// Queues the row as it is now. A failure is logged: the next write or the next start mends it.
    fn write_row_later(&self) {
        let (record, id) = (self.record.clone(), self.id);
        let written = self.core.store.write(move |db| sandboxes::update(db, &record));
        self.core.spawn(async move {
            if let Err(error) = written.await {
                tracing::error!(sandbox.id = %id, error = chain(&error), "Could not record the state of sandbox {id}");
            }
        });
    }

    /// What runs of it is ended, and the row says paused again; generation and secrets of the attempt are used up.
    async fn stay_paused(&mut self, before: SandboxRecord, failure: &ResumeFailure) {
        tracing::warn!(sandbox.id = %self.id, failure = ?failure, "Could not resume sandbox {}; it stays paused", self.id);
        if self.record.state == SandboxState::Paused {
            return;
        }
        let (runtime, id) = (Arc::clone(&self.core.runtime), self.id);
        if before.snapshot.is_some() && !matches!(self.serve_during(runtime.restored(id)).await, Ok(Restored::Nothing)) {
            super::recover::tell_files_went_on(&self.core, id);
        }
        if let Err(error) = self.serve_during(runtime.stop(id)).await {
            tracing::error!(sandbox.id = %self.id, error = chain(&error), "Could not stop a half-resumed sandbox {}", self.id);
        }
        self.record = SandboxRecord { generation: self.record.generation, ..before };
        if let Err(error) = self.write_row().await {
            tracing::error!(sandbox.id = %self.id, error = chain(&error), "Could not record that sandbox {} stays paused", self.id);
        }
        self.publish();
    }
}
