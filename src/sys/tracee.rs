//! Threads of other processes that are held still, read and changed (ptrace(2)).
//!
//! Tracees belong to the thread that seized them. When that thread ends, they go on.

use super::checked;
use nix::errno::Errno;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Between two looks at a thread that is to stop.
const LOOK_EVERY: Duration = Duration::from_micros(100);

/// A buffer that no register set fills.
const REGISTERS_BYTES_MAX: usize = 16 << 10;

const SEIZE: i64 = 0x4206;
const INTERRUPT: i64 = 0x4207;
const CONT: i64 = 7;
const DETACH: i64 = 17;
const SYSCALL: i64 = 24;
const GETREGSET: i64 = 0x4204;
const SETREGSET: i64 = 0x4205;
const GETSIGMASK: i64 = 0x420a;
const SETSIGMASK: i64 = 0x420b;

const TELL_SYSCALLS_APART: usize = 1;
const STOP_AT_EXIT: usize = 1 << 6;
const SUSPEND_SECCOMP: usize = 1 << 21;

/// What a stop is of, above its signal.
const EVENT_EXIT: i32 = 6;
const EVENT_STOP: i32 = 128;
/// The signal of a system call's stop.
const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;

/// The set of the general registers, by the kernel's number.
const GENERAL: usize = 1;
/// The set of everything that XSAVE saves.
const EXTENDED: usize = 0x202;

/// Why a thread stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// It was interrupted, on no system call's way.
    Interrupted,
    /// At the beginning or the end of a system call.
    Syscall,
    /// It is about to end, with all that it holds still held.
    Ending,
    /// A signal is about to reach it.
    Signal(i32),
}

/// A thread that this one traces. Dropped, it goes on untraced if it was stopped.
#[derive(Debug)]
pub struct Tracee {
    tid: i32,
}

impl Tracee {
    /// Traces a thread and has it stop. Its own filters do not apply to it until it is let go.
    pub fn interrupt(tid: i32) -> io::Result<Self> {
        // A kernel without checkpoints cannot suspend filters.
        request(SEIZE, tid, 0, TELL_SYSCALLS_APART | SUSPEND_SECCOMP).or_else(|_| request(SEIZE, tid, 0, TELL_SYSCALLS_APART))?;
        let tracee = Self { tid };
        request(INTERRUPT, tid, 0, 0)?;
        Ok(tracee)
    }

    /// Traces a process that goes on, until its end: also killed, it stops there before anything that it holds is let go,
    /// its own tracees among that.
    pub fn hold_at_end(pid: i32) -> io::Result<Self> {
        request(SEIZE, pid, 0, STOP_AT_EXIT)?;
        Ok(Self { tid: pid })
    }

    /// Whether it has stopped. `ESRCH` or `ECHILD` when it is gone.
    pub fn stopped(&self) -> io::Result<Option<Stop>> {
        let mut status = 0;
        // SAFETY: `status` is writable and outlives the call.
        let waited = unsafe { libc::waitpid(self.tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
        match Errno::result(waited) {
            Ok(0) | Err(Errno::EINTR) => return Ok(None),
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        if !libc::WIFSTOPPED(status) {
            return Err(Errno::ESRCH.into());
        }
        Ok(Some(match (libc::WSTOPSIG(status), status >> 16) {
            (SYSCALL_STOP, _) => Stop::Syscall,
            (_, EVENT_EXIT) => Stop::Ending,
            (_, EVENT_STOP) => Stop::Interrupted,
            (signal, _) => Stop::Signal(signal),
        }))
    }

    /// The next stop, waited for until `deadline`.
    pub fn wait(&self, deadline: Instant) -> io::Result<Stop> {
        loop {
            if let Some(stop) = self.stopped()? {
                return Ok(stop);
            }
            if Instant::now() > deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("thread {} does not stop", self.tid)));
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Lets it go on, with this signal (0: none) for it.
    pub fn go_on(&self, signal: i32) -> io::Result<()> {
        request(CONT, self.tid, 0, usize::try_from(signal).map_err(io::Error::other)?)
    }

    /// Lets it go on to the next beginning or end of a system call.
    pub fn to_syscall(&self) -> io::Result<()> {
        request(SYSCALL, self.tid, 0, 0)
    }

    /// The general registers as the kernel lays them out for the thread's mode.
    pub fn registers(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0_u8; REGISTERS_BYTES_MAX];
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        request(GETREGSET, self.tid, GENERAL, (&raw mut part) as usize)?;
        buffer.truncate(part.iov_len);
        Ok(buffer)
    }

    /// Replaces the general registers.
    pub fn set_registers(&self, registers: &[u8]) -> io::Result<()> {
        self.set(GENERAL, registers)
    }

    /// Replaces what XSAVE saves.
    pub fn set_extended_registers(&self, registers: &[u8]) -> io::Result<()> {
        self.set(EXTENDED, registers)
    }

    fn set(&self, which: usize, registers: &[u8]) -> io::Result<()> {
        let mut part = libc::iovec { iov_base: registers.as_ptr().cast_mut().cast(), iov_len: registers.len() };
        request(SETREGSET, self.tid, which, (&raw mut part) as usize)
    }

    /// The signals that it blocks, a bit each.
    pub fn blocked_signals(&self) -> io::Result<u64> {
        let mut mask = 0_u64;
        request(GETSIGMASK, self.tid, size_of::<u64>(), (&raw mut mask) as usize)?;
        Ok(mask)
    }

    /// Replaces them.
    pub fn set_blocked_signals(&self, mask: u64) -> io::Result<()> {
        request(SETSIGMASK, self.tid, size_of::<u64>(), (&raw const mask) as usize)
    }

    /// What its memory holds at an address.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        OpenOptions::new().read(true).open(format!("/proc/{}/mem", self.tid))?.read_exact_at(bytes, address)
    }

    /// Writes to its memory, whatever it may do itself there.
    pub fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        OpenOptions::new().write(true).open(format!("/proc/{}/mem", self.tid))?.write_all_at(bytes, address)
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // It may have ended.
        let _ = request(DETACH, self.tid, 0, 0);
    }
}

/// One ptrace call. What the last argument points to, if it is an address, the callers own and outlive the call with.
fn request(what: i64, tid: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: the requests of this file write to this process's memory only through `data`, which their callers point to
    // values of the size that the kernel is told, alive until the call returns.
    let outcome = unsafe { libc::syscall(libc::SYS_ptrace, what, i64::from(tid), address, data) };
    checked(outcome).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn sleeper() -> Child {
        Command::new("sleep").arg("60").spawn().unwrap()
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn an_interrupted_thread_shows_its_registers_and_takes_others() {
        let mut child = sleeper();
        let tracee = Tracee::interrupt(i32::try_from(child.id()).unwrap()).unwrap();
        assert_eq!(tracee.wait(soon()).unwrap(), Stop::Interrupted);
        let registers = tracee.registers().unwrap();
        assert_eq!(registers.len(), 27 * 8);
        tracee.set_registers(&registers).unwrap();
        tracee.set_blocked_signals(1 << 9).unwrap();
        assert_eq!(tracee.blocked_signals().unwrap(), 1 << 9);
        drop(tracee);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    #[expect(clippy::zombie_processes, reason = "it is reaped by the function under test")]
    fn a_killed_process_is_held_at_its_end() {
        let mut child = sleeper();
        let tracee = Tracee::hold_at_end(i32::try_from(child.id()).unwrap()).unwrap();
        child.kill().unwrap();
        assert_eq!(tracee.wait(soon()).unwrap(), Stop::Ending);
        child.kill().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(tracee.stopped().unwrap(), None, "a second kill does not hurry it");
        tracee.go_on(0).unwrap();
        assert!(tracee.wait(soon()).is_err());
    }
}
