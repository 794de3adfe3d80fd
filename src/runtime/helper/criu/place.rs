//! Where CRIU runs: a mount namespace of the helper's own, and for a restore the sandbox's cgroups.

use crate::sys::netns::bring_loopback_up;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// CRIU probes the kernel at each start (25-30 ms) unless it finds its notes here; it keeps them on a tmpfs only.
const NOTES: &str = "/run/criu.kdat";

/// Why the place could not be prepared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlaceError {
    /// The private mount namespace.
    #[error("cannot make a private mount namespace with an own /run; CRIU needs CAP_SYS_ADMIN")]
    Mounts(#[source] io::Error),
    /// The network namespace that CRIU runs in.
    #[error("cannot set lo up, which CRIU's probe of the kernel needs")]
    Loopback(#[source] io::Error),
    /// Moving into the sandbox's cgroup.
    #[error("cannot move into cgroup {}", path.display())]
    Cgroup {
        /// The folder of the cgroup.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Making the cgroup the root of what the sandbox sees.
    #[error("cannot make a cgroup namespace")]
    CgroupNamespace(#[source] io::Error),
}

/// Moves this process into a mount namespace of its own that still follows the host's mounts and unmounts (a slave:
/// a private copy would pin disks that the server unmounts), with a tmpfs on /run. The notes that an earlier CRIU
/// left in `notes_cache` are put there; the returned guard brings new ones back. Sees to it that lo is up, without
/// which CRIU's probe of the kernel fails.
///
/// `notes_cache` names a file of this CRIU's own folder; nothing below /run is visible afterwards, so no path of
/// the operation may lie there.
pub(crate) fn prepare(notes_cache: &Path) -> Result<ProbeNotes, PlaceError> {
    bring_loopback_up().map_err(PlaceError::Loopback)?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| PlaceError::Mounts(errno.into()))?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).map_err(|errno| PlaceError::Mounts(errno.into()))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), flags, Some("size=1m,mode=700")).map_err(|errno| PlaceError::Mounts(errno.into()))?;
    let cache = per_boot(notes_cache);
    let known = std::fs::copy(&cache, NOTES).is_ok();
    Ok(ProbeNotes { cache, known })
}

/// The notes hold addresses of this boot's kernel.
fn per_boot(notes_cache: &Path) -> PathBuf {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    notes_cache.with_extension(boot_id.trim())
}

/// CRIU's notes about the kernel, kept between helper processes. Only time is lost when they cannot be.
#[derive(Debug)]
pub(crate) struct ProbeNotes {
    cache: PathBuf,
    known: bool,
}

impl Drop for ProbeNotes {
    fn drop(&mut self) {
        if self.known {
            return;
        }
        let aside = self.cache.with_extension(format!("{}.tmp", std::process::id()));
        let kept = std::fs::copy(NOTES, &aside).and_then(|_| std::fs::rename(&aside, &self.cache));
        if kept.is_err() {
            let _ = std::fs::remove_file(&aside);
        }
    }
}

/// Where CRIU is started.
#[derive(Debug)]
pub(super) enum Seat {
    /// As any child of this process.
    Here,
    /// As a child born in this cgroup v2 folder.
    Cgroup(File),
}

/// Makes the sandbox's fresh cgroups the home of what CRIU restores: charged there, and, as the root of a cgroup
/// namespace, all it sees.
///
/// On v1 this process moves there itself. A single thread that moves alone, by `tasks`, spares the RCU grace period
/// that the kernel's lock costs otherwise (3-20 ms); the v2 tree beside v1 ones has no such file and no limits, so it is
/// left out. On v2 CRIU is born there, for the same reason.
pub(super) fn seat_in(cgroups: &[PathBuf]) -> Result<Seat, PlaceError> {
    let mut moved = false;
    for path in cgroups {
        moved |= move_thread(path).map_err(|source| PlaceError::Cgroup { path: path.clone(), source })?;
    }
    match (moved, cgroups) {
        (true, _) | (false, []) => {
            unshare(CloneFlags::CLONE_NEWCGROUP).map_err(|errno| PlaceError::CgroupNamespace(errno.into()))?;
            Ok(Seat::Here)
        }
        (false, [path, ..]) => {
            let folder = File::open(path).map_err(|source| PlaceError::Cgroup { path: path.clone(), source })?;
            Ok(Seat::Cgroup(folder))
        }
    }
}

/// Whether there was a `tasks` file to move by. "0" is the writer, whatever pid namespace it is in.
fn move_thread(cgroup: &Path) -> io::Result<bool> {
    match OpenOptions::new().write(true).open(cgroup.join("tasks")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
        Ok(mut tasks) => tasks.write_all(b"0").map(|()| true),
    }
}

/// Moves this process into one cgroup of a hierarchy of either version.
pub(in crate::runtime::helper) fn join(cgroup: &Path) -> io::Result<()> {
    match move_thread(cgroup)? {
        true => Ok(()),
        false => std::fs::write(cgroup.join("cgroup.procs"), "0"),
    }
}
