//! Where CRIU runs: for a dump the nursery's mount namespace, for a restore one of its own, and the sandbox's cgroups.
//!
//! ```text
//!  host ──follows──> nursery: all mounts, /run its own   (dumps; cold starts)
//!                       └── bare: what is needed of the host, none of a sandbox   (held open, nobody is in it)
//!                              └── a copy for each restore: bare, and its one root
//! ```

use crate::sys::mount::{attach, clone_mount, make_slave};
use crate::sys::mountinfo::mount_point;
use crate::sys::netns::bring_loopback_up;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// CRIU probes the kernel at each start (25-30 ms) unless it finds its notes here; it keeps them on a tmpfs only.
const NOTES: &str = "/run/criu.kdat";
const RUN: &str = "/run";

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

/// What a process has by birth that the nursery forked after [`prepare_for_all`].
static BORN_WITH: OnceLock<Birthright> = OnceLock::new();

#[derive(Debug)]
struct Birthright {
    /// Its notes are on /run.
    criu: PathBuf,
    /// The mount namespace that restores copy.
    bare: File,
}

/// What CRIU and the dynamic linker look for on the host; a folder that is no mount of its own is part of another. /proc and
/// /sys also for the sandbox: the kernel lets a user namespace mount them only where they are seen already.
const NEEDED: [&str; 9] = ["/proc", "/sys", "/dev", "/run", "/usr", "/bin", "/lib", "/lib64", "/etc"];

/// [`prepare`], once for all the processes that this one forks, as far as they run `criu`: a namespace for each would be
/// a copy of all mounts and its end, with the kernel's grace periods.
///
/// What these processes mount below the data folder is seen by the host, and what the host mounts there by them: the folder
/// is a shared mount, here as there. The mounts that /run lies on are followed one way, so the tmpfs stays here.
pub(in crate::runtime::helper) fn prepare_for_all(criu: &Path, data_dir: &Path) -> Result<(), PlaceError> {
    if criu.starts_with(RUN) {
        // The folder would be hidden; each process sees to itself.
        return Ok(());
    }
    bring_loopback_up().map_err(PlaceError::Loopback)?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| PlaceError::Mounts(errno.into()))?;
    follow("/", MsFlags::empty())?;
    match follow(RUN, MsFlags::empty()) {
        // Not a mount of its own.
        Err(PlaceError::Mounts(error)) if error.raw_os_error() == Some(nix::libc::EINVAL) => {}
        other => other?,
    }
    mount_run()?;
    // Without them the first CRIU makes new ones.
    let _ = std::fs::copy(per_boot(&notes_of(criu)), NOTES);
    let bare = make_bare(&[criu, data_dir]).map_err(PlaceError::Mounts)?;
    // Nothing else sets it.
    let _ = BORN_WITH.set(Birthright { criu: criu.to_owned(), bare });
    Ok(())
}

/// A copy of this process's mount namespace with the mounts alone that [`NEEDED`] and `paths` lie on. It follows nobody: of
/// what is mounted for sandboxes from now on it has nothing, and pins nothing. This process is back where it was.
fn make_bare(paths: &[&Path]) -> io::Result<File> {
    let here = File::open("/proc/self/ns/mnt")?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    let bare = make_this_bare(paths).and_then(|()| File::open("/proc/self/ns/mnt"));
    setns(here.as_fd(), CloneFlags::CLONE_NEWNS)?;
    bare
}

fn make_this_bare(paths: &[&Path]) -> io::Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)?;
    let mounts = std::fs::read("/proc/self/mountinfo")?;
    for point in mounts.split(|byte| *byte == b'\n').filter_map(mount_point) {
        if !is_needed(&point, paths) {
            // What is mounted below it goes too, so it may be gone already.
            let _ = umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
    Ok(())
}

fn is_needed(point: &Path, paths: &[&Path]) -> bool {
    NEEDED.iter().map(Path::new).chain(paths.iter().copied()).any(|path| path.starts_with(point))
}

/// From here on mounts and unmounts at `place` on the host are seen here, and not the other way.
fn follow(place: &str, more: MsFlags) -> Result<(), PlaceError> {
    let none: Option<&str> = None;
    mount(none, place, none, MsFlags::MS_SLAVE | more, none).map_err(|errno| PlaceError::Mounts(errno.into()))
}

/// A sandbox's root, whose mounts a restore puts together in a folder of it, passes through and does not look around.
fn mount_run() -> Result<(), PlaceError> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), RUN, Some("tmpfs"), flags, Some("size=1m,mode=711")).map_err(|errno| PlaceError::Mounts(errno.into()))
}

/// Where the notes of this CRIU are kept, in its own folder.
fn notes_of(criu: &Path) -> PathBuf {
    criu.with_file_name("kernel-notes")
}

/// For a dump: [`prepare_alone`], unless this process was born into such a place, which others work in at the same time:
/// nothing may be mounted there but below the data folder.
pub(crate) fn prepare(criu: &Path) -> Result<ProbeNotes, PlaceError> {
    match BORN_WITH.get() {
        Some(born_with) if born_with.criu == criu => Ok(ProbeNotes::on_run(criu)),
        Some(_) | None => prepare_alone(criu),
    }
}

/// Moves this process into a mount namespace of its own for a restore, with `root`, a mount below the data folder, and no
/// other sandbox's. What is mounted here is seen nowhere else and goes with the process.
///
/// CRIU begins with a copy of all mounts that it finds and ends with their removal: 10 µs each, and each sandbox has three.
pub(super) fn prepare_for_restore(criu: &Path, root: &Path) -> Result<ProbeNotes, PlaceError> {
    let Some(born_with) = BORN_WITH.get().filter(|born_with| born_with.criu == criu) else { return prepare_alone(criu) };
    let carry = || {
        let root_mount = clone_mount(root)?;
        // As it was in the dump, and has to be for CRIU.
        make_slave(root_mount.as_fd())?;
        setns(born_with.bare.as_fd(), CloneFlags::CLONE_NEWNS)?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        attach(root_mount, root)
    };
    carry().map_err(PlaceError::Mounts)?;
    Ok(ProbeNotes::on_run(criu))
}

/// Moves this process into a mount namespace of its own that still follows the host's mounts and unmounts (a slave: a
/// private copy would pin disks that the server unmounts), with a tmpfs on /run. The notes that an earlier CRIU left
/// beside `criu` are put there; the returned guard brings new ones back. Sees to it that lo is up, without which CRIU's
/// probe of the kernel fails.
///
/// Nothing below /run is visible afterwards, so no path of the operation may lie there.
fn prepare_alone(criu: &Path) -> Result<ProbeNotes, PlaceError> {
    let cache = per_boot(&notes_of(criu));
    bring_loopback_up().map_err(PlaceError::Loopback)?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| PlaceError::Mounts(errno.into()))?;
    follow("/", MsFlags::MS_REC)?;
    mount_run()?;
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

impl ProbeNotes {
    /// Those of the nursery's /run.
    fn on_run(criu: &Path) -> Self {
        Self { cache: per_boot(&notes_of(criu)), known: Path::new(NOTES).exists() }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_that_lead_somewhere_are_needed_and_sandboxes_are_not() {
        let paths = [Path::new("/srv/fast/stillbox/criu/0a/criu"), Path::new("/srv/fast/stillbox")];
        for needed in ["/", "/proc", "/sys", "/dev", "/run", "/usr", "/srv", "/srv/fast", "/srv/fast/stillbox"] {
            assert!(is_needed(Path::new(needed), &paths), "{needed}");
        }
        for not in
            ["/srv/fast/stillbox/sandboxes/i1/root", "/srv/other", "/sr", "/sys/fs/cgroup", "/dev/pts", "/proc/sys/fs/binfmt_misc", "/home"]
        {
            assert!(!is_needed(Path::new(not), &paths), "{not}");
        }
    }
}
