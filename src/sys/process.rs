//! Processes that stay the ones we mean: pidfds, start times, exits.

use super::checked;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A descriptor that becomes readable when the process has ended.
pub fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain integers; the call returns a new descriptor (close-on-exec by itself) or an error.
    let fd = checked(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends SIGKILL. `ESRCH` when the process has ended already.
pub fn kill(pidfd: BorrowedFd<'_>) -> io::Result<()> {
    let no_info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: a null siginfo is allowed; the rest are plain integers.
    let outcome = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, no_info, 0) };
    checked(outcome).map(drop)
}

/// This process's own copy of a descriptor of another one: the same open file.
pub fn copy_descriptor(pidfd: BorrowedFd<'_>, descriptor: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain integers; the call returns a new descriptor (close-on-exec by itself) or an error.
    let fd = checked(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), descriptor, 0) })?;
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// From here on the kernel, short of memory, ends anything rather than this process. Inherited by children; best effort:
/// it takes CAP_SYS_RESOURCE.
pub fn be_spared_by_the_oom_killer() {
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
}

/// From here on this process takes CPU and disk only as far as others leave them. Best effort.
pub fn yield_to_others() {
    const LEAST_NICE: libc::c_int = 19;
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_CLASS_IDLE: libc::c_int = 3 << 13;
    // SAFETY: plain integers; 0 is the calling process.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, LEAST_NICE) };
    // SAFETY: plain integers; 0 is the calling thread.
    unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_CLASS_IDLE) };
}

/// From here on this process gets most of a CPU that others want too: for work that somebody stands still for. Best
/// effort; inherited by children.
pub fn go_before_others() {
    const URGENT: libc::c_int = -10;
    // SAFETY: plain integers; 0 is the calling process.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, URGENT) };
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildEnd {
    /// It returned this status.
    Exited(i32),
    /// This signal ended it.
    Signaled(i32),
}

/// Takes the status of a child that has ended. `None` while it runs; `ECHILD` when it is not this process's child.
pub fn reap(pidfd: BorrowedFd<'_>) -> io::Result<Option<ChildEnd>> {
    let id = libc::id_t::try_from(pidfd.as_raw_fd()).map_err(io::Error::other)?;
    // SAFETY: all zeroes is a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is writable and outlives the call.
    let outcome = unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, libc::WEXITED | libc::WNOHANG) };
    Errno::result(outcome)?;
    // SAFETY: waitid has filled in the fields of SIGCHLD, or left the zeroes.
    let pid = unsafe { info.si_pid() };
    if pid == 0 {
        return Ok(None);
    }
    // SAFETY: waitid has filled in the fields of SIGCHLD.
    let status = unsafe { info.si_status() };
    Ok(Some(match info.si_code {
        libc::CLD_EXITED => ChildEnd::Exited(status),
        _ => ChildEnd::Signaled(status),
    }))
}

/// Waits until a process has ended and takes its status; `None` where it is not our child, or somebody took it already.
/// Cancel-safe: a status that was not taken stays where it is.
pub async fn ended(pidfd: OwnedFd) -> io::Result<Option<ChildEnd>> {
    // SAFETY: the descriptor is owned by the value that watches it, so it stays open for as long as it is watched.
    let watched = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
    loop {
        let mut ready = watched.readable().await?;
        match reap(watched.get_ref().as_fd()) {
            Ok(None) => ready.clear_ready(),
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => return Ok(None),
            end => return end,
        }
    }
}

/// Kills a child and takes its status. Returns when it has ended; one whose status was taken already is left alone.
pub fn end(child: BorrowedFd<'_>) {
    // What cannot be killed has ended.
    let _ = kill(child);
    let mut fds = [PollFd::new(child, PollFlags::POLLIN)];
    while poll(&mut fds, PollTimeout::NONE) == Err(Errno::EINTR) {}
    let _ = reap(child);
}

/// A child that has ended and whose status nobody has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Zombie {
    /// Its number.
    pub pid: i32,
    /// Its process group: the one of whoever started it, unless somebody saw to it that it has another.
    pub group: i32,
}

/// Whether there is any among this process's children. One system call.
pub fn has_zombie_child() -> bool {
    // SAFETY: all zeroes is a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is writable and outlives the call; WNOWAIT takes no status.
    let outcome = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) };
    // SAFETY: waitid has filled in the fields of SIGCHLD, or left the zeroes.
    outcome == 0 && unsafe { info.si_pid() } != 0
}

/// Those among this process's children. Reads a file per process of the machine.
pub fn zombie_children() -> Vec<Zombie> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let zombie = |pid| parse_zombie(pid, std::process::id(), &std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?);
    pids.filter_map(zombie).collect()
}

/// After the command name: state, parent, process group.
fn parse_zombie(pid: i32, of_parent: u32, stat: &str) -> Option<Zombie> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let (state, parent, group) = (fields.next()?, fields.next()?, fields.next()?);
    (state == "Z" && parent.parse() == Ok(of_parent)).then_some(Zombie { pid, group: group.parse().ok()? })
}

/// Field 22 of /proc/PID/stat: when the process started, in clock ticks after boot.
pub fn start_ticks(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_ticks(&stat).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

/// The command name, field 2, may hold spaces and parentheses: fields are counted from the last `)`.
fn parse_start_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;

    #[test]
    fn the_start_time_is_found_behind_a_hostile_command_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 12345 1";
        assert_eq!(parse_start_ticks(stat), Some(987_654));
        assert_eq!(parse_start_ticks("42 (a"), None);
    }

    #[test]
    #[expect(clippy::zombie_processes, reason = "it is reaped by the function under test")]
    fn a_child_that_nobody_waited_for_is_a_zombie_until_it_is_reaped() {
        let child = std::process::Command::new("true").process_group(0).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let pidfd = open_pidfd(pid).unwrap();
        while !zombie_children().contains(&Zombie { pid, group: pid }) {
            std::thread::yield_now();
        }
        assert!(has_zombie_child());
        assert_eq!(reap(pidfd.as_fd()).unwrap(), Some(ChildEnd::Exited(0)));
        assert!(!zombie_children().iter().any(|zombie| zombie.pid == pid));
    }

    #[tokio::test]
    #[expect(clippy::zombie_processes, reason = "it is ended by the function under test")]
    async fn who_waits_for_a_child_whose_status_was_taken_learns_that_it_has_ended() {
        let child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pidfd = open_pidfd(i32::try_from(child.id()).unwrap()).unwrap();
        let waiting = tokio::spawn(ended(pidfd.try_clone().unwrap()));
        end(pidfd.as_fd());
        assert_eq!(waiting.await.unwrap().unwrap(), None);
        end(pidfd.as_fd());
    }

    #[test]
    #[expect(clippy::zombie_processes, reason = "it is reaped by the function under test")]
    fn a_killed_child_is_reaped_once_with_its_signal() {
        let mut command = std::process::Command::new("sleep");
        let child = command.arg("60").spawn().unwrap();
        let pidfd = open_pidfd(i32::try_from(child.id()).unwrap()).unwrap();
        assert_eq!(reap(pidfd.as_fd()).unwrap(), None);
        kill(pidfd.as_fd()).unwrap();
        let end = loop {
            if let Some(end) = reap(pidfd.as_fd()).unwrap() {
                break end;
            }
        };
        assert_eq!(end, ChildEnd::Signaled(libc::SIGKILL));
        assert!(reap(pidfd.as_fd()).is_err());
    }
}
