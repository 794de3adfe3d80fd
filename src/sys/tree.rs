//! Removing folders that a stranger has filled.
//!
//! The standard library goes down folder in folder, with a descriptor and a piece of stack for each: 15,000 of them within
//! one another end the process. Here what lies too deep is moved to the top first, so that both are bounded.

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, renameat};
use nix::libc::AT_FDCWD;
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};
use nix::{NixPath, Result};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::Path;

/// Folders within one another that are open at a time.
const DEPTH_MAX: usize = 64;

/// Removes what is at `path`, with everything in it if it is a folder. No symbolic link is followed in the last part of
/// the path or below.
pub fn remove(path: &Path) -> io::Result<()> {
    remove_at(AT_FDCWD, path).map_err(Into::into)
}

/// The same of an entry of an open folder.
pub fn remove_in(folder: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    remove_at(folder.as_raw_fd(), name).map_err(Into::into)
}

fn remove_at<P: NixPath + ?Sized>(folder: RawFd, name: &P) -> Result<()> {
    match unlinkat(Some(folder), name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::EISDIR) => {}
        other => return other,
    }
    loop {
        let top = open(folder, name)?;
        let number = top.as_raw_fd();
        let was_deep = empty(top, number, 0)?;
        match unlinkat(Some(folder), name, UnlinkatFlags::RemoveDir) {
            // What lay too deep lies at the top now.
            Err(Errno::ENOTEMPTY) if was_deep => {}
            other => return other,
        }
    }
}

fn open<P: NixPath + ?Sized>(folder: RawFd, name: &P) -> Result<Dir> {
    Dir::openat(Some(folder), name, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
}

/// Removes what is in a folder, and says whether something was moved to `top` instead.
fn empty(mut folder: Dir, top: RawFd, depth: usize) -> Result<bool> {
    let here = folder.as_raw_fd();
    let mut was_deep = false;
    for entry in folder.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let removed = match unlinkat(Some(here), name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) if depth < DEPTH_MAX => {
                was_deep |= empty(open(here, name)?, top, depth + 1)?;
                unlinkat(Some(here), name, UnlinkatFlags::RemoveDir)
            }
            Err(Errno::EISDIR) => {
                was_deep = true;
                renameat(Some(here), name, Some(top), format!(".stillbox-{}", uuid::Uuid::new_v4().simple()).as_str())
            }
            other => other,
        };
        match removed {
            Err(errno) if errno != Errno::ENOENT => return Err(errno),
            _ => {}
        }
    }
    Ok(was_deep)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsFd;

    /// Folders within one another, deeper than any path can say: from the inside out.
    fn nest(folder: &Path, levels: usize) {
        fs::create_dir(folder.join("deep")).unwrap();
        for _ in 1..levels {
            fs::create_dir(folder.join("outer")).unwrap();
            fs::write(folder.join("outer/file"), "x").unwrap();
            fs::rename(folder.join("deep"), folder.join("outer/deep")).unwrap();
            fs::rename(folder.join("outer"), folder.join("deep")).unwrap();
        }
    }

    #[test]
    fn folders_without_end_are_removed_with_little_stack() {
        let folder = tempfile::tempdir().unwrap();
        nest(folder.path(), 2_000);
        let path = folder.path().join("deep");
        let removing = std::thread::Builder::new().stack_size(256 << 10).spawn(move || remove(&path)).unwrap();
        removing.join().unwrap().unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_links_lead_to_stays() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("kept/inner")).unwrap();
        fs::create_dir_all(folder.path().join("gone/inner")).unwrap();
        std::os::unix::fs::symlink(folder.path().join("kept"), folder.path().join("gone/inner/link")).unwrap();
        std::os::unix::fs::symlink(folder.path().join("kept"), folder.path().join("link")).unwrap();
        let root = fs::File::open(folder.path()).unwrap();
        for name in ["gone", "link"] {
            remove_in(root.as_fd(), OsStr::new(name)).unwrap();
        }
        assert!(folder.path().join("kept/inner").is_dir());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let missing = remove(&folder.path().join("gone")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
