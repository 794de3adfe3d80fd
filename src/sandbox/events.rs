//! What was done with sandboxes, told to those who ask later.

use super::core::Core;
use super::create::CreateError;
use super::driver::Driver;
use super::error::StoreFailure;
use super::fork::ForkError;
use super::pause::PauseError;
use super::resume::ConnectError;
use super::timeout::TimeoutError;
use crate::model::{EndReason, EventKind, EventRecord, FailureKind, SandboxRecord};
use crate::runtime::{Exhausted, Scarce};
use crate::store::events as stored;

pub use stored::{EventPage, EventQuery};

/// An error that an event is kept of.
pub trait Failure: std::fmt::Display {
    /// What kind it is.
    fn kind(&self) -> FailureKind;
}

impl Failure for Exhausted {
    fn kind(&self) -> FailureKind {
        match self.scarce {
            Scarce::Disk => FailureKind::NoRoom,
            Scarce::Places => FailureKind::Full,
        }
    }
}

impl Failure for CreateError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::TooMany(_) => FailureKind::Full,
            Self::ShuttingDown => FailureKind::Closing,
            Self::Killed(_) | Self::VolumeFile { .. } => FailureKind::NotNow,
            Self::IdempotencyConflict { .. }
            | Self::NotReady { .. }
            | Self::NoVolume(_)
            | Self::MountTaken { .. }
            | Self::BadMountPath { .. } => FailureKind::Wrong,
            Self::Exhausted(exhausted) => exhausted.kind(),
            Self::Start { .. } | Self::Store(_) => FailureKind::Internal,
        }
    }
}

impl Failure for PauseError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Unknown(_) => FailureKind::NotFound,
            Self::AlreadyPaused(_) | Self::InTransition { .. } => FailureKind::NotNow,
            Self::NotDumpable { .. } => FailureKind::NotDumpable,
            Self::SnapshotSpace { .. } | Self::Exhausted { .. } => FailureKind::NoRoom,
            Self::Dump { .. } | Self::Store(_) => FailureKind::Internal,
        }
    }
}

impl Failure for ConnectError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Unknown(_) => FailureKind::NotFound,
            Self::AlreadyRunning(_) | Self::InTransition { .. } | Self::BadMountPath { .. } | Self::VolumeFile { .. } => {
                FailureKind::NotNow
            }
            Self::TooLong { .. } => FailureKind::Wrong,
            Self::TooMany(_) => FailureKind::Full,
            Self::Exhausted { exhausted, .. } => exhausted.kind(),
            Self::Restore { .. } | Self::Store(_) => FailureKind::Internal,
        }
    }
}

impl Failure for ForkError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Source(source) => source.kind(),
            Self::Copy(copy) => copy.kind(),
        }
    }
}

impl Failure for TimeoutError {
    fn kind(&self) -> FailureKind {
        match self {
            // A paused sandbox has no timeout that could be set.
            Self::Unknown(_) | Self::NotRunning { .. } => FailureKind::NotFound,
            Self::TooLong { .. } => FailureKind::Wrong,
            Self::Store(_) => FailureKind::Internal,
        }
    }
}

/// Remembers what was done with a sandbox, and why it failed if it did.
pub(super) fn keep<T, E: Failure>(core: &Core, record: &SandboxRecord, kind: EventKind, result: &Result<T, E>) {
    let failed = result.as_ref().err();
    keep_told(core, record, kind, (failed.map(ToString::to_string), failed.map(Failure::kind)));
}

/// Remembers that a sandbox ended.
pub(super) fn keep_end(core: &Core, record: &SandboxRecord, reason: &EndReason) {
    keep_told(core, record, EventKind::Kill, (why(reason), None));
}

fn keep_told(core: &Core, record: &SandboxRecord, kind: EventKind, (error, failure): (Option<String>, Option<FailureKind>)) {
    core.store.keep_event(EventRecord {
        id: 0,
        at: core.clock.now(),
        sandbox: record.id,
        template: record.spec.template,
        template_name: record.spec.alias.clone(),
        kind,
        error,
        failure,
    });
}

pub(super) async fn query(core: &Core, query: EventQuery) -> Result<EventPage, StoreFailure> {
    Ok(core.store.events(query).await?)
}

/// What an end of itself says beside "killed"; nothing when somebody asked for it.
fn why(reason: &EndReason) -> Option<String> {
    match reason {
        EndReason::Killed => None,
        EndReason::TimedOut => Some("its time was up".to_owned()),
        EndReason::Idle => Some("it was idle for as long as it may be".to_owned()),
        EndReason::AgentDied { detail } => Some(format!("its agent died: {detail}")),
        EndReason::CreateFailed { detail } => Some(detail.clone()),
    }
}

impl Driver {
    pub(super) fn event<T, E: Failure>(&self, kind: EventKind, result: &Result<T, E>) {
        keep(&self.core, &self.record, kind, result);
    }
}
