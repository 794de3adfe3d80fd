//! Copies of disk images, and file systems that hold still.

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

const FICLONE: libc::c_ulong = 0x4004_9409;
const FIFREEZE: libc::c_ulong = 0xC004_5877;
const FITHAW: libc::c_ulong = 0xC004_5878;

/// How the bytes of a copy came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyKind {
    /// Both files share their blocks until one is written.
    Shared,
    /// This many bytes of data were copied; holes stayed holes.
    Data(u64),
}

/// Makes the empty file `to` a copy of `from`, sharing blocks where the file system can, else data extents only.
pub fn copy_sparse(from: &File, to: &File) -> io::Result<CopyKind> {
    // SAFETY: both are open descriptors; the call takes the second by value.
    let shared = unsafe { libc::ioctl(to.as_raw_fd(), FICLONE, from.as_raw_fd()) };
    if shared == 0 {
        return Ok(CopyKind::Shared);
    }
    let size = from.metadata()?.len();
    to.set_len(size)?;
    let size = i64::try_from(size).map_err(io::Error::other)?;
    let mut copied = 0;
    let mut offset = 0;
    while offset < size {
        let start = match lseek(from.as_raw_fd(), offset, Whence::SeekData) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek(from.as_raw_fd(), start, Whence::SeekHole)?;
        copy_range(from, to, start, end)?;
        copied += end - start;
        offset = end;
    }
    Ok(CopyKind::Data(copied.cast_unsigned()))
}

fn copy_range(from: &File, to: &File, start: i64, end: i64) -> io::Result<()> {
    let (mut read_at, mut write_at) = (start, start);
    while read_at < end {
        let wanted = usize::try_from(end - read_at).map_err(io::Error::other)?;
        match nix::fcntl::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), wanted) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::EINTR) => {}
            // Other file systems than the source's, on kernels that do not copy between them.
            Err(Errno::EXDEV | Errno::EOPNOTSUPP | Errno::EINVAL) => return copy_by_hand(from, to, read_at, end),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &File, to: &File, start: i64, end: i64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; 1 << 20];
    let mut offset = start.cast_unsigned();
    let end = end.cast_unsigned();
    while offset < end {
        let wanted = usize::try_from(end - offset).map_err(io::Error::other)?.min(buffer.len());
        let count = from.read_at(&mut buffer[..wanted], offset)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        to.write_all_at(&buffer[..count], offset)?;
        offset += u64::try_from(count).map_err(io::Error::other)?;
    }
    Ok(())
}

/// A file system whose writers wait; dropping it lets them go on.
#[derive(Debug)]
pub struct Frozen<'a>(BorrowedFd<'a>);

impl<'a> Frozen<'a> {
    /// Flushes and freezes the file system that `folder`, any open folder of it, is on.
    pub fn freeze(folder: BorrowedFd<'a>) -> io::Result<Self> {
        // SAFETY: an open descriptor; takes no argument.
        Errno::result(unsafe { libc::syncfs(folder.as_raw_fd()) })?;
        // SAFETY: an open descriptor; the argument is ignored.
        Errno::result(unsafe { libc::ioctl(folder.as_raw_fd(), FIFREEZE, 0) })?;
        Ok(Self(folder))
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        thaw(self.0);
    }
}

/// Lets the writers of the file system that `folder` is on go on, whoever froze it.
pub fn thaw(folder: BorrowedFd<'_>) {
    // SAFETY: an open descriptor; the argument is ignored. Failure means that it is not frozen, which is the goal.
    unsafe { libc::ioctl(folder.as_raw_fd(), FITHAW, 0) };
}

/// Writes all dirty data of the file system that `folder` is on.
pub fn sync_filesystem(folder: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: an open descriptor; takes no argument.
    Errno::result(unsafe { libc::syncfs(folder.as_raw_fd()) }).map(drop).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn a_sparse_copy_has_the_same_bytes_and_the_same_holes() {
        let from = tempfile::tempfile().unwrap();
        from.set_len(64 << 20).unwrap();
        from.write_all_at(b"first", 0).unwrap();
        from.write_all_at(b"last", 40 << 20).unwrap();
        let to = tempfile::tempfile().unwrap();
        copy_sparse(&from, &to).unwrap();
        assert_eq!(to.metadata().unwrap().len(), 64 << 20);
        assert!(to.metadata().unwrap().blocks() * 512 < 1 << 20, "holes were filled");
        let mut word = [0; 5];
        to.read_exact_at(&mut word, 0).unwrap();
        assert_eq!(&word, b"first");
        let mut word = [0; 4];
        to.read_exact_at(&mut word, 40 << 20).unwrap();
        assert_eq!(&word, b"last");
    }
}
