//! The conversation with one `criu swrk`: a request, CRIU's stops on the way, the answer.
//!
//! Messages are rust-criu's generated types; its transport is not used, because it knows only some of the options
//! and drops the restored pid.

use super::failure::reason_in_log;
use super::place::Seat;
use super::{CriuError, HookError};
use crate::sys::command::{die_with_parent, spawn_in_cgroup};
use crate::sys::process;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use protobuf::{Message, MessageField};
use rust_criu::rust_criu_protobuf::rpc;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// CRIU's messages are some hundred bytes; one that fills this was cut.
const MESSAGE_BYTES_MAX: usize = 64 << 10;

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

/// A running `criu swrk`. Dropped, it is killed if it still runs, and reaped.
#[derive(Debug)]
pub(super) struct Swrk {
    process: OwnedFd,
    socket: OwnedFd,
    verb: Verb,
    log: PathBuf,
    deadline: Duration,
    ends_at: Instant,
}

impl Swrk {
    /// Starts CRIU as a child. One that restores dies with this process, and what it began is nobody's. One that dumps
    /// does not: killed while it works in a task it would take that task along; left alone, it meets the end of this
    /// conversation at its next stop and undoes its work. The folders of a request are opened by this process:
    /// CRIU reads them through /proc/PID/fd of the socket's maker.
    pub(super) fn start(criu: &Path, verb: Verb, work: &Path, seat: &Seat, deadline: Duration) -> Result<Swrk, CriuError> {
        let (process, socket) = spawn(criu, verb, seat).map_err(|source| CriuError::Spawn { path: criu.to_owned(), source })?;
        let log = work.join(verb.log_name());
        Ok(Swrk { process, socket, verb, log, deadline, ends_at: Instant::now() + deadline })
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

    fn wait_readable(&self) -> Result<(), CriuError> {
        loop {
            let left = self.ends_at.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            // Its end as well: tasks that it has forked may hold the other side of the conversation open.
            let mut fds = [self.socket.as_fd(), self.process.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut fds, timeout) {
                Err(nix::errno::Errno::EINTR) => {}
                Ok(0) if left.is_zero() => {
                    return Err(CriuError::TimedOut { verb: self.verb.name(), deadline: self.deadline, log: self.log.clone() });
                }
                Ok(0) => {}
                // What it said before it ended is heard first.
                Ok(_) if fds[0].any().unwrap_or(true) => return Ok(()),
                Ok(_) => return Err(self.refused()),
                Err(errno) => return Err(self.protocol(errno)),
            }
        }
    }
}

impl Drop for Swrk {
    fn drop(&mut self) {
        // CRIU ends by itself after its answer; on every other path it must not go on alone. Killed in the middle of
        // a dump it leaves the tasks running (verified: checkpoint.md, section 3).
        if self.socket_is_open() {
            let _ = process::kill(self.process.as_fd());
        }
        // Readable once it has ended, which it now does.
        let _ = poll(&mut [PollFd::new(self.process.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
        let _ = process::reap(self.process.as_fd());
    }
}

/// CRIU's pidfd and our end of the conversation.
fn spawn(criu: &Path, verb: Verb, seat: &Seat) -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    // The helper has one thread, so nothing else can be spawned between this and the end of the function.
    fcntl(theirs.as_raw_fd(), FcntlArg::F_SETFD(FdFlag::empty()))?;
    let end = theirs.as_raw_fd().to_string();
    // The machine's own CRIU configuration is not ours.
    let arguments = ["--no-default-config", "swrk", &end];
    let process = match seat {
        Seat::Here => {
            let mut command = Command::new(criu);
            command.args(arguments).env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            if verb == Verb::Restore {
                die_with_parent(&mut command);
            }
            let child = command.spawn()?;
            process::open_pidfd(i32::try_from(child.id()).map_err(io::Error::other)?)?
        }
        Seat::Cgroup(folder) => {
            let program = CString::new(criu.as_os_str().as_bytes())?;
            let arguments = arguments.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>()?;
            let all: Vec<&CStr> = std::iter::once(&program).chain(&arguments).map(CString::as_c_str).collect();
            spawn_in_cgroup(&program, &all, folder.as_fd())?
        }
    };
    Ok((process, ours))
}

impl Swrk {
    /// Whether CRIU still holds its end. After the final answer it closes it, soon: wait for that a little, since a
    /// kill in its last steps would leave files behind in its work folder.
    fn socket_is_open(&self) -> bool {
        let mut byte = [0];
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(200_u16)) {
            Ok(0) | Err(_) => true,
            Ok(_) => recv(self.socket.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) != Ok(0),
        }
    }
}
