//! What dumps take of the disk, and giving back what nothing needs.

use super::core::Core;
use super::error::StoreFailure;
use crate::model::{ByteSize, Keeper, SandboxId, SnapshotId};
use crate::runtime::Room;
use crate::store::snapshots;
use time::OffsetDateTime;

/// One dump on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DumpUse {
    /// Its id: folder `snapshots/<id>`.
    pub snapshot: SnapshotId,
    /// The sandbox that was dumped; it may be gone.
    pub sandbox: SandboxId,
    /// Who needs it; nobody any more where it goes with the next housekeeping.
    pub kept_for: Option<Keeper>,
    /// Bytes of memory images.
    pub memory: ByteSize,
    /// Bytes of its copy of the disk; none for a pause, whose disk stays with the sandbox.
    pub disk: ByteSize,
    /// When it was taken.
    pub created_at: OffsetDateTime,
    /// Whether it is known to be on stable storage.
    pub synced: bool,
}

/// All dumps of this data folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskUse {
    /// Newest first.
    pub dumps: Vec<DumpUse>,
    /// Memory and disk of all of them.
    pub used: ByteSize,
    /// The bound; setting `snapshots.disk_bytes_max`.
    pub limit: ByteSize,
    /// How full the host's disk is, where that is known.
    pub room: Option<Room>,
}

pub(super) async fn disk_use(core: &Core) -> Result<DiskUse, StoreFailure> {
    let (records, mut keepers) = core.store.read(|db| Ok((snapshots::all(db)?, snapshots::keepers(db)?))).await?;
    let used = records.iter().map(|record| record.memory_bytes.bytes() + record.disk_bytes.bytes()).sum();
    let mut dumps: Vec<DumpUse> = records
        .into_iter()
        .map(|record| DumpUse {
            snapshot: record.id,
            sandbox: record.sandbox,
            kept_for: keepers.remove(&record.id),
            memory: record.memory_bytes,
            disk: record.disk_bytes,
            created_at: record.created_at,
            synced: record.synced,
        })
        .collect();
    dumps.sort_by_key(|dump| std::cmp::Reverse(dump.created_at));
    Ok(DiskUse { dumps, used: ByteSize(used), limit: core.config.snapshots_bytes_max, room: core.runtime.room().await })
}

/// Does now what housekeeping does every minute: forgets ended sandboxes, removes those paused for too long and the
/// dumps that nothing needs. Returns how many bytes of dumps that gave back.
pub(super) async fn collect_garbage(core: &Core) -> Result<ByteSize, StoreFailure> {
    let before = disk_use(core).await?.used;
    super::housekeeping::once(core).await;
    let after = disk_use(core).await?.used;
    Ok(ByteSize(before.bytes().saturating_sub(after.bytes())))
}
