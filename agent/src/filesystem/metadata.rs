//! User-defined file metadata: `X-Metadata-<key>` of an upload, kept as extended attributes `user.e2b.<key>`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

/// What one file carries. Sorted, so that equal sets look equal in answers and logs.
pub(crate) type Metadata = BTreeMap<String, String>;

const XATTR_PREFIX: &str = "user.e2b.";
/// The kernel takes names of at most 255 bytes, prefix included.
const KEY_BYTES_MAX: usize = 255 - XATTR_PREFIX.len();
/// ext4 keeps all attributes of an inode in one block.
const TOTAL_BYTES_MAX: usize = 4096;

/// Why a set of metadata cannot be kept.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum MetadataError {
    #[error("metadata key {key:?} exceeds {KEY_BYTES_MAX} bytes")]
    KeyTooLong { key: String },
    #[error("metadata {what} contains non-printable-ASCII byte 0x{byte:02x} at offset {offset}")]
    NotPrintable { what: String, byte: u8, offset: usize },
    #[error("total metadata size {bytes} exceeds {TOTAL_BYTES_MAX} bytes")]
    TooLarge { bytes: usize },
}

/// Collects a set from raw keys and values, lower-casing the keys. An empty key is dropped, as E2B does.
pub(crate) fn parse<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Result<Metadata, MetadataError> {
    let mut metadata = Metadata::new();
    let mut bytes = 0;
    for (key, value) in pairs {
        let key = key.to_ascii_lowercase();
        if key.is_empty() || metadata.contains_key(&key) {
            continue;
        }
        if key.len() > KEY_BYTES_MAX {
            return Err(MetadataError::KeyTooLong { key });
        }
        printable("key", key.as_bytes())?;
        let value = printable(&format!("value for key {key:?}"), value)?;
        bytes += XATTR_PREFIX.len() + key.len() + value.len();
        metadata.insert(key, value);
    }
    if bytes > TOTAL_BYTES_MAX {
        return Err(MetadataError::TooLarge { bytes });
    }
    Ok(metadata)
}

fn printable(what: &str, bytes: &[u8]) -> Result<String, MetadataError> {
    match bytes.iter().position(|byte| !(0x20..=0x7e).contains(byte)) {
        None => Ok(bytes.iter().copied().map(char::from).collect()),
        Some(offset) => Err(MetadataError::NotPrintable { what: what.to_owned(), byte: bytes[offset], offset }),
    }
}

/// Reads what the file at `path` carries, following links. Best effort: a file system without attributes
/// and values that are not UTF-8 (set by hand inside the sandbox) read as absent.
pub(crate) fn read(path: &Path) -> Metadata {
    let Ok(names) = list(|buffer| rustix::fs::listxattr(path, buffer)) else {
        return Metadata::new();
    };
    keys(&names)
        .filter_map(|key| {
            let name = format!("{XATTR_PREFIX}{key}");
            let value = list(|buffer| rustix::fs::getxattr(path, name.as_str(), buffer)).ok()?;
            Some((key.to_owned(), String::from_utf8(value).ok()?))
        })
        .collect()
}

/// Makes `wanted` the whole set of `file`. A file that has none and gets none sees no system call that
/// changes it: watchers would report the change as CHMOD.
pub(crate) fn replace(file: &File, wanted: &Metadata) -> io::Result<()> {
    let names = match list(|buffer| rustix::fs::flistxattr(file, buffer)) {
        Ok(names) => names,
        // procfs, sysfs and the like keep no attributes; the answer then shows that none were kept.
        Err(Errno::NOTSUP) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    for stale in keys(&names).filter(|key| !wanted.contains_key(*key)) {
        match rustix::fs::fremovexattr(file, format!("{XATTR_PREFIX}{stale}")) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    for (key, value) in wanted {
        let name = format!("{XATTR_PREFIX}{key}");
        match rustix::fs::fsetxattr(file, name, value.as_bytes(), XattrFlags::empty()) {
            Ok(()) => {}
            Err(Errno::NOTSUP) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// The keys of ours among zero-separated attribute names.
fn keys(names: &[u8]) -> impl Iterator<Item = &str> {
    names.split(|byte| *byte == 0).filter_map(|name| std::str::from_utf8(name).ok()?.strip_prefix(XATTR_PREFIX))
}

/// Calls `fill` with a buffer that grows until the answer fits: attributes may change between two calls.
fn list(fill: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; 1024];
    loop {
        match fill(&mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            // XATTR_SIZE_MAX and XATTR_LIST_MAX are both 64 KiB.
            Err(Errno::RANGE) if buffer.len() < 65536 => buffer.resize(buffer.len() * 8, 0),
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(pairs: &[(&str, &str)]) -> Result<Metadata, MetadataError> {
        parse(pairs.iter().map(|(key, value)| (*key, value.as_bytes())))
    }

    #[test]
    fn keys_are_lowered_and_empty_ones_dropped() {
        let metadata = pairs(&[("Author", "Mish"), ("", "lost")]).unwrap();
        assert_eq!(metadata, Metadata::from([("author".to_owned(), "Mish".to_owned())]));
    }

    #[test]
    fn limits_are_those_of_the_file_system() {
        let longest = "k".repeat(KEY_BYTES_MAX);
        assert!(pairs(&[(&longest, "")]).is_ok());
        let longer = format!("{longest}k");
        assert!(matches!(pairs(&[(&longer, "")]), Err(MetadataError::KeyTooLong { .. })));

        let room = TOTAL_BYTES_MAX - XATTR_PREFIX.len() - 1;
        assert!(pairs(&[("k", &"v".repeat(room))]).is_ok());
        let over = pairs(&[("k", &"v".repeat(room + 1))]).unwrap_err();
        assert_eq!(over, MetadataError::TooLarge { bytes: TOTAL_BYTES_MAX + 1 });
    }

    #[test]
    fn only_printable_ascii_is_kept() {
        let refused = pairs(&[("k", "a\u{e9}")]).unwrap_err();
        assert_eq!(refused.to_string(), "metadata value for key \"k\" contains non-printable-ASCII byte 0xc3 at offset 1");
        assert!(pairs(&[("k", "a\tb")]).is_err());
    }

    #[test]
    fn a_new_set_replaces_the_old_one_and_leaves_foreign_attributes_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let file = File::create(&path).unwrap();
        rustix::fs::fsetxattr(&file, "user.other", b"1", XattrFlags::empty()).unwrap();

        replace(&file, &pairs(&[("a", "1"), ("b", "2")]).unwrap()).unwrap();
        assert_eq!(read(&path).len(), 2);
        replace(&file, &pairs(&[("b", "3")]).unwrap()).unwrap();
        assert_eq!(read(&path), pairs(&[("b", "3")]).unwrap());
        replace(&file, &Metadata::new()).unwrap();
        assert!(read(&path).is_empty());
        assert!(rustix::fs::getxattr(&path, "user.other", &mut [0; 8]).is_ok());
    }

    #[test]
    fn a_file_system_without_attributes_is_no_error() {
        let file = File::open("/proc/self/status").unwrap();
        replace(&file, &pairs(&[("a", "1")]).unwrap()).unwrap();
        assert!(read(Path::new("/proc/self/status")).is_empty());
    }

    #[test]
    fn values_that_are_not_utf8_read_as_absent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let file = File::create(&path).unwrap();
        rustix::fs::fsetxattr(&file, "user.e2b.raw", b"\xff", XattrFlags::empty()).unwrap();
        assert!(read(&path).is_empty());
    }
}
