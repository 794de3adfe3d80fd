//! Whether anybody uses a sandbox, and since when nobody does: what an idle timeout looks at.
//!
//! Use is what comes in from outside: a request into the sandbox for as long as it or its answer is under way, and every
//! move of its end. Reads of the control plane are no use.

use super::clock::Clock;
use super::driver::Driver;
use crate::model::EndReason;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use time::OffsetDateTime;

/// The use of one run of a sandbox.
#[derive(Debug)]
pub(super) struct Activity {
    clock: Clock,
    uses: Mutex<Uses>,
}

#[derive(Debug)]
struct Uses {
    under_way: u32,
    last: OffsetDateTime,
}

impl Activity {
    /// A run that begins now; its beginning is a use.
    pub(super) fn new(clock: Clock) -> Self {
        let last = clock.now();
        Self { clock, uses: Mutex::new(Uses { under_way: 0, last }) }
    }

    /// A use that is over at once.
    pub(super) fn note(&self, now: OffsetDateTime) {
        self.lock().last = now;
    }

    /// When it will have been idle for `idle_max`, if nobody comes.
    fn idle_at(&self, now: OffsetDateTime, idle_max: Duration) -> OffsetDateTime {
        let uses = self.lock();
        let last = if uses.under_way > 0 { now } else { uses.last };
        last + idle_max
    }

    fn lock(&self) -> MutexGuard<'_, Uses> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody uses a sandbox, until this is dropped.
#[derive(Debug)]
pub struct InUse(Arc<Activity>);

impl InUse {
    pub(super) fn of(activity: &Arc<Activity>) -> Self {
        activity.lock().under_way += 1;
        Self(Arc::clone(activity))
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let now = self.0.clock.now();
        let mut uses = self.0.lock();
        uses.under_way -= 1;
        uses.last = now;
    }
}

impl Driver {
    /// Why a running one must end now, if it must.
    pub(super) fn reason_to_end(&self, now: OffsetDateTime) -> Option<EndReason> {
        match (self.record.end_at <= now, self.idle_at(now)) {
            (true, _) => Some(EndReason::TimedOut),
            (false, Some(idle)) if idle <= now => Some(EndReason::Idle),
            (false, _) => None,
        }
    }

    /// Asks the timers for the first moment at which it may have to end. While it is used that moment moves on, and the
    /// driver asks again when it comes.
    pub(super) fn watch_end(&self) {
        let end = self.record.end_at;
        let at = self.idle_at(self.core.clock.now()).map_or(end, |idle| end.min(idle));
        self.core.timers.set(self.id, at);
    }

    fn idle_at(&self, now: OffsetDateTime) -> Option<OffsetDateTime> {
        let (idle_max, run) = (self.record.spec.lifecycle.idle_max?, self.run.as_ref()?);
        Some(run.activity.idle_at(now, idle_max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_is_idle_from_the_end_of_its_last_use_on() {
        let (clock, minute) = (Clock::default(), Duration::from_secs(60));
        let activity = Arc::new(Activity::new(clock.clone()));
        let (one, other) = (InUse::of(&activity), InUse::of(&activity));
        clock.advance(Duration::from_secs(300));
        drop(one);
        let now = clock.now();
        assert_eq!(activity.idle_at(now, minute), now + minute, "one use is still under way");
        drop(other);
        clock.advance(minute);
        assert!(activity.idle_at(clock.now(), minute) <= clock.now());
        activity.note(clock.now());
        assert!(activity.idle_at(clock.now(), minute) > clock.now());
    }
}
