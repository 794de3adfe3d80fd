//! Child processes that std cannot start as we need them.

use super::checked;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{dup2, execve};
use std::ffi::CStr;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The child is killed when the thread that spawns it ends; what the child starts itself is not.
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    // SAFETY: the closure runs between fork and exec and makes one system call, prctl, which allocates nothing and
    // takes no lock.
    unsafe { command.pre_exec(|| set_pdeathsig(Signal::SIGKILL).map_err(Into::into)) }
}

/// The child starts with SIGCHLD blocked: a tracer that is traced itself would stop for each stop of its tracees.
pub fn block_sigchld(command: &mut Command) -> &mut Command {
    // SAFETY: the closure runs between fork and exec and makes one system call, rt_sigprocmask, which allocates nothing
    // and takes no lock.
    unsafe {
        command.pre_exec(|| {
            let mut mask = SigSet::empty();
            mask.add(Signal::SIGCHLD);
            mask.thread_block().map_err(Into::into)
        })
    }
}

/// Starts a program as a child that is born in this cgroup v2 folder, sees it as the root of a new cgroup namespace,
/// and is killed when the calling thread ends. It has /dev/null for standard input, output and error, and no
/// environment. Returns its pidfd.
///
/// A move by `cgroup.procs` would do the same, but waits for an RCU grace period (10 ms) under the kernel's lock for
/// all cgroups; a birth does not.
///
/// Forks: the calling process must have one thread.
pub fn spawn_in_cgroup(program: &CStr, arguments: &[&CStr], cgroup: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let (mut failed, report) = io::pipe()?;
    match clone_into(cgroup)? {
        None => {
            let errno = become_program(program, arguments);
            let _ = (&report).write_all(&(errno as i32).to_ne_bytes());
            // SAFETY: ends this process without running the parent's atexit handlers in a copy of it.
            unsafe { libc::_exit(127) }
        }
        Some(pidfd) => {
            drop(report);
            let mut errno = [0; 4];
            match failed.read_exact(&mut errno) {
                Ok(()) => Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
                // The pipe was closed by exec.
                Err(_) => Ok(pidfd),
            }
        }
    }
}

/// A fork whose child is born in `cgroup`; the parent gets the child's pidfd.
fn clone_into(cgroup: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    /// Not an int, so libc's constant of this name cannot be used.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    // SAFETY: all zeroes is a valid clone_args: no flags, no stack, which makes it a fork.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = CLONE_INTO_CGROUP;
    arguments.exit_signal = u64::try_from(libc::SIGCHLD).map_err(io::Error::other)?;
    arguments.cgroup = u64::try_from(cgroup.as_raw_fd()).map_err(io::Error::other)?;
    fork_with(arguments)
}

/// A fork whose child is this process's sibling: its parent waits for it. Returns its pidfd, or `None` in the child.
///
/// The calling process must have one thread.
pub fn fork_sibling() -> io::Result<Option<OwnedFd>> {
    // SAFETY: all zeroes is a valid clone_args: no flags, no stack, which makes it a fork.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    // The signal at its end is the one at ours; the kernel wants none to be named.
    arguments.flags = u64::try_from(libc::CLONE_PARENT).map_err(io::Error::other)?;
    fork_with(arguments)
}

/// The parent gets the child's pidfd. The calling process must have one thread.
fn fork_with(mut arguments: libc::clone_args) -> io::Result<Option<OwnedFd>> {
    let mut pidfd = -1_i32;
    arguments.flags |= u64::try_from(libc::CLONE_PIDFD).map_err(io::Error::other)?;
    arguments.pidfd = (&raw mut pidfd) as u64;
    let size = std::mem::size_of::<libc::clone_args>();
    // SAFETY: `arguments` and what it points to outlive the call; without CLONE_VM the child gets a copy of everything,
    // and the caller promises a single thread, so no lock is held by a thread that the child lacks.
    let outcome = checked(unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size) })?;
    if outcome == 0 {
        return Ok(None);
    }
    // SAFETY: the kernel has just stored this descriptor for us and nobody else knows it.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// Returns only when it fails.
fn become_program(program: &CStr, arguments: &[&CStr]) -> nix::errno::Errno {
    let attempt = || -> nix::Result<std::convert::Infallible> {
        set_pdeathsig(Signal::SIGKILL)?;
        unshare(CloneFlags::CLONE_NEWCGROUP)?;
        let null = OpenOptions::new().read(true).write(true).open("/dev/null");
        let null = null.map_err(|error| nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
        for standard in 0..=2 {
            dup2(null.as_raw_fd(), standard)?;
        }
        let none: [&CStr; 0] = [];
        execve(program, arguments, &none)
    };
    match attempt() {
        Err(errno) => errno,
        Ok(never) => match never {},
    }
}
