//! The allow-list: facts in, a reason out when they are not on it.
//!
//! A reason reads after the command's name and pid: "gdb (pid 42): is being traced …".

use super::parse::{Mount, Status, printable};
use crate::runtime::GHOST_BYTES_MAX;
use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

/// File systems that CRIU makes anew or carries along. Everything else mounted inside is refused; nested overlays
/// above all, which dump well and cannot be restored.
const FILE_SYSTEMS: [&str; 5] = ["proc", "sysfs", "devpts", "tmpfs", "mqueue"];

/// Anonymous inodes that survive (checkpoint.md, section 2.3).
const ANON_INODES: [&str; 6] = ["[eventfd]", "[eventpoll]", "[signalfd]", "[timerfd]", "[pidfd]", "inotify"];

/// Protocols whose sockets survive, as `system.sockprotoname` names them.
const PROTOCOLS: [&str; 14] =
    ["TCP", "TCPv6", "UDP", "UDPv6", "UDP-Lite", "UDPLITEv6", "UNIX", "UNIX-STREAM", "NETLINK", "PACKET", "RAW", "RAWv6", "PING", "PINGv6"];

/// Character devices that a sandbox has: null, zero, full, random, urandom; tty, ptmx.
const DEVICES: [(u64, u64); 7] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)];
/// Majors of terminals in /dev/pts.
const PTS_MAJORS: std::ops::RangeInclusive<u64> = 136..=143;

/// What an open file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FdFacts {
    Socket(SocketFacts),
    /// Something without a path: `pipe:[1]`, `anon_inode:[eventfd]`, `net:[2]`.
    Kernel {
        link: String,
    },
    File(FileFacts),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SocketFacts {
    pub(super) protocol: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileFacts {
    pub(super) link: String,
    pub(super) mode: u32,
    pub(super) device_number: u64,
    pub(super) links: u64,
    pub(super) bytes_on_disk: u64,
    pub(super) mount_id: u64,
}

pub(super) fn tracer(status: &Status) -> Option<String> {
    (status.tracer != 0).then(|| "is being traced (strace, gdb or another debugger); detach it first".to_owned())
}

pub(super) fn namespace(name: &str, found: &Path, expected: &Path) -> Option<String> {
    (found != expected).then(|| match name {
        "pid_for_children" | "time_for_children" => format!("has made a new {} namespace", &name[..name.len() - 13]),
        _ => format!("lives in a {name} namespace of its own; end it first"),
    })
}

pub(super) fn mount(mount: &Mount, known_devices: &BTreeSet<String>) -> Option<String> {
    let allowed = known_devices.contains(&mount.device) || FILE_SYSTEMS.contains(&mount.kind.as_str());
    (!allowed).then(|| {
        let (kind, point) = (printable(&mount.kind), printable(&mount.point));
        format!("has a file system of type {kind} mounted on {point}; unmount it first")
    })
}

pub(super) fn fd<'a>(facts: &FdFacts, mount_ids: &HashSet<u64>, namespaces: impl Iterator<Item = &'a PathBuf>) -> Option<String> {
    match facts {
        FdFacts::Socket(socket) => protocol(&socket.protocol),
        FdFacts::Kernel { link } => kernel_object(link, namespaces),
        FdFacts::File(file) => device(file).or_else(|| deleted(file)).or_else(|| foreign_mount(file, mount_ids)),
    }
}

fn protocol(name: &str) -> Option<String> {
    match name {
        name if PROTOCOLS.contains(&name) => None,
        "MPTCP" | "MPTCPv6" => {
            Some("has a multipath TCP socket; Go programs do without when started with GODEBUG=multipathtcp=0".to_owned())
        }
        other => Some(format!("has a socket of type {}, which cannot be saved", printable(other))),
    }
}

fn kernel_object<'a>(link: &str, mut namespaces: impl Iterator<Item = &'a PathBuf>) -> Option<String> {
    if let Some(kind) = link.strip_prefix("anon_inode:") {
        return anon_inode(kind);
    }
    // `pidfd:[1]` is what kernels from 6.14 on say for `anon_inode:[pidfd]`; `mnt:[2]` may be any mount namespace.
    if ["pipe:[", "pidfd:[", "mnt:["].iter().any(|prefix| link.starts_with(prefix)) || link == "[pidfd]" {
        return None;
    }
    match namespaces.any(|own| own == Path::new(link)) {
        true => None,
        false => Some(format!("holds {}, which cannot be saved", printable(link))),
    }
}

fn anon_inode(kind: &str) -> Option<String> {
    if ANON_INODES.contains(&kind) {
        return None;
    }
    Some(match kind {
        "[io_uring]" => "has an io_uring, which cannot be saved; use epoll instead".to_owned(),
        "[userfaultfd]" => "uses userfaultfd, which cannot be saved".to_owned(),
        "[perf_event]" => "has a performance counter open; end the profiler first".to_owned(),
        "[fanotify]" => "watches files with fanotify, which cannot be saved; inotify can".to_owned(),
        kind if kind.starts_with("bpf") || kind.starts_with("[bpf") => "uses BPF, which cannot be saved".to_owned(),
        kind => format!("holds anon_inode:{}, which cannot be saved", printable(kind)),
    })
}

fn device(file: &FileFacts) -> Option<String> {
    let kind = file.mode & libc::S_IFMT;
    let number = (libc::major(file.device_number).into(), libc::minor(file.device_number).into());
    let allowed = match kind {
        libc::S_IFCHR => DEVICES.contains(&number) || PTS_MAJORS.contains(&number.0),
        libc::S_IFBLK => false,
        _ => true,
    };
    (!allowed).then(|| match number {
        (10, 229) => "serves a FUSE file system; unmount it first".to_owned(),
        (10, 200) => "has a tun or tap device open; end the tunnel first".to_owned(),
        (major, minor) => format!("has the device {} ({major}:{minor}) open", printable(&file.link)),
    })
}

/// A deleted file that is still open travels in the dump; memfds are memory and travel anyway.
fn deleted(file: &FileFacts) -> Option<String> {
    let is_ghost = file.links == 0 && file.mode & libc::S_IFMT == libc::S_IFREG && !is_memfd(file);
    let limit = u64::from(GHOST_BYTES_MAX);
    (is_ghost && file.bytes_on_disk > limit).then(|| {
        let (path, mib) = (printable(&file.link), file.bytes_on_disk >> 20);
        format!("has the deleted file {path} open, which holds {mib} MiB; at most {} MiB can be saved", limit >> 20)
    })
}

fn is_memfd(file: &FileFacts) -> bool {
    file.link.starts_with("/memfd:")
}

/// What lies on a file system that is mounted nowhere in the sandbox (message queues, detached mounts) cannot be opened
/// again.
fn foreign_mount(file: &FileFacts, mount_ids: &HashSet<u64>) -> Option<String> {
    let known = mount_ids.contains(&file.mount_id) || is_memfd(file);
    (!known).then(|| format!("has {} open on a file system that is mounted nowhere in the sandbox", printable(&file.link)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(facts: FdFacts) -> Option<String> {
        let own = PathBuf::from("net:[7]");
        fd(&facts, &HashSet::from([45]), [&own].into_iter())
    }

    fn kernel(link: &str) -> Option<String> {
        judged(FdFacts::Kernel { link: link.into() })
    }

    fn plain(link: &str) -> FileFacts {
        FileFacts { link: link.into(), mode: libc::S_IFREG | 0o644, device_number: 0, links: 1, bytes_on_disk: 4096, mount_id: 45 }
    }

    fn device_file(link: &str, major: u32, minor: u32) -> FdFacts {
        let device_number = libc::makedev(major, minor);
        FdFacts::File(FileFacts { mode: libc::S_IFCHR | 0o666, device_number, ..plain(link) })
    }

    #[test]
    fn what_survives_is_let_through() {
        for link in ["pipe:[12]", "anon_inode:[eventfd]", "anon_inode:inotify", "pidfd:[99]", "mnt:[3]", "net:[7]"] {
            assert_eq!(kernel(link), None, "{link}");
        }
        for protocol in ["TCP", "UNIX-STREAM", "NETLINK", "PINGv6"] {
            assert_eq!(judged(FdFacts::Socket(SocketFacts { protocol: protocol.into() })), None, "{protocol}");
        }
        assert_eq!(judged(FdFacts::File(plain("/home/user/a"))), None);
        for (link, major, minor) in [("/dev/null", 1, 3), ("/dev/ptmx", 5, 2), ("/dev/pts/3", 136, 3)] {
            assert_eq!(judged(device_file(link, major, minor)), None, "{link}");
        }
    }

    #[test]
    fn what_cannot_be_dumped_is_named() {
        for (link, word) in [
            ("anon_inode:[io_uring]", "io_uring"),
            ("anon_inode:[userfaultfd]", "userfaultfd"),
            ("anon_inode:bpf-map", "BPF"),
            ("anon_inode:[perf_event]", "performance"),
            ("anon_inode:[something new]", "something new"),
            ("net:[8]", "net:[8]"),
        ] {
            assert!(kernel(link).is_some_and(|reason| reason.contains(word)), "{link}");
        }
        assert!(judged(device_file("/dev/fuse", 10, 229)).unwrap().contains("FUSE"));
        assert!(judged(device_file("/dev/net/tun", 10, 200)).unwrap().contains("tun"));
        assert!(judged(device_file("/dev/kvm", 10, 232)).unwrap().contains("/dev/kvm (10:232)"));
        let socket = |protocol: &str| judged(FdFacts::Socket(SocketFacts { protocol: protocol.into() })).unwrap();
        assert!(socket("MPTCP").contains("GODEBUG"));
        assert!(socket("AF_VSOCK").contains("AF_VSOCK"));
    }

    #[test]
    fn large_deleted_files_are_refused_and_memfds_are_memory() {
        let ghost = FileFacts { links: 0, bytes_on_disk: 300 << 20, ..plain("/tmp/log (deleted)") };
        assert!(judged(FdFacts::File(ghost.clone())).unwrap().contains("300 MiB; at most 256 MiB"));
        let small = FileFacts { bytes_on_disk: 256 << 20, ..ghost.clone() };
        assert_eq!(judged(FdFacts::File(small)), None);
        let memfd = FileFacts { link: "/memfd:x (deleted)".into(), mount_id: 1, ..ghost };
        assert_eq!(judged(FdFacts::File(memfd)), None);
    }

    #[test]
    fn files_on_file_systems_that_are_mounted_nowhere_are_refused() {
        let lost = FileFacts { mount_id: 77, ..plain("/mnt/x") };
        assert!(judged(FdFacts::File(lost)).unwrap().contains("mounted nowhere"));
    }

    #[test]
    fn only_listed_file_systems_and_the_root_itself_may_be_mounted() {
        let on = |kind: &str, device: &str| Mount { id: 1, device: device.into(), point: "/m".into(), kind: kind.into() };
        let known = BTreeSet::from(["0:52".to_owned(), "7:3".to_owned()]);
        for allowed in [on("tmpfs", "0:9"), on("proc", "0:8"), on("overlay", "0:52"), on("ext4", "7:3")] {
            assert_eq!(mount(&allowed, &known), None, "{allowed:?}");
        }
        for refused in [on("overlay", "0:60"), on("fuse.s3fs", "0:61"), on("cgroup", "0:62"), on("unreadable", ""), on("ext4", "7:4")] {
            assert!(mount(&refused, &known).unwrap().contains(&refused.kind), "{refused:?}");
        }
    }

    #[test]
    fn tracers_and_foreign_namespaces_are_found() {
        let status = |tracer| Status { command: "x".into(), inner_pid: 2, tracer, is_zombie: false };
        assert_eq!(tracer(&status(0)), None);
        assert!(tracer(&status(9)).is_some());
        let (own, other) = (Path::new("user:[1]"), Path::new("user:[2]"));
        assert_eq!(namespace("user", own, own), None);
        assert!(namespace("user", other, own).unwrap().contains("user namespace"));
        assert_eq!(namespace("pid_for_children", other, own).unwrap(), "has made a new pid namespace");
    }
}
