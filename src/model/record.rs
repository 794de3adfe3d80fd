//! What the store keeps of sandboxes, templates, snapshots, metrics and logs: one struct per row, in the core's types.

use super::{AutoResume, BuildId, ByteSize, Keep, Resources, SandboxId, SandboxSpec, SandboxState, SnapshotId, TemplateId};
use std::collections::BTreeMap;
use time::OffsetDateTime;

/// A process that is still the one we mean: pids are reused, a pid with its start time is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ProcessRef {
    /// Pid in the host's pid namespace.
    pub pid: i32,
    /// Field 22 of /proc/PID/stat: clock ticks after boot.
    pub start_ticks: u64,
}

/// What the kernel holds of a sandbox that has processes; enough for the next server to take it over.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct KernelRef {
    /// Its pid 1, as the host sees it.
    pub init: ProcessRef,
    /// Which slot netns it leads out through.
    pub slot: u32,
    /// First host uid of its 64 k range.
    pub uid_base: u32,
    /// The host's boot id: pids and mounts mean nothing after a reboot.
    pub host_boot_id: String,
    /// SHA-256 (hex) of the agent that runs in it.
    pub agent: String,
}

/// Why a sandbox ended.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// Somebody asked for it.
    Killed,
    /// Its time was up.
    TimedOut,
    /// Its pid 1 ended by itself or was killed by the kernel.
    AgentDied {
        /// What is known: exit status or signal, out of memory, host reboot.
        detail: String,
    },
    /// It never came up.
    CreateFailed {
        /// The error, as the creator got it.
        detail: String,
    },
}

/// A sandbox's row.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxRecord {
    /// Its id.
    pub id: SandboxId,
    /// Where it stands; intent first.
    pub state: SandboxState,
    /// What it was made from. `network` inside is replaced by network updates.
    pub spec: SandboxSpec,
    /// When it was created.
    pub created_at: OffsetDateTime,
    /// When its present run began: create, or the last resume.
    pub started_at: OffsetDateTime,
    /// When its time is up; for a paused one the moment of the pause.
    pub end_at: OffsetDateTime,
    /// What the kernel holds; `None` without processes.
    pub kernel: Option<KernelRef>,
    /// The agent's control secret that the next init must carry (hex).
    pub control_secret: String,
    /// Times that its memory was copied or restored; programs inside can read it.
    pub generation: u64,
    /// What the last pause kept; `None` when it never was paused or runs.
    pub paused: Option<Keep>,
    /// The dump that a resume restores; `None` unless paused with memory.
    pub snapshot: Option<SnapshotId>,
    /// Why it ended.
    pub end_reason: Option<EndReason>,
    /// The boot id that programs inside see; new on each cold boot.
    pub boot_id: String,
}

impl SandboxRecord {
    /// Whether traffic may wake it: only memory pauses are woken by themselves.
    pub fn wakes_on_traffic(&self) -> bool {
        self.spec.lifecycle.auto_resume == AutoResume::On && self.paused == Some(Keep::Memory)
    }
}

/// How far a build has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BuildState {
    /// Registered, not started.
    Waiting,
    /// Under way.
    Building,
    /// Usable.
    Ready,
    /// Failed; its log says why.
    Error,
}

/// A build's row: an immutable root file system and how to start it.
#[derive(Debug, Clone, PartialEq)]
pub struct BuildRecord {
    /// Its id.
    pub id: BuildId,
    /// The template it belongs to.
    pub template: TemplateId,
    /// How far it is.
    pub state: BuildState,
    /// Layer ids (hex SHA-256), bottom to top; folders `layers/<id>`.
    pub layers: Vec<String>,
    /// Environment for everything started in it.
    pub env: BTreeMap<String, String>,
    /// Default user of commands.
    pub user: String,
    /// Default working directory of commands.
    pub workdir: String,
    /// Started when the template is built; alive in its dump.
    pub start_command: Option<String>,
    /// Ends with 0 once the start command is ready.
    pub ready_command: Option<String>,
    /// Limits of sandboxes made from it.
    pub resources: Resources,
    /// What it was built from, for deciding whether a rebuild is due (recipe hash or cache key).
    pub origin: String,
    /// Registered at.
    pub created_at: OffsetDateTime,
    /// Ended at.
    pub finished_at: Option<OffsetDateTime>,
}

/// A template's row.
#[derive(Debug, Clone, PartialEq)]
pub struct TemplateRecord {
    /// Its id.
    pub id: TemplateId,
    /// Names that lead to it, first one for display.
    pub aliases: Vec<String>,
    /// The builds that tags name; the tag `default` is used when none is asked for.
    pub tags: BTreeMap<String, BuildId>,
    /// Whether other teams may use it; kept for the dialects.
    pub public: bool,
    /// Registered at.
    pub created_at: OffsetDateTime,
    /// Last change of names, tags or builds.
    pub updated_at: OffsetDateTime,
    /// Last create of a sandbox from it.
    pub last_spawned_at: Option<OffsetDateTime>,
    /// Sandboxes created from it so far.
    pub spawn_count: u64,
    /// Builds registered so far.
    pub build_count: u64,
}

/// A dump's row; the images are in `snapshots/<id>`.
#[derive(Debug, Clone, PartialEq)]
pub struct SnapshotRecord {
    /// Its id.
    pub id: SnapshotId,
    /// The sandbox that was dumped; it may be gone by now.
    pub sandbox: SandboxId,
    /// Kernel release at the dump.
    pub kernel: String,
    /// CPU feature flags at the dump, sorted, as in /proc/cpuinfo.
    pub cpu_flags: String,
    /// SHA-256 (hex) of the CRIU that wrote it.
    pub criu: String,
    /// SHA-256 (hex) of the agent in it.
    pub agent: String,
    /// The inner address in it.
    pub inner_address: String,
    /// Control secret of the agent in it (hex).
    pub control_secret: String,
    /// Bytes of memory images.
    pub memory_bytes: ByteSize,
    /// Bytes of disk data.
    pub disk_bytes: ByteSize,
    /// Made at.
    pub created_at: OffsetDateTime,
    /// Whether everything is known to be on stable storage.
    pub synced: bool,
}

/// One sample of what a sandbox uses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MetricPoint {
    /// Taken at.
    pub at: OffsetDateTime,
    /// CPUs it may use.
    pub cpu_count: u32,
    /// Share of all its CPUs together since the last sample, 0 to 100.
    pub cpu_used_pct: f64,
    /// Memory without page cache.
    pub memory_used: ByteSize,
    /// Memory limit.
    pub memory_total: ByteSize,
    /// Page cache charged to it.
    pub memory_cache: ByteSize,
    /// Disk used.
    pub disk_used: ByteSize,
    /// Disk size.
    pub disk_total: ByteSize,
}

/// How loud a log line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// For the curious.
    Debug,
    /// What happened.
    Info,
    /// Something to look at.
    Warn,
    /// Something failed.
    Error,
}

/// One line of a sandbox's or build's log.
#[derive(Debug, Clone, PartialEq)]
pub struct LogEntry {
    /// Written at.
    pub at: OffsetDateTime,
    /// How loud.
    pub level: LogLevel,
    /// The text.
    pub message: String,
    /// Details by name.
    pub fields: BTreeMap<String, String>,
}

