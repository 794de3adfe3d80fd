//! Where helpers come from: a process of this program that has loaded it, has one thread and has done nothing yet.
//!
//! Executing a program of this size anew costs some 2.5 ms of CPU, which is the linker's work; a fork of one that waits
//! costs a tenth of that. The server asks, and gives the three standard streams; the nursery forks, and answers with
//! the pidfd. What it forks is the server's child, as if the server had started it, and ends after one operation.
//! Nothing but forks happens in the nursery itself, so each helper begins as the same blank process, in the mount
//! namespace that CRIU needs.
//!
//! ```text
//!  server ── verb, 3 descriptors ──> nursery ──fork──> helper (the server's child): request on 0, answer on 1
//!         <── pidfd, or why not ───
//! ```
//!
//! It ends with the server: its standard input is their conversation.

use super::client::HelperError;
use super::criu::place;
use crate::sys::command::fork_sibling;
use crate::sys::descriptors::{receive, send};
use crate::sys::process::{self, ChildEnd};
use nix::sys::prctl::set_name;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair};
use nix::sys::time::{TimeVal, TimeValLike};
use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::unix::pipe;

/// `stillbox runtime <VERB>`.
pub(super) const VERB: &str = "nursery";

/// A fork takes a fraction of a millisecond; a nursery that does not answer for so long is given up.
const ANSWER_S_MAX: i64 = 10;
/// Longer than any verb.
const MESSAGE_BYTES_MAX: usize = 32;
/// What `ps` shows of a helper begins with this.
const NAME_PREFIX: &str = "sb-";

/// Starts helpers. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Nursery {
    program: PathBuf,
    criu: Option<PathBuf>,
    data_dir: PathBuf,
    running: Arc<Mutex<Option<Running>>>,
}

/// The process, and our end of the conversation.
#[derive(Debug)]
struct Running {
    socket: OwnedFd,
    /// Not its pid: that may be somebody else's once it was killed and its status was taken.
    process: OwnedFd,
}

/// A helper that waits for its request.
#[derive(Debug)]
pub(super) struct Helper {
    pub(super) process: HelperProcess,
    pub(super) stdin: pipe::Sender,
    pub(super) stdout: pipe::Receiver,
    pub(super) stderr: pipe::Receiver,
}

/// The process of a helper. Dropping it kills it, if it still runs.
#[derive(Debug)]
pub(super) struct HelperProcess(OwnedFd);

impl Nursery {
    /// Of `program`, which is executed when the first helper is wanted, and anew whenever its nursery was ended. Most of
    /// its helpers run `criu`, for sandboxes below `data_dir`.
    pub(crate) fn new(program: &Path, criu: Option<&Path>, data_dir: &Path) -> Self {
        Self { program: program.to_owned(), criu: criu.map(Path::to_owned), data_dir: data_dir.to_owned(), running: Arc::default() }
    }

    /// A helper for one operation.
    pub(super) async fn spawn(&self, verb: &'static str) -> Result<Helper, HelperError> {
        let nursery = self.clone();
        let spawned = tokio::task::spawn_blocking(move || nursery.spawn_blocking(verb)).await;
        let (pidfd, [stdin, stdout, stderr]) =
            spawned.map_err(io::Error::other).and_then(|spawned| spawned).map_err(|source| HelperError::Run { verb, source })?;
        let dress = move || {
            Ok(Helper {
                process: HelperProcess(pidfd),
                stdin: pipe::Sender::from_owned_fd(stdin)?,
                stdout: pipe::Receiver::from_owned_fd(stdout)?,
                stderr: pipe::Receiver::from_owned_fd(stderr)?,
            })
        };
        dress().map_err(|source| HelperError::Run { verb, source })
    }

    /// The pidfd and our ends of standard input, output and error. A nursery that was killed is followed by another.
    fn spawn_blocking(&self, verb: &'static str) -> io::Result<(OwnedFd, [OwnedFd; 3])> {
        let (stdin, our_stdin) = io::pipe()?;
        let (our_stdout, stdout) = io::pipe()?;
        let (our_stderr, stderr) = io::pipe()?;
        let theirs = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let earlier = running.take();
        let (asked, nursery) = match earlier.map(|nursery| (nursery.ask(verb, theirs), nursery)) {
            Some((Ok(pidfd), nursery)) => (Ok(pidfd), nursery),
            Some((Err(Unanswered::Refused(error)), nursery)) => (Err(error), nursery),
            Some((Err(Unanswered::Gone(_)), _)) | None => {
                let nursery = self.start_process()?;
                (nursery.ask(verb, theirs).map_err(io::Error::from), nursery)
            }
        };
        *running = Some(nursery);
        Ok((asked?, [our_stdin.into(), our_stdout.into(), our_stderr.into()]))
    }

    /// Has one ready before the first helper is wanted.
    pub(crate) fn start(&self) {
        let nursery = self.clone();
        tokio::task::spawn_blocking(move || {
            let mut running = nursery.running.lock().unwrap_or_else(PoisonError::into_inner);
            if running.is_none() {
                // Who wants a helper will be told why there is none.
                *running = nursery.start_process().ok();
            }
        });
    }

    fn start_process(&self) -> io::Result<Running> {
        Running::start(&self.program, self.criu.as_deref(), &self.data_dir)
    }

    /// Ends it; helpers that are at work go on.
    pub(crate) fn close(&self) {
        drop(self.running.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// Why there is no helper.
enum Unanswered {
    /// The kernel gave no process.
    Refused(io::Error),
    /// The nursery has ended, or hangs.
    Gone(io::Error),
}

impl From<Unanswered> for io::Error {
    fn from(unanswered: Unanswered) -> Self {
        match unanswered {
            Unanswered::Refused(error) | Unanswered::Gone(error) => error,
        }
    }
}

impl Running {
    /// In a process group of its own: what a terminal sends to the server's group is the server's to handle.
    fn start(program: &Path, criu: Option<&Path>, data_dir: &Path) -> io::Result<Self> {
        let (socket, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(ANSWER_S_MAX))?;
        let mut command = Command::new(program);
        command.args(["runtime", VERB]).arg(data_dir).args(criu).env_clear().process_group(0);
        let child = command.stdin(theirs).stdout(Stdio::null()).spawn()?;
        let process = process::open_pidfd(i32::try_from(child.id()).map_err(io::Error::other)?)?;
        Ok(Self { socket, process })
    }

    fn ask(&self, verb: &str, stdio: [BorrowedFd<'_>; 3]) -> Result<OwnedFd, Unanswered> {
        send(self.socket.as_fd(), verb.as_bytes(), &stdio).map_err(Unanswered::Gone)?;
        let mut text = [0; MESSAGE_BYTES_MAX];
        let (length, mut descriptors) = receive(self.socket.as_fd(), &mut text).map_err(Unanswered::Gone)?;
        match (descriptors.pop(), <[u8; 4]>::try_from(&text[..length])) {
            (Some(pidfd), _) => Ok(pidfd),
            (None, Ok(errno)) => Err(Unanswered::Refused(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))),
            (None, Err(_)) => Err(Unanswered::Gone(io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has nothing to finish.
        process::end(self.process.as_fd());
    }
}

impl HelperProcess {
    /// Waits until it has ended, and takes its status.
    pub(super) async fn ended(&self) -> io::Result<Option<ChildEnd>> {
        process::ended(self.0.try_clone()?).await
    }
}

impl Drop for HelperProcess {
    fn drop(&mut self) {
        if process::kill(self.0.as_fd()).is_ok()
            && let (Ok(runtime), Ok(pidfd)) = (tokio::runtime::Handle::try_current(), self.0.try_clone())
        {
            // Its status interests nobody, but has to be taken.
            runtime.spawn(process::ended(pidfd));
        }
    }
}

/// What a process is after [`serve`].
pub(super) enum Role {
    /// The nursery, at its end.
    Nursery,
    /// A helper that was just born, for this verb.
    Helper(String),
}

/// The nursery's life: forks a helper for each question, until the server has ended. In each of the forks it returns too.
/// They are born where CRIU is to run, if `arguments` (the data folder, then perhaps a CRIU) say which.
pub(super) fn serve(arguments: &[OsString]) -> io::Result<Role> {
    be_called(VERB)?;
    if let [data_dir, criu] = arguments {
        // Who cannot do without is told so when it tries by itself.
        let _ = place::prepare_for_all(Path::new(criu), Path::new(data_dir));
    }
    let stdin = io::stdin();
    loop {
        let mut verb = [0; MESSAGE_BYTES_MAX];
        let (length, stdio) = receive(stdin.as_fd(), &mut verb)?;
        if length == 0 {
            return Ok(Role::Nursery);
        }
        match fork_sibling() {
            Ok(None) => {
                let verb = String::from_utf8_lossy(&verb[..length]).into_owned();
                become_helper(&verb, &stdio)?;
                return Ok(Role::Helper(verb));
            }
            Ok(Some(pidfd)) => send(stdin.as_fd(), b"born", &[pidfd.as_fd()])?,
            Err(error) => send(stdin.as_fd(), &error.raw_os_error().unwrap_or(nix::libc::EIO).to_ne_bytes(), &[])?,
        }
    }
}

/// The descriptors become the standard ones, which ends its part in the nursery's conversation.
fn become_helper(verb: &str, stdio: &[OwnedFd]) -> io::Result<()> {
    for (standard, given) in (0..).zip(stdio) {
        nix::unistd::dup2(given.as_raw_fd(), standard)?;
    }
    be_called(verb)
}

/// Forks share their arguments; this is how they are told apart.
fn be_called(verb: &str) -> io::Result<()> {
    let name = CString::new(format!("{NAME_PREFIX}{verb}"))?;
    Ok(set_name(&name)?)
}
