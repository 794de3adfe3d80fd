//! The only unsafe code of the host: system calls that no library wraps as we need them.
//!
//! Returns owned file descriptors and `io::Result`; knows nothing of sandboxes.
#![allow(unsafe_code, reason = "this room exists to hold the unsafe code, one operation per block")]

pub mod command;
pub mod conntrack;
pub mod descriptors;
pub mod device_policy;
pub mod disk;
pub mod loop_device;
pub mod loopback;
pub mod mount;
pub mod mount_elsewhere;
pub mod mountinfo;
pub mod netns;
pub mod process;
pub mod sock_diag;
pub mod tracee;
pub mod tree;
pub mod userns;
pub mod xattr;

/// A system call's result as a number that may be a descriptor, or the thread's error.
fn checked(outcome: libc::c_long) -> std::io::Result<i32> {
    match outcome {
        -1 => Err(std::io::Error::last_os_error()),
        value => i32::try_from(value).map_err(std::io::Error::other),
    }
}
