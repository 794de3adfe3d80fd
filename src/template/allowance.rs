//! What the making of a layer may take of this machine. Archives, images and build steps are somebody else's idea of how
//! much that is: a few kilobytes of them can stand for terabytes of files, and for gigabytes of names.

use crate::model::ByteSize;
use nix::sys::statvfs::statvfs;
use std::io;
use std::path::{Path, PathBuf};

/// Names and attributes that are held in memory while a layer is made: of four million files with long paths.
const HELD_MAX: ByteSize = ByteSize::mib(512);
/// How much is written between two looks at the host's disk.
const LOOK_EVERY: ByteSize = ByteSize::mib(64);
/// What a file takes on a disk at least.
const BLOCK: ByteSize = ByteSize(4096);

/// The host's disk, as it is filled: what `runtime.disk_free_min` keeps free is nobody's.
#[derive(Debug)]
pub(super) struct HostRoom {
    folder: PathBuf,
    free_min: ByteSize,
    /// Since the last look.
    taken: u64,
}

impl HostRoom {
    /// Of the disk that `folder` lies on.
    pub(super) fn of(folder: &Path, free_min: ByteSize) -> Self {
        // The first look is at once.
        Self { folder: folder.to_owned(), free_min, taken: LOOK_EVERY.bytes() }
    }

    /// Asks for room for so many bytes, of one file; an error when less than the floor would be left.
    pub(super) fn take(&mut self, bytes: u64) -> io::Result<()> {
        self.taken = self.taken.saturating_add(bytes.max(BLOCK.bytes()));
        if self.taken < LOOK_EVERY.bytes() {
            return Ok(());
        }
        self.taken = 0;
        let space = statvfs(&self.folder)?;
        let (free, floor) = (ByteSize(space.blocks_available() * space.fragment_size()), self.free_min);
        if free.bytes() >= floor.bytes().saturating_add(bytes) {
            return Ok(());
        }
        let full = format!(
            "{free} are free on the host's disk, {} more are wanted and {floor} are kept free (runtime.disk_free_min)",
            ByteSize(bytes)
        );
        Err(io::Error::new(io::ErrorKind::StorageFull, full))
    }
}

/// Names and attributes that are held until a layer is done.
#[derive(Debug)]
pub(super) struct Held {
    left: u64,
}

impl Default for Held {
    fn default() -> Self {
        Self { left: HELD_MAX.bytes() }
    }
}

impl Held {
    /// Another bound.
    #[cfg(test)]
    pub(super) fn of(left: u64) -> Self {
        Self { left }
    }

    /// Counts some more; an error beyond the bound.
    pub(super) fn add(&mut self, bytes: usize) -> Result<(), &'static str> {
        let left = u64::try_from(bytes).ok().and_then(|bytes| self.left.checked_sub(bytes));
        self.left = left.ok_or("the names and attributes before it take 512 MiB")?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_free_of_the_hosts_disk_is_nobodys() {
        let folder = tempfile::tempdir().unwrap();
        let mut roomy = HostRoom::of(folder.path(), ByteSize(0));
        roomy.take(1).unwrap();
        let refused = roomy.take(u64::MAX >> 1).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::StorageFull);
        let refused = HostRoom::of(folder.path(), ByteSize(u64::MAX)).take(1).unwrap_err();
        assert!(refused.to_string().contains("runtime.disk_free_min"), "{refused}");
    }

    #[test]
    fn a_disk_is_looked_at_again_as_it_is_filled() {
        let folder = tempfile::tempdir().unwrap();
        let mut room = HostRoom::of(folder.path(), ByteSize(0));
        room.take(1).unwrap();
        room.free_min = ByteSize(u64::MAX);
        let writes = (0..).take_while(|_| room.take(BLOCK.bytes()).is_ok()).count();
        assert_eq!(writes as u64, LOOK_EVERY.bytes() / BLOCK.bytes() - 1);
    }
}
