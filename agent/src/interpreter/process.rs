//! The process of a kernel: started like any other of the sandbox, in a session of its own, and killed with its group
//! when nobody holds it any more.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, chown};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process_group, pidfd_send_signal};
use tokio::sync::oneshot;

use super::random_hex;
use crate::process::exit::Exit;
use crate::process::spawn::{self, ProcessConfig, SpawnError, Stdin, Streams, Terminal};
use crate::state::Agent;
use crate::users::{self, User, UserError};
use crate::wire::RUN_DIR;

/// E2B's kernels are root's: people's cells install packages with apt and write below /root.
const USER: &str = "root";

#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error("could not make {path}: {source}")]
    Folder { path: PathBuf, source: io::Error },
    #[error("could not connect to the kernel: {0}")]
    Connect(#[source] io::Error),
    #[error("the kernel ended before it was ready ({status}): {said}")]
    Ended { status: String, said: String },
    #[error("the kernel was not ready within {0:?}")]
    Slow(std::time::Duration),
}

/// A folder for the sockets and files of one kernel; removed with it.
#[derive(Debug)]
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn new() -> Result<Folder, StartError> {
        let user = users::by_name(USER)?;
        // Short: the path of a unix socket has 108 bytes.
        let path = Path::new(RUN_DIR).join("kernels").join(random_hex(8));
        let make = || {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
            chown(&path, Some(user.uid), Some(user.gid))
        };
        make().map_err(|source| StartError::Folder { path: path.clone(), source })?;
        Ok(Folder(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left is a few dead sockets in a sandbox's own /run.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[derive(Debug)]
pub(super) struct KernelProcess {
    pid: Pid,
    pidfd: OwnedFd,
    exit: oneshot::Receiver<Exit>,
    ended: Option<Exit>,
}

/// The agent's ends of a kernel's pipes.
#[derive(Debug)]
pub(super) struct Pipes {
    pub(super) stdin: Option<OwnedFd>,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

impl KernelProcess {
    /// Starts `command` in `cwd`. Called on the agent's one thread and without an await in between, as the reaper wants.
    pub(super) fn start(agent: &Agent, command: &[String], cwd: &str, stdin: Stdin) -> Result<(KernelProcess, Pipes), StartError> {
        let user = users::by_name(USER)?;
        let identity = agent.identity();
        let (cmd, args) = command.split_first().map_or((String::new(), Vec::new()), |(cmd, args)| (cmd.clone(), args.to_vec()));
        let config = ProcessConfig { cmd, args, envs: environment(&user), cwd: Some(cwd.to_owned()) };
        let spawned = spawn::spawn(&identity, &user, &config, Terminal::Pipes { stdin })?;
        let exit = agent.reaper.exit_of(spawned.pid);
        let process = KernelProcess { pid: spawned.pid, pidfd: spawned.pidfd, exit, ended: None };
        match spawned.streams {
            Streams::Pipes { stdin, stdout, stderr } => Ok((process, Pipes { stdin, stdout, stderr })),
            // Asked for pipes; a kernel with a terminal would be one that cannot be heard.
            Streams::Pty(_) => Err(StartError::Connect(io::Error::other("the kernel has a terminal"))),
        }
    }

    /// Waits for the end. Cancel-safe, and may be asked again.
    pub(super) async fn ended(&mut self) -> Exit {
        if let Some(exit) = self.ended {
            return exit;
        }
        // The reaper drops no sender; a lost one could only mean that the child was waited for elsewhere.
        let exit = (&mut self.exit).await.unwrap_or(Exit::Code(0));
        self.ended = Some(exit);
        exit
    }

    /// As Ctrl-C in a terminal: the kernel and what it runs in its group.
    pub(super) fn interrupt(&self) {
        // Gone is as good as interrupted.
        let _ = kill_process_group(self.pid, Signal::INT);
    }

    /// Tells the kernel alone; ignored by one that does not know the signal.
    pub(super) fn poke(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::URG);
    }

    /// Whether it is dead, be it not reaped yet: it runs nothing of what is sent from now on.
    pub(super) fn is_dead(&mut self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let is_dead = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0);
        is_dead || self.has_ended()
    }

    /// As far as the reaper knows by now.
    fn has_ended(&mut self) -> bool {
        if self.ended.is_none() {
            self.ended = match self.exit.try_recv() {
                Ok(exit) => Some(exit),
                Err(oneshot::error::TryRecvError::Empty) => None,
                Err(oneshot::error::TryRecvError::Closed) => Some(Exit::Code(0)),
            };
        }
        self.ended.is_some()
    }
}

impl Drop for KernelProcess {
    fn drop(&mut self) {
        // Once it is reaped, its number may be another's.
        if !self.has_ended() {
            let _ = kill_process_group(self.pid, Signal::KILL);
        }
    }
}

/// What a kernel has besides the sandbox's variables: a terminal's type, as programs in cells expect one.
fn environment(user: &User) -> BTreeMap<String, String> {
    let shell = [("TERM", "dumb"), ("SHELL", "/bin/bash")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    BTreeMap::from_iter(shell.into_iter().chain([("USER".to_owned(), user.name.clone())]))
}
