//! The lock on a data folder: one server per folder, told by flock(2), which the kernel drops with its holder.

use super::StoreError;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Holds `data_dir/lock` until dropped. The file stays: removing it would let two servers lock two files.
#[derive(Debug)]
pub(super) struct DataDirLock {
    _held: Flock<File>,
}

impl DataDirLock {
    pub(super) fn acquire(data_dir: &Path) -> Result<Self, StoreError> {
        let path = data_dir.join("lock");
        let failed = |source| StoreError::File { file: path.clone(), source };
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut held) => {
                write_holder(&mut held).map_err(failed)?;
                Ok(Self { _held: held })
            }
            Err((file, nix::errno::Errno::EWOULDBLOCK)) => Err(StoreError::Locked { dir: data_dir.to_owned(), holder: read_holder(file) }),
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }
}

fn write_holder(file: &mut File) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    write!(file, "{}", std::process::id())
}

fn read_holder(mut file: File) -> String {
    let mut text = String::new();
    match file.read_to_string(&mut text) {
        Ok(_) if !text.is_empty() => text.chars().take(20).collect(),
        Ok(_) | Err(_) => "unknown".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_told_who_the_first_is_and_gets_its_turn() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataDirLock::acquire(dir.path()).unwrap();
        let refused = DataDirLock::acquire(dir.path()).unwrap_err();
        assert!(refused.to_string().contains(&format!("pid {}", std::process::id())), "{refused}");
        drop(first);
        DataDirLock::acquire(dir.path()).unwrap();
    }
}
