//! The real runtime: this machine's kernel.
//!
//! ```text
//! start    disk files ─> ids, slot, cgroup ─> helper: mounts, pid 1 ─> watched by pidfd
//! stop     processes ─> mounts, loop device ─> cgroup ─> slot
//! adopt    pidfd of the same process (start time) ─> slot, ids
//! sweep    whatever carries our marks and belongs to nobody
//! ```
//!
//! Nothing here remembers how far an operation had come: what a sandbox has in the kernel is found by its id (cgroup,
//! folder, mounts), so that one way of cleaning up serves a failed start, a stop and the next server. Only libcontainer
//! and CRIU need the helper process; everything else is done here, on blocking threads.

mod live;
mod open;
mod orphans;
mod pools;
mod release;
mod room;
mod roots;
mod start;
mod volumes;

pub use open::OpenError;

use super::cgroup::Cgroups;
use super::config::RuntimeConfig;
use super::criu_binary::CriuBinary;
use super::disk::{DiskError, DiskKind, Disks, copy_of_mounted};
use super::layout::Layout;
use super::network::{Network, NetworkError};
use super::rootfs::{DiskNext, missing_in};
use super::uids::UidPool;
use super::volumes::Volumes;
use super::{
    DumpRequest, Dumped, Exhausted, Exit, Finding, Restored, Room, Runtime, RuntimeError, Scarce, StartRequest, UnmountHow, Unmounted,
    Usage, Writing, WrittenFiles, fill, precheck, restored,
};
use crate::model::{ByteSize, DumpKey, KernelRef, NetworkPolicy, SandboxId, SecretRecord, VolumeMount};
use crate::runtime::helper::client::Helpers;
use live::Live;
use room::Lookout;
use roots::Roots;
use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The runtime of one server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Kernel(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    config: RuntimeConfig,
    layout: Layout,
    disks: Disks,
    volumes: Volumes,
    cgroups: Cgroups,
    uids: UidPool,
    network: Network,
    /// Made before they are wanted.
    roots: Roots,
    lookout: Lookout,
    helpers: Helpers,
    /// SHA-256 of this build's agent.
    agent: String,
    /// `None` where there is none: nothing can be dumped then.
    criu: Option<CriuBinary>,
    host_boot_id: String,
    dump_key: DumpKey,
    live: Mutex<HashMap<SandboxId, Arc<Live>>>,
}

/// How often a lazy restore is asked whether it is complete; 1 GB takes some 400 ms.
const FILL_LOOK_EVERY: Duration = Duration::from_millis(10);

/// A process can keep whoever reads its memory map waiting for as long as it lives.
const LOOK_TIME_MAX: Duration = Duration::from_secs(30);

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Names the step of a sandbox's operation that an error happened in.
fn step<E: Into<BoxError>>(id: SandboxId, step: &'static str) -> impl FnOnce(E) -> RuntimeError {
    move |source| RuntimeError::Step { id, step, source: source.into() }
}

impl Kernel {
    /// Whom every sandbox asks for names: the gateway of its slot.
    pub fn nameservers(&self) -> Vec<IpAddr> {
        let text = self.0.network.resolv_conf();
        text.lines().filter_map(|line| line.strip_prefix("nameserver ")?.trim().parse().ok()).collect()
    }

    /// The volumes that its sandboxes mount.
    pub fn volumes(&self) -> Volumes {
        self.0.volumes.clone()
    }

    fn live(&self, id: SandboxId) -> Result<Arc<Live>, RuntimeError> {
        let live = self.0.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.get(&id).cloned().ok_or(RuntimeError::NotRunning { id })
    }

    fn insert(&self, id: SandboxId, live: Live) {
        self.0.live.lock().unwrap_or_else(PoisonError::into_inner).insert(id, Arc::new(live));
    }

    fn remove(&self, id: SandboxId) -> Option<Arc<Live>> {
        self.0.live.lock().unwrap_or_else(PoisonError::into_inner).remove(&id)
    }

    /// Runs blocking work on a thread that may block. A panic in it is one here.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Shared) -> T + Send + 'static) -> T {
        let shared = Arc::clone(&self.0);
        match tokio::task::spawn_blocking(move || work(&shared)).await {
            Ok(done) => done,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }
}

#[async_trait::async_trait]
impl Runtime for Kernel {
    async fn start(&self, request: StartRequest) -> Result<KernelRef, RuntimeError> {
        self.start_sandbox(request).await
    }

    async fn adopt(&self, id: SandboxId, kernel: &KernelRef, network: &NetworkPolicy) -> Result<(), RuntimeError> {
        let is_ours = kernel.host_boot_id == self.0.host_boot_id;
        let waited = self.blocking(move |shared| shared.wait_for_helper(id)).await;
        waited.map_err(step(id, "waiting for an earlier server's helper"))?;
        let live = match is_ours {
            true => self.watch(id, kernel.clone(), self.0.uids.adopt(kernel.uid_base)),
            false => None,
        };
        let live = live.ok_or(RuntimeError::NotRunning { id })?;
        self.undo_dump(id, kernel.init.pid).await;
        self.0.network.adopt(kernel.slot, id, network).await.map_err(step(id, "taking over the network slot"))?;
        self.insert(id, live);
        Ok(())
    }

    async fn restored(&self, id: SandboxId) -> Result<Restored, RuntimeError> {
        let looked = self.blocking(move |shared| {
            shared.wait_for_helper(id)?;
            restored::read(&shared.layout.sandbox(id))
        });
        looked.await.map_err(step(id, "looking for what an earlier server restored"))
    }

    async fn exited(&self, id: SandboxId) -> Exit {
        match self.live(id) {
            Ok(live) => live.exited().await,
            Err(_) => Exit::unknown(),
        }
    }

    async fn written(&self, id: SandboxId) -> Result<WrittenFiles, RuntimeError> {
        let shown = self.blocking(move |shared| shared.show_written(id)).await;
        shown.map_err(step(id, "looking at what it wrote"))
    }

    async fn stop(&self, id: SandboxId) -> Result<(), RuntimeError> {
        self.settle(id).await
    }

    async fn destroy(&self, id: SandboxId) -> Result<(), RuntimeError> {
        self.release(id, DiskNext::Removed).await
    }

    async fn dump(&self, request: DumpRequest) -> Result<Dumped, RuntimeError> {
        self.dump_sandbox(request).await
    }

    async fn copy_disk(&self, id: SandboxId, to: PathBuf) -> Result<(), RuntimeError> {
        self.live(id)?;
        if self.0.disks.kind() == DiskKind::Folder {
            return Err(step(id, "copying its disk")(DiskError::NoCopies));
        }
        let copied = self.blocking(move |shared| copy_of_mounted(&shared.layout.sandbox(id), &to));
        copied.await.map_err(step(id, "copying its disk"))
    }

    async fn findings(&self, id: SandboxId) -> Result<Vec<Finding>, RuntimeError> {
        let live = self.live(id)?;
        let init = live.kernel.init.pid;
        let looked = async {
            // A look that nobody waits for any more goes on: never more of them than one.
            let looking = Arc::clone(&live.looking).lock_owned().await;
            let found = self.blocking(move |shared| {
                let _looking = looking;
                let folder = shared.layout.sandbox(id);
                let mut findings = precheck::findings(init, fill::state(&folder.work())?, &shared.layout.volumes())?;
                let missing = missing_in(&folder.root_mount())?;
                findings.extend(missing.map(|path| precheck::missing(&path)));
                Ok::<_, std::io::Error>(findings)
            });
            found.await
        };
        match tokio::time::timeout(LOOK_TIME_MAX, looked).await {
            Ok(found) => found.map_err(step(id, "looking for what cannot be dumped")),
            Err(_) => Ok(vec![precheck::unanswered(LOOK_TIME_MAX)]),
        }
    }

    async fn dial(&self, id: SandboxId, port: u16) -> std::io::Result<tokio::net::TcpStream> {
        let live = self.live(id).map_err(|error| std::io::Error::new(std::io::ErrorKind::NotConnected, error))?;
        self.0.network.dial(&live.netns, port).await
    }

    async fn require_room(&self, id: SandboxId, writing: Writing) -> Result<(), RuntimeError> {
        self.live(id)?;
        self.blocking(move |shared| shared.require_room(id, writing)).await
    }

    async fn room(&self) -> Option<Room> {
        self.blocking(|shared| shared.disks.room().ok()).await
    }

    async fn usage(&self, id: SandboxId) -> Result<Usage, RuntimeError> {
        self.live(id)?;
        let read = self.blocking(move |shared| -> Result<Usage, BoxError> {
            let used = shared.cgroups.of(id).usage()?;
            let disk = nix::sys::statvfs::statvfs(&shared.layout.sandbox(id).disk_mount())?;
            let bytes = |blocks: u64| blocks * disk.fragment_size();
            Ok(Usage {
                cpu_ns: used.cpu_ns,
                memory_used_bytes: used.memory_used_bytes,
                memory_cache_bytes: used.memory_cache_bytes,
                disk_used_bytes: bytes(disk.blocks() - disk.blocks_free()),
                disk_total_bytes: bytes(disk.blocks()),
            })
        });
        read.await.map_err(step(id, "reading the usage"))
    }

    fn dump_key(&self) -> DumpKey {
        self.0.dump_key.clone()
    }

    async fn filled(&self, id: SandboxId) -> Result<(), RuntimeError> {
        loop {
            let looked = self.blocking(move |shared| fill::state(&shared.layout.sandbox(id).work())).await;
            match looked.map_err(step(id, "looking how far its memory is"))? {
                fill::Fill::Complete => return Ok(()),
                fill::Fill::GoingOn => tokio::time::sleep(FILL_LOOK_EVERY).await,
                fill::Fill::Lost => return Err(step(id, "filling its memory")("the process that fills it ended early")),
            }
        }
    }

    fn expect(&self, request: &StartRequest) {
        self.expect_root(request);
    }

    async fn set_network(&self, id: SandboxId, policy: &NetworkPolicy) -> Result<(), RuntimeError> {
        let slot = self.live(id)?.kernel.slot;
        self.0.network.set_policy(slot, policy).await.map_err(|error| network_error(id, error))
    }

    fn set_secrets(&self, secrets: Vec<SecretRecord>) {
        self.0.network.set_secrets(secrets);
    }

    async fn set_memory(&self, id: SandboxId, memory: ByteSize) -> Result<(), RuntimeError> {
        self.live(id)?;
        let set = self.blocking(move |shared| shared.cgroups.of(id).set_memory(memory)).await;
        set.map_err(|error| RuntimeError::Step { id, step: "changing the memory limit", source: Box::new(error) })
    }

    async fn mount_volume(&self, id: SandboxId, mount: &VolumeMount) -> Result<(), RuntimeError> {
        self.mount_in_running(id, mount.clone()).await
    }

    async fn unmount_volume(&self, id: SandboxId, mount: &VolumeMount, how: UnmountHow) -> Result<Unmounted, RuntimeError> {
        self.unmount_in_running(id, mount.clone(), how).await
    }

    async fn sweep(&self, keep: &[SandboxId]) -> Result<(), RuntimeError> {
        self.sweep_sandboxes(keep).await
    }

    async fn close(&self) {
        self.0.helpers.close();
        self.empty_roots().await;
        self.0.network.close().await;
        self.blocking(|shared| {
            shared.lookout.close();
            shared.cgroups.close();
            shared.volumes.close();
        })
        .await;
    }
}

fn network_error(id: SandboxId, error: NetworkError) -> RuntimeError {
    match error {
        NetworkError::NoSlot { limit } => RuntimeError::Exhausted(Exhausted {
            scarce: Scarce::Places,
            what: "the pool of network slots".to_owned(),
            used: limit.to_string(),
            limit: format!("{limit} (network.slots_max)"),
            remedy: "kill sandboxes or raise network.slots_max".to_owned(),
        }),
        other => step(id, "setting up the network")(other),
    }
}
