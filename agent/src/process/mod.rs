//! Processes started over the wire, from fork to the end that late joiners may still ask for.
//!
//! ```text
//! start ─> Running ── exited, and output at its end (or signalled by a client) ──> Ended ── 30 s ──> forgotten
//! ```
//!
//! A process belongs to no connection: clients attach to its output and leave, and only a signal, its own deadline or
//! the sandbox's end kills it.

pub(crate) mod exit;
pub(crate) mod input;
pub(crate) mod output;
pub(crate) mod reaper;
pub(crate) mod spawn;
mod supervise;
mod table;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Signal, pidfd_send_signal};
use tokio::sync::Notify;
use tokio::time::Instant;

pub(crate) use self::table::{Selector, Table};

use self::input::Input;
use self::output::{Output, Subscription};
use self::spawn::{ProcessConfig, SpawnError, Terminal};
use crate::state::{Agent, Identity};
use crate::users::User;

#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) tag: Option<String>,
    pub(crate) config: ProcessConfig,
    output: Arc<Output>,
    /// None once it has ended, so that what is kept for late joiners holds no fds.
    live: Mutex<Option<Arc<Live>>>,
    signalled: Notify,
}

/// What a running process can be reached by.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) input: Input,
    /// Names this process even when its pid has been given to another.
    pidfd: OwnedFd,
}

/// A request to start a process, complete and checked for form.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) config: ProcessConfig,
    pub(crate) terminal: Terminal,
    pub(crate) tag: Option<String>,
    /// The process is killed then, whether or not its client is still there.
    pub(crate) deadline: Option<Instant>,
}

/// Starts a process and everything that attends it. The subscription sees its output from the first byte on.
pub(crate) fn start(
    agent: &Arc<Agent>,
    identity: &Identity,
    user: &User,
    start: Start,
) -> Result<(Arc<Process>, Subscription), SpawnError> {
    let spawned = spawn::spawn(identity, user, &start.config, start.terminal)?;
    let exit = agent.reaper.exit_of(spawned.pid);
    let program = start.config.cmd.clone();
    supervise::attend(agent, spawned, start, exit).map_err(|source| SpawnError::Exec { program, source })
}

impl Process {
    /// What it printed that no client has seen, then what it prints from now on.
    pub(crate) fn subscribe(&self) -> Subscription {
        self.output.subscribe()
    }

    pub(crate) fn is_running(&self) -> bool {
        self.live().is_some()
    }

    /// None once it has ended.
    pub(crate) fn live(&self) -> Option<Arc<Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Hits this process alone. Once it is gone, grandchildren that hold its output are no longer waited for.
    pub(crate) fn send_signal(&self, signal: Signal) -> io::Result<()> {
        let sent = self.live().map_or(Ok(()), |live| pidfd_send_signal(&live.pidfd, signal));
        self.signalled.notify_one();
        match sent {
            // It has exited and only its output is still open: what the caller wants is true already.
            Err(rustix::io::Errno::SRCH) => Ok(()),
            other => Ok(other?),
        }
    }

    fn retire(&self) {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
