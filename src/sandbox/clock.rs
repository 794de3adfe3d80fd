//! The wall clock of the core, which tests can move.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use time::OffsetDateTime;
use tokio::sync::Notify;

/// The present moment. Ends of sandboxes are moments of the wall clock: a laptop that slept through one kills late,
/// not never.
#[derive(Debug, Clone, Default)]
pub struct Clock {
    ahead_micros: Arc<AtomicI64>,
    moved: Arc<Notify>,
}

impl Clock {
    /// Now, in whole microseconds: what rows and cursors keep of a time.
    pub fn now(&self) -> OffsetDateTime {
        let now = OffsetDateTime::now_utc() + time::Duration::microseconds(self.ahead_micros.load(Ordering::Relaxed));
        now.replace_nanosecond(now.microsecond() * 1000).unwrap_or(now)
    }

    /// Moves the clock, for tests; who waits for a moment looks again.
    pub fn advance(&self, by: Duration) {
        self.ahead_micros.fetch_add(i64::try_from(by.as_micros()).unwrap_or(i64::MAX), Ordering::Relaxed);
        self.moved.notify_waiters();
    }

    /// Resolves when the clock was moved. Cancel-safe: whoever waits looks at the clock anyway.
    pub(super) async fn moved(&self) {
        self.moved.notified().await;
    }
}
