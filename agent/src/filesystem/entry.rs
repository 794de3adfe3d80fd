//! What one directory entry looks like to a client (E2B's `EntryInfo`), read from the disk.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::metadata::{self, Metadata};
use crate::users::Names;

/// One entry. A link shows its own name, size, times and `permissions`, but its final target's kind and mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) path: String,
    pub(crate) size: i64,
    /// The nine permission bits only.
    pub(crate) mode: u32,
    /// As Go prints an `os.FileMode`: `-rw-r--r--`, `dtrwxrwxrwx`, `Lrwxrwxrwx`.
    pub(crate) permissions: String,
    pub(crate) owner: String,
    pub(crate) group: String,
    pub(crate) modified: Modified,
    pub(crate) symlink_target: Option<String>,
    pub(crate) metadata: Metadata,
}

/// Files and directories have a kind on the wire; devices, pipes, sockets and broken links do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Other,
}

/// Time of the last change of content, since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Modified {
    pub(crate) seconds: i64,
    pub(crate) nanos: i32,
}

impl Entry {
    /// Reads the entry at `path` without following it. `shown_path` is what the answer calls it: the path
    /// as the client asked for it.
    pub(crate) fn read(path: &Path, shown_path: &Path, names: &Names) -> io::Result<Entry> {
        let own = fs::symlink_metadata(path)?;
        let link = own.is_symlink().then(|| Link::follow(path));
        let (kind, mode) = match &link {
            Some(link) => (link.kind, link.mode),
            None => (Kind::of(&own), own.mode() & 0o777),
        };
        Ok(Entry {
            name: base_name(shown_path),
            kind,
            path: shown_path.to_string_lossy().into_owned(),
            size: i64::try_from(own.size()).unwrap_or(i64::MAX),
            mode,
            permissions: permissions(&own),
            owner: names.user(own.uid()),
            group: names.group(own.gid()),
            modified: Modified { seconds: own.mtime(), nanos: i32::try_from(own.mtime_nsec()).unwrap_or_default() },
            symlink_target: link.map(|link| link.target),
            metadata: metadata::read(path),
        })
    }
}

impl Kind {
    fn of(metadata: &fs::Metadata) -> Kind {
        if metadata.is_file() {
            Kind::File
        } else if metadata.is_dir() {
            Kind::Directory
        } else {
            Kind::Other
        }
    }
}

/// Where a symbolic link leads in the end.
struct Link {
    target: String,
    kind: Kind,
    mode: u32,
}

impl Link {
    /// A link that leads nowhere has itself as its target and no kind, as in E2B.
    fn follow(path: &Path) -> Link {
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let (kind, mode) = match fs::metadata(&target) {
            Ok(metadata) => (Kind::of(&metadata), metadata.mode() & 0o777),
            Err(_) => (Kind::Other, 0),
        };
        Link { target: target.to_string_lossy().into_owned(), kind, mode }
    }
}

/// The last component as E2B names an entry: trailing slashes are ignored and the root is called `/`.
pub(crate) fn base_name(path: &Path) -> String {
    path.file_name().map_or_else(|| "/".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// Go's `FileMode.String()`: letters for what is special, a dash if nothing is, then nine permission bits.
fn permissions(metadata: &fs::Metadata) -> String {
    let file_type = metadata.file_type();
    let mode = metadata.mode();
    let special = [
        (file_type.is_dir(), 'd'),
        (file_type.is_symlink(), 'L'),
        (file_type.is_block_device() || file_type.is_char_device(), 'D'),
        (file_type.is_fifo(), 'p'),
        (file_type.is_socket(), 'S'),
        (mode & 0o4000 != 0, 'u'),
        (mode & 0o2000 != 0, 'g'),
        (file_type.is_char_device(), 'c'),
        (mode & 0o1000 != 0, 't'),
    ];
    let mut text: String = special.into_iter().filter_map(|(applies, letter)| applies.then_some(letter)).collect();
    if text.is_empty() {
        text.push('-');
    }
    for (bit, letter) in (0..9).rev().zip("rwxrwxrwx".chars()) {
        text.push(if mode & (1 << bit) == 0 { '-' } else { letter });
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn entry(path: &Path) -> Entry {
        Entry::read(path, path, &Names::read()).unwrap()
    }

    #[test]
    fn an_entry_is_named_after_its_last_component() {
        assert_eq!(base_name(Path::new("/a/b.txt")), "b.txt");
        assert_eq!(base_name(Path::new("/a/b/")), "b");
        assert_eq!(base_name(Path::new("/")), "/");
    }

    #[test]
    fn permissions_read_as_go_prints_them() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("f");
        fs::write(&file, "1").unwrap();
        let shown = |mode| {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            entry(&file).permissions
        };
        assert_eq!(shown(0o644), "-rw-r--r--");
        assert_eq!(shown(0o4755), "urwxr-xr-x");
        assert_eq!(shown(0o2701), "grwx-----x");
        assert_eq!(shown(0o6777), "ugrwxrwxrwx");
        assert_eq!(entry(Path::new("/dev/null")).permissions, "Dcrw-rw-rw-");
        assert_eq!(entry(Path::new("/tmp")).permissions, "dtrwxrwxrwx");
    }

    #[test]
    fn a_file_shows_its_mode_size_and_owner() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("f");
        fs::write(&file, "1234").unwrap();
        std::os::unix::fs::chown(&file, Some(0), Some(12345)).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o4640)).unwrap();
        let entry = entry(&file);
        assert_eq!(entry.name, "f");
        assert_eq!(entry.kind, Kind::File);
        assert_eq!((entry.size, entry.mode), (4, 0o640));
        assert_eq!((entry.owner.as_str(), entry.group.as_str()), ("root", "12345"));
        assert_eq!(entry.symlink_target, None);
        assert!(entry.modified.seconds > 0);
    }

    #[test]
    fn a_link_shows_the_kind_and_mode_of_its_final_target() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        fs::create_dir(root.join("d")).unwrap();
        symlink("d", root.join("first")).unwrap();
        symlink("first", root.join("second")).unwrap();
        let entry = entry(&root.join("second"));
        assert_eq!(entry.kind, Kind::Directory);
        assert_eq!(entry.mode, 0o755);
        assert_eq!(entry.permissions, "Lrwxrwxrwx");
        assert_eq!(entry.size, 5, "the link's own size");
        assert_eq!(entry.symlink_target.unwrap(), root.join("d").to_str().unwrap());
    }

    #[test]
    fn a_broken_link_is_its_own_target_and_has_no_kind() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("broken");
        symlink("nowhere", &link).unwrap();
        let entry = entry(&link);
        assert_eq!((entry.kind, entry.mode), (Kind::Other, 0));
        assert_eq!(entry.symlink_target.unwrap(), link.to_str().unwrap());
    }
}
