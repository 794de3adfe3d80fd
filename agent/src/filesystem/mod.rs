//! The Filesystem service: what clients ask of paths, and what they are told when directories change.
//!
//! `entry`, `metadata`, `ops` and `relocate` are plain blocking functions over paths; `watch` reads one inotify
//! instance and `watchers` keeps all of them. They know no wire types; `service` alone does. `files` (HTTP) uses the
//! same functions.

pub(crate) mod aside;
pub(crate) mod entry;
pub(crate) mod metadata;
pub(crate) mod ops;
mod relocate;
pub(crate) mod service;
pub(crate) mod watch;
pub(crate) mod watchers;
