//! One uploaded file onto the disk, in the order of system calls that watchers are used to: CREATE, CHMOD, WRITE.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::{OpenOptionsExt, chown, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::filesystem::metadata::{self, Metadata};
use crate::filesystem::ops::{EnsureError, Owner};

/// Small files arrive whole in one write, and so as one WRITE event.
const CHUNK_BYTES: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("path is a directory: {}", path.display())]
    Directory { path: PathBuf },
    #[error("error ensuring directories")]
    Parents(#[from] EnsureError),
    #[error("not enough inodes available for {}", path.display())]
    NoInodes { path: PathBuf },
    #[error("not enough disk space available{remains}")]
    NoSpace { remains: Remains },
    #[error("not enough space for file metadata of {}", path.display())]
    NoMetadataSpace { path: PathBuf },
    #[error("error reading the upload of {}{remains}", path.display())]
    Source {
        path: PathBuf,
        remains: Remains,
        #[source]
        source: io::Error,
    },
    #[error("error {doing} {}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What a failure half-way leaves behind. Completes a sentence.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Remains {
    /// The file was new and is removed.
    Nothing,
    /// The file was there; what it held cannot come back.
    Beginning { path: PathBuf, bytes: u64 },
}

impl fmt::Display for Remains {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Remains::Nothing => Ok(()),
            Remains::Beginning { path, bytes } => {
                write!(formatter, "; '{}' was overwritten and holds the first {bytes} bytes", path.display())
            }
        }
    }
}

/// What is stored, where and for whom.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) path: &'a Path,
    pub(crate) owner: Owner,
    pub(crate) metadata: &'a Metadata,
}

impl Target<'_> {
    /// Writes all of `source` into the file, whose parents are there. A new file is 0644; one that is there is
    /// truncated in place and keeps its mode. After a failure a new file is removed again.
    pub(crate) fn store(self, source: &mut dyn Read) -> Result<(), StoreError> {
        let mut opened = self.open()?;
        let stored = self.write(&mut opened, source).and_then(|()| self.attach_metadata(&opened.file));
        if stored.is_err() && !opened.existed {
            // The error on its way is the one to report.
            drop(fs::remove_file(self.path));
        }
        stored
    }

    fn open(self) -> Result<Opened, StoreError> {
        match fs::metadata(self.path) {
            Ok(found) if found.is_dir() => return Err(StoreError::Directory { path: self.path.to_owned() }),
            Ok(_) => {
                if let Some(file) = self.open_existing()? {
                    return Ok(Opened { file, existed: true });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(self.failed("looking at")(source)),
        }
        let file = open_options().create(true).mode(0o644).open(self.path).map_err(self.failed("creating"))?;
        fchown(&file, Some(self.owner.uid), Some(self.owner.gid)).map_err(self.failed("changing the owner of"))?;
        Ok(Opened { file: blocking(file).map_err(self.failed("opening"))?, existed: false })
    }

    /// Opened without O_CREAT: with it fs.protected_regular lets not even root open others' files in /tmp.
    fn open_existing(self) -> Result<Option<File>, StoreError> {
        let opened = self.take_over().and_then(|()| open_options().open(self.path)).and_then(blocking);
        match opened {
            Ok(file) => Ok(Some(file)),
            // Removed in between: then it is a new one.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.failed("opening")(source)),
        }
    }

    /// Files of procfs and of some mounts have an owner for good and can be written all the same.
    fn take_over(self) -> io::Result<()> {
        match chown(self.path, Some(self.owner.uid), Some(self.owner.gid)) {
            Err(error) if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported) => Ok(()),
            result => result,
        }
    }

    fn write(self, opened: &mut Opened, source: &mut dyn Read) -> Result<(), StoreError> {
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut bytes = 0;
        loop {
            let remains = match opened.existed {
                true => Remains::Beginning { path: self.path.to_owned(), bytes },
                false => Remains::Nothing,
            };
            let length = match read_full(source, &mut buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => length,
                Err(source) => return Err(StoreError::Source { path: self.path.to_owned(), remains, source }),
            };
            opened.file.write_all(&buffer[..length]).map_err(|source| match is_full(&source) {
                true => StoreError::NoSpace { remains },
                false => self.failed("writing")(source),
            })?;
            bytes += length as u64;
        }
    }

    fn attach_metadata(self, file: &File) -> Result<(), StoreError> {
        metadata::replace(file, self.metadata).map_err(|source| match is_full(&source) {
            true => StoreError::NoMetadataSpace { path: self.path.to_owned() },
            false => self.failed("writing metadata of")(source),
        })
    }

    fn failed(self, doing: &'static str) -> impl FnOnce(io::Error) -> StoreError {
        move |source| match is_full(&source) {
            true => StoreError::NoInodes { path: self.path.to_owned() },
            false => StoreError::Io { doing, path: self.path.to_owned(), source },
        }
    }
}

struct Opened {
    file: File,
    existed: bool,
}

/// Opening never waits: a pipe without a reader is refused instead of holding a thread of the agent.
fn open_options() -> OpenOptions {
    let mut options = OpenOptions::new();
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    options.write(true).truncate(true).custom_flags(flags.bits().cast_signed());
    options
}

fn blocking(file: File) -> io::Result<File> {
    rustix::io::ioctl_fionbio(&file, false)?;
    Ok(file)
}

/// Fills the buffer unless the source ends before.
pub(crate) fn read_full(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match source.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

pub(crate) fn is_full(error: &io::Error) -> bool {
    let full = [Errno::NOSPC, Errno::DQUOT].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|errno| full.contains(&errno))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;
    use crate::filesystem::watch::{Depth, Event, NetworkMounts, Watch};

    const OWNER: Owner = Owner { uid: 1234, gid: 1235 };

    fn store(path: &Path, content: &[u8]) -> Result<(), StoreError> {
        store_as(OWNER, path, content)
    }

    fn store_as(owner: Owner, path: &Path, mut content: &[u8]) -> Result<(), StoreError> {
        Target { path, owner, metadata: &Metadata::new() }.store(&mut content)
    }

    fn events(watch: &mut Watch) -> Vec<String> {
        let mut events = Vec::new();
        watch.read(&mut |event: Event| events.push(format!("{:?}", event.kind))).unwrap();
        events
    }

    #[test]
    fn a_new_file_is_0644_and_the_users_and_three_events() {
        let folder = tempfile::tempdir().unwrap();
        let mut watch = Watch::open(folder.path(), Depth::Directory, NetworkMounts::Refuse).unwrap();
        let path = folder.path().join("f");
        store(&path, b"content").unwrap();
        assert_eq!(events(&mut watch), ["Create", "Chmod", "Write"]);
        let found = fs::metadata(&path).unwrap();
        assert_eq!((found.mode() & 0o7777, found.uid(), found.gid()), (0o644, 1234, 1235));
        assert_eq!(fs::read(&path).unwrap(), b"content");
    }

    #[test]
    fn an_existing_file_keeps_inode_and_mode_and_changes_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        fs::write(&path, "much longer content").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let before = fs::metadata(&path).unwrap();
        let mut watch = Watch::open(folder.path(), Depth::Directory, NetworkMounts::Refuse).unwrap();
        store(&path, b"short").unwrap();
        assert_eq!(events(&mut watch), ["Chmod", "Write"], "truncating and writing are one WRITE");
        let after = fs::metadata(&path).unwrap();
        assert_eq!((after.ino(), after.mode(), after.uid()), (before.ino(), before.mode(), 1234));
        assert_eq!(fs::read(&path).unwrap(), b"short");
    }

    #[test]
    fn a_failed_upload_leaves_no_new_file_and_says_what_became_of_an_old_one() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::UnexpectedEof.into())
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let metadata = Metadata::new();
        let path = folder.path().join("f");
        let target = Target { path: &path, owner: OWNER, metadata: &metadata };
        assert!(target.store(&mut Broken).is_err());
        assert!(!path.exists());
        fs::write(&path, "old").unwrap();
        let error = target.store(&mut (&b"new"[..]).chain(Broken)).unwrap_err();
        assert!(error.to_string().contains("was overwritten and holds the first 0 bytes"), "{error}");
        assert!(path.exists());
    }

    #[test]
    fn a_full_disk_is_told_from_other_failures() {
        let root = Owner { uid: 0, gid: 0 };
        let error = store_as(root, Path::new("/dev/full"), b"x").unwrap_err();
        assert!(matches!(error, StoreError::NoSpace { remains: Remains::Beginning { .. } }), "{error:?}");
    }

    #[test]
    fn a_directory_cannot_be_overwritten() {
        let error = store(Path::new("/tmp"), b"x").unwrap_err();
        assert!(matches!(error, StoreError::Directory { .. }), "{error:?}");
    }

    #[test]
    fn a_file_whose_owner_is_fixed_can_be_written() {
        // Without effect since Linux 5.18; it gets its own value back.
        let path = Path::new("/proc/sys/kernel/random/urandom_min_reseed_secs");
        let value = fs::read(path).unwrap();
        assert!(chown(path, Some(OWNER.uid), None).is_err());
        store(path, &value).unwrap();
    }

    #[test]
    fn a_pipe_nobody_reads_does_not_hold_the_agent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        assert!(matches!(store(&path, b"x"), Err(StoreError::Io { .. })));
    }
}
