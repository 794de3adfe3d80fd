//! The composition root: opens, recovers, spawns, drains.
