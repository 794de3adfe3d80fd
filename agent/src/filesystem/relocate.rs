//! Moving between file systems, where rename(2) gives up: copy beside the destination, rename the copy into
//! place, remove the source. Until that last rename the destination shows nothing of it.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::fs::{chown, lchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode};

use super::aside::{Aside, remove_any};
use super::metadata;

#[derive(Debug, thiserror::Error)]
pub(crate) enum RelocateError {
    #[error("cannot move {} below itself", path.display())]
    BelowItself { path: PathBuf },
    #[error("error copying {}", path.display())]
    Copy {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot move {} to another file system: it is a device or a socket", path.display())]
    Special { path: PathBuf },
    #[error("error renaming the copy to {}", path.display())]
    Place {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} was copied to its new place but could not be removed", path.display())]
    RemoveSource {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Moves the tree at `from` to `to`, keeping modes, owners, times, links and metadata; what rename(2) would
/// replace is replaced. Hard links become copies.
pub(super) fn relocate(from: &Path, to: &Path) -> Result<(), RelocateError> {
    let place = |source| RelocateError::Place { path: to.to_owned(), source };
    let copy = Aside::of(to).map_err(place)?;
    if is_below(&copy.path, from) {
        return Err(RelocateError::BelowItself { path: from.to_owned() });
    }
    copy_tree(from, &copy.path)?;
    copy.place(to).map_err(place)?;
    remove_any(from).map_err(|source| RelocateError::RemoveSource { path: from.to_owned(), source })
}

/// rename(2) looks for this only after it has seen that both are on one file system.
fn is_below(path: &Path, from: &Path) -> bool {
    let parent = path.parent().and_then(|parent| parent.canonicalize().ok());
    let is_link = from.is_symlink();
    match (parent, from.canonicalize()) {
        (Some(parent), Ok(from)) => !is_link && parent.starts_with(from),
        _ => false,
    }
}

/// What is left to do of a tree.
enum Step {
    Copy {
        from: PathBuf,
        to: PathBuf,
    },
    /// A directory's own times and mode, once all is in it.
    Finish {
        from: PathBuf,
        to: PathBuf,
        found: Metadata,
    },
}

/// Keeps its own stack: a tree may be deeper than a thread's has room for.
fn copy_tree(from: &Path, to: &Path) -> Result<(), RelocateError> {
    let mut steps = vec![Step::Copy { from: from.to_owned(), to: to.to_owned() }];
    while let Some(step) = steps.pop() {
        match step {
            Step::Copy { from, to } => copy_one(from, to, &mut steps)?,
            Step::Finish { from, to, found } => {
                let finished = File::open(&to).and_then(|directory| finish(&directory, &from, &found));
                finished.map_err(|source| RelocateError::Copy { path: from, source })?;
            }
        }
    }
    Ok(())
}

fn copy_one(from: PathBuf, to: PathBuf, steps: &mut Vec<Step>) -> Result<(), RelocateError> {
    let failed = |source| RelocateError::Copy { path: from.clone(), source };
    let found = fs::symlink_metadata(&from).map_err(failed)?;
    let kind = found.file_type();
    if kind.is_dir() {
        DirBuilder::new().mode(0o700).create(&to).map_err(failed)?;
        let mut content = Vec::new();
        for child in fs::read_dir(&from).map_err(failed)? {
            let name = child.map_err(failed)?.file_name();
            content.push(Step::Copy { from: from.join(&name), to: to.join(&name) });
        }
        steps.push(Step::Finish { from, to, found });
        steps.append(&mut content);
        Ok(())
    } else if kind.is_file() {
        copy_file(&from, &to, &found).map_err(failed)
    } else if kind.is_symlink() {
        copy_link(&from, &to, &found).map_err(failed)
    } else if kind.is_fifo() {
        copy_fifo(&to, &found).map_err(failed)
    } else {
        Err(RelocateError::Special { path: from })
    }
}

fn copy_file(from: &Path, to: &Path, found: &Metadata) -> io::Result<()> {
    let mut copy = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    io::copy(&mut File::open(from)?, &mut copy)?;
    finish(&copy, from, found)
}

fn copy_link(from: &Path, to: &Path, found: &Metadata) -> io::Result<()> {
    symlink(fs::read_link(from)?, to)?;
    lchown(to, Some(found.uid()), Some(found.gid()))
}

fn copy_fifo(to: &Path, found: &Metadata) -> io::Result<()> {
    let mode = Mode::from_raw_mode(found.mode() & 0o7777);
    rustix::fs::mkfifoat(CWD, to, mode)?;
    chown(to, Some(found.uid()), Some(found.gid()))
}

/// Owner before mode, because chown clears set-user-id; times last, because everything else changes them.
fn finish(copy: &File, from: &Path, found: &Metadata) -> io::Result<()> {
    std::os::unix::fs::fchown(copy, Some(found.uid()), Some(found.gid()))?;
    copy.set_permissions(fs::Permissions::from_mode(found.mode() & 0o7777))?;
    metadata::replace(copy, &metadata::read(from))?;
    copy.set_times(fs::FileTimes::new().set_accessed(found.accessed()?).set_modified(found.modified()?))
}
