//! The processes that the agent knows, by pid.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::Process;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Selector {
    #[error("process with pid {0} not found")]
    Pid(u32),
    #[error("process with tag {0} not found")]
    Tag(String),
}

/// How long an ended process can still be connected to, and how many of them at most.
const END_RETENTION: Duration = Duration::from_secs(30);
const ENDED_MAX: usize = 64;

#[derive(Debug, Default)]
pub(crate) struct Table {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    by_pid: BTreeMap<u32, Arc<Process>>,
    /// Oldest first.
    ended: VecDeque<(Instant, Arc<Process>)>,
}

/// Whether the caller of [`Table::keep_ended`] has to see to it that ended processes are forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sweep {
    Begin,
    /// Another one is at it.
    Running,
}

impl Table {
    /// A running process, in the order of pids.
    pub(crate) fn running(&self) -> Vec<Arc<Process>> {
        self.lock().by_pid.values().filter(|process| process.is_running()).cloned().collect()
    }

    /// A running process. The error is the selector itself, which reads as "… not found".
    pub(crate) fn find_running(&self, selector: Selector) -> Result<Arc<Process>, Selector> {
        self.find(selector.clone()).ok().filter(|process| process.is_running()).ok_or(selector)
    }

    /// As [`Table::find_running`], or one that has ended a moment ago.
    pub(crate) fn find(&self, selector: Selector) -> Result<Arc<Process>, Selector> {
        let by_pid = &self.lock().by_pid;
        let found = match &selector {
            Selector::Pid(pid) => by_pid.get(pid),
            Selector::Tag(tag) => {
                let tagged = || by_pid.values().filter(|process| process.tag.as_ref() == Some(tag));
                tagged().find(|process| process.is_running()).or_else(|| tagged().next_back())
            }
        };
        found.cloned().ok_or(selector)
    }

    /// An ended process that had the same pid is forgotten.
    pub(super) fn insert(&self, process: Arc<Process>) {
        self.lock().by_pid.insert(process.pid, process);
    }

    /// Keeps an ended process for late joiners.
    pub(super) fn keep_ended(&self, process: Arc<Process>) -> Sweep {
        let mut state = self.lock();
        let sweep = if state.ended.is_empty() { Sweep::Begin } else { Sweep::Running };
        state.ended.push_back((Instant::now() + END_RETENTION, process));
        if state.ended.len() > ENDED_MAX {
            state.forget_oldest();
        }
        sweep
    }

    /// Returns when the next one is due; None when none is left.
    pub(super) fn forget_expired(&self, now: Instant) -> Option<Instant> {
        let mut state = self.lock();
        loop {
            let due = state.ended.front()?.0;
            if due > now {
                return Some(due);
            }
            state.forget_oldest();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Its pid may belong to another process by now.
    fn forget_oldest(&mut self) {
        let Some((_, process)) = self.ended.pop_front() else { return };
        if self.by_pid.get(&process.pid).is_some_and(|known| Arc::ptr_eq(known, &process)) {
            self.by_pid.remove(&process.pid);
        }
    }
}
