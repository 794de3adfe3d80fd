//! Undoes from outside what a CRIU that was killed in the middle of a dump had changed in its tasks.
//!
//! CRIU works inside the tasks: it has them run code of its own and holds their TCP connections in repair mode. Ours
//! notes beforehand what it changes ([`journal`]), and leaves no thread in a state that it cannot wait in (criu/0006).
//!
//! ```text
//! killed ─> held at its end ─> cgroup frozen ─> it ends ─> connections out of repair ─> threads seized ─> thawed
//!        ─> registers, signal masks, code put back ─> foreign mappings and files closed ─> all go on
//! ```
//! Whoever is seized while frozen stops before it runs code of its own.

use super::frozen::Frozen;
use super::journal::{self, Infected, SavedThread};
use crate::sys::process::{copy_descriptor, open_pidfd};
use crate::sys::tracee::{Stop, Tracee};
use nix::errno::Errno;
use nix::sys::socket::sockopt::TcpRepair;
use nix::sys::socket::{getsockopt, setsockopt};
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Bound on all of it.
const CURED_WITHIN: Duration = Duration::from_secs(10);

/// What CRIU's code blocks: all that can be blocked but SIGTRAP.
const FOREIGN_MASK: u64 = !(1 << (libc::SIGTRAP - 1) | 1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1));

/// The memory that CRIU's code lies in, by its name.
const FOREIGN_FILE: &str = "/memfd:CRIUMFD";

/// `syscall; jmp .`
const MAKE_A_SYSCALL: [u8; 8] = [0x0f, 0x05, 0xeb, 0xfe, 0xcc, 0xcc, 0xcc, 0xcc];

/// Places in the general registers of a 64-bit thread.
const AX: usize = 10;
const DI: usize = 14;
const SI: usize = 13;
const ORIG_AX: usize = 15;
const IP: usize = 16;
const NATIVE_REGISTERS: usize = 27;
/// The same of a 32-bit one.
const IP_COMPAT: usize = 12;

/// rt_sigreturn, of 64 bits and of 32.
const SIGRETURNS: [u64; 2] = [15, 173];

/// The kernel's errors that stand for "call again", which no program sees.
const RESTARTS: [i64; 3] = [-512, -513, -514];
const RESTART_OTHERWISE: i64 = -516;

/// Why a sandbox could not be given back what it was.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} of process {pid}")]
pub(crate) struct CureError {
    action: &'static str,
    pid: i32,
    #[source]
    source: io::Error,
}

fn failed(action: &'static str, pid: i32) -> impl FnOnce(io::Error) -> CureError {
    move |source| CureError { action, pid, source }
}

/// Gives everything in `cgroups` back what it was, and lets it go on. CRIU has ended.
pub(super) fn cure(work: &Path, cgroups: &[PathBuf], frozen: Option<Frozen>) -> Result<(), CureError> {
    let infected = journal::read(work).map_err(failed("read the journal", 0))?;
    for pid in processes_in(cgroups) {
        // It may be a zombie.
        let _ = end_repair_of_connections(pid);
    }
    let held = infected.into_iter().map(Held::seize).collect::<Result<Vec<_>, _>>()?;
    drop(frozen);
    held.into_iter().try_for_each(Held::cure)
}

fn processes_in(cgroups: &[PathBuf]) -> HashSet<i32> {
    let listed = cgroups.iter().filter_map(|folder| fs::read_to_string(folder.join("cgroup.procs")).ok());
    listed.flat_map(|text| text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<i32>>()).collect()
}

/// A connection in repair mode sends nothing, refuses data and ends without a word.
fn end_repair_of_connections(pid: i32) -> io::Result<()> {
    let pidfd = open_pidfd(pid)?;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let is_socket = fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"));
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()).filter(|_| is_socket) else { continue };
        let Ok(socket) = copy_descriptor(pidfd.as_fd(), number) else { continue };
        // Anything but TCP does not know the option.
        if getsockopt(&socket, TcpRepair).is_ok_and(|mode| mode == 1) {
            setsockopt(&socket, TcpRepair, &0)?;
        }
    }
    Ok(())
}

/// A process with all its threads seized.
struct Held {
    infected: Infected,
    threads: BTreeMap<i32, Tracee>,
    deadline: Instant,
}

/// Where a thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// In a system call that CRIU makes in its name.
    Injected,
    /// In CRIU's code.
    Parasite,
    /// In its own.
    Own,
}

impl Held {
    fn seize(infected: Infected) -> Result<Self, CureError> {
        let pid = infected.pid;
        let listed = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let tids = listed.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let seize = |tid: i32| match Tracee::interrupt(tid) {
            Ok(tracee) => Ok(Some((tid, tracee))),
            // It ended meanwhile.
            Err(error) if is_gone(&error) || is_zombie(tid) => Ok(None),
            Err(error) => Err(failed("seize a thread", pid)(error)),
        };
        let threads = tids.filter_map(|tid| seize(tid).transpose()).collect::<Result<_, _>>()?;
        Ok(Self { infected, threads, deadline: Instant::now() + CURED_WITHIN })
    }

    fn cure(mut self) -> Result<(), CureError> {
        let pid = self.infected.pid;
        let mut stopped = BTreeMap::new();
        for (tid, tracee) in std::mem::take(&mut self.threads) {
            match self.come_to_rest(&tracee) {
                Ok(()) => drop(stopped.insert(tid, tracee)),
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(failed("stop a thread", pid)(error)),
            }
        }
        let foreign = foreign_memory(pid);
        for (tid, tracee) in &stopped {
            match self.put_back(*tid, tracee, &foreign) {
                Err(error) if !is_gone(&error) => return Err(failed("put back a thread's registers", pid)(error)),
                _ => {}
            }
        }
        let Some(any) = stopped.values().next() else { return Ok(()) };
        self.remove_foreign_things(any, &foreign).map_err(failed("unmap CRIU's code", pid))?;
        self.put_back_code(any).map_err(failed("put back the code", pid))
    }

    fn come_to_rest(&self, tracee: &Tracee) -> io::Result<()> {
        loop {
            match tracee.wait(self.deadline)? {
                Stop::Interrupted => return Ok(()),
                Stop::Signal(signal) => tracee.go_on(signal)?,
                Stop::Syscall | Stop::Ending => tracee.go_on(0)?,
            }
        }
    }

    fn put_back(&self, tid: i32, tracee: &Tracee, foreign: &[Range<u64>]) -> io::Result<()> {
        let Some(saved) = self.infected.threads.get(&tid) else { return Ok(()) };
        match (self.place_of(tracee, foreign)?, tid == self.infected.pid) {
            (At::Injected, _) | (At::Parasite, false) => restore(tracee, saved),
            // Its conversation with CRIU has ended: it goes back by itself, and closes what it has opened.
            (At::Parasite, true) => self.let_it_return(tracee),
            // Its mask goes before its registers, and comes back after them.
            (At::Own, _) if tracee.blocked_signals()? == FOREIGN_MASK => tracee.set_blocked_signals(saved.blocked_signals),
            (At::Own, _) => Ok(()),
        }
    }

    fn place_of(&self, tracee: &Tracee, foreign: &[Range<u64>]) -> io::Result<At> {
        let at = instruction(&tracee.registers()?);
        let is_injected = self.syscall_place().is_some_and(|(start, _)| (start..start + 8).contains(&at));
        Ok(match (is_injected, foreign.iter().any(|range| range.contains(&at))) {
            (true, _) => At::Injected,
            (false, true) => At::Parasite,
            (false, false) => At::Own,
        })
    }

    fn let_it_return(&self, tracee: &Tracee) -> io::Result<()> {
        let mut is_inside = false;
        let mut is_return = false;
        loop {
            tracee.to_syscall()?;
            match tracee.wait(self.deadline)? {
                Stop::Syscall if is_inside && is_return => return Ok(()),
                Stop::Syscall => {
                    is_inside = !is_inside;
                    is_return = word(&tracee.registers()?, ORIG_AX).is_some_and(|number| SIGRETURNS.contains(&number));
                }
                Stop::Interrupted | Stop::Ending => {}
                Stop::Signal(signal) => {
                    let unexpected = format!("signal {signal} in CRIU's code");
                    return Err(io::Error::other(unexpected));
                }
            }
        }
    }

    /// Where CRIU had system calls made, and what was there.
    fn syscall_place(&self) -> Option<(u64, &[u8])> {
        self.infected.code.iter().min_by_key(|(address, _)| *address).map(|(address, bytes)| (*address, bytes.as_slice()))
    }

    /// CRIU's memory and the file that it was made by, which the process itself must let go of.
    fn remove_foreign_things(&self, thread: &Tracee, foreign: &[Range<u64>]) -> io::Result<()> {
        let Some((place, _)) = self.syscall_place() else { return Ok(()) };
        for range in foreign {
            self.have_it_call(thread, place, libc::SYS_munmap, [range.start, range.end - range.start])?;
        }
        for descriptor in foreign_descriptors(self.infected.pid) {
            self.have_it_call(thread, place, libc::SYS_close, [descriptor, 0])?;
        }
        Ok(())
    }

    /// Of a 32-bit process CRIU's memory stays: it is in nobody's way.
    fn have_it_call(&self, thread: &Tracee, place: u64, call: i64, arguments: [u64; 2]) -> io::Result<()> {
        let mut own = thread.registers()?;
        if own.len() != NATIVE_REGISTERS * 8 {
            return Ok(());
        }
        settle_interrupted_call(&mut own);
        let blocked_signals = thread.blocked_signals()?;
        let mut foreign = own.clone();
        for (place_of, value) in [(AX, call.cast_unsigned()), (DI, arguments[0]), (SI, arguments[1]), (IP, place), (ORIG_AX, u64::MAX)] {
            set_word(&mut foreign, place_of, value);
        }
        thread.write(place, &MAKE_A_SYSCALL)?;
        thread.set_blocked_signals(FOREIGN_MASK)?;
        thread.set_registers(&foreign)?;
        let mut ends_left = 2;
        while ends_left > 0 {
            thread.to_syscall()?;
            if thread.wait(self.deadline)? == Stop::Syscall {
                ends_left -= 1;
            }
        }
        thread.set_registers(&own)?;
        thread.set_blocked_signals(blocked_signals)
    }

    fn put_back_code(&self, thread: &Tracee) -> io::Result<()> {
        // What was there first is what was there before CRIU.
        for (address, bytes) in self.infected.code.iter().rev() {
            let mut now = vec![0; bytes.len()];
            thread.read(*address, &mut now)?;
            if now != *bytes {
                thread.write(*address, bytes)?;
            }
        }
        Ok(())
    }
}

fn restore(tracee: &Tracee, saved: &SavedThread) -> io::Result<()> {
    tracee.set_registers(&saved.registers)?;
    if !saved.extended_registers.is_empty() {
        tracee.set_extended_registers(&saved.extended_registers)?;
    }
    tracee.set_blocked_signals(saved.blocked_signals)
}

/// What the kernel would do with a call that was interrupted, which it does no more once another one was made.
fn settle_interrupted_call(registers: &mut [u8]) {
    let (Some(result), Some(number), Some(at)) = (word(registers, AX), word(registers, ORIG_AX), word(registers, IP)) else { return };
    if number.cast_signed() < 0 {
        return;
    }
    if RESTARTS.contains(&result.cast_signed()) {
        set_word(registers, AX, number);
        set_word(registers, IP, at - 2);
    } else if result.cast_signed() == RESTART_OTHERWISE {
        set_word(registers, AX, i64::from(-libc::EINTR).cast_unsigned());
    }
}

fn instruction(registers: &[u8]) -> u64 {
    let at = match registers.len() == NATIVE_REGISTERS * 8 {
        true => word(registers, IP),
        false => {
            registers.chunks_exact(4).nth(IP_COMPAT).and_then(|bytes| bytes.try_into().ok()).map(|word| u32::from_ne_bytes(word).into())
        }
    };
    at.unwrap_or(0)
}

fn word(registers: &[u8], place: usize) -> Option<u64> {
    registers.chunks_exact(8).nth(place)?.try_into().ok().map(u64::from_ne_bytes)
}

fn set_word(registers: &mut [u8], place: usize, value: u64) {
    if let Some(word) = registers.chunks_exact_mut(8).nth(place) {
        word.copy_from_slice(&value.to_ne_bytes());
    }
}

fn foreign_memory(pid: i32) -> Vec<Range<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    maps.lines().filter(|line| line.contains(FOREIGN_FILE)).filter_map(parse_range).collect()
}

fn parse_range(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

fn foreign_descriptors(pid: i32) -> Vec<u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let is_foreign = |path: PathBuf| fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with(FOREIGN_FILE));
    entries.filter(|entry| is_foreign(entry.path())).filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ESRCH | Errno::ECHILD))
}

/// The first thread of a process may have ended before the others.
fn is_zombie(tid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{tid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(ax: i64, orig_ax: i64) -> Vec<u8> {
        let mut all = vec![0; NATIVE_REGISTERS * 8];
        set_word(&mut all, AX, ax.cast_unsigned());
        set_word(&mut all, ORIG_AX, orig_ax.cast_unsigned());
        set_word(&mut all, IP, 0x1002);
        all
    }

    #[test]
    fn an_interrupted_call_is_made_again_and_no_other() {
        let after = |ax, orig_ax| {
            let mut all = registers(ax, orig_ax);
            settle_interrupted_call(&mut all);
            (word(&all, AX).unwrap().cast_signed(), word(&all, IP).unwrap())
        };
        assert_eq!(after(-512, 202), (202, 0x1000));
        assert_eq!(after(-516, 35), (-4, 0x1002), "a sleep whose rest the kernel has forgotten");
        assert_eq!(after(-11, 0), (-11, 0x1002), "a call that failed");
        assert_eq!(after(-512, -1), (-512, 0x1002), "no call at all");
    }

    #[test]
    fn a_line_of_maps_is_a_range() {
        assert_eq!(parse_range("7f00-7fff r-xs 00000000 00:01 3 /memfd:CRIUMFD (deleted)"), Some(0x7f00..0x7fff));
    }
}
