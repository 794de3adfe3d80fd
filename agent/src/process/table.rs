//! The processes that the agent knows, by pid.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Process;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Selector {
    #[error("process with pid {0} not found")]
    Pid(u32),
    #[error("process with tag {0} not found")]
    Tag(String),
}

#[derive(Debug, Default)]
pub(crate) struct Table {
    by_pid: Mutex<BTreeMap<u32, Arc<Process>>>,
}

impl Table {
    /// A running process, in the order of pids.
    pub(crate) fn running(&self) -> Vec<Arc<Process>> {
        self.lock().values().filter(|process| process.is_running()).cloned().collect()
    }

    /// A running process. The error is the selector itself, which reads as "… not found".
    pub(crate) fn find_running(&self, selector: Selector) -> Result<Arc<Process>, Selector> {
        self.find(selector.clone()).ok().filter(|process| process.is_running()).ok_or(selector)
    }

    /// As [`Table::find_running`], or one that has ended a moment ago.
    pub(crate) fn find(&self, selector: Selector) -> Result<Arc<Process>, Selector> {
        let by_pid = self.lock();
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
        self.lock().insert(process.pid, process);
    }

    /// Does nothing when the pid belongs to another process by now.
    pub(super) fn forget(&self, process: &Arc<Process>) {
        let mut by_pid = self.lock();
        if by_pid.get(&process.pid).is_some_and(|known| Arc::ptr_eq(known, process)) {
            by_pid.remove(&process.pid);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Arc<Process>>> {
        self.by_pid.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
