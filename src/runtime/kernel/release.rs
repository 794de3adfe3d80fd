//! Taking away what a sandbox has in the kernel, found by its id.

use super::{BoxError, Kernel, Shared, step};
use crate::model::SandboxId;
use crate::runtime::disk::{DiskKind, sync_image};
use crate::runtime::helper;
use crate::runtime::layout::SandboxFolder;
use crate::runtime::restored;
use crate::runtime::rootfs::{DiskNext, unmount_root};
use crate::runtime::{RuntimeError, WrittenFiles};
use crate::sys::disk::thaw;
use crate::sys::loop_device;
use crate::sys::mount::NewFilesystem;
use crate::sys::mountinfo::mount_point;
use crate::sys::tree;
use std::collections::{BTreeSet, HashSet};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

impl Kernel {
    /// Ends a sandbox's processes and gives everything back. Succeeds when there is nothing.
    pub(super) async fn release(&self, id: SandboxId, next: DiskNext) -> Result<(), RuntimeError> {
        let live = self.remove(id);
        let released = self.blocking(move |shared| shared.release_blocking(id, next)).await;
        if let Some(live) = live {
            // Not before the processes are gone: the slot belongs to somebody else from here on.
            let slot = self.0.network.release(live.kernel.slot).await;
            released.map_err(step(id, "giving back mounts and cgroup"))?;
            slot.map_err(step(id, "giving back the network slot"))?;
            return Ok(());
        }
        released.map_err(step(id, "giving back mounts and cgroup"))
    }

    /// [`Kernel::release`], the disk kept, with nothing left to say of an earlier restore.
    pub(super) async fn settle(&self, id: SandboxId) -> Result<(), RuntimeError> {
        self.release(id, DiskNext::Kept).await?;
        let forgotten = self.blocking(move |shared| restored::forget(&shared.layout.sandbox(id))).await;
        forgotten.map_err(step(id, "forgetting an earlier restore"))
    }

    /// Removes what belongs to nobody: of ids that are neither kept nor live everything, of kept ones without
    /// processes what only a sandbox with processes has.
    pub(super) async fn sweep_sandboxes(&self, keep: &[SandboxId]) -> Result<(), RuntimeError> {
        let live: HashSet<SandboxId> = {
            let live = self.0.live.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            live.keys().copied().collect()
        };
        let found = self.blocking(Shared::sandboxes_with_traces).await;
        for id in found.into_iter().filter(|id| !live.contains(id)) {
            let next = match keep.contains(&id) {
                true => DiskNext::Kept,
                false => DiskNext::Removed,
            };
            if let Err(error) = self.release(id, next).await {
                tracing::error!(sandbox.id = %id, error = &error as &dyn std::error::Error, "Leftovers of sandbox {id} cannot be removed");
            }
        }
        let slots: Vec<u32> = {
            let live = self.0.live.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            live.values().map(|live| live.kernel.slot).collect()
        };
        if let Err(error) = self.0.network.sweep(&slots).await {
            tracing::error!(error = &error as &dyn std::error::Error, "Leftover network slots cannot be removed");
        }
        Ok(())
    }
}

impl Shared {
    /// A helper that is at work on this sandbox has the lock of its folder. Returns when it is done, at the latest when
    /// a server would have killed it.
    pub(super) fn wait_for_helper(&self, id: SandboxId) -> io::Result<()> {
        helper::wait_until_idle(&self.layout.sandbox(id), self.config.helper_time_max)?;
        thaw_disk(&self.layout.sandbox(id))
    }

    pub(super) fn release_blocking(&self, id: SandboxId, next: DiskNext) -> Result<(), BoxError> {
        let folder = self.layout.sandbox(id);
        let cgroup = self.cgroups.of(id);
        // Who writes to a disk that holds still cannot even be killed.
        thaw_disk(&folder)?;
        cgroup.kill_all()?;
        self.wait_for_helper(id)?;
        // What a helper started between the two.
        cgroup.kill_all()?;
        unmount_root(&folder, next)?;
        cgroup.remove()?;
        match next {
            DiskNext::Kept => sync_image(&folder)?,
            DiskNext::Removed => remove_folder(folder.path())?,
        }
        Ok(())
    }

    /// Ends its processes; opens its disk a second time, since the mount that it has shows the ids of its user namespace.
    pub(super) fn show_written(&self, id: SandboxId) -> Result<WrittenFiles, BoxError> {
        self.cgroups.of(id).kill_all()?;
        let folder = self.layout.sandbox(id);
        match self.disks.kind() {
            DiskKind::Folder => Ok(WrittenFiles::in_folder(folder.disk_folder().join("upper"))),
            DiskKind::Image => {
                let number = loop_device::holder_of(&folder.disk_image())?.ok_or("its disk is not mounted")?;
                let disk = NewFilesystem::open(c"ext4")?;
                disk.set(c"source", &PathBuf::from(format!("/dev/loop{number}")))?;
                Ok(WrittenFiles::on_mount(disk.create()?, "upper"))
            }
        }
    }

    /// Every sandbox of this instance that has a folder, a cgroup or a mount. A loop device has one of them: its image lies in
    /// the folder, and without a mount it is given back by itself.
    fn sandboxes_with_traces(&self) -> BTreeSet<SandboxId> {
        let sandboxes = self.layout.sandboxes();
        let of_path = |path: &Path| path.strip_prefix(&sandboxes).ok()?.iter().next()?.to_str()?.parse().ok();
        let folders = std::fs::read_dir(&sandboxes).into_iter().flatten().flatten().filter_map(|entry| of_path(&entry.path()));
        let mut found: BTreeSet<SandboxId> = folders.chain(self.cgroups.sandboxes()).collect();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        found.extend(mounts.lines().filter_map(|line| mount_point(line.as_bytes())).filter_map(|path| of_path(&path)));
        found
    }
}

/// A helper that was killed while it copied the disk left it holding still.
fn thaw_disk(folder: &SandboxFolder) -> io::Result<()> {
    let mount = folder.disk_mount();
    match (std::fs::metadata(&mount), std::fs::metadata(folder.path())) {
        // Only its own file system; without one, the folder lies on the host's.
        (Ok(disk), Ok(host)) if disk.dev() != host.dev() => {
            thaw(std::fs::File::open(mount)?.as_fd());
            Ok(())
        }
        _ => Ok(()),
    }
}

fn remove_folder(path: &Path) -> io::Result<()> {
    match tree::remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
