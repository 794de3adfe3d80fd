//! The files of a volume, from outside: what its content API does below the volume's root.
//!
//! Sandboxes write there too, so nothing that is found is trusted: every path is resolved by the kernel as if the
//! volume's root were the root of everything (symbolic links lead nowhere else, FIFOs keep nobody waiting), and what is
//! done to an entry is done to an open descriptor of it, or below one of its folder. Everything blocks.

use super::UnknownVolume;
use crate::sys::mount::open_in_root;
use crate::sys::tree;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, RenameFlags, readlinkat, renameat2};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, unlinkat};
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use time::OffsetDateTime;

/// Entries in one answer.
const ENTRIES_MAX: usize = 100_000;
/// Levels of folders in one answer, as E2B has it.
const DEPTH_MAX: u32 = 10;
/// Longest path, the kernel's own bound.
const PATH_LENGTH_MAX: usize = 4095;
/// Ids that a sandbox can have; others would be nobody's inside.
const ID_MAX: u32 = 65_535;
/// Of what is made without a mode: whoever is in a sandbox may use it.
const FILE_MODE: u32 = 0o666;
const FOLDER_MODE: u32 = 0o777;
/// Who owns what is made without an owner: the user that commands in the built-in templates run as.
const OWNER: u32 = 1000;

/// Why the files were not read or changed.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is no such volume.
    #[error(transparent)]
    NoVolume(#[from] UnknownVolume),
    /// The path leads nowhere.
    #[error("path '{0}' does not exist in the volume")]
    NotFound(VolumePath),
    /// Something is there already.
    #[error("path '{0}' exists already; force replaces it")]
    Exists(VolumePath),
    /// It is no file.
    #[error("path '{0}' is not a regular file")]
    NotFile(VolumePath),
    /// It is no folder.
    #[error("path '{0}' is not a folder, or leads through something that is none")]
    NotFolder(VolumePath),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The volume is full.
    #[error("the volume is full")]
    Full,
    /// The disk said no.
    #[error("the volume's storage failed")]
    Storage(#[source] io::Error),
}

/// A path in a volume: absolute, without `.` and `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumePath(String);

impl std::fmt::Display for VolumePath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl VolumePath {
    /// As clients write it: relative means from the root, and `..` ends there.
    pub fn parse(text: &str) -> Result<Self, FileError> {
        if text.contains('\0') || text.len() > PATH_LENGTH_MAX {
            return Err(FileError::Invalid(format!("the path has a NUL, or more than {PATH_LENGTH_MAX} bytes")));
        }
        let mut parts: Vec<&str> = Vec::new();
        for part in text.split('/') {
            match part {
                "" | "." => {}
                ".." => drop(parts.pop()),
                part => parts.push(part),
            }
        }
        Ok(Self(format!("/{}", parts.join("/"))))
    }

    fn as_path(&self) -> &Path {
        Path::new(&self.0)
    }

    /// Folder and name; `None` for the root.
    fn split(&self) -> Option<(Self, &str)> {
        let (folder, name) = self.0.rsplit_once('/')?;
        let folder = if folder.is_empty() { "/" } else { folder };
        (!name.is_empty()).then(|| (Self(folder.to_owned()), name))
    }

    fn join(&self, name: &str) -> Self {
        Self(format!("{}/{name}", self.0.trim_end_matches('/')))
    }
}

/// Owner and mode that a client names; `None` leaves what is there, or takes the default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Owner {
    /// User, as inside.
    pub uid: Option<u32>,
    /// Group, as inside.
    pub gid: Option<u32>,
    /// Permissions.
    pub mode: Option<u32>,
}

impl Owner {
    /// Refuses what nobody inside could be.
    pub fn checked(self) -> Result<Self, FileError> {
        if self.uid.into_iter().chain(self.gid).any(|id| id > ID_MAX) {
            return Err(FileError::Invalid(format!("uid and gid are at most {ID_MAX}")));
        }
        if self.mode.is_some_and(|mode| mode > 0o7777) {
            return Err(FileError::Invalid("mode is at most 4095 (0o7777)".to_owned()));
        }
        Ok(self)
    }

    /// In place of what is not named.
    fn or(self, uid: u32, gid: u32, mode: u32) -> (Uid, Gid, Mode) {
        let mode = Mode::from_bits_truncate(self.mode.unwrap_or(mode));
        (Uid::from_raw(self.uid.unwrap_or(uid)), Gid::from_raw(self.gid.unwrap_or(gid)), mode)
    }
}

/// Whether folders that are missing are made, and what is there already is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Force {
    /// Neither.
    No,
    /// Both.
    Yes,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link, which is shown and not followed.
    Symlink,
    /// A FIFO, a socket.
    Other,
}

/// What there is to know of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryStat {
    /// Its last part; empty for the root.
    pub name: String,
    /// From the volume's root.
    pub path: String,
    /// What it is.
    pub kind: EntryKind,
    /// Bytes; none of a folder.
    pub size: u64,
    /// Permissions.
    pub mode: u32,
    /// Owner, as inside.
    pub uid: u32,
    /// Group, as inside.
    pub gid: u32,
    /// Last read.
    pub accessed: OffsetDateTime,
    /// Last written.
    pub modified: OffsetDateTime,
    /// Made, or last changed where the file system does not know.
    pub created: OffsetDateTime,
    /// Where a symbolic link leads.
    pub target: Option<String>,
}

/// The root of a volume.
#[derive(Debug)]
pub struct Root(OwnedFd);

/// A file that is being written, under a name that nobody looks for. Dropped before it is put in place, it is removed.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    folder: OwnedFd,
    aside: OsString,
    path: VolumePath,
    name: String,
    in_place: bool,
}

impl Root {
    pub(super) fn open(path: &Path) -> Result<Self, FileError> {
        let root = File::open(path).map_err(FileError::Storage)?;
        Ok(Self(root.into()))
    }

    fn at(&self, path: &VolumePath, flags: i32) -> Result<OwnedFd, FileError> {
        open_in_root(self.0.as_fd(), path.as_path(), flags, 0).map_err(|error| told(error, path))
    }

    fn folder(&self, path: &VolumePath) -> Result<OwnedFd, FileError> {
        self.at(path, libc::O_RDONLY | libc::O_DIRECTORY)
    }

    /// The entry itself, not what a symbolic link leads to.
    fn entry(&self, path: &VolumePath) -> Result<OwnedFd, FileError> {
        self.at(path, libc::O_PATH | libc::O_NOFOLLOW)
    }

    /// What is at the path.
    pub fn stat(&self, path: &VolumePath) -> Result<EntryStat, FileError> {
        stat_of(self.entry(path)?, path)
    }

    /// What is in a folder, by name, and in its folders down to `depth` levels.
    pub fn list(&self, path: &VolumePath, depth: u32) -> Result<Vec<EntryStat>, FileError> {
        if depth > DEPTH_MAX {
            return Err(FileError::Invalid(format!("depth is at most {DEPTH_MAX}")));
        }
        let mut entries = Vec::new();
        list_into(&mut entries, &self.folder(path)?, path, depth)?;
        Ok(entries)
    }

    /// Makes a folder; `force` makes those on the way too, and is content with one that is there.
    pub fn make_folder(&self, path: &VolumePath, owner: Owner, force: Force) -> Result<EntryStat, FileError> {
        let Some((parent, name)) = path.split() else {
            return match force {
                Force::Yes => self.stat(path),
                Force::No => Err(FileError::Exists(path.clone())),
            };
        };
        let folder = self.parent(&parent, owner, force)?;
        match make_in(&folder, name, owner) {
            Err(Errno::EEXIST) if force == Force::Yes && self.stat(path)?.kind == EntryKind::Folder => self.stat(path),
            Err(errno) => Err(told(errno.into(), path)),
            Ok(()) => self.stat(path),
        }
    }

    fn parent(&self, path: &VolumePath, owner: Owner, force: Force) -> Result<OwnedFd, FileError> {
        match force {
            Force::Yes => self.make_parents(path, owner),
            Force::No => self.folder(path),
        }
    }

    fn make_parents(&self, path: &VolumePath, owner: Owner) -> Result<OwnedFd, FileError> {
        let mut known = VolumePath("/".to_owned());
        let mut folder = self.folder(&known)?;
        for part in path.0.split('/').filter(|part| !part.is_empty()) {
            known = known.join(part);
            match make_in(&folder, part, Owner { mode: None, ..owner }) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(told(errno.into(), &known)),
            }
            folder = self.folder(&known)?;
        }
        Ok(folder)
    }

    /// Removes an entry, with everything in it if it is a folder. The root is not an entry.
    pub fn remove(&self, path: &VolumePath) -> Result<(), FileError> {
        let (parent, name) = path.split().ok_or_else(|| FileError::NotFound(path.clone()))?;
        let kind = self.stat(path)?.kind;
        let folder = self.folder(&parent)?;
        let removed = match kind {
            // Goes down without following links, whatever is moved meanwhile, and however deep it is.
            EntryKind::Folder => tree::remove_in(folder.as_fd(), name.as_ref()),
            EntryKind::File | EntryKind::Symlink | EntryKind::Other => {
                unlinkat(Some(folder.as_raw_fd()), name, UnlinkatFlags::NoRemoveDir).map_err(Into::into)
            }
        };
        removed.map_err(|error| told(error, path))
    }

    /// Changes owner and permissions of an entry.
    pub fn update(&self, path: &VolumePath, owner: Owner) -> Result<EntryStat, FileError> {
        let entry = self.entry(path)?;
        let (uid, gid) = (owner.uid.map(Uid::from_raw), owner.gid.map(Gid::from_raw));
        let owned = fchownat(Some(entry.as_raw_fd()), "", uid, gid, AtFlags::AT_EMPTY_PATH);
        owned.map_err(|errno| told(errno.into(), path))?;
        if let Some(mode) = owner.mode {
            let changed = fs::set_permissions(by_descriptor(&entry), fs::Permissions::from_mode(mode));
            changed.map_err(|error| told(error, path))?;
        }
        self.stat(path)
    }

    /// A file for reading.
    pub fn read(&self, path: &VolumePath) -> Result<File, FileError> {
        // Whoever opens a FIFO would wait for its writer.
        let file = File::from(self.at(path, libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY)?);
        match file.metadata().map_err(FileError::Storage)?.is_file() {
            true => Ok(file),
            false => Err(FileError::NotFile(path.clone())),
        }
    }

    /// Begins a file; `force` makes the folders on the way, and replaces what is there at the end.
    pub fn begin_file(&self, path: &VolumePath, owner: Owner, force: Force) -> Result<NewFile, FileError> {
        let (parent, name) = path.split().ok_or_else(|| FileError::NotFile(path.clone()))?;
        let before = match self.stat(path) {
            Ok(found) if found.kind == EntryKind::Folder => return Err(FileError::NotFile(path.clone())),
            Ok(_) if force == Force::No => return Err(FileError::Exists(path.clone())),
            Ok(found) if found.kind == EntryKind::File => Some(found),
            Ok(_) | Err(FileError::NotFound(_)) => None,
            Err(error) => return Err(error),
        };
        let folder = self.parent(&parent, owner, force)?;
        let aside = OsString::from(format!(".stillbox-upload-{}", uuid::Uuid::new_v4().simple()));
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL;
        let file = File::from(open_in_root(folder.as_fd(), Path::new(&aside), flags, 0o600).map_err(|error| told(error, path))?);
        let new = NewFile { file, folder, aside, path: path.clone(), name: name.to_owned(), in_place: false };
        let (uid, gid, mode) = match before {
            Some(before) => owner.or(before.uid, before.gid, before.mode),
            None => owner.or(OWNER, OWNER, FILE_MODE),
        };
        give(&new.file, uid, gid, mode).map_err(|errno| told(errno.into(), path))?;
        Ok(new)
    }
}

impl NewFile {
    /// Adds bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.file.write_all(bytes).map_err(|error| told(error, &self.path))
    }

    /// Gives it its name. It is on stable storage when this returns.
    pub fn put_in_place(mut self, force: Force) -> Result<EntryStat, FileError> {
        let folder = Some(self.folder.as_raw_fd());
        let flags = match force {
            Force::Yes => RenameFlags::empty(),
            Force::No => RenameFlags::RENAME_NOREPLACE,
        };
        renameat2(folder, self.aside.as_os_str(), folder, self.name.as_str(), flags).map_err(|errno| told(errno.into(), &self.path))?;
        self.in_place = true;
        self.file.sync_all().map_err(|error| told(error, &self.path))?;
        stat_of(self.file.try_clone().map_err(FileError::Storage)?.into(), &self.path)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.in_place {
            // What stays behind is a file with a strange name in the user's own volume.
            let _ = unlinkat(Some(self.folder.as_raw_fd()), self.aside.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// A path that leads to exactly this descriptor's file.
fn by_descriptor(descriptor: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
}

fn make_in(folder: &OwnedFd, name: &str, owner: Owner) -> Result<(), Errno> {
    mkdirat(Some(folder.as_raw_fd()), name, Mode::from_bits_truncate(0o700))?;
    let made = open_entry(folder, name, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW)?;
    let (uid, gid, mode) = owner.or(OWNER, OWNER, FOLDER_MODE);
    give(&File::from(made), uid, gid, mode)
}

/// The owner first: a change of owner takes permissions away.
fn give(file: &File, uid: Uid, gid: Gid, mode: Mode) -> Result<(), Errno> {
    fchown(file.as_raw_fd(), Some(uid), Some(gid))?;
    fchmod(file.as_raw_fd(), mode)
}

fn open_entry(folder: &OwnedFd, name: &str, flags: i32) -> Result<OwnedFd, Errno> {
    open_in_root(folder.as_fd(), Path::new(name), flags, 0).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
}

fn list_into(entries: &mut Vec<EntryStat>, folder: &OwnedFd, path: &VolumePath, depth: u32) -> Result<(), FileError> {
    let read = fs::read_dir(by_descriptor(folder)).map_err(|error| told(error, path))?;
    // A name that is no text cannot be told in JSON, nor asked for. Programs inside can make millions of them.
    let texts = read.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = texts.take(ENTRIES_MAX + 1).collect();
    names.sort();
    for name in names {
        let entry_path = path.join(&name);
        let found = open_entry(folder, &name, libc::O_PATH | libc::O_NOFOLLOW).map_err(|errno| told(errno.into(), &entry_path));
        let stat = match found.and_then(|entry| stat_of(entry, &entry_path)) {
            Err(FileError::NotFound(_)) => continue,
            other => other?,
        };
        if entries.len() >= ENTRIES_MAX {
            return Err(FileError::Invalid(format!("there are more than {ENTRIES_MAX} entries; ask for less depth")));
        }
        let is_folder = stat.kind == EntryKind::Folder;
        entries.push(stat);
        if is_folder && depth > 1 {
            match open_entry(folder, &name, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW) {
                Err(Errno::ENOENT) => {}
                Err(errno) => return Err(told(errno.into(), &entry_path)),
                Ok(inner) => list_into(entries, &inner, &entry_path, depth - 1)?,
            }
        }
    }
    Ok(())
}

fn stat_of(entry: OwnedFd, path: &VolumePath) -> Result<EntryStat, FileError> {
    let entry = File::from(entry);
    let found = entry.metadata().map_err(FileError::Storage)?;
    let kind = kind_of(&found);
    let target = match kind {
        EntryKind::Symlink => readlinkat(Some(entry.as_raw_fd()), "").ok().map(|target| target.to_string_lossy().into_owned()),
        EntryKind::File | EntryKind::Folder | EntryKind::Other => None,
    };
    let changed = time_of(found.ctime(), found.ctime_nsec());
    Ok(EntryStat {
        name: path.split().map(|(_, name)| name.to_owned()).unwrap_or_default(),
        path: path.0.clone(),
        kind,
        // What a folder's own entries take differs between file systems, and helps nobody.
        size: if kind == EntryKind::Folder { 0 } else { found.len() },
        mode: found.mode() & 0o7777,
        uid: found.uid(),
        gid: found.gid(),
        accessed: time_of(found.atime(), found.atime_nsec()),
        modified: time_of(found.mtime(), found.mtime_nsec()),
        created: found.created().map_or(changed, OffsetDateTime::from),
        target,
    })
}

fn kind_of(found: &Metadata) -> EntryKind {
    let kind = found.file_type();
    match (kind.is_file(), kind.is_dir(), kind.is_symlink()) {
        (true, _, _) => EntryKind::File,
        (_, true, _) => EntryKind::Folder,
        (_, _, true) => EntryKind::Symlink,
        (false, false, false) => EntryKind::Other,
    }
}

/// Programs inside may set any time; what no calendar has is shown as the beginning of 1970.
fn time_of(seconds: i64, nanoseconds: i64) -> OffsetDateTime {
    let since = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    OffsetDateTime::from_unix_timestamp_nanos(since).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

fn told(error: io::Error, path: &VolumePath) -> FileError {
    match error.raw_os_error() {
        Some(libc::ENOENT) => FileError::NotFound(path.clone()),
        Some(libc::EEXIST) => FileError::Exists(path.clone()),
        Some(libc::ENOTDIR | libc::ELOOP) => FileError::NotFolder(path.clone()),
        Some(libc::EISDIR | libc::ENXIO) => FileError::NotFile(path.clone()),
        Some(libc::ENAMETOOLONG) => FileError::Invalid("the path, or a part of it, is too long".to_owned()),
        Some(libc::EOPNOTSUPP) => FileError::Invalid("that cannot be changed of this kind of entry".to_owned()),
        Some(libc::ENOSPC | libc::EDQUOT) => FileError::Full,
        _ => FileError::Storage(error),
    }
}
