//! Sandboxes as the kernel sees them: root file systems, namespaces, cgroups, networks, dumps.
//!
//! [`Runtime`] is all that the core sees of it. [`kernel::Kernel`] is the real one; [`fake::Fake`] keeps the core's
//! tests away from the kernel. Forks, libcontainer and CRIU exist only in `helper/`, a process of its own.
//! Never touches the store or HTTP.

pub mod agent;
pub mod cgroup;
pub mod config;
pub mod criu_binary;
pub mod devices;
pub mod disk;
pub mod fake;
pub mod fill;
pub mod helper;
pub mod kernel;
pub mod layout;
pub mod network;
pub mod precheck;
pub mod restored;
pub mod rootfs;
pub mod uids;
pub mod volumes;

pub use disk::Room;
pub use restored::Restored;

use crate::model::{ByteSize, DumpKey, Keep, KernelRef, MountPath, NetworkPolicy, Resources, SandboxId, SecretRecord, VolumeMount};
use std::path::PathBuf;

/// Deleted files up to this size travel in a dump; the pre-dump check refuses larger ones by name.
pub(crate) const GHOST_BYTES_MAX: u32 = 256 << 20;

/// Where the upper layer of a sandbox's root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskSource {
    /// A new, empty disk of the size in [`Resources`].
    Fresh,
    /// The disk that this sandbox already has (`sandboxes/<id>/disk.img`): resume, cold boot.
    Own,
    /// A copy of this disk image, which nobody has mounted writable: fork, the first restore of a dump.
    CopyOf(PathBuf),
    /// The same, of a dump that many creates restore: copies are made ahead, and one of those is taken if there is one.
    PooledCopyOf(PathBuf),
}

/// How pid 1 comes to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartFrom {
    /// libcontainer starts the agent; it learns this control secret (64 hex characters).
    Cold {
        /// What the first init must carry.
        control_secret: String,
    },
    /// CRIU restores the images in this folder.
    Dump {
        /// `snapshots/<id>/images` or a template's.
        images: PathBuf,
        /// SHA-256 (hex) of the CRIU that wrote them; kept below `criu/`.
        criu: String,
        /// SHA-256 (hex) of the agent in them; kept below `agents/`.
        agent: String,
    },
}

/// Everything needed to give a sandbox processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartRequest {
    /// Whose. Names every kernel object.
    pub id: SandboxId,
    /// Layer ids, bottom to top, without the agent's own; folders `layers/<id>`.
    pub layers: Vec<String>,
    /// The upper layer.
    pub disk: DiskSource,
    /// The limits.
    pub resources: Resources,
    /// Egress rules of its slot.
    pub network: NetworkPolicy,
    /// What is mounted in it before its processes run. Those in a dump come back by it, the others are added.
    pub volumes: Vec<VolumeMount>,
    /// Cold, or from a dump.
    pub from: StartFrom,
}

/// What a dump does to its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterDump {
    /// Pause: the processes are gone afterwards.
    Stop,
    /// Fork, snapshot: they go on.
    KeepRunning,
}

/// Where a dump is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DumpRequest {
    /// The source.
    pub id: SandboxId,
    /// What happens to it.
    pub after: AfterDump,
    /// An existing empty folder for the CRIU images; renamed into place by the caller.
    pub images: PathBuf,
    /// Where a copy of the disk is put while the tasks are frozen (fork, snapshot); `None` for pause.
    pub disk_copy: Option<PathBuf>,
}

/// In the folder of the images: [`Dumped`] as JSON, written when the images are complete and before a task is ended
/// (the `post-dump` notification). A server that finds a dead sandbox `pausing` tells by it whether its memory is whole.
pub const DUMPED_FILE: &str = "dumped.json";

/// What a dump turned out to be.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Dumped {
    /// SHA-256 (hex) of the CRIU used.
    pub criu: String,
    /// SHA-256 (hex) of the agent in it.
    pub agent: String,
    /// Bytes of images.
    pub images_bytes: u64,
    /// How long the tasks stood still.
    pub standstill: std::time::Duration,
}

/// What a sandbox wrote over its layers: the upper folder of its overlay, ids from 0, as overlayfs keeps it (whiteouts,
/// `trusted.overlay.*`). Nobody writes to it any more. To be dropped before the sandbox is destroyed.
#[derive(Debug)]
pub struct WrittenFiles {
    upper: PathBuf,
    /// A mount that is attached nowhere; the path leads through this descriptor.
    _mount: Option<std::os::fd::OwnedFd>,
}

impl WrittenFiles {
    /// Files in a plain folder.
    pub fn in_folder(upper: PathBuf) -> Self {
        Self { upper, _mount: None }
    }

    /// Files below `inside` on a mount that nobody else sees.
    pub fn on_mount(mount: std::os::fd::OwnedFd, inside: &str) -> Self {
        use std::os::fd::AsRawFd;
        Self { upper: PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd())).join(inside), _mount: Some(mount) }
    }

    /// The folder. Valid in this process.
    pub fn upper(&self) -> &std::path::Path {
        &self.upper
    }
}

/// A reason why a process cannot be dumped.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Finding {
    /// Pid inside the sandbox.
    pub pid: i32,
    /// Its command name, control characters replaced.
    pub command: String,
    /// What it holds that cannot be dumped, and what to do about it.
    pub reason: String,
}

/// What a sandbox uses at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// CPU time used since the cgroup was made, in nanoseconds.
    pub cpu_ns: u64,
    /// Memory without page cache, in bytes.
    pub memory_used_bytes: u64,
    /// Page cache, in bytes.
    pub memory_cache_bytes: u64,
    /// Disk used, in bytes.
    pub disk_used_bytes: u64,
    /// Disk size, in bytes.
    pub disk_total_bytes: u64,
}

/// How pid 1 of a sandbox ended, as far as it can be known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// `exit status 1`, `killed by signal 9`, `out of memory`, or `unknown` after a server restart.
    pub detail: String,
}

/// How much of a volume leaves a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnmountHow {
    /// What is mounted at the path.
    ThisOne {
        /// Programs keep the files that they have open.
        forced: bool,
    },
    /// Wherever programs inside have moved or bound it.
    Everywhere {
        /// Programs keep the files that they have open.
        forced: bool,
    },
}

impl UnmountHow {
    pub(crate) const fn is_forced(self) -> bool {
        match self {
            Self::ThisOne { forced } | Self::Everywhere { forced } => forced,
        }
    }
}

/// What became of a volume that was to be unmounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmounted {
    /// It is not mounted there any more.
    Done,
    /// Programs have files open on it.
    Busy,
}

/// A thing that a machine has so much of and no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scarce {
    /// The host's disk.
    Disk,
    /// Numbers of which each sandbox has one: id ranges, network slots.
    Places,
}

/// The machine has no room for what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} is used up: {used} of {limit}; {remedy}")]
pub struct Exhausted {
    /// What kind of thing.
    pub scarce: Scarce,
    /// The thing, e.g. `disk space below /var/lib/stillbox`.
    pub what: String,
    /// Amount in use, with its unit.
    pub used: String,
    /// The bound, with its unit.
    pub limit: String,
    /// The next step.
    pub remedy: String,
}

/// What is about to be written of a running sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writing {
    /// A pause: its memory, where that is kept.
    Pause,
    /// A source of copies: its disk, and its memory where that is kept.
    Copy(Keep),
}

/// Why the kernel side failed. The core turns it into its own errors; the source chain has the details.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The machine has no room; nothing was started.
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    /// It has processes that cannot be dumped; nothing was touched.
    #[error("sandbox {id} cannot be dumped: {}", findings.iter().map(|f| format!("{} (pid {}): {}", f.command, f.pid, f.reason)).collect::<Vec<_>>().join("; "))]
    NotDumpable {
        /// The sandbox.
        id: SandboxId,
        /// At least one.
        findings: Vec<Finding>,
    },
    /// A volume cannot be mounted where it was to be; nothing was started, or changed.
    #[error("no volume can be mounted at '{path}': {wrong}")]
    BadMountPath {
        /// Where.
        path: MountPath,
        /// What is in the way.
        wrong: String,
    },
    /// Its processes had a file open on a volume that others have removed or replaced since; nothing was started.
    #[error("'{path}' was open on a volume, and cannot be opened any more: {why}")]
    VolumeFile {
        /// Where it was, inside.
        path: String,
        /// The kernel's reason.
        why: String,
    },
    /// The sandbox has no processes, or not those of its row.
    #[error("sandbox {id} has no running processes")]
    NotRunning {
        /// The sandbox.
        id: SandboxId,
    },
    /// A step failed; what was acquired for it has been released.
    #[error("{step} of sandbox {id} failed")]
    Step {
        /// The sandbox.
        id: SandboxId,
        /// What was being done, e.g. `mounting the disk`.
        step: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The kernel, as the core needs it. One method per verb; each is called by the sandbox's driver only, one at a
/// time per sandbox. Every method may be repeated after a crash: leftovers of an earlier try are replaced.
///
/// Dropping a future of these does not stop what it began; callers are drivers, which do not drop them.
#[async_trait::async_trait]
pub trait Runtime: Send + Sync + std::fmt::Debug + 'static {
    /// Makes root file system, cgroup, network and pid 1. Afterwards the agent will answer soon; nothing was
    /// initialised in it. On failure nothing is left, but for an `Own` disk.
    async fn start(&self, request: StartRequest) -> Result<KernelRef, RuntimeError>;

    /// Takes over a sandbox that an earlier server left running. `NotRunning` when its processes are gone. A helper of
    /// the earlier server that is still busy with it (a dump) is ended first, or waited for.
    /// Its egress rules become those of `network`.
    async fn adopt(&self, id: SandboxId, kernel: &KernelRef, network: &NetworkPolicy) -> Result<(), RuntimeError>;

    /// How the latest start from a dump ended, if the server that asked for it did not see that. Waits for a helper of
    /// that server. Forgotten by [`Runtime::stop`].
    async fn restored(&self, id: SandboxId) -> Result<Restored, RuntimeError>;

    /// Resolves when pid 1 of a started or adopted sandbox has ended. Cancel-safe.
    async fn exited(&self, id: SandboxId) -> Exit;

    /// Ends all its processes and shows what they wrote. What else it holds stays until it is stopped or destroyed.
    async fn written(&self, id: SandboxId) -> Result<WrittenFiles, RuntimeError>;

    /// Ends all its processes and gives back cgroup, slot, mounts and loop device. The disk stays, flushed.
    /// Succeeds when there is nothing left to stop.
    async fn stop(&self, id: SandboxId) -> Result<(), RuntimeError>;

    /// [`Runtime::stop`], and the disk and the folder of the sandbox are removed.
    async fn destroy(&self, id: SandboxId) -> Result<(), RuntimeError>;

    /// Dumps a running sandbox and leaves [`DUMPED_FILE`] beside the images. The caller has looked at its
    /// [`Runtime::findings`], before it touched anything; what would dump and never restore is looked for once more when
    /// the tasks stand still. Any failure leaves it running as it was. After `Stop` the sandbox holds what a stopped one holds: the disk, flushed.
    async fn dump(&self, request: DumpRequest) -> Result<Dumped, RuntimeError>;

    /// Copies the disk of a running sandbox to a new file, as of one moment. Its processes go on; they wait for as long as
    /// they write.
    async fn copy_disk(&self, id: SandboxId, to: PathBuf) -> Result<(), RuntimeError>;

    /// What would keep it from being dumped now; empty when nothing would.
    async fn findings(&self, id: SandboxId) -> Result<Vec<Finding>, RuntimeError>;

    /// Connects to a TCP port on 127.0.0.1, else ::1, inside. One attempt; refused is `ConnectionRefused`.
    async fn dial(&self, id: SandboxId, port: u16) -> std::io::Result<tokio::net::TcpStream>;

    /// An error where the host's disk has no room for this. To be asked before anything is touched.
    async fn require_room(&self, _id: SandboxId, _writing: Writing) -> Result<(), RuntimeError> {
        Ok(())
    }

    /// How full the host's disk is; `None` where nobody knows.
    async fn room(&self) -> Option<Room> {
        None
    }

    /// What it uses.
    async fn usage(&self, id: SandboxId) -> Result<Usage, RuntimeError>;

    /// What a dump made now would depend on.
    fn dump_key(&self) -> DumpKey;

    /// Resolves when nothing reads the images any more that it was restored from: at once, or when a lazy restore has
    /// all its memory. An error says that the memory is lost: the sandbox is torn and must be stopped. Cancel-safe.
    async fn filled(&self, _id: SandboxId) -> Result<(), RuntimeError> {
        Ok(())
    }

    /// Tells that starts like this one are to be expected; what can be made ahead of them is made from now on.
    fn expect(&self, _request: &StartRequest) {}

    /// Replaces the egress rules of its slot; new connections see them at once.
    async fn set_network(&self, id: SandboxId, policy: &NetworkPolicy) -> Result<(), RuntimeError>;

    /// Tells what secrets there are from now on, for policies that name some; requests that begin later carry these.
    fn set_secrets(&self, _secrets: Vec<SecretRecord>) {}

    /// Changes the memory limit of a running one. A limit below what it uses is refused by the kernel.
    async fn set_memory(&self, id: SandboxId, memory: ByteSize) -> Result<(), RuntimeError>;

    /// Mounts a volume in a running one.
    async fn mount_volume(&self, id: SandboxId, mount: &VolumeMount) -> Result<(), RuntimeError>;

    /// Unmounts a volume in a running one.
    async fn unmount_volume(&self, id: SandboxId, mount: &VolumeMount, how: UnmountHow) -> Result<Unmounted, RuntimeError>;

    /// Removes everything of this instance in the kernel and in `sandboxes/` that belongs to no id in `keep`.
    /// Called once at start, after the last adopt.
    async fn sweep(&self, keep: &[SandboxId]) -> Result<(), RuntimeError>;

    /// Gives back what belongs to the server and not to a sandbox: pools, forwarding rules. Running sandboxes go on.
    async fn close(&self);
}
