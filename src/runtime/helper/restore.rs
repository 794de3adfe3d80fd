//! A restore: CRIU lets a dumped tree go on, on another disk, with other ids, in another cgroup.

use super::super::network::InnerNetwork;
use super::super::rootfs::{RootPlan, mount_root};
use super::super::volumes::VolumeBind;
use super::container::{Limits, limit_namespace, prepare_this_process, userns_of};
use super::criu::{self, CriuError, Hooks, Memory, RestoreOptions, View};
use super::volumes::Staged;
use super::{Blame, HelperStep, Later, Operation};
use crate::model::{ByteSize, KernelRef, ProcessRef, SandboxId};
use crate::runtime::layout::SandboxFolder;
use crate::runtime::restored;
use crate::sys::netns::Netns;
use crate::sys::process::{go_before_others, start_ticks};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Restores a dump on a new mount of its root.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Restore {
    /// Whose it becomes.
    pub(crate) id: SandboxId,
    /// Its root; the disk is a copy of the one at the time of the dump, or that one itself.
    pub(crate) root: Root,
    /// The cgroup's folders, made and limited; this process moves into them.
    pub(crate) cgroup_folders: Vec<PathBuf>,
    /// The way out.
    pub(crate) network: InnerNetwork,
    /// Of the slot that `network` leads out through.
    pub(crate) slot: u32,
    /// The host's.
    pub(crate) boot_id: String,
    /// The agent's content address (hex).
    pub(crate) agent_sha256: String,
    /// CRIU's images. Only read.
    pub(crate) images: PathBuf,
    /// The CRIU that wrote them.
    pub(crate) criu: PathBuf,
    /// From this much memory on, the sandbox runs before all of it is in.
    pub(crate) lazy_min: ByteSize,
    /// Volumes: those that the dump names, and those that are added.
    pub(crate) volumes: Vec<VolumeBind>,
    /// What the kernel counts per namespace.
    pub(crate) limits: Limits,
    /// Bound on CRIU's work.
    pub(crate) deadline: Duration,
}

/// The root file system of a restore.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Root {
    /// To be mounted first.
    ToMount(RootPlan),
    /// Made ahead, with a view of the dump's images.
    Mounted {
        /// Where.
        folder: SandboxFolder,
        /// First host id of the range that it is mapped to.
        uid_base: u32,
    },
}

impl Root {
    fn folder(&self) -> &SandboxFolder {
        match self {
            Self::ToMount(plan) => &plan.folder,
            Self::Mounted { folder, .. } => folder,
        }
    }

    fn uid_base(&self) -> u32 {
        match self {
            Self::ToMount(plan) => plan.uid_base,
            Self::Mounted { uid_base, .. } => *uid_base,
        }
    }
}

impl Operation for Restore {
    const VERB: &'static str = "restore";
    type Answer = KernelRef;

    fn folder(&self) -> &SandboxFolder {
        self.root.folder()
    }

    /// What a failure leaves behind is found by the sandbox's id, as after a failed cold start.
    fn run(&self, later: &mut Later) -> Result<KernelRef, HelperStep> {
        go_before_others();
        if let Root::ToMount(plan) = &self.root {
            // The namespace was needed for its map; CRIU makes the sandbox's own.
            drop(mount_root(plan)?);
        }
        let folder = self.root.folder();
        // From here: where CRIU runs, the data folder's mounts are not seen.
        let way_out = self.network.open().map_err(HelperStep::wrap("opening its network slot"))?;
        let volumes = Staged::open(&self.volumes, self.root.uid_base()).map_err(HelperStep::wrap("opening its volumes"))?;
        prepare_this_process();
        let memory = memory_in(&self.images).map_err(HelperStep::wrap("looking at the images"))?;
        let options = RestoreOptions {
            criu: &self.criu,
            images: &self.images,
            work: &folder.work(),
            view: match self.root {
                Root::ToMount(_) => View::ToMake,
                Root::Mounted { .. } => View::Made,
            },
            root: &folder.root_mount(),
            uid_base: self.root.uid_base(),
            cgroups: &self.cgroup_folders,
            externals: volumes.externals(),
            memory: match memory >= self.lazy_min {
                true => Memory::Lazily { executable: Path::new("/proc/self/exe") },
                false => Memory::Now,
            },
            deadline: self.deadline,
        };
        let mut running = None;
        let hooks = Hooks {
            in_place: || Ok(volumes.put()?),
            set_up_netns: |netns: &Netns| Ok(way_out.attach(netns)?),
            before_it_runs: |init| {
                volumes.attach_missing(init, self.root.uid_base())?;
                let kernel = running.insert(self.kernel_ref(init)?);
                Ok(restored::begin(folder, kernel)?)
            },
        };
        let restored = criu::restore(&options, hooks).map_err(|error| self.failed(error))?;
        let kernel = running.ok_or_else(|| HelperStep::new("restoring", "CRIU did not stop before it let the processes go"))?;
        let userns = userns_of(restored.init).map_err(HelperStep::wrap("limiting its user namespace"))?;
        limit_namespace(&userns, &self.limits).map_err(HelperStep::wrap("limiting its user namespace"))?;
        restored::complete(folder, &kernel).map_err(HelperStep::wrap("noting what was restored"))?;
        later.drop(restored.over);
        Ok(kernel)
    }
}

impl Restore {
    /// A sandbox's own files are as they were; what cannot be opened any more is on a volume, where others write.
    fn failed(&self, error: CriuError) -> HelperStep {
        let unopened = error.unopened_file().filter(|_| !self.volumes.is_empty());
        let mut step = HelperStep::wrap("restoring")(error);
        if let Some((path, why)) = unopened {
            step.blame = Some(Blame::VolumeFile { path, why });
        }
        step
    }

    fn kernel_ref(&self, init: i32) -> io::Result<KernelRef> {
        let init = ProcessRef { pid: init, start_ticks: start_ticks(init)? };
        let (host_boot_id, agent) = (self.boot_id.clone(), self.agent_sha256.clone());
        Ok(KernelRef { init, slot: self.slot, uid_base: self.root.uid_base(), host_boot_id, agent })
    }
}

/// Size of the dumped pages.
fn memory_in(images: &Path) -> io::Result<ByteSize> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(images)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("pages-") {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(ByteSize(bytes))
}
