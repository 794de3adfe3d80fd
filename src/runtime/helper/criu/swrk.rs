//! The conversation with one `criu swrk`: a request, CRIU's stops on the way, the answer.
//!
//! Messages are rust-criu's generated types; its transport is not used, because it knows only some of the options
//! and drops the restored pid.

use super::failure::reason_in_log;
use super::frozen::Frozen;
use super::place::Seat;
use super::{CriuError, HookError};
use crate::sys::command::{block_sigchld, die_with_parent, spawn_in_cgroup};
use crate::sys::process;
use crate::sys::tracee::{Stop, Tracee};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use protobuf::{Message, MessageField};
use rust_criu::rust_criu_protobuf::rpc;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// CRIU's messages are some hundred bytes; one that fills this was cut.
const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Names the descriptor of the journal to our CRIU.
const JOURNAL_VARIABLE: &str = "STILLBOX_CURE_FD";

/// How long CRIU may take from its answer to its end.
const LAST_STEPS_WITHIN: Duration = Duration::from_millis(200);

/// Whether CRIU has given its final answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Talk {
    GoingOn,
    Over,
}

/// What is asked of CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Dump,
    Restore,
}

impl Verb {
    pub(super) fn name(self) -> &'static str {
        match self {
            Verb::Dump => "dump",
            Verb::Restore => "restore",
        }
    }

    pub(super) fn log_name(self) -> &'static str {
        match self {
            Verb::Dump => "dump.log",
            Verb::Restore => "restore.log",
        }
    }

    fn request_type(self) -> rpc::Criu_req_type {
        match self {
            Verb::Dump => rpc::Criu_req_type::DUMP,
            Verb::Restore => rpc::Criu_req_type::RESTORE,
        }
    }
}

/// What a CRIU that is killed must not take along: the tasks that it traces.
#[derive(Debug)]
pub(super) struct Guard<'a> {
    /// Theirs: they are frozen before it lets go of them.
    pub(super) cgroups: &'a [PathBuf],
    /// Where it notes what it changes in them; it inherits this.
    pub(super) journal: File,
}

/// A CRIU that stops at its end, however that comes.
#[derive(Debug)]
struct Watched {
    tracee: Tracee,
    stops: SignalFd,
    cgroups: Vec<PathBuf>,
    /// Since it ended without an answer.
    frozen: Option<Frozen>,
}

/// A running `criu swrk`. Dropped, it is killed if it still runs, and reaped.
#[derive(Debug)]
pub(super) struct Swrk {
    process: OwnedFd,
    watched: Option<Watched>,
    talk: Talk,
    socket: OwnedFd,
    verb: Verb,
    log: PathBuf,
    deadline: Duration,
    ends_at: Instant,
}

impl Swrk {
    /// Starts CRIU as a child. One that restores dies with this process, and what it began is nobody's. One that dumps
    /// does not: it meets the end of this conversation at its next stop and undoes its work; should it be killed itself,
    /// `guard` says what is needed to undo it from outside. The folders of a request are opened by this process:
    /// CRIU reads them through /proc/PID/fd of the socket's maker.
    pub(super) fn start(
        criu: &Path,
        verb: Verb,
        work: &Path,
        seat: &Seat,
        deadline: Duration,
        guard: Option<Guard<'_>>,
    ) -> Result<Swrk, CriuError> {
        let started = spawn(criu, verb, seat, guard).map_err(|source| CriuError::Spawn { path: criu.to_owned(), source })?;
        let Started { process, socket, watched } = started;
        let log = work.join(verb.log_name());
        Ok(Swrk { process, watched, talk: Talk::GoingOn, socket, verb, log, deadline, ends_at: Instant::now() + deadline })
    }

    /// Sends the request and answers CRIU's stops by `on_moment` (its name, and init's pid where CRIU tells it)
    /// until the final answer. A failing hook makes CRIU undo its work; its error then wins over CRIU's.
    pub(super) fn run(
        &mut self,
        options: rpc::Criu_opts,
        mut on_moment: impl FnMut(&str, i32) -> Result<(), HookError>,
    ) -> Result<rpc::Criu_resp, CriuError> {
        let mut request = rpc::Criu_req::new();
        request.set_type(self.verb.request_type());
        request.opts = MessageField::some(options);
        self.send(&request)?;
        let mut hook_error = None;
        loop {
            let response = match self.receive() {
                Err(CriuError::Refused { .. }) if hook_error.is_some() => break,
                other => other?,
            };
            if response.type_() != rpc::Criu_req_type::NOTIFY {
                self.talk = Talk::Over;
                if response.success() {
                    return Ok(response);
                }
                break;
            }
            let moment = response.notify.script().to_owned();
            let outcome = match hook_error {
                None => on_moment(&moment, response.notify.pid()),
                Some(_) => Ok(()),
            };
            let mut answer = rpc::Criu_req::new();
            answer.set_type(rpc::Criu_req_type::NOTIFY);
            answer.set_notify_success(outcome.is_ok());
            if let Err(source) = outcome {
                hook_error = Some(CriuError::Hook { verb: self.verb.name(), moment, source });
            }
            self.send(&answer)?;
        }
        Err(hook_error.unwrap_or_else(|| self.refused()))
    }

    fn refused(&self) -> CriuError {
        CriuError::Refused { verb: self.verb.name(), reason: reason_in_log(&self.log), log: self.log.clone() }
    }

    fn protocol(&self, detail: impl std::fmt::Display) -> CriuError {
        CriuError::Protocol { verb: self.verb.name(), detail: detail.to_string() }
    }

    fn send(&self, message: &rpc::Criu_req) -> Result<(), CriuError> {
        let bytes = message.write_to_bytes().map_err(|error| self.protocol(error))?;
        match send(self.socket.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => Ok(()),
            // It died; its log says why.
            Err(_) => Err(self.refused()),
        }
    }

    fn receive(&mut self) -> Result<rpc::Criu_resp, CriuError> {
        self.wait_readable()?;
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap_or(0);
        match length {
            0 => Err(self.refused()),
            MESSAGE_BYTES_MAX => Err(self.protocol("a message larger than 64 KiB")),
            _ => rpc::Criu_resp::parse_from_bytes(&buffer[..length]).map_err(|error| self.protocol(error)),
        }
    }

    fn wait_readable(&mut self) -> Result<(), CriuError> {
        loop {
            let left = self.ends_at.saturating_duration_since(Instant::now());
            match self.poll(PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                // What it said before it came to its end is heard first: after its last answer nothing is left to hold.
                Ok(Woken { socket: true, .. }) => return Ok(()),
                Ok(Woken { stopped: true, .. }) => self.answer_stops(),
                Ok(Woken { ended: true, .. }) => return Err(self.refused()),
                Ok(_) if left.is_zero() => {
                    return Err(CriuError::TimedOut { verb: self.verb.name(), deadline: self.deadline, log: self.log.clone() });
                }
                Ok(_) => {}
                Err(errno) => return Err(self.protocol(errno)),
            }
        }
    }

    /// What there is to hear. Of its end as well: tasks that it has forked may hold the other side of the conversation
    /// open. Until its stops as a tracee are answered it does not come to its end.
    fn poll(&self, timeout: PollTimeout) -> nix::Result<Woken> {
        let watched = self.watched.as_ref().map(|watched| watched.stops.as_fd());
        let mut fds: Vec<PollFd<'_>> = [Some(self.socket.as_fd()), Some(self.process.as_fd()), watched]
            .into_iter()
            .flatten()
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        match poll(&mut fds, timeout) {
            Err(nix::errno::Errno::EINTR) => return Ok(Woken::default()),
            other => drop(other?),
        }
        let any = |place: usize| fds.get(place).is_some_and(|fd| fd.any().unwrap_or(true));
        Ok(Woken { socket: any(0), ended: any(1), stopped: any(2) })
    }

    fn answer_stops(&mut self) {
        if let Some(watched) = &mut self.watched {
            watched.answer_stops(self.talk);
        }
    }

    /// Waits for its end, and brings it about unless it has answered. Whom it left in the middle of its work stands
    /// frozen.
    pub(super) fn end(&mut self) -> End {
        // It ends by itself after its answer; on every other path it must not go on alone.
        if self.socket_is_open() {
            let _ = process::kill(self.process.as_fd());
        }
        while self.poll(PollTimeout::NONE).is_ok_and(|woken| !woken.ended) {
            self.answer_stops();
        }
        let _ = process::reap(self.process.as_fd());
        match self.talk {
            Talk::Over => End::AfterItsAnswer,
            Talk::GoingOn => End::InTheMiddle(self.watched.as_mut().and_then(|watched| watched.frozen.take())),
        }
    }

    /// Whether CRIU still holds its end. After the final answer it closes it, soon: wait for that a little, since a
    /// kill in its last steps would leave files behind in its work folder.
    fn socket_is_open(&mut self) -> bool {
        let until = Instant::now() + LAST_STEPS_WITHIN;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.poll(PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO)) {
                Ok(Woken { ended: true, .. }) => return false,
                Ok(Woken { stopped: true, .. }) => self.answer_stops(),
                Ok(Woken { socket: true, .. }) => {
                    return recv(self.socket.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT) != Ok(0);
                }
                Ok(_) if left.is_zero() => return true,
                Ok(_) => {}
                Err(_) => return true,
            }
        }
    }
}

impl Drop for Swrk {
    fn drop(&mut self) {
        // Frozen tasks go on where nobody cures them.
        drop(self.end());
    }
}

/// What a poll found.
#[derive(Debug, Default)]
struct Woken {
    socket: bool,
    ended: bool,
    stopped: bool,
}

/// How CRIU ended.
#[derive(Debug)]
pub(super) enum End {
    /// Whatever it said, its work was done or undone.
    AfterItsAnswer,
    /// Tasks may be as it left them, frozen where that is possible.
    InTheMiddle(Option<Frozen>),
}

impl Watched {
    fn begin(pid: i32, guard: &Guard<'_>) -> io::Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block()?;
        let stops = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Self { tracee: Tracee::hold_at_end(pid)?, stops, cgroups: guard.cgroups.to_vec(), frozen: None })
    }

    fn answer_stops(&mut self, talk: Talk) {
        while matches!(self.stops.read_signal(), Ok(Some(_))) {}
        while let Ok(Some(stop)) = self.tracee.stopped() {
            let gone_on = match stop {
                Stop::Ending => {
                    if talk == Talk::GoingOn {
                        self.frozen = Some(Frozen::freeze(&self.cgroups));
                    }
                    self.tracee.go_on(0)
                }
                Stop::Signal(signal) => self.tracee.go_on(signal),
                Stop::Interrupted | Stop::Syscall => self.tracee.go_on(0),
            };
            // It ends all the same.
            drop(gone_on);
        }
    }
}

/// A CRIU that runs.
struct Started {
    process: OwnedFd,
    /// Our end of the conversation.
    socket: OwnedFd,
    watched: Option<Watched>,
}

fn spawn(criu: &Path, verb: Verb, seat: &Seat, guard: Option<Guard<'_>>) -> io::Result<Started> {
    let (socket, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    // The helper has one thread, so nothing else can be spawned between this and the end of the function.
    fcntl(theirs.as_raw_fd(), FcntlArg::F_SETFD(FdFlag::empty()))?;
    let end = theirs.as_raw_fd().to_string();
    // The machine's own CRIU configuration is not ours.
    let arguments = ["--no-default-config", "swrk", &end];
    match seat {
        Seat::Here => {
            let mut command = Command::new(criu);
            command.args(arguments).env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            if verb == Verb::Restore {
                die_with_parent(&mut command);
            }
            if let Some(guard) = &guard {
                fcntl(guard.journal.as_raw_fd(), FcntlArg::F_SETFD(FdFlag::empty()))?;
                block_sigchld(command.env(JOURNAL_VARIABLE, guard.journal.as_raw_fd().to_string()));
            }
            let child = command.spawn()?;
            let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
            let process = process::open_pidfd(pid)?;
            let watched = guard.map(|guard| Watched::begin(pid, &guard)).transpose()?;
            Ok(Started { process, socket, watched })
        }
        Seat::Cgroup(folder) => {
            let program = CString::new(criu.as_os_str().as_bytes())?;
            let arguments = arguments.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>()?;
            let all: Vec<&CStr> = std::iter::once(&program).chain(&arguments).map(CString::as_c_str).collect();
            Ok(Started { process: spawn_in_cgroup(&program, &all, folder.as_fd())?, socket, watched: None })
        }
    }
}
