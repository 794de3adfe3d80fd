//! The ends of sandboxes: one task that tells a driver when its sandbox's time is up.
//!
//! The task only knows moments; what happens then (kill, pause, nothing because the end was moved) is the driver's.

use super::core::Core;
use super::driver::Request;
use crate::model::SandboxId;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use time::OffsetDateTime;
use tokio::sync::Notify;

/// The wall clock may jump (suspend, NTP), so the task looks at it at least this often; ends are kept within it.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Moments by sandbox.
#[derive(Debug, Default)]
pub(super) struct Timers {
    ends: Mutex<Ends>,
    sooner: Notify,
}

#[derive(Debug, Default)]
struct Ends {
    in_order: BTreeSet<(OffsetDateTime, SandboxId)>,
    by_id: HashMap<SandboxId, OffsetDateTime>,
}

impl Timers {
    /// Its driver is told at `at`, and no more at any moment set before.
    pub(super) fn set(&self, id: SandboxId, at: OffsetDateTime) {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        ends.remove(id);
        ends.by_id.insert(id, at);
        ends.in_order.insert((at, id));
        let is_first = ends.in_order.first() == Some(&(at, id));
        drop(ends);
        if is_first {
            self.sooner.notify_one();
        }
    }

    /// Its driver is not told any more.
    pub(super) fn clear(&self, id: SandboxId) {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    fn take_due(&self, now: OffsetDateTime) -> Vec<SandboxId> {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let due: Vec<SandboxId> = ends.in_order.iter().take_while(|(at, _)| *at <= now).map(|(_, id)| *id).collect();
        for id in &due {
            ends.remove(*id);
        }
        due
    }

    fn first(&self) -> Option<OffsetDateTime> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner).in_order.first().map(|(at, _)| *at)
    }
}

impl Ends {
    fn remove(&mut self, id: SandboxId) {
        if let Some(at) = self.by_id.remove(&id) {
            self.in_order.remove(&(at, id));
        }
    }
}

/// The task. Runs until it is aborted.
pub(super) async fn run(core: Arc<Core>) {
    loop {
        for id in core.timers.take_due(core.clock.now()) {
            tell(&core, id);
        }
        let until_first = core.timers.first().map_or(LOOK_EVERY, |at| (at - core.clock.now()).try_into().unwrap_or(Duration::ZERO));
        tokio::select! {
            // Cancel-safe, all three: whichever comes first, the loop looks at everything again.
            () = tokio::time::sleep(until_first.min(LOOK_EVERY)) => {}
            () = core.timers.sooner.notified() => {}
            () = core.clock.moved() => {}
        }
    }
}

/// A driver whose requests are full is busy; it is told again soon.
fn tell(core: &Core, id: SandboxId) {
    let Some(handle) = core.handle(id) else { return };
    if handle.requests.try_send(Request::Expired).is_err() && !handle.requests.is_closed() {
        core.timers.set(id, core.clock.now() + LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: OffsetDateTime = time::macros::datetime!(2026-01-02 03:04:05 UTC);

    #[test]
    fn only_the_last_moment_set_counts_and_each_comes_once() {
        let (timers, one, two) = (Timers::default(), SandboxId::random(), SandboxId::random());
        timers.set(one, START + Duration::from_secs(1));
        timers.set(two, START + Duration::from_secs(2));
        timers.set(one, START + Duration::from_secs(3));
        assert_eq!(timers.take_due(START + Duration::from_secs(2)), [two]);
        assert_eq!(timers.take_due(START + Duration::from_secs(2)), []);
        timers.clear(one);
        assert_eq!((timers.first(), timers.take_due(START + Duration::from_secs(9))), (None, vec![]));
    }
}
