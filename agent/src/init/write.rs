//! Writes a small file where a tenant may have put anything.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Makes `content` the whole content of `path`. A regular file keeps its inode and is not touched when it says the same
/// already; a link, FIFO or the like is replaced; a folder is an error. Never blocks, never follows a link, never syncs.
pub(super) fn write_in_place(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = open_regular(path)?;
    let mut present = Vec::with_capacity(content.len());
    // One byte more tells a longer file from an equal one.
    (&mut file).take(content.len() as u64 + 1).read_to_end(&mut present)?;
    if present == content {
        return Ok(());
    }
    file.seek(SeekFrom::Start(0))?;
    file.write_all(content)?;
    file.set_len(content.len() as u64)
}

fn open_regular(path: &Path) -> io::Result<File> {
    match open(path, OpenOptions::new().create(true)) {
        Ok(file) if file.metadata()?.is_file() => return Ok(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
            return open(path, OpenOptions::new().create_new(true));
        }
        Err(error) if error.kind() == io::ErrorKind::IsADirectory => return Err(error),
        // Something that is no regular file, or cannot be opened as one.
        Ok(_) | Err(_) => {}
    }
    fs::remove_file(path)?;
    open(path, OpenOptions::new().create_new(true))
}

fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    options.read(true).write(true).mode(0o644).custom_flags(flags).open(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use super::*;

    fn folder(name: &str) -> std::path::PathBuf {
        let folder = std::env::temp_dir().join(format!("stillbox-agent-write-{name}-{}", std::process::id()));
        drop(fs::remove_dir_all(&folder));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn a_file_keeps_its_inode_whether_it_grows_or_shrinks() {
        let folder = folder("inode");
        let path = folder.join("boot_id");
        fs::write(&path, "much longer than before").unwrap();
        let inode = fs::metadata(&path).unwrap().ino();
        for content in ["short", "", "longer again"] {
            write_in_place(&path, content.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn an_equal_file_is_not_written() {
        let folder = folder("equal");
        let path = folder.join("hosts");
        write_in_place(&path, b"same").unwrap();
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        write_in_place(&path, b"same").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), modified);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn links_and_fifos_are_replaced_and_folders_refused() {
        let folder = folder("kinds");
        let (target, link, fifo) = (folder.join("target"), folder.join("link"), folder.join("fifo"));
        fs::write(&target, "untouched").unwrap();
        symlink(&target, &link).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
        for path in [&link, &fifo] {
            write_in_place(path, b"new").unwrap();
            assert_eq!(fs::read_to_string(path).unwrap(), "new");
            assert!(fs::symlink_metadata(path).unwrap().is_file());
        }
        assert_eq!(fs::read_to_string(&target).unwrap(), "untouched");
        assert!(write_in_place(&folder, b"new").is_err());
        write_in_place(&folder.join("made/on/the/way"), b"new").unwrap();
        fs::remove_dir_all(folder).unwrap();
    }
}
