//! The mount API by file descriptor: file systems and bind mounts that nobody sees until they are attached.

use super::checked;
use std::ffi::{CStr, CString};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A file system that is being described; nothing is mounted yet.
#[derive(Debug)]
pub struct NewFilesystem(OwnedFd);

impl NewFilesystem {
    /// Starts describing a file system of this type.
    pub fn open(kind: &CStr) -> io::Result<Self> {
        // SAFETY: `kind` is a C string that outlives the call; the call returns a new descriptor or an error.
        let fd = checked(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), libc::FSOPEN_CLOEXEC) })?;
        // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sets an option with a value.
    pub fn set(&self, key: &CStr, value: &Path) -> io::Result<()> {
        let value = c_path(value)?;
        self.configure(libc::FSCONFIG_SET_STRING, Some(key), Some(&value))
    }

    /// Sets an option without a value.
    pub fn flag(&self, key: &CStr) -> io::Result<()> {
        self.configure(libc::FSCONFIG_SET_FLAG, Some(key), None)
    }

    /// Creates the file system and a mount of it that is attached nowhere.
    pub fn create(self) -> io::Result<OwnedFd> {
        self.configure(libc::FSCONFIG_CMD_CREATE, None, None)?;
        // SAFETY: plain integers; the call returns a new descriptor or an error.
        let fd = checked(unsafe { libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), libc::FSMOUNT_CLOEXEC, 0) });
        let fd = fd.map_err(|error| self.explain(error))?;
        // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn configure(&self, command: u32, key: Option<&CStr>, value: Option<&CStr>) -> io::Result<()> {
        let key = key.map_or(std::ptr::null(), CStr::as_ptr);
        let value = value.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: both pointers are null or lead to C strings that outlive the call.
        let outcome = unsafe { libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), command, key, value, 0) };
        checked(outcome).map(drop).map_err(|error| self.explain(error))
    }

    /// The kernel writes the reason of a refusal into the descriptor: `EINVAL` alone helps nobody.
    fn explain(&self, error: io::Error) -> io::Error {
        let mut log = String::new();
        let mut line = [0u8; 512];
        let mut reader = match self.0.try_clone() {
            Ok(fd) => std::fs::File::from(fd),
            Err(_) => return error,
        };
        while let Ok(count @ 1..) = reader.read(&mut line) {
            log.push_str(String::from_utf8_lossy(&line[..count]).trim());
            log.push_str("; ");
        }
        match log.is_empty() {
            true => error,
            false => io::Error::new(error.kind(), format!("{}{error}", log)),
        }
    }
}

/// A second mount of what is at `path`, attached nowhere, without the mounts below it.
pub fn clone_mount(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: `path` is a C string that outlives the call; the call returns a new descriptor or an error.
    let fd = checked(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })?;
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes an unattached mount show ids through the map of `userns`: id 0 on disk becomes its first host id.
pub fn map_ids(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(userns.as_raw_fd()).map_err(io::Error::other)?,
    };
    set_attributes(mount, &attributes)
}

/// Makes an unattached mount fit for somebody who is not trusted: ids through the map of `userns`, no set-user-id
/// programs, no devices, and nothing that is mounted on it shows anywhere else.
pub fn confine(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: u64::try_from(userns.as_raw_fd()).map_err(io::Error::other)?,
    };
    set_attributes(mount, &attributes)
}

/// Makes an unattached mount a follower: what is mounted on the one that it was cloned from shows on it too, and not the
/// other way.
pub fn make_slave(mount: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: libc::MS_SLAVE, userns_fd: 0 };
    set_attributes(mount, &attributes)
}

/// Makes an unattached mount read-only.
pub fn make_read_only(mount: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    set_attributes(mount, &attributes)
}

fn set_attributes(mount: BorrowedFd<'_>, attributes: &libc::mount_attr) -> io::Result<()> {
    let size = size_of::<libc::mount_attr>();
    // SAFETY: the empty path and `attributes` outlive the call, and `size` is the size of the latter.
    let outcome = unsafe {
        libc::syscall(libc::SYS_mount_setattr, mount.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, std::ptr::from_ref(attributes), size)
    };
    checked(outcome).map(drop)
}

/// Attaches an unattached mount at `target`, in the caller's mount namespace.
pub fn attach(mount: impl AsFd, target: &Path) -> io::Result<()> {
    let target = c_path(target)?;
    // SAFETY: both paths are C strings that outlive the call.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    checked(outcome).map(drop)
}

/// Attaches an unattached mount over the open folder `target`, which is in the caller's mount namespace.
pub fn attach_over(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    let empty = c"".as_ptr();
    // SAFETY: both paths are the same constant C string.
    let outcome = unsafe { libc::syscall(libc::SYS_move_mount, mount.as_raw_fd(), empty, target.as_raw_fd(), empty, flags) };
    checked(outcome).map(drop)
}

/// Opens `path` as if `root` were the root of everything: symbolic links are followed within it, `..` ends at it, and
/// what is no path at all (`/proc/…/fd`) is refused. `mode` is for what `flags` creates.
pub fn open_in_root(root: BorrowedFd<'_>, path: &Path, flags: i32, mode: u32) -> io::Result<OwnedFd> {
    open_how(root, path, flags, mode, libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS)
}

/// Opens `path` below `root` without following any symbolic link and without leaving `root`.
pub fn open_beneath(root: BorrowedFd<'_>, path: &Path, flags: i32) -> io::Result<OwnedFd> {
    open_how(root, path, flags, 0, libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS)
}

fn open_how(root: BorrowedFd<'_>, path: &Path, flags: i32, mode: u32, resolve: u64) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    // SAFETY: all zeroes is a valid open_how, which is plain integers.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = u64::try_from(flags | libc::O_CLOEXEC).map_err(io::Error::other)?;
    how.mode = u64::from(mode);
    how.resolve = resolve;
    // SAFETY: `path` and `how` outlive the call, and the size is that of `how`.
    let fd =
        checked(unsafe { libc::syscall(libc::SYS_openat2, root.as_raw_fd(), path.as_ptr(), &raw const how, size_of::<libc::open_how>()) })?;
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}
