//! What a sandbox is asked to be: the value that every dialect's create request is parsed into.

use super::{BuildId, ByteSize, NetworkPolicy, TemplateId, VolumeMount};
use std::collections::BTreeMap;
use std::time::Duration;
use time::OffsetDateTime;

/// What a pause keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// Processes, memory and files: a CRIU dump. Resume goes on where it stopped.
    Memory,
    /// Files only: resume is a cold boot with the same id, tokens and environment.
    FilesOnly,
}

/// What happens when the time of a sandbox is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// It is removed.
    Kill,
    /// It is paused, keeping what is named.
    Pause(Keep),
}

/// Whether a proxied request wakes a paused sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AutoResume {
    /// The request is answered as for a sandbox that does not exist.
    Off,
    /// The request waits for the resume and is then served.
    On,
}

/// Whether the agent wants an access token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Secure {
    /// Every envd call must carry the sandbox's token.
    Token,
    /// Whoever reaches the port is served.
    Open,
}

/// When a sandbox ends and what wakes it. Persisted; inherited rules are each dialect's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Lifecycle {
    /// Time to live from create, connect or resume on; the value given at create is kept for auto-resume.
    pub timeout: Duration,
    /// What happens then.
    pub on_timeout: OnTimeout,
    /// Whether traffic wakes it.
    pub auto_resume: AutoResume,
    /// After so long without a request from outside its time is up, too; `None` = only its end counts.
    #[serde(default)]
    pub idle_max: Option<Duration>,
    /// No run of it lasts longer, whatever ends are asked for; `None` = the server's own limit alone.
    #[serde(default)]
    pub run_max: Option<Duration>,
}

impl Lifecycle {
    /// Ends by being killed after `timeout`, and nothing wakes it.
    pub const fn of(timeout: Duration) -> Self {
        Self { timeout, on_timeout: OnTimeout::Kill, auto_resume: AutoResume::Off, idle_max: None, run_max: None }
    }

    /// When a run that began at `started` may end at the latest.
    pub fn latest_end(&self, started: OffsetDateTime) -> Option<OffsetDateTime> {
        self.run_max.map(|max| started + max)
    }

    /// When a run that begins at `started` ends if its time to live is `timeout`.
    pub fn end_of_run(&self, started: OffsetDateTime, timeout: Duration) -> OffsetDateTime {
        let end = started + timeout;
        self.latest_end(started).map_or(end, |latest| end.min(latest))
    }
}

/// The limits of a sandbox, enforced by cgroups and by the size of its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Resources {
    /// CPUs' worth of time per period.
    pub cpu_count: u32,
    /// Memory limit, page cache included.
    pub memory: ByteSize,
    /// Size of the sandbox's own disk as `df` shows it inside.
    pub disk: ByteSize,
    /// Processes and threads together.
    pub pids_max: u32,
}

/// Everything that a new sandbox is made from. Values are already checked: no field needs a second look.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SandboxSpec {
    /// The template asked for, after alias and tag were resolved.
    pub template: TemplateId,
    /// The build of it that is used.
    pub build: BuildId,
    /// The alias by which it was asked for, for display.
    pub alias: Option<String>,
    /// When it ends.
    pub lifecycle: Lifecycle,
    /// Its limits.
    pub resources: Resources,
    /// Who may talk to whom.
    pub network: NetworkPolicy,
    /// Free text of the user's, searchable in lists.
    pub metadata: BTreeMap<String, String>,
    /// Environment of everything started in it.
    pub env: BTreeMap<String, String>,
    /// Whether envd calls need the token.
    pub secure: Secure,
    /// Volumes that it sees, each at a path of its own. Rows of earlier releases have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeMount>,
}
