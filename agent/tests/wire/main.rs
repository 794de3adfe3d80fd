//! The real agent as a real pid 1, and its wire: what an SDK, the host or the kernel asks, and what each has to get.

// Said again, though all of this is a test, because clippy allows `unwrap` only where it sees it written.
#[cfg(test)]
mod duties;
#[cfg(test)]
mod files;
#[cfg(test)]
mod filesystem;
#[cfg(test)]
mod http;
#[cfg(test)]
mod init;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod process;
#[cfg(test)]
mod support;
#[cfg(test)]
mod terminal;
