//! Copies files from layer to layer with all that belongs to them, hard links among them kept.

use super::super::layer::{LayerError, io_error, is_kept_attribute};
use nix::sys::{stat, time::TimeSpec};
use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

/// One journey from layers to a new one.
#[derive(Debug, Default)]
pub(super) struct Copier {
    /// By which path an inode with several names was copied first.
    links: HashMap<(u64, u64), PathBuf>,
}

impl Copier {
    /// Copies what is no folder. Sockets and device nodes are left out: the former are of use only to whoever listens on
    /// them, the latter are the runtime's.
    pub(super) fn copy(&mut self, path: &Path, metadata: &Metadata, target: &Path) -> Result<(), LayerError> {
        if metadata.nlink() > 1 {
            if let Some(first) = self.links.get(&(metadata.dev(), metadata.ino())) {
                return fs::hard_link(first, target).map_err(io_error("link", target));
            }
            self.links.insert((metadata.dev(), metadata.ino()), target.to_owned());
        }
        let kind = metadata.file_type();
        if kind.is_file() {
            fs::copy(path, target).map_err(io_error("copy", path))?;
        } else if kind.is_symlink() {
            let to = fs::read_link(path).map_err(io_error("read", path))?;
            symlink(to, target).map_err(io_error("create", target))?;
        } else if kind.is_fifo() {
            nix::unistd::mkfifo(target, stat::Mode::from_bits_truncate(0o600)).map_err(|errno| io_error("create", target)(errno.into()))?;
        } else {
            return Ok(());
        }
        copy_facts(path, metadata, target)
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
