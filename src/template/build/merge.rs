//! Several layers become one: a lookup that finds nothing asks every layer, and a mount has room for so many names only.

use super::super::layer::{Incoming, LayerError, io_error};
use super::super::lease::Lease;
use super::super::unpack::UnpackLimits;
use super::super::whiteout::{is_gone, is_opaque, make_gone, make_opaque};
use super::copier::{Copier, copy_facts};
use super::view::View;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

/// Layers of a build before those that its steps made are merged.
pub(super) const LAYERS_MAX: usize = 40;

/// Makes one layer of these, bottom to top, and holds it. What they hide of the layers below them stays hidden.
pub(super) fn merged(data_dir: &Path, layers: &[String], limits: UnpackLimits) -> Result<Lease, LayerError> {
    let incoming = Incoming::new(data_dir)?;
    let root = incoming.rootfs();
    let parts = View::of(data_dir, layers).into_parts();
    merge(&parts, &root, &mut Copier::within(limits, &root))?;
    incoming.commit(None)
}

/// Fills `target` with what the folders have, top first.
fn merge(parts: &[PathBuf], target: &Path, copier: &mut Copier) -> Result<(), LayerError> {
    for name in all_names(parts)? {
        let target = target.join(&name);
        let Some(found) = Topmost::of(parts, &name)? else { continue };
        match found {
            Topmost::Gone => make_gone(&target).map_err(io_error("create", &target))?,
            Topmost::Other(path) => {
                let metadata = fs::symlink_metadata(&path).map_err(io_error("read", &path))?;
                copier.copy(&path, &metadata, &target)?;
            }
            Topmost::Folder { parts, hides } => {
                fs::create_dir(&target).map_err(io_error("create", &target))?;
                merge(&parts, &target, copier)?;
                if hides {
                    make_opaque(&target).map_err(io_error("mark", &target))?;
                }
            }
        }
    }
    let Some(top) = parts.first() else { return Ok(()) };
    let metadata = fs::symlink_metadata(top).map_err(io_error("read", top))?;
    copy_facts(top, &metadata, target)
}

fn all_names(parts: &[PathBuf]) -> Result<BTreeSet<OsString>, LayerError> {
    let mut names = BTreeSet::new();
    for part in parts {
        for entry in fs::read_dir(part).map_err(io_error("list", part))? {
            names.insert(entry.map_err(io_error("list", part))?.file_name());
        }
    }
    Ok(names)
}

/// What counts under a name.
enum Topmost {
    Gone,
    Other(PathBuf),
    Folder {
        parts: Vec<PathBuf>,
        /// Whether what layers further down have under this name must not show through.
        hides: bool,
    },
}

impl Topmost {
    fn of(parts: &[PathBuf], name: &OsString) -> Result<Option<Self>, LayerError> {
        let mut folders = Vec::new();
        for part in parts {
            let path = part.join(name);
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            if metadata.is_dir() {
                let hides = is_opaque(&path).map_err(io_error("read the attributes of", &path))?;
                folders.push(path);
                if hides {
                    return Ok(Some(Self::Folder { parts: folders, hides: true }));
                }
            } else if folders.is_empty() {
                return Ok(Some(if is_gone(&metadata) { Self::Gone } else { Self::Other(path) }));
            } else {
                return Ok(Some(Self::Folder { parts: folders, hides: true }));
            }
        }
        Ok((!folders.is_empty()).then_some(Self::Folder { parts: folders, hides: false }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::layer::folder_of;
    use super::*;

    /// A layer with these files, folders (`x/`), whiteouts (`-x`) and opaque folders (`x/!`).
    fn layer(data_dir: &Path, paths: &[&str]) -> String {
        let incoming = Incoming::new(data_dir).unwrap();
        for path in paths {
            let (mark, path) = path.strip_prefix('-').map_or(("", *path), |path| ("-", path));
            let on_disk = incoming.rootfs().join(path.trim_end_matches('!'));
            if path.ends_with('/') || path.ends_with('!') {
                fs::create_dir_all(&on_disk).unwrap();
                if path.ends_with('!') {
                    make_opaque(&on_disk).unwrap();
                }
                continue;
            }
            fs::create_dir_all(on_disk.parent().unwrap()).unwrap();
            if mark.is_empty() { fs::write(&on_disk, path).unwrap() } else { make_gone(&on_disk).unwrap() }
        }
        incoming.commit(None).unwrap().id().to_owned()
    }

    #[test]
    fn one_layer_shows_and_hides_what_the_others_did() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let data_dir = tempfile::tempdir().unwrap();
        let layers = [
            layer(data_dir.path(), &["a/kept", "a/gone", "b/old", "c", "d/file", "e/x"]),
            layer(data_dir.path(), &["-a/gone", "b/!", "b/new", "-c", "-below", "d/file"]),
            layer(data_dir.path(), &["c/now-a-folder", "-d", "e/y"]),
        ];
        let one = merged(data_dir.path(), &layers, UnpackLimits::default()).unwrap();
        let root = folder_of(data_dir.path(), one.id());
        let names = |path: &str| {
            let mut names: Vec<_> = fs::read_dir(root.join(path)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(""), ["a", "b", "below", "c", "d", "e"]);
        assert_eq!((names("a"), names("b")), (vec!["gone".into(), "kept".into()], vec!["new".into()]));
        assert_eq!((names("c"), names("e")), (vec!["now-a-folder".into()], vec!["x".into(), "y".into()]));
        for gone in ["a/gone", "below", "d"] {
            assert!(is_gone(&fs::symlink_metadata(root.join(gone)).unwrap()), "{gone}");
        }
        assert!(is_opaque(&root.join("b")).unwrap() && is_opaque(&root.join("c")).unwrap());
        assert!(!is_opaque(&root.join("a")).unwrap());
    }
}
