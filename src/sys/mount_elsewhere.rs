//! Mounts of ours that other mount namespaces have copies of.
//!
//! A process that unshares its mount namespace and makes it private (mmdebstrap, a container runtime, `unshare -m`) keeps
//! a copy of every mount of the host for as long as it lives: a disk that the server has unmounted stays in use there.

use super::mountinfo::{device, mount_point};
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{chroot, fchdir};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A copy of a mount, seen from a process that has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// The process.
    pub pid: u32,
    /// The name that it goes by.
    pub command: String,
}

/// Unmounts the file systems with these device numbers (`st_dev`) in every mount namespace but the caller's, lazily, and
/// tells where that was. What cannot be entered (it has just ended) is passed over.
pub fn unmount_elsewhere(devices: &BTreeSet<u64>) -> io::Result<Vec<Copy>> {
    let devices = devices.clone();
    // A thread can change its mount namespace only when it shares its root and working folder with no other.
    let worker = std::thread::Builder::new().name("mounts-elsewhere".to_owned()).spawn(move || {
        unshare(CloneFlags::CLONE_FS)?;
        Ok(unmount_in_all(&devices))
    })?;
    worker.join().map_err(|_| io::Error::other("the thread that enters mount namespaces panicked"))?
}

/// Runs `work` in the mount namespace of `process`, in a thread of its own. Its root and its working folder are those of
/// the namespace, whatever the process has made of its own.
pub fn in_mount_namespace_of<T: Send>(process: i32, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = File::open(format!("/proc/{process}/ns/mnt"))?;
    std::thread::scope(|scope| {
        let worker = std::thread::Builder::new().name("mounts-inside".to_owned()).spawn_scoped(scope, || {
            // A thread can change its mount namespace only when it shares its root and working folder with no other.
            unshare(CloneFlags::CLONE_FS)?;
            setns(&namespace, CloneFlags::CLONE_NEWNS)?;
            work()
        })?;
        worker.join().map_err(|_| io::Error::other("the thread in another mount namespace panicked"))?
    })
}

fn unmount_in_all(devices: &BTreeSet<u64>) -> Vec<Copy> {
    let mut seen: BTreeSet<u64> = namespace_of(Path::new("/proc/self")).into_iter().collect();
    let mut copies = Vec::new();
    for process in processes() {
        let folder = PathBuf::from(format!("/proc/{process}"));
        let Some(namespace) = namespace_of(&folder) else { continue };
        let mounts = fs::read(folder.join("mountinfo")).unwrap_or_default();
        let points = points_of(&mounts, devices);
        // One process may have been moved below a folder that shows none of them: another of the namespace is asked too.
        if points.is_empty() || !seen.insert(namespace) {
            continue;
        }
        let command = fs::read_to_string(folder.join("comm")).unwrap_or_default().trim_end().to_owned();
        if enter(&folder).is_ok() {
            for point in points.iter().rev() {
                // Gone already, or replaced by the process: nothing of ours is there then.
                let _ = umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            }
            copies.push(Copy { pid: process, command });
        }
    }
    copies
}

fn processes() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn namespace_of(process: &Path) -> Option<u64> {
    fs::metadata(process.join("ns/mnt")).ok().map(|namespace| namespace.ino())
}

/// Makes the calling thread see the files that `process` sees.
fn enter(process: &Path) -> io::Result<()> {
    let root = open(&process.join("root"), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    // SAFETY: `open` has just returned this descriptor and nobody else knows it.
    let root = unsafe { OwnedFd::from_raw_fd(root) };
    setns(File::open(process.join("ns/mnt"))?, CloneFlags::CLONE_NEWNS)?;
    fchdir(root.as_raw_fd())?;
    chroot(".")?;
    Ok(())
}

/// Where mountinfo says that these devices are mounted, in the order in which they were.
fn points_of(mountinfo: &[u8], devices: &BTreeSet<u64>) -> Vec<PathBuf> {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    lines.filter(|line| device(line).is_some_and(|device| devices.contains(&device))).filter_map(mount_point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_found_by_device_and_unescaped() {
        let text = b"22 1 254:0 / / rw - ext4 /dev/root rw\n\
            40 22 7:3 / /data/a\\040b/disk rw,relatime shared:4 - ext4 /dev/loop3 rw\n\
            41 22 0:52 / /data/root rw - overlay overlay rw\nshort line\n";
        let devices = |wanted: &[(u64, u64)]| wanted.iter().map(|(major, minor)| nix::sys::stat::makedev(*major, *minor)).collect();
        assert_eq!(points_of(text, &devices(&[(7, 3)])), [Path::new("/data/a b/disk")]);
        assert_eq!(points_of(text, &devices(&[(7, 3), (0, 52)])), [Path::new("/data/a b/disk"), Path::new("/data/root")]);
        assert!(points_of(text, &devices(&[(7, 4)])).is_empty());
    }
}
