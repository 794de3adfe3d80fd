//! Copies files from layer to layer with all that belongs to them, hard links among them kept.
//!
//! A build step writes what it likes: a file of sixteen terabytes takes nothing on its sandbox's disk while it is a hole,
//! and ten million names are a matter of minutes. So what becomes a layer is bounded as an image's layers are.

use super::super::allowance::{Held, HostRoom};
use super::super::layer::{Bound, LayerError, io_error, is_kept_attribute};
use super::super::unpack::UnpackLimits;
use crate::runtime::disk::copy_file;
use nix::sys::{stat, time::TimeSpec};
use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

/// One journey from layers to a new one.
#[derive(Debug)]
pub(super) struct Copier {
    /// By which path an inode with several names was copied first.
    links: HashMap<(u64, u64), PathBuf>,
    limits: UnpackLimits,
    /// As large as they say they are: a layer's tar has no holes.
    bytes: u64,
    entries: u64,
    held: Held,
    room: HostRoom,
}

impl Copier {
    /// Copies so much to the disk that `folder` lies on.
    pub(super) fn within(limits: UnpackLimits, folder: &Path) -> Self {
        let room = HostRoom::of(folder, limits.free_min);
        Self { links: HashMap::new(), limits, bytes: 0, entries: 0, held: Held::default(), room }
    }

    /// The names in a folder, sorted.
    pub(super) fn names_in(&mut self, folder: &Path) -> Result<BTreeSet<OsString>, LayerError> {
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(folder).map_err(io_error("list", folder))? {
            let name = entry.map_err(io_error("list", folder))?.file_name();
            self.held.add(name.len()).map_err(|why| io_error("list", folder)(io::Error::other(why)))?;
            self.entries += 1;
            if self.entries > self.limits.entries_max {
                return Err(LayerError::TooLarge { path: folder.to_owned(), bound: Bound::Entries(self.limits.entries_max) });
            }
            names.insert(name);
        }
        Ok(names)
    }

    /// Copies what is no folder. Sockets and device nodes are left out: the former are of use only to whoever listens on
    /// them, the latter are the runtime's.
    pub(super) fn copy(&mut self, path: &Path, metadata: &Metadata, target: &Path) -> Result<(), LayerError> {
        let kind = metadata.file_type();
        if kind.is_socket() || kind.is_char_device() || kind.is_block_device() {
            return Ok(());
        }
        if metadata.nlink() > 1 {
            if let Some(first) = self.links.get(&(metadata.dev(), metadata.ino())) {
                return fs::hard_link(first, target).map_err(io_error("link", target));
            }
            self.links.insert((metadata.dev(), metadata.ino()), target.to_owned());
        }
        if kind.is_file() {
            self.take_room_for(path, metadata)?;
            copy_file(path, target).map_err(io_error("copy", path))?;
        } else if kind.is_symlink() {
            let to = fs::read_link(path).map_err(io_error("read", path))?;
            symlink(to, target).map_err(io_error("create", target))?;
        } else {
            nix::unistd::mkfifo(target, stat::Mode::from_bits_truncate(0o600)).map_err(|errno| io_error("create", target)(errno.into()))?;
        }
        copy_facts(path, metadata, target)
    }

    fn take_room_for(&mut self, path: &Path, metadata: &Metadata) -> Result<(), LayerError> {
        self.bytes = self.bytes.saturating_add(metadata.len());
        if self.bytes > self.limits.bytes_max.bytes() {
            return Err(LayerError::TooLarge { path: path.to_owned(), bound: Bound::Bytes(self.limits.bytes_max) });
        }
        self.room.take(metadata.blocks().saturating_mul(512)).map_err(io_error("copy", path))
    }
}

/// Owner, permissions, kept attributes and time. The owner first: changing it drops set-user-ID bits and capabilities.
pub(super) fn copy_facts(from: &Path, metadata: &Metadata, to: &Path) -> Result<(), LayerError> {
    let copied = || -> io::Result<()> {
        lchown(to, Some(metadata.uid()), Some(metadata.gid()))?;
        if !metadata.is_symlink() {
            fs::set_permissions(to, fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
            copy_attributes(from, to)?;
        }
        let time = TimeSpec::new(metadata.mtime(), 0);
        stat::utimensat(None, to, &time, &time, stat::UtimensatFlags::NoFollowSymlink).map_err(io::Error::from)
    };
    copied().map_err(io_error("write", to))
}

fn copy_attributes(from: &Path, to: &Path) -> io::Result<()> {
    let names = match xattr::list(from) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(()),
        names => names?,
    };
    for name in names.filter(|name| is_kept_attribute(name)) {
        if let Some(value) = xattr::get(from, &name)? {
            xattr::set(to, &name, &value)?;
        }
    }
    Ok(())
}
