//! Extended attributes of files.

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The value of `name`, which must not be longer than 256 bytes. Follows links, those of /proc/PID/fd included.
pub fn get(path: &Path, name: &CStr) -> io::Result<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut value = vec![0_u8; 256];
    // SAFETY: both names end with a zero byte, and the pointer leads to as many writable bytes as the size says.
    let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    value.truncate(length);
    Ok(value)
}

/// Sets an attribute of the file itself, not of what a symbolic link names.
pub fn set(path: &Path, name: &CStr, value: &[u8]) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: path and name end with a zero byte, and the length is that of the value.
    let outcome = unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    nix::errno::Errno::result(outcome).map(drop).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_socket_tells_its_protocol() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
        assert_eq!(get(Path::new(&path), c"system.sockprotoname").unwrap(), b"UDP\0");
    }

    #[test]
    fn a_missing_attribute_is_an_error() {
        assert!(get(Path::new("/"), c"trusted.stillbox.nothing").is_err());
    }
}
