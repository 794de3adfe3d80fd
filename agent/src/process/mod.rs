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
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Signal, pidfd_send_signal};
use tokio::sync::Notify;
use tokio::time::Instant;

pub(crate) use self::table::{Selector, Table};

use self::input::Input;
use self::output::{Output, Subscription};
use self::spawn::{ProcessConfig, Size, SpawnError, Terminal};
use crate::state::{Agent, Identity};
use crate::users::User;

#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) tag: Option<String>,
    pub(crate) config: ProcessConfig,
    pub(crate) input: Input,
    output: Arc<Output>,
    /// Names this process even when its pid has been given to another.
    pidfd: OwnedFd,
    ended: AtomicBool,
    signalled: Notify,
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
pub(crate) fn start(agent: &Arc<Agent>, identity: &Identity, user: &User, start: Start) -> Result<(Arc<Process>, Subscription), SpawnError> {
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
        !self.ended.load(Ordering::Acquire)
    }

    /// Hits this process alone. Once it is gone, grandchildren that hold its output are no longer waited for.
    pub(crate) fn send_signal(&self, signal: Signal) -> io::Result<()> {
        let sent = pidfd_send_signal(self.pidfd.as_fd(), signal);
        self.signalled.notify_one();
        match sent {
            // It has exited and only its output is still open: what the caller wants is true already.
            Err(rustix::io::Errno::SRCH) => Ok(()),
            other => Ok(other?),
        }
    }

    pub(crate) fn resize(&self, size: Size) -> Result<(), input::InputError> {
        self.input.resize(size)
    }
}
