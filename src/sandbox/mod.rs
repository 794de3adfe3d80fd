//! The core: what a sandbox may do next, and who does it.
//!
//! [`Registry`] is the face of this room: dialects, proxy and templates ask it and await the answer; each sandbox has
//! one driver task, and only that changes the sandbox's state. Whether a request is accepted, ignored or denied is a
//! pure function (queue.rs). Handlers may vanish at any await: nothing here is lost by it.

mod registry;
mod tokens;

pub use registry::{
    ConnectError, Connected, CreateError, ListError, ListOrder, ListPage, ListQuery, LogDirection, LogQuery, MetricsError, NetworkError,
    Fork, ForkError, OpenError, PauseError, Registry, Route, RouteError, SandboxConfig, SnapshotInfo, SnapshotPage, SnapshotQuery, SnapshotSync, StoreFailure, Strictness, TimeoutError, UnknownSandbox,
};
pub use tokens::{InstallKey, TokenKind};
