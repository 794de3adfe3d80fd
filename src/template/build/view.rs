//! The layers of a build seen as one tree, from the host, without mounting anything.
//!
//! Reads overlayfs's marks: a whiteout (a character device 0:0) hides what is below it, an opaque folder hides the
//! folders below it. No link is followed: what lies behind one is not found.

use super::super::layer::folder_of;
use super::super::whiteout::{is_gone, is_opaque};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

/// Some layers, one over the other.
#[derive(Debug, Clone)]
pub(super) struct View {
    /// Top first.
    layers: Vec<PathBuf>,
}

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// No layer has it, or it lies behind a link.
    Nothing,
    /// A folder; where its parts are, top first.
    Folder(Vec<PathBuf>),
    /// A file, a link, a pipe; where it is.
    Other(PathBuf),
}

impl View {
    /// The layers with these ids, bottom to top.
    pub(super) fn of(data_dir: &Path, layers: &[String]) -> Self {
        Self::of_folders(layers.iter().map(|id| folder_of(data_dir, id)).collect())
    }

    /// Folders, bottom to top.
    pub(super) fn of_folders(mut folders: Vec<PathBuf>) -> Self {
        folders.reverse();
        Self { layers: folders }
    }

    /// The roots, top first.
    pub(super) fn into_parts(self) -> Vec<PathBuf> {
        self.layers
    }

    /// What is at `path`, from the root, with or without a leading slash.
    pub(super) fn find(&self, path: &Path) -> io::Result<Found> {
        let mut parts = self.layers.clone();
        let mut names = path.components().filter_map(|component| match component {
            Component::Normal(name) => Some(name),
            _ => None,
        });
        let mut name = names.next();
        while let Some(this) = name {
            name = names.next();
            match below(&parts, Path::new(this))? {
                Found::Folder(next) => parts = next,
                Found::Other(file) if name.is_none() => return Ok(Found::Other(file)),
                Found::Nothing | Found::Other(_) => return Ok(Found::Nothing),
            }
        }
        Ok(Found::Folder(parts))
    }
}

/// What the parts of a folder have under this name.
pub(super) fn below(parts: &[PathBuf], name: &Path) -> io::Result<Found> {
    let mut found = Vec::new();
    for part in parts {
        let path = part.join(name);
        let metadata = match fs::symlink_metadata(&path) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => continue,
            metadata => metadata?,
        };
        if metadata.is_dir() {
            let hides = is_opaque(&path)?;
            found.push(path);
            if hides {
                break;
            }
            continue;
        }
        if found.is_empty() && !is_gone(&metadata) {
            return Ok(Found::Other(path));
        }
        break;
    }
    Ok(if found.is_empty() { Found::Nothing } else { Found::Folder(found) })
}

/// The names in a folder that has these parts.
pub(super) fn names_in(parts: &[PathBuf]) -> io::Result<BTreeSet<OsString>> {
    let mut names = BTreeSet::new();
    let mut hidden = BTreeSet::new();
    for part in parts {
        for entry in fs::read_dir(part)? {
            let entry = entry?;
            let name = entry.file_name();
            if names.contains(&name) || hidden.contains(&name) {
                continue;
            }
            match is_gone(&entry.metadata()?) {
                true => hidden.insert(name),
                false => names.insert(name),
            };
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two layers; the lower one has `a/file`, `link -> a`, `etc/passwd`.
    fn layers() -> (tempfile::TempDir, View) {
        let folder = tempfile::tempdir().unwrap();
        let (lower, upper) = (folder.path().join("lower"), folder.path().join("upper"));
        for path in [lower.join("a"), lower.join("etc"), upper.join("a")] {
            fs::create_dir_all(path).unwrap();
        }
        fs::write(lower.join("a/file"), "below").unwrap();
        fs::write(lower.join("etc/passwd"), "below").unwrap();
        fs::write(upper.join("a/other"), "above").unwrap();
        std::os::unix::fs::symlink("a", lower.join("link")).unwrap();
        let view = View::of_folders(vec![lower, upper]);
        (folder, view)
    }

    #[test]
    fn folders_of_all_layers_are_one_and_the_upper_file_wins() {
        let (folder, view) = layers();
        let Found::Folder(parts) = view.find(Path::new("/a")).unwrap() else { panic!("a is a folder") };
        assert_eq!(names_in(&parts).unwrap(), ["file", "other"].map(OsString::from).into());
        fs::write(folder.path().join("upper/a/file"), "above").unwrap();
        assert_eq!(view.find(Path::new("a/file")).unwrap(), Found::Other(folder.path().join("upper/a/file")));
    }

    #[test]
    fn links_are_seen_and_not_followed() {
        let (folder, view) = layers();
        assert_eq!(view.find(Path::new("/link")).unwrap(), Found::Other(folder.path().join("lower/link")));
        assert_eq!(view.find(Path::new("/link/file")).unwrap(), Found::Nothing);
        assert_eq!(view.find(Path::new("/none/file")).unwrap(), Found::Nothing);
    }
}
