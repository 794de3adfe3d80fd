//! A sandbox's log: read from its agent while it runs, kept in the store, asked for by its users.

use super::agent;
use super::core::Core;
use super::error::{StoreFailure, UnknownSandbox, chain};
use crate::model::{LogLevel, MetricPoint, SandboxId, SandboxRecord};
use crate::store::history::LogRange;
use crate::store::sandboxes::{self, Order};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::sync::{Mutex, watch};

/// How often a running sandbox's log is read.
const READ_EVERY: Duration = Duration::from_secs(1);
/// How long a pause or kill waits for the last lines.
const LAST_READ_MAX: Duration = Duration::from_millis(100);

/// Which end of a log comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogDirection {
    /// Oldest first, from the cursor on.
    Forward,
    /// Newest first, from the cursor back.
    Backward,
}

/// Which log lines to return.
#[derive(Debug, Clone, PartialEq)]
pub struct LogQuery {
    /// Start from this moment.
    pub cursor: Option<OffsetDateTime>,
    /// At most this many.
    pub limit: u32,
    /// Which end first.
    pub direction: LogDirection,
    /// This level or louder.
    pub level: Option<LogLevel>,
    /// Text that the message contains.
    pub search: Option<String>,
}

impl LogQuery {
    /// The same to the store, for which every level has a number.
    pub(crate) fn range(self) -> LogRange {
        LogRange {
            cursor: self.cursor,
            order: match self.direction {
                LogDirection::Forward => Order::Ascending,
                LogDirection::Backward => Order::Descending,
            },
            limit: self.limit,
            level: self.level.unwrap_or(LogLevel::Debug),
            search: self.search,
        }
    }
}

/// Why there are no metrics or logs.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// Never there, or its history is gone.
    #[error(transparent)]
    Unknown(#[from] UnknownSandbox),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
}

/// Reads one run's log without gap or repetition, whoever asks.
#[derive(Debug)]
pub(super) struct LogReader {
    id: SandboxId,
    secret: String,
    /// Older lines are those of the template or sandbox that it is a copy of.
    since: OffsetDateTime,
    read_to: Mutex<u64>,
}

impl LogReader {
    /// For the run that begins now. An agent that was started anew counts from the beginning.
    pub(super) async fn open(core: &Core, record: &SandboxRecord) -> Self {
        let read_to = core.store.log_cursor(record.id.to_string()).await.unwrap_or(0);
        Self { id: record.id, secret: record.control_secret.clone(), since: record.created_at, read_to: Mutex::new(read_to) }
    }

    /// Brings the store up to date. Cancel-safe: lines not kept are read again.
    pub(super) async fn read(&self, core: &Core) {
        let mut read_to = self.read_to.lock().await;
        match agent::log_since(&core.runtime, self.id, &self.secret, *read_to, core.clock.now()).await {
            Ok(page) if page.read_to > *read_to => {
                *read_to = page.read_to;
                let own = page.entries.into_iter().filter(|entry| entry.at >= self.since).collect();
                core.store.keep_logs(self.id.to_string(), own, Some(page.read_to));
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(sandbox.id = %self.id, error = chain(&error), "Could not read the log of sandbox {}", self.id),
        }
    }

    /// [`LogReader::read`] before an end, with little patience.
    pub(super) async fn read_rest(&self, core: &Core) {
        let _an_agent_that_hangs_keeps_its_lines = tokio::time::timeout(LAST_READ_MAX, self.read(core)).await;
    }
}

/// Reads the log until the run is cut.
pub(super) async fn follow(core: Arc<Core>, log: Arc<LogReader>, mut cut: watch::Receiver<bool>) {
    loop {
        let read = async {
            tokio::time::sleep(READ_EVERY).await;
            log.read(&core).await;
        };
        tokio::select! {
            biased;
            // Cancel-safe: the run is over; reading is cancel-safe by itself.
            _ = cut.wait_for(|cut| *cut) => return,
            () = read => {}
        }
    }
}

/// Lines of a sandbox's log, up to this moment.
pub(super) async fn query(core: &Core, id: SandboxId, query: LogQuery) -> Result<Vec<crate::model::LogEntry>, MetricsError> {
    require_row(core, id).await?;
    let run = core.handle(id).and_then(|handle| handle.view.borrow().run.clone());
    if let Some(run) = run {
        run.log.read_rest(core).await;
    }
    Ok(core.store.logs(id.to_string(), query.range()).await.map_err(StoreFailure::from)?)
}

/// Samples of a sandbox, oldest first.
pub(super) async fn metrics(core: &Core, id: SandboxId, range: Range<OffsetDateTime>) -> Result<Vec<MetricPoint>, MetricsError> {
    require_row(core, id).await?;
    Ok(core.store.metrics(id, range).await.map_err(StoreFailure::from)?)
}

/// History outlives the sandbox for as long as its row is kept.
async fn require_row(core: &Core, id: SandboxId) -> Result<(), MetricsError> {
    let row = core.store.read(move |db| sandboxes::by_id(db, id)).await.map_err(StoreFailure::from)?;
    row.map(drop).ok_or(MetricsError::Unknown(UnknownSandbox(id)))
}
