//! Bounds and timings of the core.

use crate::model::ByteSize;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Bounds and timings of the core. Each has a key in config/stillbox.toml.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxConfig {
    /// `data_dir`: dumps are in `snapshots/<id>`, disks in `sandboxes/<id>`.
    pub data_dir: PathBuf,
    /// What /etc/resolv.conf inside says.
    pub nameservers: Vec<IpAddr>,
    /// Authorities that sandboxes trust beside their image's own: this server's.
    pub ca_pem: Option<String>,
    /// The port of our public URLs, when their names are below `.localhost`: programs look for those on their own loopback.
    pub localhost_port: Option<u16>,
    /// Longest time to live that may be asked for.
    pub timeout_max: Duration,
    /// Sandboxes with processes at once.
    pub running_max: u32,
    /// The CPU limits of sandboxes with processes together.
    pub cpus_max: u64,
    /// The memory limits of sandboxes with processes together.
    pub memory_max: ByteSize,
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
    /// How processes of a new sandbox come to be.
    pub create_by: CreateBy,
    /// When a dump is put on stable storage.
    pub snapshot_sync: SnapshotSync,
    /// Whether a pause unmounts FUSE file systems that are in its way, instead of being refused.
    pub unmount_fuse: bool,
}

/// How processes of a new sandbox come to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CreateBy {
    /// A restore of the dump of its build's ready state; cold without one that fits, and one is made in the background.
    Restore,
    /// A cold start, always.
    ColdStart,
}

/// When a dump is put on stable storage. A death of any of our processes is survived either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotSync {
    /// After the caller was answered; a power cut until then loses the memory of the sandbox.
    Background,
    /// Before the caller is answered.
    BeforeReply,
}
