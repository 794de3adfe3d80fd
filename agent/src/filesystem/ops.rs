//! The verbs of the Filesystem service over resolved paths: plain blocking functions, no wire types.
//!
//! They run as the sandbox's root and hand what they make to the user. Links are followed as the kernel
//! follows them: root ends at the sandbox's own user namespace.

use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};
use std::vec;

use rustix::io::Errno;

use super::aside::remove_any;
use super::entry::{Entry, Kind};
use super::relocate::{self, RelocateError};
use crate::users::Names;

/// Who owns what a request makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum StatError {
    #[error("file not found: {}", path.display())]
    NotFound { path: PathBuf },
    #[error("error getting file info of {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ListError {
    #[error("path not found: {}", path.display())]
    NotFound { path: PathBuf },
    #[error("path is not a directory: {}", path.display())]
    NotDirectory { path: PathBuf },
    #[error("cyclic symlink or too long a chain of links at {}", path.display())]
    LinkLoop { path: PathBuf },
    #[error("the listing of {} exceeds {LISTING_BYTES_MAX} bytes; ask for less depth or for a subdirectory", path.display())]
    TooMany { path: PathBuf },
    #[error("error reading directory {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum MakeDirError {
    #[error("directory already exists: {}", path.display())]
    Exists { path: PathBuf },
    #[error("path already exists but it is not a directory: {}", path.display())]
    NotDirectory { path: PathBuf },
    #[error(transparent)]
    Ensure(#[from] EnsureError),
    #[error(transparent)]
    Stat(#[from] StatError),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum EnsureError {
    #[error("path is a file: {}", path.display())]
    File { path: PathBuf },
    #[error("failed to create directory {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum MoveError {
    #[error("source file not found: {}", path.display())]
    NotFound { path: PathBuf },
    #[error("cannot move {} to {}: {reason}", from.display(), to.display())]
    Refused { from: PathBuf, to: PathBuf, reason: &'static str },
    #[error(transparent)]
    Ensure(#[from] EnsureError),
    #[error("error renaming {} to {}", from.display(), to.display())]
    Io {
        from: PathBuf,
        to: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Relocate(#[from] RelocateError),
    #[error(transparent)]
    Stat(#[from] StatError),
}

#[derive(Debug, thiserror::Error)]
#[error("error removing file or directory {}", path.display())]
pub(crate) struct RemoveError {
    path: PathBuf,
    pub(crate) source: io::Error,
}

/// What the entries of one listing may take before they go out, all held at once: some 150,000 of them.
const LISTING_BYTES_MAX: usize = 64 << 20;
/// An entry without its path.
const ENTRY_BYTES: usize = 400;

/// Describes the entry itself, not what it links to.
pub(crate) fn stat(path: &Path, names: &Names) -> Result<Entry, StatError> {
    Entry::read(path, path, names).map_err(|source| match is_missing(&source) {
        true => StatError::NotFound { path: path.to_owned() },
        false => StatError::Io { path: path.to_owned(), source },
    })
}

/// Lists `depth` levels (0 counts as 1) in lexical order, each directory before its content. Links are
/// listed, never entered, except for `path` itself; the entries' paths stay below `path` as it was asked.
pub(crate) fn list_dir(path: &Path, depth: u32, names: &Names) -> Result<Vec<Entry>, ListError> {
    let root = fs::canonicalize(path).map_err(|source| list_error(path, source))?;
    if !root.is_dir() {
        return Err(ListError::NotDirectory { path: path.to_owned() });
    }
    let mut listing = Listing { root, shown_root: clean_end(path), names, entries: Vec::new(), bytes: 0 };
    listing.walk(depth.max(1))?;
    Ok(listing.entries)
}

struct Listing<'a> {
    root: PathBuf,
    shown_root: PathBuf,
    names: &'a Names,
    entries: Vec<Entry>,
    bytes: usize,
}

/// A directory that is being listed.
struct Level {
    /// Below the root.
    path: PathBuf,
    rest: vec::IntoIter<OsString>,
}

impl Listing<'_> {
    /// Keeps its own stack: a tree may be deeper than a thread's has room for.
    fn walk(&mut self, depth: u32) -> Result<(), ListError> {
        let top = sorted_names(&self.root).map_err(|source| list_error(&self.root, source))?;
        let mut levels = vec![Level { path: PathBuf::new(), rest: top }];
        while let Some(level) = levels.last_mut() {
            let Some(name) = level.rest.next() else {
                levels.pop();
                continue;
            };
            let path = level.path.join(name);
            let has_room_below = levels.len() < usize::try_from(depth).unwrap_or(usize::MAX);
            if self.entry(&path)? == Some(Kind::Directory) && has_room_below {
                match sorted_names(&self.root.join(&path)) {
                    Ok(rest) => levels.push(Level { path, rest }),
                    Err(error) if is_passed_over(&error) => {}
                    Err(error) => return Err(list_error(&path, error)),
                }
            }
        }
        Ok(())
    }

    /// Adds the entry and tells what it is itself, link or not; None if there is nothing to tell.
    fn entry(&mut self, below: &Path) -> Result<Option<Kind>, ListError> {
        let path = self.root.join(below);
        let entry = match Entry::read(&path, &self.shown_root.join(below), self.names) {
            Ok(entry) => entry,
            Err(error) if is_passed_over(&error) => return Ok(None),
            Err(error) => return Err(list_error(&path, error)),
        };
        self.bytes += ENTRY_BYTES + entry.path.len();
        if self.bytes > LISTING_BYTES_MAX {
            return Err(ListError::TooMany { path: self.shown_root.clone() });
        }
        let kind = if entry.symlink_target.is_some() { Kind::Other } else { entry.kind };
        self.entries.push(entry);
        Ok(Some(kind))
    }
}

/// What is gone since its directory was read, what lies too deep for a path, and mounts that let not even root in (a
/// user's FUSE) or that are dead: they must not take the whole listing with them.
fn is_passed_over(error: &io::Error) -> bool {
    let unreachable = [Errno::ACCESS, Errno::PERM, Errno::NOTCONN, Errno::SRCH, Errno::NAMETOOLONG].map(Errno::raw_os_error);
    is_missing(error) || error.raw_os_error().is_some_and(|errno| unreachable.contains(&errno))
}

fn sorted_names(directory: &Path) -> io::Result<vec::IntoIter<OsString>> {
    let mut names: Vec<OsString> = fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
    names.sort_unstable();
    Ok(names.into_iter())
}

fn list_error(path: &Path, source: io::Error) -> ListError {
    let path = path.to_owned();
    match source.kind() {
        _ if is_missing(&source) => ListError::NotFound { path },
        // The standard library's kind for it is not stable yet.
        _ if source.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => ListError::LinkLoop { path },
        _ => ListError::Io { path, source },
    }
}

/// Makes `path` and every missing parent, each 0755 and owned by `owner`.
pub(crate) fn make_dir(path: &Path, owner: Owner, names: &Names) -> Result<Entry, MakeDirError> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Err(MakeDirError::Exists { path: path.to_owned() }),
        Ok(_) => return Err(MakeDirError::NotDirectory { path: path.to_owned() }),
        // What cannot be looked at is made or refused, with its reason, below.
        Err(_) => {}
    }
    ensure_dirs(path, owner)?;
    Ok(stat(path, names)?)
}

/// Whether `ensure_dirs` had anything to make: watchers then have new directories to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ensured {
    AllThere,
    Made,
}

/// Makes the missing directories of `path`. Those already there keep owner and mode.
pub(crate) fn ensure_dirs(path: &Path, owner: Owner) -> Result<Ensured, EnsureError> {
    let mut ensured = Ensured::AllThere;
    let mut ancestors: Vec<&Path> = path.ancestors().collect();
    ancestors.reverse();
    for directory in ancestors {
        match fs::metadata(directory) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(EnsureError::File { path: directory.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make_owned(directory, owner).map_err(|source| EnsureError::Io { path: directory.to_owned(), source })?;
                ensured = Ensured::Made;
            }
            Err(source) => return Err(EnsureError::Io { path: directory.to_owned(), source }),
        }
    }
    Ok(ensured)
}

fn make_owned(directory: &Path, owner: Owner) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(directory) {
        Ok(()) => {}
        // Another request was faster and may not have come to its chown yet; ours does no harm.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    chown(directory, Some(owner.uid), Some(owner.gid))
}

/// Moves `from` to `to`, making parents and replacing what is there as rename(2) does; across file systems
/// by copying. A failed move leaves the source whole.
pub(crate) fn move_entry(from: &Path, to: &Path, owner: Owner, names: &Names) -> Result<Entry, MoveError> {
    let (from, to) = (&clean_end(from), &clean_end(to));
    match fs::symlink_metadata(from) {
        Err(error) if is_missing(&error) => return Err(MoveError::NotFound { path: from.clone() }),
        Err(source) => return Err(move_error(from, to, source)),
        Ok(_) => {}
    }
    if let Some(parent) = to.parent() {
        ensure_dirs(parent, owner)?;
    }
    match fs::rename(from, to) {
        Ok(()) => {}
        // Besides other mounts: overlayfs renames no directory that comes from a template's layer.
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            relocate::relocate(from, to)?;
        }
        Err(source) => return Err(move_error(from, to, source)),
    }
    Ok(stat(to, names)?)
}

fn move_error(from: &Path, to: &Path, source: io::Error) -> MoveError {
    let (from, to) = (from.to_owned(), to.to_owned());
    let reason = match source.kind() {
        // Checked before, so someone has just removed it.
        io::ErrorKind::NotFound => return MoveError::NotFound { path: from },
        io::ErrorKind::DirectoryNotEmpty => "the destination is a directory that is not empty",
        io::ErrorKind::IsADirectory => "the destination is a directory and the source is not",
        io::ErrorKind::NotADirectory => "the source is a directory and the destination is not",
        io::ErrorKind::InvalidInput => "a directory cannot be moved below itself",
        _ => return MoveError::Io { from, to, source },
    };
    MoveError::Refused { from, to, reason }
}

/// Removes a file, a link or a whole tree; what is not there counts as removed.
pub(crate) fn remove(path: &Path) -> Result<(), RemoveError> {
    let path = &clean_end(path);
    match remove_any(path) {
        Err(source) if !is_missing(&source) => Err(RemoveError { path: path.clone(), source }),
        _ => Ok(()),
    }
}

/// Without slashes at the end, which would make the kernel follow a link.
fn clean_end(path: &Path) -> PathBuf {
    path.components().collect()
}

/// A name below a file is as absent as one in an empty directory.
pub(crate) fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    const OWNER: Owner = Owner { uid: 1234, gid: 1235 };

    /// Knows nobody: owners show as numbers.
    fn names() -> Names {
        Names::default()
    }

    struct Folder {
        _guard: tempfile::TempDir,
        root: PathBuf,
    }

    fn folder() -> Folder {
        let guard = tempfile::tempdir().unwrap();
        let root = guard.path().canonicalize().unwrap();
        Folder { _guard: guard, root }
    }

    fn listed(path: &Path, depth: u32) -> Vec<String> {
        let entries = list_dir(path, depth, &names()).unwrap();
        let below = |entry: &Entry| Path::new(&entry.path).strip_prefix(path).unwrap().to_owned();
        entries.iter().map(|entry| below(entry).to_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn a_listing_is_lexical_and_shows_directories_before_their_content() {
        let folder = folder();
        for directory in ["b/x", "a/y/z", "a/x"] {
            fs::create_dir_all(folder.root.join(directory)).unwrap();
        }
        fs::write(folder.root.join("a.txt"), "").unwrap();
        assert_eq!(listed(&folder.root, 0), ["a", "a.txt", "b"]);
        assert_eq!(listed(&folder.root, 1), ["a", "a.txt", "b"]);
        assert_eq!(listed(&folder.root, 2), ["a", "a/x", "a/y", "a.txt", "b", "b/x"]);
        assert_eq!(listed(&folder.root, 9), ["a", "a/x", "a/y", "a/y/z", "a.txt", "b", "b/x"]);
    }

    #[test]
    fn links_are_listed_but_entered_only_at_the_top() {
        let folder = folder();
        fs::create_dir_all(folder.root.join("real/inner")).unwrap();
        symlink("real", folder.root.join("link")).unwrap();
        assert_eq!(listed(&folder.root, 3), ["link", "real", "real/inner"]);
        let through = list_dir(&folder.root.join("link"), 1, &names()).unwrap();
        assert_eq!(through[0].path, folder.root.join("link/inner").to_str().unwrap());
        assert_eq!(through[0].kind, Kind::Directory);
    }

    #[test]
    fn only_directories_can_be_listed() {
        let folder = folder();
        let file = folder.root.join("f");
        fs::write(&file, "").unwrap();
        symlink("loop", folder.root.join("loop")).unwrap();
        let error = |path: &str| list_dir(&folder.root.join(path), 1, &names()).unwrap_err();
        assert!(matches!(error("f"), ListError::NotDirectory { .. }));
        assert!(matches!(error("nothing"), ListError::NotFound { .. }));
        assert!(matches!(error("f/below"), ListError::NotFound { .. }));
        assert!(matches!(error("loop"), ListError::LinkLoop { .. }));
    }

    #[test]
    fn made_directories_belong_to_the_user_and_existing_ones_stay() {
        let folder = folder();
        fs::create_dir(folder.root.join("old")).unwrap();
        let entry = make_dir(&folder.root.join("old/a/b"), OWNER, &names()).unwrap();
        assert_eq!((entry.owner.as_str(), entry.group.as_str(), entry.mode), ("1234", "1235", 0o755));
        let owner = |path: &str| fs::metadata(folder.root.join(path)).unwrap().uid();
        assert_eq!((owner("old"), owner("old/a")), (0, 1234));
    }

    #[test]
    fn making_what_is_there_or_below_a_file_is_refused() {
        let folder = folder();
        fs::write(folder.root.join("f"), "").unwrap();
        let error = |path: &str| make_dir(&folder.root.join(path), OWNER, &names()).unwrap_err();
        assert!(matches!(error(""), MakeDirError::Exists { .. }));
        assert!(matches!(error("f"), MakeDirError::NotDirectory { .. }));
        assert!(matches!(error("f/x"), MakeDirError::Ensure(EnsureError::File { .. })));
    }

    #[test]
    fn a_move_makes_parents_and_overwrites_files() {
        let folder = folder();
        let (from, to) = (folder.root.join("f"), folder.root.join("a/b/g"));
        for content in ["1", "2"] {
            fs::write(&from, content).unwrap();
            let entry = move_entry(&from, &to, OWNER, &names()).unwrap();
            assert_eq!((entry.name.as_str(), entry.path.as_str()), ("g", to.to_str().unwrap()));
            assert_eq!(fs::read_to_string(&to).unwrap(), content);
            assert!(!from.exists());
        }
    }

    #[test]
    fn a_refused_move_changes_nothing() {
        let folder = folder();
        fs::create_dir_all(folder.root.join("full/x")).unwrap();
        fs::create_dir(folder.root.join("d")).unwrap();
        fs::write(folder.root.join("f"), "").unwrap();
        let error = |from: &str, to: &str| move_entry(&folder.root.join(from), &folder.root.join(to), OWNER, &names()).unwrap_err();
        assert!(matches!(error("nothing", "new/x"), MoveError::NotFound { .. }));
        assert!(matches!(error("d", "full"), MoveError::Refused { .. }));
        assert!(matches!(error("f", "full"), MoveError::Refused { .. }));
        assert!(matches!(error("d", "f"), MoveError::Refused { .. }));
        assert!(matches!(error("d", "d/below"), MoveError::Refused { .. }));
        assert_eq!(listed(&folder.root, 2), ["d", "f", "full", "full/x"]);
    }

    #[test]
    fn a_tree_moves_to_another_file_system_with_all_it_is() {
        // /dev/shm is a tmpfs wherever tests run; /tmp may be one too, then this test is of rename(2).
        let (here, there) = (folder(), tempfile::tempdir_in("/dev/shm").unwrap());
        let tree = here.root.join("tree");
        fs::create_dir_all(tree.join("sub")).unwrap();
        fs::write(tree.join("sub/f"), "content").unwrap();
        symlink("sub/f", tree.join("link")).unwrap();
        std::os::unix::fs::chown(tree.join("sub/f"), Some(1234), Some(1235)).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o4711);
        fs::set_permissions(tree.join("sub/f"), mode).unwrap();
        let before = fs::metadata(tree.join("sub/f")).unwrap();

        let moved = there.path().join("moved");
        move_entry(&tree, &moved, OWNER, &names()).unwrap();
        assert!(!tree.exists());
        let after = fs::metadata(moved.join("link")).unwrap();
        assert_eq!(fs::read_to_string(moved.join("link")).unwrap(), "content");
        assert_eq!((after.mode(), after.uid(), after.gid()), (before.mode(), 1234, 1235));
        assert_eq!(after.modified().unwrap(), before.modified().unwrap());
        assert_eq!(fs::read_dir(there.path()).unwrap().count(), 1, "no copy is left aside");
    }

    #[test]
    fn removing_takes_trees_links_and_what_is_not_there() {
        let folder = folder();
        fs::create_dir_all(folder.root.join("d/e")).unwrap();
        fs::write(folder.root.join("d/e/f"), "").unwrap();
        fs::create_dir(folder.root.join("kept")).unwrap();
        symlink("kept", folder.root.join("link")).unwrap();
        for path in ["d/", "link/", "nothing", "nothing/below"] {
            remove(&folder.root.join(path)).unwrap();
        }
        assert_eq!(listed(&folder.root, 1), ["kept"]);
    }
}
