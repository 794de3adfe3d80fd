//! User namespaces as descriptors, and acting with another file system identity.

use super::checked;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, setresgid, setresuid};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

/// Makes a user namespace that maps ids 0..count to `base`..`base + count` of ours, and that uid `base` owns.
///
/// The owner matters: what the kernel counts per user (inotify instances, pipes, namespaces) is also charged to the
/// owner one level up, and that must not be the host's root, whom all sandboxes would then share.
///
/// Forks: the calling process must have one thread.
pub fn new_user_namespace(base: u32, count: u32) -> io::Result<OwnedFd> {
    let (mut ready, mut report) = io::pipe()?;
    let (mut released, hold) = io::pipe()?;
    // SAFETY: the caller promises a single thread, so no lock is held by a thread that the child lacks.
    let fork = unsafe { fork() }?;
    match fork {
        ForkResult::Child => {
            drop(hold);
            let made = unshare_as_owner(base);
            let word = made.as_ref().map_or_else(|errno| (*errno as i32).to_le_bytes(), |()| [0; 4]);
            // The parent reads end-of-file when this fails, which is an error to it too.
            let _ = report.write_all(&word);
            let _ = released.read(&mut [0]);
            // SAFETY: ends this process without running the parent's atexit handlers in a copy of it.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop(report);
            let mut word = [0; 4];
            let namespace = ready
                .read_exact(&mut word)
                .and_then(|()| match i32::from_le_bytes(word) {
                    0 => Ok(()),
                    errno => Err(io::Error::from_raw_os_error(errno)),
                })
                .and_then(|()| map_and_open(child, base, count));
            drop(hold);
            let _ = kill(child, Signal::SIGKILL);
            waitpid(child, None)?;
            namespace
        }
    }
}

fn unshare_as_owner(base: u32) -> nix::Result<()> {
    let root = Uid::from_raw(0);
    setresgid(Gid::from_raw(0), Gid::from_raw(base), Gid::from_raw(0))?;
    setresuid(root, Uid::from_raw(base), root)?;
    raise_capabilities().map_err(|error| nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(libc::EPERM)))?;
    unshare(CloneFlags::CLONE_NEWUSER)
}

fn map_and_open(child: Pid, base: u32, count: u32) -> io::Result<OwnedFd> {
    let map = format!("0 {base} {count}\n");
    std::fs::write(format!("/proc/{child}/uid_map"), &map)?;
    std::fs::write(format!("/proc/{child}/gid_map"), &map)?;
    Ok(File::open(format!("/proc/{child}/ns/user"))?.into())
}

/// Gives the calling thread the file system ids `base`, with all capabilities that it may have, until dropped.
///
/// An overlay remembers who mounted it and acts as that user on its upper layer, where host ids that the layer's map
/// does not know are refused (`EOVERFLOW`): so it must be mounted, and devices made in it, as the mapped root.
#[derive(Debug)]
pub struct FilesystemIdentity {
    _thread_bound: std::marker::PhantomData<*const ()>,
}

impl FilesystemIdentity {
    /// Assumes the identity.
    pub fn assume(base: u32) -> io::Result<Self> {
        let identity = Self { _thread_bound: std::marker::PhantomData };
        set_filesystem_ids(base);
        // The kernel takes the file capabilities away with fsuid 0; they are ours by uid.
        raise_capabilities()?;
        Ok(identity)
    }
}

impl Drop for FilesystemIdentity {
    fn drop(&mut self) {
        set_filesystem_ids(0);
    }
}

fn set_filesystem_ids(id: u32) {
    nix::unistd::setfsgid(Gid::from_raw(id));
    nix::unistd::setfsuid(Uid::from_raw(id));
}

/// Makes every permitted capability of the calling thread effective.
fn raise_capabilities() -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Half {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    // _LINUX_CAPABILITY_VERSION_3: 64 bits in two halves.
    let mut header = Header { version: 0x2008_0522, pid: 0 };
    let mut halves = [Half::default(); 2];
    // SAFETY: both pointers lead to structs of the layout that version 3 asks for, and outlive the call.
    checked(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, halves.as_mut_ptr()) })?;
    for half in &mut halves {
        half.effective = half.permitted;
    }
    // SAFETY: as above; the kernel only reads.
    checked(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, halves.as_ptr()) })?;
    Ok(())
}

/// Runs `work` in a child process inside the user namespace, with all capabilities in it.
///
/// Forks: the calling process must have one thread.
pub fn in_user_namespace(namespace: &OwnedFd, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    // SAFETY: the caller promises a single thread, so no lock is held by a thread that the child lacks.
    let fork = unsafe { fork() }?;
    match fork {
        ForkResult::Child => {
            let outcome = nix::sched::setns(namespace, CloneFlags::CLONE_NEWUSER).map_err(io::Error::from).and_then(|()| work());
            let status = outcome.map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0);
            // SAFETY: ends this process without running the parent's atexit handlers in a copy of it.
            unsafe { libc::_exit(status) }
        }
        ForkResult::Parent { child } => match waitpid(child, None)? {
            nix::sys::wait::WaitStatus::Exited(_, 0) => Ok(()),
            nix::sys::wait::WaitStatus::Exited(_, errno) => Err(io::Error::from_raw_os_error(errno)),
            other => Err(io::Error::other(format!("the child ended with {other:?}"))),
        },
    }
}
