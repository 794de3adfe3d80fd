//! What a program owes as pid 1, before it serves: its secret read, nothing inherited, loopback up.

use std::io::{self, Read as _};

use rustix::fs::{Mode, OFlags, open};
use rustix::process::Pid;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::sys;
use crate::wire::CONTROL_SECRET_LEN;

#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("could not read the control secret from fd 0")]
    Read(#[source] io::Error),
    #[error("the control secret on fd 0 is not {CONTROL_SECRET_LEN} hex characters")]
    Secret,
    #[error("could not open /dev/null")]
    DevNull(#[source] io::Error),
}

/// Reads the control secret from fd 0: 64 hex characters, ended by a newline or by the end of the file.
pub fn read_control_secret() -> Result<String, SetupError> {
    let mut secret = Vec::with_capacity(CONTROL_SECRET_LEN);
    for byte in io::stdin().lock().bytes() {
        match byte.map_err(SetupError::Read)? {
            b'\n' => break,
            byte => secret.push(byte),
        }
        if secret.len() > CONTROL_SECRET_LEN {
            return Err(SetupError::Secret);
        }
    }
    String::from_utf8(secret).ok().filter(|secret| is_control_secret(secret)).ok_or(SetupError::Secret)
}

pub(crate) fn is_control_secret(text: &str) -> bool {
    text.len() == CONTROL_SECRET_LEN && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Everything but stdio, which still takes error messages. Call it before anything of this process opens a file. Best
/// effort where a failure only means that there was nothing to do.
pub fn prepare() {
    sys::bound_allocator();
    sys::close_from(3);
    sys::reset_signals();
    rustix::process::umask(Mode::from_raw_mode(0o022));
    // Refused to a session leader, which a pid 1 mostly is.
    let _ = rustix::process::setsid();
    // Orphans come to pid 1 by themselves; elsewhere they have to be asked for.
    if rustix::process::getpid() != Pid::INIT {
        let _ = rustix::process::set_child_subreaper(Some(Pid::INIT));
    }
    // One that is down and may not be changed shows when the agent is dialled; it serves other interfaces all the same.
    let _ = sys::bring_loopback_up();
}

/// Reopens fds 0, 1 and 2 as the container's own /dev/null: CRIU refuses an fd that leads out of the mount namespace.
pub fn let_go_of_stdio() -> Result<(), SetupError> {
    let reopen = || {
        let null = open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)
    };
    reopen().map_err(|error| SetupError::DevNull(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_secret_is_64_hex_characters() {
        assert!(is_control_secret(&"0123456789abcdef".repeat(4)));
        assert!(!is_control_secret(&"0".repeat(63)));
        assert!(!is_control_secret(&"g".repeat(64)));
    }
}
