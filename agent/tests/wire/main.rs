//! The agent's wire, tested on the real binary: what an SDK would send, and what it has to get.

// Said again, though all of this is a test, because clippy allows `unwrap` only where it sees it written.
#[cfg(test)]
mod files;
#[cfg(test)]
mod filesystem;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod support;
