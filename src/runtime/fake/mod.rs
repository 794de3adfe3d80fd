//! A [`Runtime`] without a kernel: for tests of the core and of what stands on it.
//!
//! Sandboxes are small agents that answer over real TCP ([`agent`]); disks and dumps are files below a folder, so that
//! they outlive a server that is "killed" by dropping it. Any verb can be told to fail, or held until it is released.

mod agent;
mod world;

pub use agent::FakeAgent;
pub use world::{Fake, Gate, Verb};
