//! The face of the core: every verb, what it needs, what it answers.

use super::{InstallKey, TokenKind};
use crate::model::{
    ByteSize, Keep, LogEntry, LogLevel, MetricPoint, NetworkPolicy, SandboxId, SandboxRecord, SandboxSpec, SandboxState, SnapshotId,
    TemplateId,
};
use crate::runtime::{Finding, Runtime};
use crate::store::Store;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;

/// Bounds and timings of the core. Each has a key in config/stillbox.toml.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxConfig {
    /// `data_dir`: dumps are in `snapshots/<id>`, disks in `sandboxes/<id>`.
    pub data_dir: PathBuf,
    /// What /etc/resolv.conf inside says.
    pub nameservers: Vec<IpAddr>,
    /// Longest time to live that may be asked for.
    pub timeout_max: Duration,
    /// Sandboxes with processes at once.
    pub running_max: u32,
    /// How often metrics are sampled.
    pub metrics_every: Duration,
    /// How long rows, metrics and logs of killed sandboxes are kept.
    pub history_kept: Duration,
    /// How long a request may wait for a sandbox to wake up.
    pub wake_wait_max: Duration,
    /// New time to live, at least, after traffic woke a sandbox.
    pub wake_timeout_min: Duration,
    /// How long the agent may take to answer after a start.
    pub agent_ready_max: Duration,
    /// All dumps together, memory and disk copies.
    pub snapshots_bytes_max: ByteSize,
    /// How long a paused sandbox is kept before it is removed.
    pub paused_kept: Duration,
    /// When a dump is put on stable storage.
    pub snapshot_sync: SnapshotSync,
}

/// When a dump is put on stable storage. A death of any of our processes is survived either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotSync {
    /// After the caller was answered; a power cut until then loses the memory of the sandbox.
    Background,
    /// Before the caller is answered.
    BeforeReply,
}

/// No live sandbox has this id: never made, killed, or its time was up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("sandbox {0} does not exist")]
pub struct UnknownSandbox(pub SandboxId);

/// The store could not answer: disk full, I/O error.
#[derive(Debug, thiserror::Error)]
#[error("the store failed")]
pub struct StoreFailure(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// Why no sandbox was created. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// All places are taken.
    #[error("{running} sandboxes are running, the limit is {limit}; kill some or raise sandbox.running_max")]
    TooMany {
        /// Running now.
        running: u32,
        /// The bound.
        limit: u32,
    },
    /// The server is stopping.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// It was killed before it was ready.
    #[error("sandbox {0} was killed while it was being created")]
    Killed(SandboxId),
    /// The same idempotency key came with another request.
    #[error("idempotency key '{key}' was used for a different request; use a new key")]
    IdempotencyConflict {
        /// The key.
        key: String,
    },
    /// The build it names cannot be used.
    #[error("build {build} of template {template} is {state}; only a ready build can be started")]
    NotReady {
        /// The template.
        template: TemplateId,
        /// The build.
        build: crate::model::BuildId,
        /// Its state.
        state: &'static str,
    },
    /// The kernel side failed.
    #[error("sandbox {id} could not be started")]
    Start {
        /// The id it would have had; names its log lines.
        id: SandboxId,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
}

/// Why a time to live was not changed.
#[derive(Debug, thiserror::Error)]
pub enum TimeoutError {
    /// Not there.
    #[error(transparent)]
    Unknown(#[from] UnknownSandbox),
    /// There, but not running.
    #[error("sandbox {id} is {state}; only a running sandbox has a timeout")]
    NotRunning {
        /// The sandbox.
        id: SandboxId,
        /// Where it stands.
        state: SandboxState,
    },
    /// Longer than allowed.
    #[error("timeout {asked:?} is longer than {limit:?} (sandbox.timeout_max)")]
    TooLong {
        /// What was asked.
        asked: Duration,
        /// The bound.
        limit: Duration,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
}

/// Why a pause did not happen. The sandbox runs on.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// Not there.
    #[error(transparent)]
    Unknown(#[from] UnknownSandbox),
    /// Paused before.
    #[error("sandbox {0} is already paused")]
    AlreadyPaused(SandboxId),
    /// Between two states.
    #[error("sandbox {id} is {state}; try again when it is running")]
    InTransition {
        /// The sandbox.
        id: SandboxId,
        /// Where it stands.
        state: SandboxState,
    },
    /// It holds what cannot be dumped; nothing was touched.
    #[error("cannot pause sandbox {id}: {}", findings.iter().map(|f| format!("{} (pid {}): {}", f.command, f.pid, f.reason)).collect::<Vec<_>>().join("; "))]
    NotDumpable {
        /// The sandbox.
        id: SandboxId,
        /// At least one.
        findings: Vec<Finding>,
    },
    /// Snapshots take all the space they may.
    #[error("snapshots use {used} of {limit}; delete some or raise snapshots.disk_bytes_max")]
    SnapshotSpace {
        /// In use.
        used: ByteSize,
        /// The bound.
        limit: ByteSize,
    },
    /// CRIU or the disk failed; the sandbox runs on.
    #[error("could not pause sandbox {id}; it keeps running")]
    Dump {
        /// The sandbox.
        id: SandboxId,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
}

/// Why a sandbox is not running after connect or resume.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Not there.
    #[error(transparent)]
    Unknown(#[from] UnknownSandbox),
    /// A resume that insists on a paused one met a running one (E2B's old `/resume`).
    #[error("sandbox {0} is already running")]
    AlreadyRunning(SandboxId),
    /// Longer than allowed.
    #[error("timeout {asked:?} is longer than {limit:?} (sandbox.timeout_max)")]
    TooLong {
        /// What was asked.
        asked: Duration,
        /// The bound.
        limit: Duration,
    },
    /// All places are taken.
    #[error("{running} sandboxes are running, the limit is {limit}; kill some or raise sandbox.running_max")]
    TooMany {
        /// Running now.
        running: u32,
        /// The bound.
        limit: u32,
    },
    /// The restore failed; it is still paused, its snapshot intact.
    #[error("could not resume sandbox {id}; it stays paused and can be tried again")]
    Restore {
        /// The sandbox.
        id: SandboxId,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
}

/// What connect did.
#[derive(Debug, Clone, PartialEq)]
pub enum Connected {
    /// It ran already; its end may have been extended.
    WasRunning(Box<SandboxRecord>),
    /// It was paused and was restored or booted.
    Resumed(Box<SandboxRecord>),
}

/// Why there are no copies. The source is as it was.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// The source cannot be copied in its present state, or its dump failed.
    #[error(transparent)]
    Source(#[from] PauseError),
    /// One copy could not be made.
    #[error(transparent)]
    Copy(#[from] CreateError),
}

/// Whether some copies may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// What succeeded stays.
    PerCopy,
    /// One failure removes all copies of the call.
    AllOrNone,
}

/// What a fork is asked to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fork {
    /// How many copies, at least one.
    pub count: u32,
    /// Time to live of each copy.
    pub timeout: Duration,
    /// Whether some may be missing.
    pub strictness: Strictness,
}

/// Which stored snapshots to list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SnapshotQuery {
    /// Taken of this sandbox only.
    pub sandbox: Option<SandboxId>,
    /// With this name only (no tag).
    pub name: Option<String>,
    /// Rows per page.
    pub limit: u32,
    /// Where the page before ended: (created_at, snapshot) of its last row.
    pub after: Option<(OffsetDateTime, SnapshotId)>,
}

/// One page of stored snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotPage {
    /// At most `limit` rows.
    pub snapshots: Vec<SnapshotInfo>,
    /// Where the next page begins; `None` on the last.
    pub next: Option<(OffsetDateTime, SnapshotId)>,
}

/// A stored copy of a sandbox, from which others can be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// The template id under which it can be created from.
    pub template: TemplateId,
    /// Its dump.
    pub snapshot: SnapshotId,
    /// The sandbox it was taken of.
    pub sandbox: SandboxId,
    /// The name without its tag; `None` for an unnamed one.
    pub name: Option<String>,
    /// The tag that leads to this build of it; `default` unless another was asked for.
    pub tag: String,
    /// When it was taken.
    pub created_at: OffsetDateTime,
}

/// Why egress rules were not replaced.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Not there.
    #[error(transparent)]
    Unknown(#[from] UnknownSandbox),
    /// There, but not running.
    #[error("sandbox {id} is {state}; only a running sandbox's network can be changed")]
    NotRunning {
        /// The sandbox.
        id: SandboxId,
        /// Where it stands.
        state: SandboxState,
    },
    /// The kernel refused; the rules are as they were.
    #[error("could not change the network of sandbox {id}")]
    Apply {
        /// The sandbox.
        id: SandboxId,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
}

/// By `started_at`, ties by id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ListOrder {
    /// Newest first.
    #[default]
    Descending,
    /// Oldest first.
    Ascending,
}

/// Which sandboxes to list. Only live ones are ever listed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ListQuery {
    /// All of these pairs must match exactly.
    pub metadata: BTreeMap<String, String>,
    /// `Running` and `Paused` only; empty = both. Pausing counts as paused, resuming as paused until it runs.
    pub states: Vec<SandboxState>,
    /// Newest or oldest first.
    pub order: ListOrder,
    /// Started at this moment or later.
    pub started_after: Option<OffsetDateTime>,
    /// Of this template only.
    pub template: Option<TemplateId>,
    /// Rows per page.
    pub limit: u32,
    /// Where the page before ended: (started_at, id) of its last row.
    pub after: Option<(OffsetDateTime, SandboxId)>,
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct ListPage {
    /// At most `limit` rows.
    pub sandboxes: Vec<SandboxRecord>,
    /// Where the next page begins; `None` on the last.
    pub next: Option<(OffsetDateTime, SandboxId)>,
    /// Running sandboxes in all, whatever the filters.
    pub running_total: u64,
}

/// Why there is no list.
pub type ListError = StoreFailure;

/// Which end of a log comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogDirection {
    /// Oldest first, from the cursor on.
    Forward,
    /// Newest first, from the cursor back.
    Backward,
}

/// Which log lines to return.
#[derive(Debug, Clone, PartialEq)]
pub struct LogQuery {
    /// Start from this moment.
    pub cursor: Option<OffsetDateTime>,
    /// At most this many.
    pub limit: u32,
    /// Which end first.
    pub direction: LogDirection,
    /// This level or louder.
    pub level: Option<LogLevel>,
    /// Text that the message contains.
    pub search: Option<String>,
}

/// Why a request cannot be routed to a port.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// Not there, or paused and not to be woken by traffic.
    #[error(transparent)]
    Unknown(#[from] UnknownSandbox),
    /// It should have been woken and could not.
    #[error(transparent)]
    Wake(ConnectError),
    /// It is waking or pausing for longer than `wake_wait_max`.
    #[error("sandbox {id} is still {state} after {waited:?}")]
    Busy {
        /// The sandbox.
        id: SandboxId,
        /// Where it stands.
        state: SandboxState,
        /// How long the request waited.
        waited: Duration,
    },
}

/// A running sandbox that requests can be sent into; good until `cut` resolves.
#[derive(Debug, Clone)]
pub struct Route {
    /// Whose.
    pub id: SandboxId,
    /// As of the moment of routing: tokens, host mask.
    pub spec: Arc<SandboxSpec>,
    runtime: Arc<dyn Runtime>,
    cut: tokio::sync::watch::Receiver<bool>,
}

impl Route {
    /// One attempt to connect to 127.0.0.1:port (else ::1) inside. Refused is `ConnectionRefused`.
    pub async fn dial(&self, port: u16) -> std::io::Result<tokio::net::TcpStream> {
        self.runtime.dial(self.id, port).await
    }

    /// Resolves when the sandbox stops, pauses or is killed: connections into it must be closed then. Cancel-safe.
    pub async fn cut(&self) {
        let mut cut = self.cut.clone();
        let _gone_counts_as_cut = cut.wait_for(|cut| *cut).await;
    }
}

/// Why the core could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
    /// Leftovers could not be swept.
    #[error("could not take over what an earlier server left")]
    Recover(#[source] crate::runtime::RuntimeError),
}

/// All sandboxes of this data folder. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    #[expect(dead_code, reason = "the core's owner fills this in")]
    inner: Arc<()>,
}

#[expect(unused_variables, clippy::unused_async, reason = "signatures first; the core's owner fills them in")]
impl Registry {
    /// Reads the store, takes over running sandboxes, finishes or undoes what was half done, sweeps leftovers, starts
    /// timers and metrics.
    pub async fn open(config: SandboxConfig, key: InstallKey, store: Store, runtime: Arc<dyn Runtime>) -> Result<Self, OpenError> {
        todo!()
    }

    /// Creates a sandbox and waits until its agent is ready. A request with an idempotency key that was seen before
    /// answers the same sandbox. The sandbox goes on when the caller vanishes.
    pub async fn create(&self, spec: SandboxSpec, idempotency_key: Option<&str>) -> Result<SandboxRecord, CreateError> {
        todo!()
    }

    /// A live sandbox as it is now.
    pub fn get(&self, id: SandboxId) -> Result<SandboxRecord, UnknownSandbox> {
        todo!()
    }

    /// One page of live sandboxes.
    pub async fn list(&self, query: ListQuery) -> Result<ListPage, ListError> {
        todo!()
    }

    /// Ends it and removes its files. From the moment of the call on it is unknown to everybody; returns when its
    /// processes are gone.
    pub async fn kill(&self, id: SandboxId) -> Result<(), UnknownSandbox> {
        todo!()
    }

    /// Sets the end of a running one to now + `timeout`; may shorten.
    pub async fn set_timeout(&self, id: SandboxId, timeout: Duration) -> Result<SandboxRecord, TimeoutError> {
        todo!()
    }

    /// Moves the end of a running one to now + `timeout` if that is later.
    pub async fn extend(&self, id: SandboxId, timeout: Duration) -> Result<SandboxRecord, TimeoutError> {
        todo!()
    }

    /// Makes sure that it runs: a running one is extended, a paused one resumed with end = now + `timeout`. Waits for a
    /// pause under way. Concurrent calls share one resume.
    pub async fn connect(&self, id: SandboxId, timeout: Duration) -> Result<Connected, ConnectError> {
        todo!()
    }

    /// As connect for a paused one; `AlreadyRunning` for a running one. `on_timeout` replaces the lifecycle's when given.
    pub async fn resume(
        &self,
        id: SandboxId,
        timeout: Duration,
        on_timeout: Option<crate::model::OnTimeout>,
    ) -> Result<SandboxRecord, ConnectError> {
        todo!()
    }

    /// Pauses it, waiting for the end. While one is under way, callers wait for the same end.
    pub async fn pause(&self, id: SandboxId, keep: Keep) -> Result<SandboxRecord, PauseError> {
        todo!()
    }

    /// Copies it: the source goes on as it was, running or paused. One entry per copy asked for; with
    /// [`Strictness::AllOrNone`] the first failure removes the other copies and is the answer.
    pub async fn fork(&self, id: SandboxId, fork: Fork) -> Result<Vec<Result<SandboxRecord, CreateError>>, ForkError> {
        todo!()
    }

    /// Stores a copy of a running sandbox as a template of its own; the source goes on. A name that exists gets a new
    /// build. `name` was checked by the caller: `name` or `name:tag`, in lower case.
    pub async fn snapshot(&self, id: SandboxId, name: Option<&str>) -> Result<SnapshotInfo, ForkError> {
        todo!()
    }

    /// One page of stored snapshots, newest first.
    pub async fn snapshots(&self, query: SnapshotQuery) -> Result<SnapshotPage, ListError> {
        todo!()
    }

    /// What would keep it from being paused now.
    pub async fn explain(&self, id: SandboxId) -> Result<Vec<Finding>, PauseError> {
        todo!()
    }

    /// Replaces the egress half of its network policy.
    pub async fn set_network(&self, id: SandboxId, policy: NetworkPolicy) -> Result<(), NetworkError> {
        todo!()
    }

    /// Its samples in the range, oldest first; also of killed ones while their history is kept.
    pub async fn metrics(&self, id: SandboxId, range: Range<OffsetDateTime>) -> Result<Vec<MetricPoint>, MetricsError> {
        todo!()
    }

    /// The newest sample of each; unknown ids are absent.
    pub async fn latest_metrics(&self, ids: &[SandboxId]) -> Result<BTreeMap<SandboxId, MetricPoint>, StoreFailure> {
        todo!()
    }

    /// Its log lines; also of killed ones while their history is kept.
    pub async fn logs(&self, id: SandboxId, query: LogQuery) -> Result<Vec<LogEntry>, MetricsError> {
        todo!()
    }

    /// Where to send a proxied request. Wakes a paused sandbox if its lifecycle says so, waiting at most
    /// `wake_wait_max`. Cancel-safe: a wake that began goes on.
    pub async fn route(&self, id: SandboxId) -> Result<Route, RouteError> {
        todo!()
    }

    /// The running or wakeable sandbox whose envd token makes `is_signed_with` true (contract/e2b.md 1.5).
    pub fn find_by_envd_token(&self, is_signed_with: &mut dyn FnMut(&str) -> bool) -> Option<SandboxId> {
        todo!()
    }

    /// A token of a sandbox, whether it exists or not.
    pub fn token(&self, kind: TokenKind, id: SandboxId) -> String {
        todo!()
    }

    /// Whether `given` is that token, in constant time.
    pub fn accepts_token(&self, kind: TokenKind, id: SandboxId, given: &str) -> bool {
        todo!()
    }

    /// Stops timers and drivers after the verb each is busy with. Sandboxes run on; the next server takes them over.
    pub async fn close(&self) {
        todo!()
    }
}

/// Why there are no metrics or logs.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// Never there, or its history is gone.
    #[error(transparent)]
    Unknown(#[from] UnknownSandbox),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
}
