//! The agent's only unsafe code: the start of programs, and the few calls that rustix does not wrap.
//! Returns `io::Result` and knows nothing of sandboxes.
#![allow(unsafe_code, reason = "this is the agent's one sys module")]

pub(crate) mod launch;

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// libc::IFF_UP, in the width that an ifreq has for flags.
const INTERFACE_UP: libc::c_short = 1;

/// Registers `fd` with the runtime, in non-blocking mode.
pub(crate) fn async_fd(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    // SAFETY: an OwnedFd stays the same open file until it is dropped, and the AsyncFd owns it.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    Ok(registered?)
}

/// Gives every signal its default meaning and blocks none: a server that was started by nohup or in the background of a
/// script ignores some, and so would every process of every sandbox. Only at start.
pub(crate) fn reset_signals() {
    // The kernel's struct sigaction, all zeroes: default handler, no flags, no mask. glibc's own call keeps 32 and 33 to itself.
    let default = [0u64; 4];
    // Rust ignores SIGPIPE, since a write to a closed pipe is an error here; std gives its children the default back.
    for signal in (1..=libc::SIGRTMAX()).filter(|signal| *signal != libc::SIGPIPE) {
        // SAFETY: the kernel reads one live sigaction and writes nothing; no handler is installed, and signals that
        // cannot be changed are refused.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, &default, std::ptr::null_mut::<u64>(), size_of::<u64>()) };
    }
    // SAFETY: a sigset_t is plain data, and all zeroes is the empty set on Linux.
    let none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: reads one live set and writes nothing; there is one thread.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()) };
}

/// Closes every fd from `first` on. Only at start, before anything of this process owns one.
pub(crate) fn close_from(first: u32) {
    // SAFETY: called before the runtime exists, so no owned fd is above the standard ones.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
}

/// How many arenas the allocator keeps: by default eight per CPU, each with what its threads once used.
const ARENAS_MAX: libc::c_int = 2;

/// Blocks from this size on are mapped by themselves and go back when freed. glibc raises its own limit, up to 32 MiB,
/// whenever such a block is freed; one that was set stays.
const MAPPED_BYTES_MIN: libc::c_int = 256 << 10;

/// Bounds what the allocator hoards. Only at start, before there is a second thread.
pub(crate) fn bound_allocator() {
    for (option, value) in [(libc::M_ARENA_MAX, ARENAS_MAX), (libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN)] {
        // SAFETY: takes two integers; nothing allocates at the same time, since there is one thread.
        unsafe { libc::mallopt(option, value) };
    }
}

/// Gives freed memory back to the kernel, which the allocator does by itself only at the end of the heap.
pub(crate) fn release_free_memory() {
    // SAFETY: may be called at any time by any thread; memory in use is left alone.
    unsafe { libc::malloc_trim(0) };
}

/// Brings the loopback interface up. Does nothing where it already is, so it works without CAP_NET_ADMIN then.
pub(crate) fn bring_loopback_up() -> io::Result<()> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: ifreq is plain data, and all zeroes is a valid value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l'.cast_signed();
    request.ifr_name[1] = b'o'.cast_signed();
    // SAFETY: the request is a live ifreq with a terminated name, which is what this ioctl reads and writes.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request) })?;
    // SAFETY: SIOCGIFFLAGS has just written this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    if flags & INTERFACE_UP != 0 {
        return Ok(());
    }
    request.ifr_ifru.ifru_flags = flags | INTERFACE_UP;
    // SAFETY: as above; the kernel only reads the request.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
