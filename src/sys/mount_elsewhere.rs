//! Mounts of ours that other mount namespaces have copies of.
//!
//! A process that unshares its mount namespace and makes it private (mmdebstrap, a container runtime, `unshare -m`) keeps
//! a copy of every mount of the host for as long as it lives: a disk that the server has unmounted stays in use there.

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{chroot, fchdir};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
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
    mountinfo.split(|byte| *byte == b'\n').filter_map(|line| point_of(line, devices)).collect()
}

/// `36 35 98:0 /root /point …`: proc_pid_mountinfo(5).
fn point_of(line: &[u8], devices: &BTreeSet<u64>) -> Option<PathBuf> {
    let mut fields = line.split(|byte| *byte == b' ').skip(2);
    let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let device = nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?);
    devices.contains(&device).then(|| unescape(fields.nth(1)?))?
}

/// Spaces, tabs, newlines and backslashes are written as three octal digits after a backslash.
fn unescape(written: &[u8]) -> Option<PathBuf> {
    let mut path = Vec::with_capacity(written.len());
    let mut rest = written;
    while let Some(at) = rest.iter().position(|byte| *byte == b'\\') {
        let digits = std::str::from_utf8(rest.get(at + 1..at + 4)?).ok()?;
        path.extend_from_slice(&rest[..at]);
        path.push(u8::from_str_radix(digits, 8).ok()?);
        rest = &rest[at + 4..];
    }
    path.extend_from_slice(rest);
    Some(PathBuf::from(std::ffi::OsString::from_vec(path)))
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
