//! Waits for every child: those that the agent started, whose exit is handed to their owner, and the orphans that pid 1
//! inherits. The only place of the agent that waits.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Pid, WaitOptions, wait};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use super::exit::Exit;

#[derive(Debug, Default)]
pub(crate) struct Reaper {
    awaited: Mutex<HashMap<Pid, oneshot::Sender<Exit>>>,
}

impl Reaper {
    /// Listens for the death of children before the first one can exist.
    pub(crate) fn listen() -> io::Result<Signal> {
        signal(SignalKind::child())
    }

    /// Reaps until the agent ends.
    pub(crate) async fn run(self: Arc<Self>, mut child_died: Signal) {
        // One signal may stand for many deaths.
        while child_died.recv().await.is_some() {
            self.reap_all();
        }
    }

    /// The exit of `pid`, a child that was started on this thread just now.
    pub(crate) fn exit_of(&self, pid: Pid) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner).insert(pid, sender);
        receiver
    }

    /// Takes all that have died. Also called after a restore, in case the signal for one of them was lost with it.
    pub(crate) fn reap_all(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let Some(exit) = Exit::from_status(status) else { continue };
            let owner = self.awaited.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
            if let Some(owner) = owner {
                let _ = owner.send(exit);
            }
        }
    }
}
