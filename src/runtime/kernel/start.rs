//! Giving a sandbox processes, and stopping time for them.

use super::live::Live;
use super::room::no_room;
use super::volumes::start_error;
use super::{Kernel, Shared, network_error, step};
use crate::model::{ByteSize, KernelRef, ProcessRef, SandboxId};
use crate::runtime::devices;
use crate::runtime::disk::{DiskError, DiskKind};
use crate::runtime::helper::container::{ColdStart, Limits};
use crate::runtime::helper::dump::Dump;
use crate::runtime::helper::restore::{Restore, Root};
use crate::runtime::helper::undo::{self, UndoDump};
use crate::runtime::network::SlotLease;
use crate::runtime::rootfs::{Boot, DiskNext, RootPlan};
use crate::runtime::uids::UidLease;
use crate::runtime::volumes::VolumeBind;
use crate::runtime::{
    AfterDump, DiskSource, DumpRequest, Dumped, Exhausted, Restored, Runtime, RuntimeError, Scarce, StartFrom, StartRequest, criu_binary,
};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

/// Helpers that may be killed one after the other while they undo a dump, before the sandbox is given up.
const UNDO_TRIES: usize = 3;

/// How far a sandbox's root file system is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RootAt {
    /// It was made ahead and has the sandbox's name already.
    Mounted,
    /// The disk has to be made, and the helper mounts it.
    ToMake,
}

/// Without the device that lazy fills need, every dump is read at once.
fn lazy_min(configured: ByteSize) -> ByteSize {
    match devices::userfaultfd() {
        Some(_) => configured,
        None => ByteSize(u64::MAX),
    }
}

impl Kernel {
    pub(super) async fn start_sandbox(&self, request: StartRequest) -> Result<KernelRef, RuntimeError> {
        let id = request.id;
        let after_failure = match request.disk {
            DiskSource::Own => DiskNext::Kept,
            DiskSource::Fresh | DiskSource::CopyOf(_) | DiskSource::PooledCopyOf(_) => DiskNext::Removed,
        };
        let disk = request.disk.clone();
        self.blocking(move |shared| shared.require_room_for(&disk)).await.map_err(|error| disk_error(id, error))?;
        if self.0.layout.sandbox(id).path().exists() {
            match after_failure {
                DiskNext::Kept => self.settle(id).await?,
                DiskNext::Removed => self.release(id, DiskNext::Removed).await?,
            }
        }
        let (uids, root) = match self.take_root(&request).await {
            Some(uids) => (uids, RootAt::Mounted),
            None => (self.lease_ids()?, RootAt::ToMake),
        };
        // Rooms of the kernel that know nothing of each other; in a row they would be a third of a create.
        let (leased, disk, cgroup, volumes) = tokio::join!(
            self.0.network.lease(id, &request.network),
            self.prepare_disk(&request, root),
            self.make_cgroup(&request),
            self.open_volumes(&request)
        );
        let slot = leased.as_ref().ok().map(|lease| lease.slot);
        let ready = leased.map_err(|error| network_error(id, error)).and_then(|lease| Ok((lease, disk.and(cgroup).and(volumes)?)));
        let outcome = match ready {
            Ok((lease, volumes)) => self.start_with(request, (uids, root), &lease, volumes).await,
            Err(error) => Err(error),
        };
        let error = match outcome {
            Ok(live) => {
                let kernel = live.kernel.clone();
                self.insert(id, live);
                return Ok(kernel);
            }
            Err(error) => error,
        };
        if let Err(cleanup) = self.release(id, after_failure).await {
            tracing::error!(sandbox.id = %id, error = &cleanup as &dyn std::error::Error, "A failed start of sandbox {id} left something behind");
        }
        if let Some(slot) = slot
            && let Err(cleanup) = self.0.network.release(slot).await
        {
            tracing::error!(sandbox.id = %id, error = &cleanup as &dyn std::error::Error, "A failed start of sandbox {id} left its network slot behind");
        }
        Err(error)
    }

    fn lease_ids(&self) -> Result<UidLease, RuntimeError> {
        self.0.uids.lease().map_err(|error| {
            RuntimeError::Exhausted(Exhausted {
                scarce: Scarce::Places,
                what: "the pool of host id ranges".to_owned(),
                used: error.0.to_string(),
                limit: format!("{} (runtime.uid_count)", error.0),
                remedy: "kill sandboxes or raise runtime.uid_count".to_owned(),
            })
        })
    }

    async fn prepare_disk(&self, request: &StartRequest, root: RootAt) -> Result<(), RuntimeError> {
        if root == RootAt::Mounted {
            return Ok(());
        }
        let (id, disk, size) = (request.id, request.disk.clone(), request.resources.disk);
        let prepared = self.blocking(move |shared| shared.prepare_disk(id, &disk, size)).await;
        prepared.map_err(|error| disk_error(id, error))
    }

    async fn make_cgroup(&self, request: &StartRequest) -> Result<(), RuntimeError> {
        let (id, resources) = (request.id, request.resources);
        let made = self.blocking(move |shared| shared.cgroups.make(id, &resources).map(drop)).await;
        made.map_err(step(id, "making the cgroup"))
    }

    async fn open_volumes(&self, request: &StartRequest) -> Result<Vec<VolumeBind>, RuntimeError> {
        if request.volumes.is_empty() {
            return Ok(Vec::new());
        }
        let (id, mounts) = (request.id, request.volumes.clone());
        let opened = self.blocking(move |shared| shared.volumes.binds(&mounts)).await;
        opened.map_err(step(id, "opening its volumes"))
    }

    async fn start_with(
        &self,
        request: StartRequest,
        (uids, root): (UidLease, RootAt),
        slot: &SlotLease,
        volumes: Vec<VolumeBind>,
    ) -> Result<Live, RuntimeError> {
        let id = request.id;
        let agent = match &request.from {
            StartFrom::Cold { .. } => self.0.agent.clone(),
            StartFrom::Dump { agent, .. } => agent.clone(),
        };
        let init = match self.run_helper(&request, &agent, (uids.base(), root), slot, volumes).await {
            Ok(init) => init,
            Err(error) => match self.restored(id).await {
                // It came to its end, but not to its answer.
                Ok(Restored::Whole(kernel)) => kernel.init,
                Ok(Restored::Nothing | Restored::Torn) | Err(_) => return Err(error),
            },
        };
        let kernel = KernelRef { init, slot: slot.slot, uid_base: uids.base(), host_boot_id: self.0.host_boot_id.clone(), agent };
        self.watch(id, kernel, uids).ok_or_else(|| step(id, "watching pid 1")("it ended at once; its last words are in agent.log"))
    }

    async fn run_helper(
        &self,
        request: &StartRequest,
        agent: &str,
        (uid_base, root): (u32, RootAt),
        slot: &SlotLease,
        volumes: Vec<VolumeBind>,
    ) -> Result<ProcessRef, RuntimeError> {
        let shared = &self.0;
        let id = request.id;
        let cgroup = shared.cgroups.of(id);
        let plan = |boot| RootPlan {
            folder: shared.layout.sandbox(id),
            disk: shared.disks.kind(),
            agent: shared.layout.agent_layer(agent),
            layers: request.layers.iter().map(|layer| shared.layout.layer(layer)).collect(),
            uid_base,
            boot,
        };
        let limits = Limits { inotify_instances_max: shared.config.inotify_instances_max };
        match &request.from {
            StartFrom::Cold { control_secret } => {
                let start = ColdStart {
                    id,
                    root: plan(Boot::Cold),
                    cgroup_folders: cgroup.folders(),
                    cgroup_path: cgroup.path().to_owned(),
                    network: slot.inner.clone(),
                    control_secret: control_secret.clone(),
                    mounts: shared.config.mounts,
                    ptys_max: shared.config.ptys_max,
                    volumes,
                    limits,
                };
                shared.helpers.call(&start).await.map_err(start_error(id, "starting pid 1"))
            }
            StartFrom::Dump { images, criu, .. } => {
                let restore = Restore {
                    id,
                    root: match root {
                        RootAt::Mounted => Root::Mounted { folder: shared.layout.sandbox(id), uid_base },
                        RootAt::ToMake => Root::ToMount(plan(Boot::Restore)),
                    },
                    cgroup_folders: cgroup.folders(),
                    network: slot.inner.clone(),
                    slot: slot.slot,
                    boot_id: shared.host_boot_id.clone(),
                    agent_sha256: agent.to_owned(),
                    images: images.clone(),
                    criu: self.criu(id, criu)?,
                    lazy_min: lazy_min(shared.config.lazy_restore_min),
                    volumes,
                    limits,
                    deadline: shared.config.helper_time_max,
                };
                let restored = self.0.helpers.restore(&restore).await.map_err(start_error(id, "restoring its processes"));
                restored.map(|kernel| kernel.init)
            }
        }
    }

    fn criu(&self, id: SandboxId, sha256: &str) -> Result<PathBuf, RuntimeError> {
        let kept = criu_binary::kept(self.0.layout.data_dir(), sha256);
        kept.ok_or_else(|| step(id, "finding the CRIU of its dump")(format!("criu/{sha256} is not there any more")))
    }

    pub(super) async fn dump_sandbox(&self, request: DumpRequest) -> Result<Dumped, RuntimeError> {
        let id = request.id;
        let live = self.live(id)?;
        if self.0.disks.kind() == DiskKind::Folder {
            return Err(step(id, "dumping its processes")(DiskError::NoCopies));
        }
        let criu = self.0.criu.as_ref().ok_or_else(|| step(id, "dumping its processes")("this machine has no usable CRIU"))?;
        let folder = self.0.layout.sandbox(id);
        let dump = Dump {
            init: live.kernel.init.pid,
            images: request.images,
            volumes: self.0.layout.volumes(),
            disk_copy: request.disk_copy,
            after: request.after,
            cgroup_folders: self.0.cgroups.of(id).folders(),
            criu: criu.path.clone(),
            criu_sha256: criu.sha256.clone(),
            agent_sha256: live.kernel.agent.clone(),
            deadline: self.0.config.helper_time_max,
            folder,
        };
        let init = live.kernel.init.pid;
        drop(live);
        let dumped = match self.0.helpers.call(&dump).await {
            Ok(dumped) => dumped,
            Err(error) => {
                // A helper that was killed leaves a CRIU that undoes its work, and perhaps a disk that holds still.
                let undone = self.blocking(move |shared| shared.wait_for_helper(id)).await;
                if let Err(error) = undone {
                    tracing::error!(sandbox.id = %id, error = &error as &dyn std::error::Error, "The dump of sandbox {id} is not undone");
                }
                self.undo_dump(id, init).await;
                return Err(step(id, "dumping its processes")(error));
            }
        };
        match request.after {
            // The dump stands, whatever clings to the disk: the next start waits for that, and says so if in vain.
            AfterDump::Stop => {
                if let Err(error) = self.settle(id).await {
                    tracing::error!(sandbox.id = %id, error = &error as &dyn std::error::Error, "Dumped sandbox {id} was not released");
                }
            }
            AfterDump::KeepRunning => {}
        }
        Ok(dumped)
    }
}

impl Kernel {
    /// Undoes what helper and CRIU left in a sandbox's tasks where both were killed, and lets those go on that a killed
    /// helper made stand still. Nobody is at work on it.
    pub(super) async fn undo_dump(&self, id: SandboxId, init: i32) {
        let folder = self.0.layout.sandbox(id);
        for tries_left in (0..UNDO_TRIES).rev() {
            if !UndoDump::is_wanted(&folder) {
                break;
            }
            let undo = UndoDump { folder: folder.clone(), cgroup_folders: self.0.cgroups.of(id).folders(), init };
            match self.0.helpers.call(&undo).await {
                Ok(()) => tracing::warn!(sandbox.id = %id, "Undid a dump of sandbox {id} whose helper and CRIU were killed"),
                // It was killed too.
                Err(_) if UndoDump::is_wanted(&folder) && tries_left > 0 => {}
                Err(error) => {
                    undo::end_what_is_torn(init);
                    tracing::error!(sandbox.id = %id, error = &error as &dyn std::error::Error, "Could not undo a dump of sandbox {id}; it is ended");
                }
            }
        }
        // Held by a helper that was killed when nothing was left to undo but that.
        self.blocking(move |shared| shared.cgroups.of(id).thaw()).await;
    }
}

impl Shared {
    fn prepare_disk(&self, id: SandboxId, source: &DiskSource, size: crate::model::ByteSize) -> Result<(), DiskError> {
        let folder = self.layout.sandbox(id);
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder.work());
        made.map_err(|source| DiskError::Io { action: "make", path: folder.work(), source })?;
        self.disks.prepare(&folder, source, size)
    }
}

fn disk_error(id: SandboxId, error: DiskError) -> RuntimeError {
    match error {
        DiskError::Full { room, need } => no_room(&room, need).into(),
        other => step(id, "making the disk")(other),
    }
}
