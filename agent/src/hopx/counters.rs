//! What this API has done so far, for its own metrics.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// Requests whose durations the percentile is taken from.
const DURATIONS_MAX: usize = 256;

#[derive(Debug)]
pub(super) struct Counters {
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    Well,
    Badly,
}

#[derive(Debug)]
struct State {
    since: Instant,
    started_at: SystemTime,
    requests: u64,
    errors: u64,
    executions: u64,
    active_executions: u64,
    duration_sum: Duration,
    latest: VecDeque<Duration>,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counted {
    pub(super) uptime: Duration,
    pub(super) started_at: SystemTime,
    pub(super) requests: u64,
    pub(super) errors: u64,
    pub(super) executions: u64,
    pub(super) active_executions: u64,
    pub(super) average: Duration,
    pub(super) p95: Duration,
}

/// One execution under way; dropping it ends it.
#[derive(Debug)]
pub(super) struct Active<'a>(&'a Counters);

impl Default for Counters {
    fn default() -> Counters {
        Counters { state: Mutex::new(State::new(0)) }
    }
}

impl State {
    fn new(active_executions: u64) -> State {
        State {
            since: Instant::now(),
            started_at: SystemTime::now(),
            requests: 0,
            errors: 0,
            executions: 0,
            active_executions,
            duration_sum: Duration::ZERO,
            latest: VecDeque::new(),
        }
    }
}

impl Counters {
    /// Begins anew; what is under way stays so.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        *state = State::new(state.active_executions);
    }

    pub(super) fn request(&self, took: Duration, ended: Ended) {
        let mut state = self.lock();
        state.requests += 1;
        state.errors += u64::from(ended == Ended::Badly);
        state.duration_sum += took;
        if state.latest.len() == DURATIONS_MAX {
            state.latest.pop_front();
        }
        state.latest.push_back(took);
    }

    pub(super) fn execution(&self) -> Active<'_> {
        let mut state = self.lock();
        state.executions += 1;
        state.active_executions += 1;
        Active(self)
    }

    pub(super) fn now(&self) -> Counted {
        let state = self.lock();
        let mut sorted: Vec<Duration> = state.latest.iter().copied().collect();
        sorted.sort_unstable();
        let answered = u32::try_from(state.requests).unwrap_or(u32::MAX).max(1);
        Counted {
            uptime: state.since.elapsed(),
            started_at: state.started_at,
            requests: state.requests,
            errors: state.errors,
            executions: state.executions,
            active_executions: state.active_executions,
            average: state.duration_sum / answered,
            p95: sorted.get(sorted.len() * 95 / 100).or(sorted.last()).copied().unwrap_or_default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.active_executions = state.active_executions.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_under_way_outlives_a_reset_and_ends_once() {
        let counters = Counters::default();
        let active = counters.execution();
        counters.request(Duration::from_millis(10), Ended::Badly);
        counters.reset();
        assert_eq!((counters.now().active_executions, counters.now().requests, counters.now().executions), (1, 0, 0));
        drop(active);
        assert_eq!(counters.now().active_executions, 0);
    }

    #[test]
    fn the_percentile_is_of_the_latest_requests_and_the_average_of_all() {
        let counters = Counters::default();
        assert_eq!(counters.now().p95, Duration::ZERO);
        for millis in 1..=100 {
            counters.request(Duration::from_millis(millis), Ended::Well);
        }
        assert_eq!(counters.now().p95, Duration::from_millis(96));
        assert_eq!(counters.now().average, Duration::from_micros(50_500));
        assert_eq!((counters.now().requests, counters.now().errors), (100, 0));
    }
}
