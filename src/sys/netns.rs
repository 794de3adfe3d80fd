//! Network namespaces: opening, making, pinning them, and doing things inside one from a thread of its own.
//!
//! Only a thread enters a namespace, never the process: each function here that enters one does so on a thread that
//! it starts for that purpose and that ends with it (or, [`SocketFactory`], that goes back after every socket). Callers'
//! threads stay where they were, so tokio workers may call the blocking ones through `spawn_blocking`.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::statfs::{FsType, statfs};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;

const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

/// An open network namespace; it exists at least as long as this.
#[derive(Debug, Clone)]
pub struct Netns(Arc<OwnedFd>);

impl Netns {
    /// The one that the calling thread is in.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// The one of a process.
    pub fn of_process(pid: i32) -> io::Result<Self> {
        Self::open(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// The one that a pin or a `/proc/<pid>/ns/net` names. A plain file (a pin that lost its mount, as after a reboot)
    /// is `NotFound`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if !is_nsfs(path)? {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("{} is no namespace", path.display())));
        }
        Ok(Self(Arc::new(file.into())))
    }

    /// A new one with a down `lo` and nothing else, kept alive by a mount on `path`, which must not exist.
    /// Nothing is left on failure. Undone by [`unpin`].
    pub fn create_pinned(path: &Path) -> io::Result<Self> {
        File::create_new(path)?;
        let made = on_own_thread("netns-new", || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some("/proc/thread-self/ns/net"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            Ok(())
        })
        .and_then(|()| Self::open(path));
        if made.is_err() {
            unpin(path)?;
        }
        made
    }

    /// Runs `work` on a thread of its own inside this namespace and waits for it. Children that `work` starts are in
    /// it too, and `/proc/sys/net` is this namespace's.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_own_thread("netns", || {
            self.enter_this_thread()?;
            work()
        })
    }
}

impl Netns {
    /// Moves the calling thread into this namespace, for good. Only for threads that end soon and own nothing else:
    /// inside [`Netns::run`].
    pub fn enter_this_thread(&self) -> io::Result<()> {
        Ok(setns(self.as_fd(), CloneFlags::CLONE_NEWNET)?)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Netns {
    fn from(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }
}

/// Takes away a pin: its mount, if it has one, and its file. The namespace goes when nothing else holds it.
/// Succeeds when there is nothing.
pub fn unpin(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn is_nsfs(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == NSFS_MAGIC)
}

fn on_own_thread<T: Send>(name: &str, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread in a network namespace panicked")))
    })
}

/// Sets lo of the calling thread's namespace up; its addresses come by themselves.
pub fn bring_loopback_up() -> io::Result<()> {
    let probe = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: all zeroes is a valid ifreq, which is plain integers and arrays.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).map_err(io::Error::other)?;
    // SAFETY: the descriptor is an open socket and the pointer leads to an ifreq that outlives the call.
    let outcome = unsafe { libc::ioctl(probe.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    nix::errno::Errno::result(outcome)?;
    Ok(())
}

/// What kind of socket is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketKind {
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP over IPv4.
    UdpV4,
}

struct SocketOrder {
    netns: Netns,
    kind: SocketKind,
    reply: tokio::sync::oneshot::Sender<io::Result<OwnedFd>>,
}

/// One thread that makes sockets inside other network namespaces: it enters, calls socket(), and goes back, so that it
/// keeps no namespace alive. A socket stays in the namespace that it was made in, whoever uses it.
#[derive(Debug, Clone)]
pub struct SocketFactory {
    orders: mpsc::Sender<SocketOrder>,
}

impl SocketFactory {
    /// Starts the thread; it ends when the last clone of the factory is gone.
    pub fn start() -> io::Result<Self> {
        let home = Netns::current()?;
        let (orders, inbox) = mpsc::channel::<SocketOrder>();
        std::thread::Builder::new().name("socket-factory".to_owned()).spawn(move || {
            for SocketOrder { netns, kind, reply } in inbox {
                let made = socket_inside(&netns, &home, kind);
                drop(netns);
                // Whoever asked may be gone: then the socket is closed here.
                drop(reply.send(made));
            }
        })?;
        Ok(Self { orders })
    }

    /// A non-blocking, close-on-exec socket that lives in `netns`. Cancel-safe.
    pub async fn socket(&self, netns: &Netns, kind: SocketKind) -> io::Result<OwnedFd> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let gone = || io::Error::other("the socket factory has ended");
        self.orders.send(SocketOrder { netns: netns.clone(), kind, reply }).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// Leaves the calling thread in `home`, unless the kernel refuses the way back: then the next call's setns, which does
/// not depend on where the thread is, still lands where it should.
fn socket_inside(netns: &Netns, home: &Netns, kind: SocketKind) -> io::Result<OwnedFd> {
    setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
    let (family, kind) = match kind {
        SocketKind::TcpV4 => (AddressFamily::Inet, SockType::Stream),
        SocketKind::TcpV6 => (AddressFamily::Inet6, SockType::Stream),
        SocketKind::UdpV4 => (AddressFamily::Inet, SockType::Datagram),
    };
    let made = socket(family, kind, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None);
    setns(home.as_fd(), CloneFlags::CLONE_NEWNET)?;
    Ok(made?)
}
