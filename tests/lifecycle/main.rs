//! The core against a runtime without a kernel: what its users are promised, one test per promise.

mod copies;
mod crash;
mod creating;
mod ending;
mod listing;
mod pausing;
mod restoring;
mod watching;
mod world;
