//! Pages of live sandboxes, straight from the store.

use super::core::Core;
use super::error::StoreFailure;
use crate::model::{SandboxId, SandboxRecord, SandboxState, TemplateId};
use crate::store::sandboxes::{self, PageQuery};
use std::collections::BTreeMap;
use time::OffsetDateTime;

/// By `started_at`, ties by id.
pub use sandboxes::Order as ListOrder;

/// Which sandboxes to list. Only live ones are ever listed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ListQuery {
    /// All of these pairs must match exactly.
    pub metadata: BTreeMap<String, String>,
    /// `Running` and `Paused` only; empty = both. Pausing counts as paused, resuming as paused until it runs.
    pub states: Vec<SandboxState>,
    /// Newest or oldest first.
    pub order: ListOrder,
    /// Started at this moment or later.
    pub started_after: Option<OffsetDateTime>,
    /// Of this template only.
    pub template: Option<TemplateId>,
    /// Rows per page.
    pub limit: u32,
    /// Where the page before ended: (started_at, id) of its last row.
    pub after: Option<(OffsetDateTime, SandboxId)>,
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct ListPage {
    /// At most `limit` rows.
    pub sandboxes: Vec<SandboxRecord>,
    /// Where the next page begins; `None` on the last.
    pub next: Option<(OffsetDateTime, SandboxId)>,
    /// Running sandboxes in all, whatever the filters.
    pub running_total: u64,
}

/// Why there is no list.
pub type ListError = StoreFailure;

pub(super) async fn list(core: &Core, query: ListQuery) -> Result<ListPage, ListError> {
    let limit = usize::try_from(query.limit).unwrap_or(usize::MAX);
    let ask = PageQuery {
        metadata: query.metadata,
        states: row_states(&query.states),
        order: query.order,
        started_after: query.started_after,
        template: query.template,
        // One row more than asked for tells whether there is a next page.
        limit: query.limit.saturating_add(1),
        after: query.after,
    };
    let question = core.store.read(move |db| Ok((sandboxes::page(db, &ask)?, sandboxes::count_in(db, SandboxState::Running)?)));
    let (mut sandboxes, running_total) = question.await?;
    let more = sandboxes.len() > limit;
    sandboxes.truncate(limit);
    let next = sandboxes.last().filter(|_| more).map(|last| (last.started_at, last.id));
    Ok(ListPage { sandboxes, next, running_total })
}

/// Rows that count as running or paused for those who list.
fn row_states(asked: &[SandboxState]) -> Vec<SandboxState> {
    let running = [SandboxState::Running];
    let paused = [SandboxState::Pausing, SandboxState::Paused, SandboxState::Resuming];
    match (asked.is_empty() || asked.contains(&SandboxState::Running), asked.is_empty() || asked.contains(&SandboxState::Paused)) {
        (true, true) => running.into_iter().chain(paused).collect(),
        (true, false) => running.to_vec(),
        (false, true) => paused.to_vec(),
        (false, false) => Vec::new(),
    }
}
