//! The folder of one dump: written aside as `snapshots/<id>.new`, renamed to `snapshots/<id>` when complete.
//!
//! A folder is found under either name, so that a crash (or a full disk) between the dump and the rename loses nothing.

use super::core::Core;
use super::error::chain;
use crate::model::SnapshotId;
use crate::runtime::disk::copy_image;
use crate::runtime::{DUMPED_FILE, Dumped};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// One dump's place on disk.
#[derive(Debug, Clone)]
pub(super) struct DumpFolder {
    place: PathBuf,
    aside: PathBuf,
}

impl DumpFolder {
    pub(super) fn of(core: &Core, id: SnapshotId) -> Self {
        let snapshots = core.snapshots_dir();
        Self { place: snapshots.join(id.as_str()), aside: snapshots.join(format!("{id}.new")) }
    }

    /// Makes it, aside and empty, readable by root only.
    pub(super) async fn make(&self) -> io::Result<()> {
        let aside = self.aside.clone();
        blocking(move || {
            remove_tree(&aside)?;
            fs::DirBuilder::new().recursive(true).mode(0o700).create(aside.join("images"))
        })
        .await
    }

    /// Where the images are, or are to be written.
    pub(super) fn images(&self) -> PathBuf {
        self.present().join("images")
    }

    /// Where the copy of the disk is, or is to be written.
    pub(super) fn disk(&self) -> PathBuf {
        self.present().join("disk.img")
    }

    fn present(&self) -> &Path {
        if self.place.exists() { &self.place } else { &self.aside }
    }

    /// Whether it was removed.
    pub(super) fn is_gone(&self) -> bool {
        !self.place.exists() && !self.aside.exists()
    }

    /// What the dump in it is; `None` when it was never finished.
    pub(super) async fn dumped(&self) -> Option<Dumped> {
        let mark = self.images().join(DUMPED_FILE);
        blocking(move || fs::read(mark)).await.ok().and_then(|text| serde_json::from_slice(&text).ok())
    }

    /// Fills it, made and empty, with the images of `other` as hard links and a copy of `disk`.
    pub(super) async fn copy_of(&self, other: &Self, disk: &Path) -> io::Result<()> {
        let (from, to) = (other.images(), self.images());
        let (disk, disk_copy) = (disk.to_owned(), self.disk());
        blocking(move || {
            for entry in fs::read_dir(from)? {
                let entry = entry?;
                if entry.file_type()?.is_file() {
                    fs::hard_link(entry.path(), to.join(entry.file_name()))?;
                }
            }
            copy_image(&disk, &disk_copy).map_err(io::Error::other)
        })
        .await
    }

    /// Puts it in place. A failure leaves it aside, where it is found as well.
    pub(super) async fn put_in_place(&self) {
        let (aside, place) = (self.aside.clone(), self.place.clone());
        if let Err(error) = blocking(move || fs::rename(aside, place)).await {
            tracing::warn!(folder = %self.aside.display(), error = chain(&error), "A dump stays aside");
        }
    }

    /// Puts everything in it on stable storage, the names last.
    pub(super) async fn sync(&self) -> io::Result<()> {
        let present = self.present().to_owned();
        blocking(move || {
            sync_tree(&present)?;
            present.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
        })
        .await
    }

    /// Bytes on disk, for the account of space.
    pub(super) async fn bytes(&self) -> u64 {
        let present = self.present().to_owned();
        blocking(move || tree_bytes(&present)).await.unwrap_or(0)
    }

    /// Removes it under either name; what cannot be removed now is swept at the next start.
    pub(super) async fn remove(&self) {
        for path in [self.place.clone(), self.aside.clone()] {
            let shown = path.display().to_string();
            if let Err(error) = blocking(move || remove_tree(&path)).await {
                tracing::warn!(folder = shown, error = chain(&error), "Could not remove a dump");
            }
        }
    }
}

/// Removes every folder below `snapshots/` that belongs to none of `keep`.
pub(super) async fn sweep(core: &Core, keep: Vec<SnapshotId>) -> io::Result<()> {
    let snapshots = core.snapshots_dir();
    blocking(move || {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&snapshots)?;
        for entry in fs::read_dir(&snapshots)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let id = name.strip_suffix(".new").unwrap_or(&name).parse::<SnapshotId>();
            if id.is_ok_and(|id| !keep.contains(&id)) {
                remove_tree(&entry.path())?;
            }
        }
        Ok(())
    })
    .await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else if entry.file_type()?.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(folder)?.sync_all()
}

fn tree_bytes(folder: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        // Disk images are sparse: blocks, not length.
        bytes += if metadata.is_dir() { tree_bytes(&entry.path())? } else { metadata.blocks() * 512 };
    }
    Ok(bytes)
}
