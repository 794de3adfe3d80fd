//! Leases: whoever is going to name a layer holds it until a row, or a manifest, does.
//!
//! A lease is a shared lock (flock) on the layer's folder, so it holds against the collector of another process as well,
//! and ends with the process that has it. The collector takes the lock for itself, looks once more whether anything
//! names the layer, and only then removes it (collect.rs).

use super::layer::folder_of;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A layer that stays as long as this is kept.
#[derive(Debug)]
pub struct Lease {
    id: String,
    _lock: Flock<File>,
}

impl Lease {
    /// Holds the layer; `None` when it is not there. Blocks for as long as a collector is looking at this very layer.
    pub fn take(data_dir: &Path, id: &str) -> io::Result<Option<Self>> {
        Self::at(&folder_of(data_dir, id), id)
    }

    /// [`Lease::take`] for who knows the folder of all layers.
    pub(super) fn take_in(layers: &Path, id: &str) -> io::Result<Option<Self>> {
        Self::at(&layers.join(id), id)
    }

    fn at(folder: &Path, id: &str) -> io::Result<Option<Self>> {
        let Some(opened) = absent_is_none(File::open(folder))? else { return Ok(None) };
        let lock = locked(opened, FlockArg::LockShared)?;
        // The collector may have taken it away between the two.
        let still_there = absent_is_none(std::fs::symlink_metadata(folder))?;
        let is_same = still_there.is_some_and(|now| lock.metadata().is_ok_and(|then| then.ino() == now.ino()));
        Ok(is_same.then(|| Self { id: id.to_owned(), _lock: lock }))
    }

    /// Holds a folder that is about to become layer `id`.
    pub(super) fn of_new(rootfs: &File, id: &str) -> io::Result<Self> {
        Ok(Self { id: id.to_owned(), _lock: locked(rootfs.try_clone()?, FlockArg::LockShared)? })
    }

    /// The layer's id.
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// A layer's folder for the collector alone; `None` when somebody holds it, or it is gone.
pub(super) fn take_alone(folder: &Path) -> io::Result<Option<Flock<File>>> {
    let Some(opened) = absent_is_none(File::open(folder))? else { return Ok(None) };
    match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}

fn locked(file: File, how: FlockArg) -> io::Result<Flock<File>> {
    let mut file = file;
    loop {
        match Flock::lock(file, how) {
            Ok(lock) => return Ok(lock),
            Err((again, Errno::EINTR)) => file = again,
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

fn absent_is_none<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_layer_is_nobody_elses_alone_and_a_missing_one_is_none() {
        let data_dir = tempfile::tempdir().unwrap();
        let folder = folder_of(data_dir.path(), "a");
        std::fs::create_dir_all(&folder).unwrap();
        assert!(Lease::take(data_dir.path(), "b").unwrap().is_none());
        let (first, second) = (Lease::take(data_dir.path(), "a").unwrap(), Lease::take(data_dir.path(), "a").unwrap());
        assert!(first.is_some() && second.is_some());
        drop(first);
        assert!(take_alone(&folder).unwrap().is_none());
        drop(second);
        assert!(take_alone(&folder).unwrap().is_some());
    }
}
