//! kill: always accepted, wins over everything that waits, leaves nothing but a row with the reason.

use super::driver::Driver;
use super::dump_folder::DumpFolder;
use super::error::chain;
use super::events;
use crate::model::{EndReason, LogEntry, LogLevel, SandboxState};
use crate::store::{sandboxes, snapshots};
use std::collections::BTreeMap;
use std::time::Duration;

/// How often the kernel is asked to let go before it is left to the next start.
const TRIES: u32 = 3;
/// Pause between two tries.
const RETRY_AFTER: Duration = Duration::from_millis(500);

impl Driver {
    /// Ends it. Callers saw it gone since the kill was accepted. Failures are logged and left to the next start, whose
    /// recovery finds the row `killing`.
    pub(super) async fn kill(&mut self) {
        let reason = self.kill_reason.clone().unwrap_or(EndReason::Killed);
        (self.record.state, self.record.end_reason) = (SandboxState::Killing, Some(reason.clone()));
        self.write_row_or_log().await;
        self.core.failpoints.pass("kill.intended").await;
        let place = self.close_run().await;
        if !self.destroy().await {
            return;
        }
        drop(place);
        self.core.failpoints.pass("kill.destroyed").await;
        self.forget_dump().await;
        let now = self.core.clock.now();
        (self.record.state, self.record.ended_at, self.record.kernel) = (SandboxState::Killed, Some(now), None);
        self.write_row_or_log().await;
        self.publish();
        self.log_end(&reason);
        events::keep_end(&self.core, &self.record, &reason);
    }

    async fn write_row_or_log(&self) {
        if let Err(error) = self.write_row().await {
            tracing::error!(sandbox.id = %self.id, error = chain(&error), "Could not record that sandbox {} is {}", self.id, self.record.state);
        }
    }

    /// Whether nothing of it is left in the kernel and on disk.
    pub(super) async fn destroy(&self) -> bool {
        for attempt in 1..=TRIES {
            match self.core.runtime.destroy(self.id).await {
                Ok(()) => return true,
                Err(error) => {
                    tracing::error!(sandbox.id = %self.id, attempt, error = chain(&error), "Could not remove sandbox {}", self.id);
                }
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
        false
    }

    /// Its dump goes, with its row and its folder.
    pub(super) async fn forget_dump(&mut self) {
        let Some(snapshot) = self.record.snapshot.take() else { return };
        let record = self.record.clone();
        let forgotten = self.core.store.write(move |db| {
            sandboxes::update(db, &record)?;
            snapshots::remove(db, snapshot)
        });
        if let Err(error) = forgotten.await {
            tracing::error!(sandbox.id = %self.id, error = chain(&error), "Could not forget the dump of sandbox {}", self.id);
        }
        DumpFolder::of(&self.core, snapshot).remove().await;
    }

    fn log_end(&self, reason: &EndReason) {
        let (level, message) = match reason {
            EndReason::Killed => (LogLevel::Info, "sandbox was killed".to_owned()),
            EndReason::TimedOut => (LogLevel::Info, "sandbox reached the end of its time".to_owned()),
            EndReason::Idle => (LogLevel::Info, "sandbox was idle for as long as it may be".to_owned()),
            EndReason::AgentDied { detail } => (LogLevel::Error, format!("sandbox ended because its agent died: {detail}")),
            EndReason::CreateFailed { detail } => (LogLevel::Error, format!("sandbox could not be created: {detail}")),
        };
        tracing::info!(sandbox.id = %self.id, "Removed sandbox {}: {message}", self.id);
        self.log_line(level, message);
    }

    /// A line of ours in the sandbox's own log.
    pub(super) fn log_line(&self, level: LogLevel, message: String) {
        let fields = BTreeMap::from([("logger".to_owned(), "stillbox".to_owned())]);
        let entry = LogEntry { at: self.core.clock.now(), level, message, fields };
        self.core.store.keep_logs(self.id.to_string(), vec![entry], None);
    }
}
