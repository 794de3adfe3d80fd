//! What a build step wrote becomes a layer: the upper folder of its sandbox, copied without what is not the step's.
//!
//! Left out: what the runtime and the agent put there, sockets, and folders that were only looked into (overlayfs copies
//! a folder up when something in it changes, and what changed may be ours). A folder of a lower layer that was renamed
//! comes with all that is in it: a layer that points into others would break when they are put together anew.

use super::super::layer::{Incoming, LayerError, io_error, is_kept_attribute};
use super::super::lease::Lease;
use super::super::whiteout::{is_gone, is_opaque, make_gone, make_opaque};
use super::view::{Found, View, below, names_in};
use nix::sys::{stat, time::TimeSpec};
use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

/// The kernel's folders: what is in them is never part of a layer.
const KERNEL_FOLDERS: [&str; 3] = ["dev", "proc", "sys"];
/// Written by the agent in every sandbox.
const OURS: [&str; 5] = ["run/stillbox", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/machine-id"];
const REDIRECT: &str = "trusted.overlay.redirect";

/// Makes a layer in `data_dir` of `upper`, which was written over `lower`, and holds it; `None` when nothing is left. `kept_out`
/// are paths, from the root, that belong to the build and not to the layer.
pub(super) fn layer_of(data_dir: &Path, upper: &Path, lower: &View, kept_out: &[PathBuf]) -> Result<Option<Lease>, LayerError> {
    let incoming = Incoming::new(data_dir)?;
    let mut harvest = Harvest { lower, kept_out, links: HashMap::new() };
    let root = incoming.rootfs();
    harvest.folder(upper, &root, Path::new(""), &Beneath::Shown(PathBuf::new()))?;
    let is_empty = fs::read_dir(&root).map_err(io_error("list", &root))?.next().is_none();
    if is_empty {
        return Ok(None);
    }
    let metadata = fs::symlink_metadata(upper).map_err(io_error("read", upper))?;
    copy_facts(upper, &metadata, &root)?;
    incoming.commit(None).map(Some)
}

/// What the lower layers have under a folder of the upper one.
enum Beneath {
    /// What they show at this path stays where it is.
    Shown(PathBuf),
    /// What they show at this path belongs here now and is copied.
    MovedHere(PathBuf),
    /// Nothing shows through.
    Nothing,
}

impl Beneath {
    fn child(&self, name: &OsString) -> Self {
        match self {
            Self::Shown(path) => Self::Shown(path.join(name)),
            Self::MovedHere(path) => Self::MovedHere(path.join(name)),
            Self::Nothing => Self::Nothing,
        }
    }

    fn path(&self) -> Option<&Path> {
        match self {
            Self::Shown(path) | Self::MovedHere(path) => Some(path),
            Self::Nothing => None,
        }
    }
}

struct Harvest<'a> {
    lower: &'a View,
    kept_out: &'a [PathBuf],
    /// By which path an inode with several names was copied first.
    links: HashMap<(u64, u64), PathBuf>,
}

impl Harvest<'_> {
    /// Fills `target`, which exists, with what belongs to the layer.
    fn folder(&mut self, upper: &Path, target: &Path, inside: &Path, beneath: &Beneath) -> Result<(), LayerError> {
        let names = sorted_names(upper)?;
        for name in &names {
            let (path, inside) = (upper.join(name), inside.join(name));
            if self.is_ours(&inside) {
                continue;
            }
            let metadata = fs::symlink_metadata(&path).map_err(io_error("read", &path))?;
            let target = target.join(name);
            if is_gone(&metadata) {
                if matches!(beneath, Beneath::Shown(_)) {
                    make_gone(&target).map_err(io_error("create", &target))?;
                }
            } else if metadata.is_dir() {
                self.child_folder(&path, &metadata, &target, &inside, beneath.child(name))?;
            } else {
                self.copy(&path, &metadata, &target)?;
            }
        }
        match beneath {
            Beneath::MovedHere(path) => self.fill(path, target, &names),
            Beneath::Shown(_) | Beneath::Nothing => Ok(()),
        }
    }

    fn child_folder(&mut self, path: &Path, metadata: &Metadata, target: &Path, inside: &Path, beneath: Beneath) -> Result<(), LayerError> {
        let hides = is_opaque(path).map_err(io_error("read the attributes of", path))?;
        let redirect = xattr::get(path, REDIRECT).map_err(io_error("read the attributes of", path))?;
        let (beneath, is_whole) = match (hides, redirect) {
            (true, _) => (Beneath::Nothing, true),
            (false, Some(to)) => (Beneath::MovedHere(redirected(&beneath, &to)), true),
            (false, None) => (beneath, false),
        };
        fs::create_dir(target).map_err(io_error("create", target))?;
        self.folder(path, target, inside, &beneath)?;
        if !is_whole && self.is_untouched(metadata, target, inside, &beneath)? {
            return fs::remove_dir(target).map_err(io_error("remove", target));
        }
        if is_whole {
            make_opaque(target).map_err(io_error("mark", target))?;
        }
        copy_facts(path, metadata, target)
    }

    /// Copied up for something in it that is not the layer's.
    fn is_untouched(&self, metadata: &Metadata, target: &Path, inside: &Path, beneath: &Beneath) -> Result<bool, LayerError> {
        let Beneath::Shown(below) = beneath else { return Ok(false) };
        let has_children = fs::read_dir(target).map_err(io_error("list", target))?.next().is_some();
        let Found::Folder(parts) = self.lower.find(below).map_err(io_error("read", below))? else { return Ok(false) };
        let Some(top) = parts.first().filter(|_| !has_children) else { return Ok(false) };
        let before = fs::symlink_metadata(top).map_err(io_error("read", top))?;
        let is_same = (before.mode(), before.uid(), before.gid()) == (metadata.mode(), metadata.uid(), metadata.gid());
        Ok(is_same || KERNEL_FOLDERS.iter().any(|name| inside == Path::new(name)))
    }

    fn is_ours(&self, inside: &Path) -> bool {
        let in_kernel_folder = inside.parent().is_some_and(|parent| KERNEL_FOLDERS.iter().any(|name| parent == Path::new(name)));
        in_kernel_folder || OURS.iter().any(|ours| inside == Path::new(ours)) || self.kept_out.iter().any(|path| inside == path)
    }

    /// Copies what the lower layers show at `path` and the upper one has not changed.
    fn fill(&mut self, path: &Path, target: &Path, changed: &BTreeSet<OsString>) -> Result<(), LayerError> {
        let Found::Folder(parts) = self.lower.find(path).map_err(io_error("read", path))? else { return Ok(()) };
        self.fill_from(&parts, target, changed)
    }

    fn fill_from(&mut self, parts: &[PathBuf], target: &Path, changed: &BTreeSet<OsString>) -> Result<(), LayerError> {
        let names = names_in(parts).map_err(io_error("list", target))?;
        for name in names.difference(changed) {
            let target = target.join(name);
            match below(parts, Path::new(name)).map_err(io_error("read", &target))? {
                Found::Nothing => {}
                Found::Other(file) => {
                    let metadata = fs::symlink_metadata(&file).map_err(io_error("read", &file))?;
                    self.copy(&file, &metadata, &target)?;
                }
                Found::Folder(parts) => {
                    fs::create_dir(&target).map_err(io_error("create", &target))?;
                    self.fill_from(&parts, &target, &BTreeSet::new())?;
                    let metadata = fs::symlink_metadata(&parts[0]).map_err(io_error("read", &parts[0]))?;
                    copy_facts(&parts[0], &metadata, &target)?;
                }
            }
        }
        Ok(())
    }

    fn copy(&mut self, path: &Path, metadata: &Metadata, target: &Path) -> Result<(), LayerError> {
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
            // A socket is of use only to whoever listens on it; device nodes are the runtime's.
            return Ok(());
        }
        copy_facts(path, metadata, target)
    }
}

/// Where a renamed folder was: absolute, or a name beside the one it would have by its path.
fn redirected(beneath: &Beneath, to: &[u8]) -> PathBuf {
    let to = Path::new(std::ffi::OsStr::from_bytes(to));
    match (to.strip_prefix("/"), beneath.path().and_then(Path::parent)) {
        (Ok(from_root), _) => from_root.to_owned(),
        (Err(_), Some(parent)) => parent.join(to),
        (Err(_), None) => to.to_owned(),
    }
}

fn sorted_names(folder: &Path) -> Result<BTreeSet<OsString>, LayerError> {
    let names = fs::read_dir(folder).and_then(|entries| entries.map(|entry| entry.map(|entry| entry.file_name())).collect());
    names.map_err(io_error("list", folder))
}

/// Owner, permissions, kept attributes and time. The owner first: changing it drops set-user-ID bits and capabilities.
fn copy_facts(from: &Path, metadata: &Metadata, to: &Path) -> Result<(), LayerError> {
    let copied = || -> io::Result<()> {
        lchown(to, Some(metadata.uid()), Some(metadata.gid()))?;
        if !metadata.is_symlink() {
            fs::set_permissions(to, fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
            for name in xattr::list(from)?.filter(|name| is_kept_attribute(name)) {
                if let Some(value) = xattr::get(from, &name)? {
                    xattr::set(to, &name, &value)?;
                }
            }
        }
        let time = TimeSpec::new(metadata.mtime(), 0);
        stat::utimensat(None, to, &time, &time, stat::UtimensatFlags::NoFollowSymlink).map_err(io::Error::from)
    };
    copied().map_err(io_error("write", to))
}
