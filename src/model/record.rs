//! What the store keeps of sandboxes, templates, snapshots, metrics and logs: one struct per row, in the core's types.

use super::{AutoResume, BuildId, ByteSize, Keep, Resources, SandboxId, SandboxSpec, SandboxState, SnapshotId, TemplateId, VolumeMount};
use std::collections::BTreeMap;
use std::fmt;
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
    /// Nobody used it for as long as it may be idle.
    Idle,
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
    /// The secret that an init under way brings. Until that init is confirmed the agent may know either.
    pub next_control_secret: Option<String>,
    /// Times that its memory was copied or restored; programs inside can read it.
    pub generation: u64,
    /// What the last pause kept; `None` when it never was paused or runs.
    pub paused: Option<Keep>,
    /// The dump that a resume restores; while pausing, the one that is being written. `None` without memory.
    pub snapshot: Option<SnapshotId>,
    /// Why it ended.
    pub end_reason: Option<EndReason>,
    /// When it ended; its history is kept for a while from then on.
    pub ended_at: Option<OffsetDateTime>,
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

/// Why a build failed, in words for whoever asked for it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BuildFailure {
    /// What went wrong.
    pub message: String,
    /// `base`, the number of a step counted from 1, or `finalize`; `None` when no part of the build is to blame.
    pub step: Option<String>,
}

/// Where a build comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BuildSource {
    /// Recipe or build steps. Its dump, if there is one, can be made again at any time.
    Recipe,
    /// A snapshot of this sandbox, which may be gone by now. Its dump and disk are all there is.
    Sandbox(SandboxId),
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
    /// Recipe or snapshot.
    pub source: BuildSource,
    /// What it was built from, for deciding whether a rebuild is due (recipe hash or cache key).
    pub origin: String,
    /// The dump of its ready state that new sandboxes are restored from; `None` = cold start.
    pub dump: Option<SnapshotId>,
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

impl TemplateRecord {
    /// A template that nobody has built, tagged or used yet.
    pub fn new(id: TemplateId, aliases: Vec<String>, at: OffsetDateTime) -> Self {
        Self {
            id,
            aliases,
            tags: BTreeMap::new(),
            public: false,
            created_at: at,
            updated_at: at,
            last_spawned_at: None,
            spawn_count: 0,
            build_count: 0,
        }
    }
}

/// What a dump depends on to be restored (design/checkpoint.md, "What a dump depends on").
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DumpKey {
    /// Kernel release.
    pub kernel: String,
    /// CPU feature flags, sorted, separated by spaces, as in /proc/cpuinfo.
    pub cpu_flags: String,
    /// SHA-256 (hex) of the CRIU that writes it; kept below `criu/`.
    pub criu: String,
    /// SHA-256 (hex) of the agent in it; kept below `agents/`.
    pub agent: String,
    /// The address that every sandbox has inside.
    pub inner_address: String,
    /// SHA-256 (hex) of what a cold start gives a sandbox to live within and a restore brings back as it was: system call
    /// filter, capabilities, mounts, devices, limits. Empty in rows of before it was kept.
    #[serde(default)]
    pub confinement: String,
}

/// Whether a dump can be restored on this machine now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    /// Nothing that it depends on has changed.
    Same,
    /// Something has changed that a restore usually survives; worth a try, the images are kept.
    Likely {
        /// What changed, from what to what.
        change: String,
    },
    /// It cannot work and is not tried.
    Impossible {
        /// What is missing.
        reason: String,
    },
}

impl DumpKey {
    /// Whether a dump made under `self` can be restored under `now`. CRIU and agent are kept by hash, and a confinement lies
    /// in the images, so that another one today is a reason to make a template's dump again, not a reason to refuse a restore.
    pub fn fit(&self, now: &Self) -> Fit {
        let present: std::collections::BTreeSet<&str> = now.cpu_flags.split(' ').collect();
        let missing: Vec<&str> = self.cpu_flags.split(' ').filter(|flag| !flag.is_empty() && !present.contains(flag)).collect();
        if !missing.is_empty() {
            return Fit::Impossible { reason: format!("this CPU lacks {}", missing.join(" ")) };
        }
        if self.inner_address != now.inner_address {
            let reason = format!("it was made at the inner address {}, sandboxes now have {}", self.inner_address, now.inner_address);
            return Fit::Impossible { reason };
        }
        let parts = [
            ("kernel", &self.kernel, &now.kernel),
            ("CRIU", &self.criu, &now.criu),
            ("agent", &self.agent, &now.agent),
            ("confinement", &self.confinement, &now.confinement),
        ];
        let changed = parts
            .into_iter()
            .filter(|(_, then, now)| then != now)
            .map(|(what, then, now)| format!("{what} {then}, now {now}"))
            .collect::<Vec<_>>();
        if changed.is_empty() { Fit::Same } else { Fit::Likely { change: changed.join("; ") } }
    }
}

/// Who needs a dump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keeper {
    /// A build of the template of this name (its id if it has none): a snapshot, or what creates are restored from.
    Template(String),
    /// This paused sandbox.
    Sandbox(SandboxId),
}

impl fmt::Display for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Template(name) => write!(f, "template {name}"),
            Self::Sandbox(id) => write!(f, "sandbox {id}"),
        }
    }
}

/// A dump's row. Its folder `snapshots/<id>` holds `images/` and, unless it belongs to a paused sandbox that still has
/// its own disk, `disk.img`.
#[derive(Debug, Clone, PartialEq)]
pub struct SnapshotRecord {
    /// Its id.
    pub id: SnapshotId,
    /// The sandbox that was dumped; it may be gone by now.
    pub sandbox: SandboxId,
    /// What it depends on.
    pub key: DumpKey,
    /// Control secret of the agent in it (hex).
    pub control_secret: String,
    /// Bytes of memory images; 0 of one that keeps files only.
    pub memory_bytes: ByteSize,
    /// Bytes of disk data.
    pub disk_bytes: ByteSize,
    /// Made at.
    pub created_at: OffsetDateTime,
    /// Whether everything is known to be on stable storage.
    pub synced: bool,
    /// Volumes that its processes had mounted; a restore brings the same ones.
    pub volumes: Vec<VolumeMount>,
}

impl SnapshotRecord {
    /// Whether there are processes to restore, and not only files to start cold on.
    pub fn has_memory(&self) -> bool {
        self.memory_bytes.bytes() > 0
    }
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

/// What was done with a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// It was created, or not.
    Create,
    /// It was paused, or runs on.
    Pause,
    /// It was resumed, or stays paused.
    Resume,
    /// A client connected to it while it ran.
    Connect,
    /// Its end was moved.
    Timeout,
    /// It was copied.
    Fork,
    /// It was stored as a template.
    Snapshot,
    /// It ended.
    Kill,
}

impl EventKind {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Create, Self::Pause, Self::Resume, Self::Connect, Self::Timeout, Self::Fork, Self::Snapshot, Self::Kill];

    /// The word in rows.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Connect => "connect",
            Self::Timeout => "timeout",
            Self::Fork => "fork",
            Self::Snapshot => "snapshot",
            Self::Kill => "kill",
        }
    }

    /// The kind with this word.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }
}

/// What kind of failure a call met: as much as the status of its answer tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// There is no such sandbox, or none in a state that the call could be about.
    NotFound,
    /// The request itself is wrong.
    Wrong,
    /// Not in its present state.
    NotNow,
    /// It holds what cannot be dumped.
    NotDumpable,
    /// As many as there may be.
    Full,
    /// The disk has no room.
    NoRoom,
    /// The server is stopping.
    Closing,
    /// It should have worked.
    Internal,
}

impl FailureKind {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::NotFound, Self::Wrong, Self::NotNow, Self::NotDumpable, Self::Full, Self::NoRoom, Self::Closing, Self::Internal];

    /// The word in rows.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::Wrong => "wrong",
            Self::NotNow => "not_now",
            Self::NotDumpable => "not_dumpable",
            Self::Full => "full",
            Self::NoRoom => "no_room",
            Self::Closing => "closing",
            Self::Internal => "internal",
        }
    }

    /// The kind with this word.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }
}

/// One thing that was done with a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRecord {
    /// Counts up; 0 before it is stored.
    pub id: u64,
    /// Done at.
    pub at: OffsetDateTime,
    /// With which.
    pub sandbox: SandboxId,
    /// Made from this.
    pub template: TemplateId,
    /// The template's name, as the sandbox shows it.
    pub template_name: Option<String>,
    /// What.
    pub kind: EventKind,
    /// Why it failed, or why the sandbox ended; `None` = as asked.
    pub error: Option<String>,
    /// What kind of failure that was; `None` of an end, and of a row from before it was kept.
    pub failure: Option<FailureKind>,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> DumpKey {
        DumpKey {
            kernel: "6.18.0".into(),
            cpu_flags: "avx sse2".into(),
            criu: "c1".into(),
            agent: "a1".into(),
            inner_address: "10.0.0.2".into(),
            confinement: "s1".into(),
        }
    }

    #[test]
    fn a_dump_fits_the_machine_that_made_it_and_one_with_more_cpu_features() {
        assert_eq!(key().fit(&key()), Fit::Same);
        assert_eq!(key().fit(&DumpKey { cpu_flags: "avx avx2 sse2".into(), ..key() }), Fit::Same);
    }

    #[test]
    fn a_missing_cpu_feature_or_another_inner_address_is_refused_by_name() {
        let Fit::Impossible { reason } = key().fit(&DumpKey { cpu_flags: "sse2".into(), ..key() }) else { panic!("tried without avx") };
        assert_eq!(reason, "this CPU lacks avx");
        let other = DumpKey { inner_address: "10.0.0.3".into(), ..key() };
        assert!(matches!(key().fit(&other), Fit::Impossible { .. }));
    }

    #[test]
    fn another_confinement_is_a_change_and_so_is_one_that_an_older_row_does_not_tell() {
        let Fit::Likely { change } = key().fit(&DumpKey { confinement: "s2".into(), ..key() }) else { panic!("the filter changed") };
        assert_eq!(change, "confinement s1, now s2");
        let mut old = serde_json::to_value(key()).unwrap();
        old.as_object_mut().unwrap().remove("confinement");
        let old: DumpKey = serde_json::from_value(old).unwrap();
        assert!(matches!(old.fit(&key()), Fit::Likely { .. }));
    }

    #[test]
    fn another_kernel_or_criu_is_worth_a_try() {
        let Fit::Likely { change } = key().fit(&DumpKey { kernel: "6.19.0".into(), criu: "c2".into(), ..key() }) else {
            panic!("kernel and CRIU changed")
        };
        assert_eq!(change, "kernel 6.18.0, now 6.19.0; CRIU c1, now c2");
    }
}
