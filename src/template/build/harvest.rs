//! What a build step wrote becomes a layer: the upper folder of its sandbox, copied without what is not the step's.
//!
//! Left out: what the runtime and the agent put there, sockets, and folders that were only looked into (overlayfs copies
//! a folder up when something in it changes, and what changed may be ours). A folder of a lower layer that was renamed
//! comes with all that is in it: a layer that points into others would break when they are put together anew.

use super::super::layer::{Incoming, LayerError, check_depth, io_error};
use super::super::lease::Lease;
use super::super::unpack::UnpackLimits;
use super::super::whiteout::{is_gone, is_opaque, make_gone, make_opaque};
use super::copier::{Copier, copy_facts};
use super::view::{Found, View, below, names_in};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The kernel's folders: what is in them is never part of a layer.
const KERNEL_FOLDERS: [&str; 3] = ["dev", "proc", "sys"];
/// Written by the agent in every sandbox.
const OURS: [&str; 5] = ["run/stillbox", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/machine-id"];
const REDIRECT: &str = "trusted.overlay.redirect";

/// Makes a layer in `data_dir` of `upper`, which was written over `lower`, and holds it; `None` when nothing is left.
pub(super) fn layer_of(data_dir: &Path, upper: &Path, lower: &View, limits: UnpackLimits) -> Result<Option<Lease>, LayerError> {
    let incoming = Incoming::new(data_dir)?;
    let root = incoming.rootfs();
    let mut harvest = Harvest { lower, copier: Copier::within(limits, &root) };
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
    copier: Copier,
}

impl Harvest<'_> {
    /// Fills `target`, which exists, with what belongs to the layer.
    fn folder(&mut self, upper: &Path, target: &Path, inside: &Path, beneath: &Beneath) -> Result<(), LayerError> {
        let names = self.copier.names_in(upper)?;
        for name in &names {
            let (path, inside) = (upper.join(name), inside.join(name));
            if is_ours(&inside) {
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
                self.copier.copy(&path, &metadata, &target)?;
            }
        }
        match beneath {
            Beneath::MovedHere(path) => self.fill(path, target, &names),
            Beneath::Shown(_) | Beneath::Nothing => Ok(()),
        }
    }

    fn child_folder(&mut self, path: &Path, metadata: &Metadata, target: &Path, inside: &Path, beneath: Beneath) -> Result<(), LayerError> {
        check_depth(inside)?;
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
                    self.copier.copy(&file, &metadata, &target)?;
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
}

/// Whether the runtime or the agent put it there.
fn is_ours(inside: &Path) -> bool {
    let in_kernel_folder = inside.parent().is_some_and(|parent| KERNEL_FOLDERS.iter().any(|name| parent == Path::new(name)));
    in_kernel_folder || OURS.iter().any(|ours| inside == Path::new(ours))
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

#[cfg(test)]
mod tests {
    use super::super::super::layer::{Bound, folder_of};
    use super::*;

    /// Makes files (their content is their path) and folders (`x/`) below `root`.
    fn furnish(root: &Path, paths: &[&str]) {
        for path in paths {
            let on_disk = root.join(path);
            match path.strip_suffix('/') {
                Some(_) => fs::create_dir_all(on_disk).unwrap(),
                None => {
                    fs::create_dir_all(on_disk.parent().unwrap()).unwrap();
                    fs::write(on_disk, path).unwrap();
                }
            }
        }
    }

    fn paths_below(root: &Path) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![root.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let entry = entry.unwrap();
                let metadata = entry.metadata().unwrap();
                let mark = if is_gone(&metadata) { "-" } else { "" };
                found.push(format!("{mark}{}", entry.path().strip_prefix(root).unwrap().display()));
                if metadata.is_dir() {
                    folders.push(entry.path());
                }
            }
        }
        found.sort();
        found
    }

    struct World {
        folder: tempfile::TempDir,
    }

    impl World {
        fn new(lower: &[&str], upper: &[&str]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            furnish(&folder.path().join("lower"), lower);
            furnish(&folder.path().join("upper"), upper);
            Self { folder }
        }

        fn upper(&self) -> PathBuf {
            self.folder.path().join("upper")
        }

        fn harvested(&self) -> Option<PathBuf> {
            let lower = View::of_folders(vec![self.folder.path().join("lower")]);
            let lease = layer_of(self.folder.path(), &self.upper(), &lower, UnpackLimits::default()).unwrap();
            lease.map(|lease| folder_of(self.folder.path(), lease.id()))
        }

        fn refused(&self, limits: UnpackLimits) -> LayerError {
            layer_of(self.folder.path(), &self.upper(), &View::of_folders(Vec::new()), limits).unwrap_err()
        }
    }

    #[test]
    fn what_is_not_the_step_s_leaves_no_layer() {
        let ours = ["etc/hosts", "etc/resolv.conf", "run/stillbox/boot_id", "dev/pts/", "dev/shm/x", "tmp/"];
        let world = World::new(&["etc/passwd", "run/", "dev/", "home/", "tmp/"], &ours);
        fs::set_permissions(world.upper().join("dev"), fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(world.harvested(), None);
    }

    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_a_step_changed_comes_with_its_folders_modes_and_links() {
        let world = World::new(&["etc/passwd", "srv/", "opt/"], &["etc/hosts", "etc/passwd", "opt/", "srv/new/file", "empty/"]);
        fs::set_permissions(world.upper().join("opt"), fs::Permissions::from_mode(0o700)).unwrap();
        fs::set_permissions(world.upper().join("srv/new/file"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::hard_link(world.upper().join("srv/new/file"), world.upper().join("srv/again")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(world.upper().join("srv/socket")).unwrap();
        fs::hard_link(world.upper().join("srv/socket"), world.upper().join("srv/socket-again")).unwrap();
        let layer = world.harvested().unwrap();
        assert_eq!(paths_below(&layer), ["empty", "etc", "etc/passwd", "opt", "srv", "srv/again", "srv/new", "srv/new/file"]);
        let file = fs::metadata(layer.join("srv/new/file")).unwrap();
        assert_eq!((file.mode() & 0o7777, file.nlink()), (0o4755, 2));
        assert_eq!(fs::metadata(layer.join("opt")).unwrap().mode() & 0o7777, 0o700);
    }

    #[test]
    fn folders_without_end_are_refused() {
        let world = World::new(&[], &[]);
        let levels = (4000 - world.upper().as_os_str().len()) / 2;
        fs::create_dir_all(world.upper().join("a/".repeat(levels))).unwrap();
        let error = world.refused(UnpackLimits::default());
        assert!(matches!(error, LayerError::TooDeep { .. }), "{error}");
    }

    #[test]
    fn a_hole_stays_one_and_counts_as_what_it_says_it_is() {
        let world = World::new(&[], &["data"]);
        let sparse = fs::File::options().write(true).open(world.upper().join("data")).unwrap();
        sparse.set_len(300 << 20).unwrap();
        let layer = world.harvested().unwrap();
        let copy = fs::metadata(layer.join("data")).unwrap();
        assert!(copy.len() == 300 << 20 && copy.blocks() * 512 < 1 << 20, "{} bytes in {} blocks", copy.len(), copy.blocks());
        // Nothing on the sandbox's disk, and more than the host has.
        sparse.set_len(1 << 43).unwrap();
        let error = world.refused(UnpackLimits::default());
        assert!(matches!(error, LayerError::TooLarge { bound: Bound::Bytes(_), .. }), "{error}");
    }

    #[test]
    fn more_names_than_a_layer_may_have_and_more_bytes_than_the_host_keeps_free_are_refused() {
        let world = World::new(&[], &["a/x", "a/y", "b"]);
        let few = UnpackLimits { entries_max: 3, ..UnpackLimits::default() };
        assert!(matches!(world.refused(few), LayerError::TooLarge { bound: Bound::Entries(3), .. }));
        let full = world.refused(UnpackLimits { free_min: crate::model::ByteSize(u64::MAX), ..UnpackLimits::default() });
        assert!(std::error::Error::source(&full).unwrap().to_string().contains("runtime.disk_free_min"), "{full}");
    }

    #[test]
    fn a_renamed_folder_of_a_lower_layer_comes_whole() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let lower = ["old/kept", "old/gone", "old/sub/deep", "old/sub/changed", "other/x"];
        let world = World::new(&lower, &["new/added", "new/sub/changed", "place/moved/", "hidden/y"]);
        make_gone(&world.upper().join("old")).unwrap();
        make_gone(&world.upper().join("new/gone")).unwrap();
        xattr::set(world.upper().join("new"), REDIRECT, b"/old").unwrap();
        xattr::set(world.upper().join("place/moved"), REDIRECT, b"/other").unwrap();
        make_opaque(&world.upper().join("hidden")).unwrap();
        let layer = world.harvested().unwrap();
        let expected = [
            "-old",
            "hidden",
            "hidden/y",
            "new",
            "new/added",
            "new/kept",
            "new/sub",
            "new/sub/changed",
            "new/sub/deep",
            "place",
            "place/moved",
            "place/moved/x",
        ];
        assert_eq!(paths_below(&layer), expected);
        assert_eq!(fs::read_to_string(layer.join("new/sub/changed")).unwrap(), "new/sub/changed");
        assert!(is_opaque(&layer.join("new")).unwrap() && is_opaque(&layer.join("hidden")).unwrap());
        assert!(!is_opaque(&layer.join("place")).unwrap());
    }
}
