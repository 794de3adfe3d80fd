//! Lines of mountinfo: `36 35 98:0 /root /point …`, proc_pid_mountinfo(5).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// The kernel's number of the mount.
pub fn id(line: &[u8]) -> Option<u32> {
    std::str::from_utf8(field(line, 0)?).ok()?.parse().ok()
}

/// The file system's device number, as `st_dev` has it.
pub fn device(line: &[u8]) -> Option<u64> {
    let (major, minor) = std::str::from_utf8(field(line, 2)?).ok()?.split_once(':')?;
    Some(nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// Which folder of the file system is mounted; `/` for all of it.
pub fn root(line: &[u8]) -> Option<PathBuf> {
    unescape(field(line, 3)?)
}

/// Where it is mounted.
pub fn mount_point(line: &[u8]) -> Option<PathBuf> {
    unescape(field(line, 4)?)
}

fn field(line: &[u8], number: usize) -> Option<&[u8]> {
    line.split(|byte| *byte == b' ').nth(number)
}

/// Spaces, tabs, newlines and backslashes are written as three octal digits after a backslash.
fn unescape(written: &[u8]) -> Option<PathBuf> {
    let mut path = Vec::with_capacity(written.len());
    let mut rest = written;
    while let Some(at) = rest.iter().position(|byte| *byte == b'\\') {
        let digits = std::str::from_utf8(rest.get(at + 1..at + 4)?).ok()?;
        path.extend_from_slice(&rest[..at]);
        path.push(u8::from_str_radix(digits, 8).ok()?);
        rest = &rest[at + 4..];
    }
    path.extend_from_slice(rest);
    Some(PathBuf::from(OsString::from_vec(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_a_space_is_read() {
        let line = b"40 30 8:1 / /var/lib/still\\040box rw shared:1 - ext4 /dev/sda1 rw";
        assert_eq!(mount_point(line), Some(PathBuf::from("/var/lib/still box")));
        assert_eq!(device(line), Some(nix::sys::stat::makedev(8, 1)));
        assert_eq!(id(line), Some(40));
        assert_eq!(root(line), Some(PathBuf::from("/")));
    }
}
