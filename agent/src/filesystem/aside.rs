//! Work in progress beside its destination: made under a hidden name, renamed into place when it is whole.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The name that a file or tree has while it is made. Dropped before `place`, it removes what is there.
#[derive(Debug)]
pub(crate) struct Aside {
    pub(crate) path: PathBuf,
}

impl Aside {
    /// A free name in the directory of `destination`. Makes nothing yet.
    pub(crate) fn of(destination: &Path) -> io::Result<Aside> {
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let mut name = OsString::from(format!(".stillbox-{:016x}-", u64::from_ne_bytes(random)));
        // A name of 255 bytes, the most there can be, leaves no room for ours.
        let shown = destination.file_name().unwrap_or_default().to_string_lossy();
        name.push(shown.chars().take(50).collect::<String>());
        Ok(Aside { path: destination.with_file_name(name) })
    }

    /// Replaces `destination` as rename(2) does.
    pub(crate) fn place(self, destination: &Path) -> io::Result<()> {
        fs::rename(&self.path, destination)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // Best effort: after `place` nothing is there, and before it the error on its way is the one to report.
        drop(remove_any(&self.path));
    }
}

/// Removes a file, a link or a tree.
pub(crate) fn remove_any(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}
