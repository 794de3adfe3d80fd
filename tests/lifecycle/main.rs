//! The core against a runtime without a kernel: what its users are promised, one test per promise.

// Marked as what they are, so that clippy lets helpers of tests unwrap as tests do.
#[cfg(test)]
mod copies;
#[cfg(test)]
mod crash;
#[cfg(test)]
mod creating;
#[cfg(test)]
mod ending;
#[cfg(test)]
mod listing;
#[cfg(test)]
mod pausing;
#[cfg(test)]
mod restoring;
#[cfg(test)]
mod watching;
#[cfg(test)]
mod world;
