//! The real agent as a real pid 1: processes, terminals, /init and what it owes the kernel.

// Said again, though all of this is a test, because clippy allows `unwrap` only where it sees it written.
#[cfg(test)]
mod duties;
#[cfg(test)]
mod init;
#[cfg(test)]
mod process;
#[cfg(test)]
mod support;
#[cfg(test)]
mod terminal;
