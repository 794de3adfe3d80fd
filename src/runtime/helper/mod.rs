//! The helper: this binary executed anew for one operation on the kernel, single-threaded, JSON in and out.
//!
//! libcontainer and CRIU exist only below here, and only in that process: both change what belongs to a whole
//! process (working directory, mounts, namespaces).

pub(crate) mod criu;
