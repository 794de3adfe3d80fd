//! What was done with sandboxes, told to those who ask later.

use super::core::Core;
use super::driver::Driver;
use super::error::StoreFailure;
use super::list::ListOrder;
use crate::model::{EndReason, EventKind, EventRecord, SandboxId, SandboxRecord, TemplateId};
use crate::store::events as stored;
use crate::store::sandboxes::Order;
use time::OffsetDateTime;

pub use stored::EventPage;

/// Which events are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventQuery {
    /// From here on, inclusive.
    pub start: OffsetDateTime,
    /// Up to here, exclusive.
    pub end: OffsetDateTime,
    /// Of this sandbox only.
    pub sandbox: Option<SandboxId>,
    /// Of sandboxes of this template only.
    pub template: Option<TemplateId>,
    /// Of these kinds only; empty = all.
    pub kinds: Vec<EventKind>,
    /// Only what failed, or only what did not.
    pub failed: Option<bool>,
    /// Oldest or newest first.
    pub order: ListOrder,
    /// Events to leave out at the beginning.
    pub offset: u64,
    /// At most this many.
    pub limit: u32,
}

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
    let EventQuery { start, end, sandbox, template, kinds, failed, order, offset, limit } = query;
    let order = match order {
        ListOrder::Ascending => Order::Ascending,
        ListOrder::Descending => Order::Descending,
    };
    Ok(core.store.events(stored::EventQuery { start, end, sandbox, template, kinds, failed, order, offset, limit }).await?)
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
