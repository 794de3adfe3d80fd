//! The end of a running sandbox's time, moved by its users.

use super::driver::Driver;
use super::error::{StoreFailure, UnknownSandbox};
use crate::model::{SandboxId, SandboxRecord, SandboxState};
use std::time::Duration;

/// Why a time to live was not changed.
#[derive(Debug, thiserror::Error)]
pub enum TimeoutError {
    /// Not there.
    #[error(transparent)]
    Unknown(#[from] UnknownSandbox),
    /// There, but not running.
    #[error("sandbox {id} is {state}; only a running sandbox has a timeout")]
    NotRunning {
        /// The sandbox.
        id: SandboxId,
        /// Where it stands.
        state: SandboxState,
    },
    /// Longer than allowed.
    #[error("timeout {asked:?} is longer than {limit:?} (sandbox.timeout_max)")]
    TooLong {
        /// What was asked.
        asked: Duration,
        /// The bound.
        limit: Duration,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
}

/// How the end moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NewEnd {
    /// To now + this; may shorten.
    In(Duration),
    /// To now + this, if that is later.
    AtLeast(Duration),
}

impl Driver {
    /// Moves the end of a running one; the row is written when this returns.
    pub(super) async fn set_end(&mut self, end: NewEnd) -> Result<SandboxRecord, TimeoutError> {
        if self.is_killing() {
            return Err(UnknownSandbox(self.id).into());
        }
        if self.record.state != SandboxState::Running {
            return Err(TimeoutError::NotRunning { id: self.id, state: self.record.state });
        }
        let (now, before) = (self.core.clock.now(), self.record.end_at);
        let after = match end {
            NewEnd::In(timeout) => now + timeout,
            NewEnd::AtLeast(timeout) => before.max(now + timeout),
        };
        let after = self.record.spec.lifecycle.latest_end(self.record.started_at).map_or(after, |latest| after.min(latest));
        if let Some(run) = &self.run {
            run.activity.note(now);
        }
        if after != before {
            self.record.end_at = after;
            if let Err(error) = self.write_row().await {
                self.record.end_at = before;
                return Err(StoreFailure::from(error).into());
            }
            self.not_overdue();
            self.publish();
        }
        self.watch_end();
        Ok(self.record.clone())
    }
}
