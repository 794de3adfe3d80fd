//! The core: what a sandbox may do next, and who does it.
//!
//! [`Registry`] is the face of this room: dialects, proxy and templates ask it and await the answer; each sandbox has
//! one driver task (driver.rs), and only that changes the sandbox's state. Whether a request is accepted, ignored or
//! denied is a pure function (queue.rs). Handlers may vanish at any await: nothing here is lost by it.
//!
//! Verbs have a file each, with their errors and the order of their steps; a server that dies between two steps is
//! followed by one that reads recover.rs.

mod activity;
mod adjust;
mod agent;
mod bearer;
mod clock;
mod commands;
mod config;
mod copy;
mod core;
mod create;
mod disk_use;
mod driver;
mod dump_folder;
mod error;
mod events;
mod exec;
mod failpoints;
mod fork;
mod housekeeping;
mod kill;
mod list;
mod logs;
mod metrics;
mod network;
mod overdue;
mod pause;
mod places;
mod queue;
mod ready_state;
mod recover;
mod registry;
mod reset;
mod resume;
mod route;
mod secrets;
mod snapshot;
mod start;
mod timeout;
mod timers;
mod tokens;
mod turns;
mod unmount;
mod volume_mounts;
mod workshop;

pub use self::core::Seams;
pub use crate::runtime::{Exhausted, Scarce};
pub use activity::InUse;
pub use adjust::{Adjust, AdjustError};
pub use bearer::{Bearer, BearerError, is_bearer};
pub use clock::Clock;
pub use commands::{CommandError, Witness};
pub use config::{CreateBy, SandboxConfig, SnapshotSync};
pub use create::CreateError;
pub use disk_use::{DiskUse, DumpUse};
pub use error::{StoreFailure, UnknownSandbox};
pub use events::{EventPage, EventQuery, Failure};
pub use exec::{Command, Ended, ExecError, Printed};
pub use failpoints::{AtFailpoint, Failpoints};
pub use fork::{Copies, Fork, ForkError, Strictness};
pub use list::{ListError, ListOrder, ListPage, ListQuery};
pub use logs::{LogDirection, LogQuery, MetricsError};
pub use network::NetworkError;
pub use pause::PauseError;
pub use places::{Full, PlacesMax, PlacesTaken};
pub use ready_state::ReadyStateError;
pub use recover::OpenError;
pub use registry::Registry;
pub use reset::{AfterReset, ResetError};
pub use resume::{ConnectError, Connected};
pub use route::{Route, RouteError};
pub use secrets::{NewSecret, SecretContent, SecretError};
pub use snapshot::{SnapshotInfo, SnapshotPage, SnapshotQuery};
pub use timeout::TimeoutError;
pub use tokens::{InstallKey, TokenKind};
pub use volume_mounts::{VolumeChange, VolumeChangeError, WhenBusy};
pub use workshop::{Workshop, WorkshopError, WorkshopRequest};
