//! The only unsafe code of the host: system calls that no library wraps as we need them.
//!
//! Returns owned file descriptors and `io::Result`; knows nothing of sandboxes.
#![allow(unsafe_code, reason = "this room exists to hold the unsafe code, one operation per block")]

pub mod command;
pub mod netns;
pub mod sock_diag;
pub mod xattr;
