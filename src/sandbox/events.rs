//! What was done with sandboxes, told to those who ask later.

use super::core::Core;
use super::driver::Driver;
use super::error::StoreFailure;
use crate::model::{EndReason, EventKind, EventRecord, SandboxRecord};
use crate::store::events as stored;

pub use stored::{EventPage, EventQuery};

/// Remembers what was done with a sandbox, and why it failed if it did.
pub(super) fn keep(core: &Core, record: &SandboxRecord, kind: EventKind, error: Option<String>) {
    core.store.keep_event(EventRecord {
        id: 0,
        at: core.clock.now(),
        sandbox: record.id,
        template: record.spec.template,
        template_name: record.spec.alias.clone(),
        kind,
        error,
    });
}

pub(super) async fn query(core: &Core, query: EventQuery) -> Result<EventPage, StoreFailure> {
    Ok(core.store.events(query).await?)
}

/// What an end of itself says beside "killed"; nothing when somebody asked for it.
pub(super) fn why(reason: &EndReason) -> Option<String> {
    match reason {
        EndReason::Killed => None,
        EndReason::TimedOut => Some("its time was up".to_owned()),
        EndReason::Idle => Some("it was idle for as long as it may be".to_owned()),
        EndReason::AgentDied { detail } => Some(format!("its agent died: {detail}")),
        EndReason::CreateFailed { detail } => Some(detail.clone()),
    }
}

impl Driver {
    pub(super) fn event<T, E: std::fmt::Display>(&self, kind: EventKind, result: &Result<T, E>) {
        keep(&self.core, &self.record, kind, result.as_ref().err().map(ToString::to_string));
    }
}
