//! The helper: a process of this binary for one operation on the kernel, single-threaded, JSON in and out. It is forked
//! from one that has done nothing ([`nursery`]), so each begins blank.
//!
//! libcontainer and CRIU exist only below here, and only in that process: both change what belongs to a whole
//! process (working directory, mounts, namespaces). [`client`] is the server's side.

pub(in crate::runtime) mod bundle;
pub(crate) mod client;
pub(crate) mod container;
pub(crate) mod criu;
pub(crate) mod dump;
pub mod main;
mod nursery;
pub(crate) mod prepare;
pub(crate) mod restore;
pub(crate) mod undo;
pub(in crate::runtime) mod volumes;

use super::layout::SandboxFolder;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};
use std::any::Any;
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};
use volumes::{AttachError, Unmountable};

/// A step of an operation that failed, as it travels to the server: what was done, and why it failed, outermost
/// reason first.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct HelperStep {
    step: String,
    reasons: Vec<String>,
    blame: Option<Blame>,
}

/// A failure that is told apart from all others, since whoever asked can do something about it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::runtime) enum Blame {
    /// A volume cannot be mounted there.
    MountPath(Unmountable),
    /// A file that was open on a volume is not what it was.
    VolumeFile {
        /// Where it was, inside.
        path: String,
        /// The kernel's reason.
        why: String,
    },
}

impl HelperStep {
    fn new(step: &str, reason: impl Into<String>) -> Self {
        Self { step: step.to_owned(), reasons: vec![reason.into()], blame: None }
    }

    /// Names the step that an error happened in.
    fn wrap<E: Error + 'static>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |error| {
            let (mut reasons, mut blame) = (Vec::new(), None);
            let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
            while let Some(error) = cause {
                reasons.push(error.to_string());
                if let Some(AttachError::Unmountable(found)) = error.downcast_ref() {
                    blame = Some(Blame::MountPath(found.clone()));
                }
                cause = error.source();
            }
            Self { step: step.to_owned(), reasons, blame }
        }
    }

    /// What its caller is to blame for, or is to know.
    pub(in crate::runtime) fn blame(&self) -> Option<&Blame> {
        self.blame.as_ref()
    }
}

impl std::fmt::Display for HelperStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} failed: {}", self.step, self.reasons.join(": "))
    }
}

impl Error for HelperStep {}

/// One operation: what it is called on the command line, what it is told and what it answers.
pub(crate) trait Operation: serde::Serialize + serde::de::DeserializeOwned + std::fmt::Debug {
    /// `stillbox runtime <VERB>`.
    const VERB: &'static str;
    /// What success answers.
    type Answer: serde::Serialize + serde::de::DeserializeOwned;
    /// The sandbox that it works on.
    fn folder(&self) -> &SandboxFolder;
    /// Does it, in the helper process. What goes to `later` is dropped when the answer has been given.
    fn run(&self, later: &mut Later) -> Result<Self::Answer, HelperStep>;
}

/// Values whose end is work that nobody should wait for: processes that are about to end, files that are of no use any
/// more.
#[derive(Debug, Default)]
pub(crate) struct Later(Vec<Box<dyn Any>>);

impl Later {
    fn drop(&mut self, value: impl Any) {
        self.0.push(Box::new(value));
    }
}

/// The mark of a helper that is at work on a sandbox: it outlives a server that was killed, and the next one waits.
struct AtWork {
    _lock: Flock<File>,
}

impl AtWork {
    fn begin(folder: &SandboxFolder) -> io::Result<Self> {
        let lock = Flock::lock(open_lock(folder, HELPER_LOCK)?, FlockArg::LockExclusive).map_err(|(_, errno)| io::Error::from(errno))?;
        Ok(Self { _lock: lock })
    }

    /// The same for the CRIU of a dump, which inherits this: it goes on to undo its work when its helper is killed.
    fn of_criu(folder: &SandboxFolder) -> io::Result<Self> {
        let lock = Flock::lock(open_lock(folder, CRIU_LOCK)?, FlockArg::LockExclusive).map_err(|(_, errno)| io::Error::from(errno))?;
        fcntl(lock.as_raw_fd(), FcntlArg::F_SETFD(FdFlag::empty()))?;
        Ok(Self { _lock: lock })
    }
}

const HELPER_LOCK: &str = "helper.lock";
const CRIU_LOCK: &str = "criu.lock";

fn open_lock(folder: &SandboxFolder, name: &str) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(folder.path().join(name))
}

/// Makes the file that the first helper would make.
fn make_lock(folder: &SandboxFolder) -> io::Result<()> {
    open_lock(folder, HELPER_LOCK).map(drop)
}

/// Returns when no helper, and no CRIU that lost its helper, is at work on the sandbox. Blocks for at most `limit`.
pub(crate) fn wait_until_idle(folder: &SandboxFolder, limit: Duration) -> io::Result<()> {
    if !folder.path().exists() {
        return Ok(());
    }
    let deadline = Instant::now() + limit;
    wait_for_lock(folder, HELPER_LOCK, deadline)?;
    wait_for_lock(folder, CRIU_LOCK, deadline)
}

fn wait_for_lock(folder: &SandboxFolder, name: &str, deadline: Instant) -> io::Result<()> {
    let mut lock = open_lock(folder, name)?;
    loop {
        match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(_) => return Ok(()),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() > deadline => {
                let waited = format!("{} of a runtime helper is still locked in {}", name, folder.path().display());
                return Err(io::Error::new(io::ErrorKind::TimedOut, waited));
            }
            Err((file, Errno::EWOULDBLOCK)) => lock = file,
            Err((_, errno)) => return Err(errno.into()),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
