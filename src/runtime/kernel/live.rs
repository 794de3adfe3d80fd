//! A sandbox with processes: what the server holds of it in memory, and how its end is noticed.

use super::{Kernel, Shared};
use crate::model::{KernelRef, SandboxId};
use crate::runtime::Exit;
use crate::runtime::uids::UidLease;
use crate::sys::netns::Netns;
use crate::sys::process::{ChildEnd, ended, open_pidfd, start_ticks};
use std::io;
use std::sync::Arc;
use tokio::sync::watch;

/// Held from start or adopt until release.
#[derive(Debug)]
pub(super) struct Live {
    /// What the row says.
    pub(super) kernel: KernelRef,
    /// Its own network namespace, for dialling in.
    pub(super) netns: Netns,
    /// Given back when this is dropped.
    pub(super) _uids: UidLease,
    exit: watch::Receiver<Option<Exit>>,
    /// Held by whoever looks through its processes.
    pub(super) looking: Arc<tokio::sync::Mutex<()>>,
}

impl Live {
    /// Resolves when pid 1 has ended. Cancel-safe: only reads a watch.
    pub(super) async fn exited(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(known) => known.clone().unwrap_or_else(Exit::unknown),
            Err(_) => Exit::unknown(),
        }
    }
}

impl Exit {
    /// Nobody could tell us.
    pub(super) fn unknown() -> Self {
        Self { detail: "unknown".to_owned() }
    }
}

impl Kernel {
    /// Begins to watch pid 1; `None` when that process is gone.
    pub(super) fn watch(&self, id: SandboxId, kernel: KernelRef, uids: UidLease) -> Option<Live> {
        let pidfd = open_pidfd(kernel.init.pid).ok()?;
        // The descriptor is of whoever has the pid now; the start time tells whether that is still ours.
        let is_same = start_ticks(kernel.init.pid).is_ok_and(|ticks| ticks == kernel.init.start_ticks);
        let netns = Netns::of_process(kernel.init.pid).ok().filter(|_| is_same)?;
        let (sender, exit) = watch::channel(None);
        let shared = Arc::clone(&self.0);
        tokio::spawn(async move {
            let end = ended(pidfd).await;
            let detail = tokio::task::spawn_blocking(move || shared.describe(id, end)).await;
            // Nobody may be interested any more.
            let _ = sender.send(Some(detail.unwrap_or_else(|_| Exit::unknown())));
        });
        Some(Live { kernel, netns, _uids: uids, exit, looking: Arc::default() })
    }
}

impl Shared {
    /// Called soon after the end: the cgroup, which knows about memory, is about to go.
    fn describe(&self, id: SandboxId, end: io::Result<Option<ChildEnd>>) -> Exit {
        let out_of_memory = || self.cgroups.of(id).oom_kills() > 0;
        let detail = match end {
            Ok(Some(ChildEnd::Exited(status))) => format!("exit status {status}"),
            Ok(Some(ChildEnd::Signaled(libc::SIGKILL))) if out_of_memory() => "out of memory".to_owned(),
            Ok(Some(ChildEnd::Signaled(signal))) => format!("killed by signal {signal}"),
            Ok(None) | Err(_) => return Exit::unknown(),
        };
        Exit { detail }
    }
}
