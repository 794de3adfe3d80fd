//! Every knob of the runtime. config.rs at the top fills it from config/stillbox.toml.

use super::network::NetworkConfig;
use crate::model::ByteSize;
use std::path::PathBuf;
use std::time::Duration;

/// What root inside may mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SandboxMounts {
    /// FUSE, tmpfs, bind mounts: CAP_SYS_ADMIN of the sandbox's own user namespace stays.
    User,
    /// Nothing: the capability is taken away from every process.
    None,
}

/// What sandboxes' disks are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskDriver {
    /// Images on loop devices where the machine has them, else folders.
    Auto,
    /// Folders of the host's file system: no size limit and no dumps, for machines whose loop devices are taken.
    Folder,
}

/// A range of host ids that user namespaces are carved from: each sandbox gets 65536 of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UidRanges {
    /// First host uid and gid. A multiple of 65536.
    pub first: u32,
    /// How many ranges of 65536; the number of sandboxes that can have processes at once.
    pub count: u32,
}

impl Default for UidRanges {
    /// 0x7000_0000..0x8000_0000: above what systemd-nspawn takes (up to 0x6fff_ffff) and subuid files usually name,
    /// below 2^31, where programs begin to see negative ids.
    fn default() -> Self {
        Self { first: 0x7000_0000, count: 4096 }
    }
}

/// The runtime's own part of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeConfig {
    /// `data_dir`: holds layers, sandboxes, agents, criu. An existing folder of root's.
    pub data_dir: PathBuf,
    /// The executable that is run as `<helper> runtime <verb>`. `/proc/self/exe`, the running binary itself even
    /// after its file was replaced; another one in tests.
    pub helper: PathBuf,
    /// How long one helper operation may take before it is killed and its work undone.
    pub helper_time_max: Duration,
    /// Host ids for user namespaces.
    pub uid_ranges: UidRanges,
    /// No sandbox is started when less than this is free below `data_dir`: a full host disk tears every sandbox's
    /// file system at once, so the last bytes are not for new ones.
    pub disk_free_min: ByteSize,
    /// What disks are made of.
    pub disk_driver: DiskDriver,
    /// What root inside may mount.
    pub mounts: SandboxMounts,
    /// inotify instances per sandbox; the host's own `fs.inotify.max_user_instances` is 128 per user by default.
    pub inotify_instances_max: u32,
    /// Pseudo-terminals per sandbox: one sandbox took 3071 of the host's 4096 where nothing said so.
    pub ptys_max: u32,
    /// Root file systems kept ready for the next creates from a dump; each is a mounted copy of a template's disk.
    pub pool_roots: u32,
    /// A dump with this much memory or more is restored lazily: the sandbox answers within 60 ms and the rest of its
    /// memory follows; until then it cannot be paused again. Smaller ones are read at once, 0.45 s per GiB.
    pub lazy_restore_min: ByteSize,
    /// An installed CRIU (4.2 or newer) in place of the built-in one.
    pub criu: Option<PathBuf>,
    /// Slots, subnet, what may be reached.
    pub network: NetworkConfig,
}

impl RuntimeConfig {
    /// The defaults for a data folder.
    pub fn new(data_dir: PathBuf) -> Self {
        Self {
            data_dir,
            helper: PathBuf::from("/proc/self/exe"),
            helper_time_max: Duration::from_secs(60),
            uid_ranges: UidRanges::default(),
            disk_free_min: ByteSize::gib(2),
            disk_driver: DiskDriver::Auto,
            mounts: SandboxMounts::User,
            inotify_instances_max: 128,
            ptys_max: 64,
            pool_roots: 8,
            lazy_restore_min: ByteSize::mib(512),
            criu: None,
            network: NetworkConfig::default(),
        }
    }
}
