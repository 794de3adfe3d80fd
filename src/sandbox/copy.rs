//! A source for copies: what fork and snapshot start from.
//!
//! Of a running sandbox: a dump with a copy of its disk, made while its tasks stand still. Of a paused one: its own dump
//! and disk, held still by its driver for as long as the source is in use.

use super::core::Core;
use super::driver::Driver;
use super::dump_folder::DumpFolder;
use super::pause::{PauseFailure, snapshot_row};
use crate::model::{BuildRecord, ByteSize, Keep, SandboxSpec, SandboxState, SnapshotId, SnapshotRecord};
use crate::runtime::{AfterDump, Writing};
use crate::store::{snapshots, templates};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::oneshot;

/// What copies start from. Dropping it lets go of the files.
#[derive(Debug)]
pub(super) struct CopySource {
    /// As of the moment of the copy.
    pub(super) spec: SandboxSpec,
    pub(super) build: BuildRecord,
    pub(super) generation: u64,
    pub(super) boot_id: String,
    /// A disk that nobody writes.
    pub(super) disk: PathBuf,
    /// The row of its files, and of its memory if it has any; `None` of one that was paused without.
    pub(super) dump: Option<SnapshotRecord>,
    held: Held,
}

/// Why the files stay as they are.
#[derive(Debug)]
enum Held {
    /// They were made for this source and go with it, unless they are kept.
    Made { core: Arc<Core>, folder: DumpFolder, keep: AtomicBool },
    /// The driver of the paused sandbox waits until this is dropped.
    Still { _until_dropped: oneshot::Sender<()> },
}

impl CopySource {
    /// Hands the files over: they stay when the source is dropped.
    pub(super) fn keep_files(&self) {
        if let Held::Made { keep, .. } = &self.held {
            keep.store(true, Ordering::Release);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Self::Made { core, folder, keep } = self
            && !keep.load(Ordering::Acquire)
        {
            let folder = folder.clone();
            core.spawn(async move { folder.remove().await });
        }
    }
}

impl Driver {
    /// A source with memory, if there is any and it is to be kept; of a paused sandbox with the receiver that ends when the source is not used any more.
    pub(super) async fn copy(&mut self, keep: Keep) -> Result<(CopySource, Option<oneshot::Receiver<()>>), PauseFailure> {
        let build_id = self.record.spec.build;
        let build = self.core.store.read(move |db| templates::build(db, build_id)).await?;
        let build = build.ok_or(PauseFailure::Gone)?;
        match self.record.state {
            SandboxState::Paused => self.hold_still(build).await,
            SandboxState::Running => match keep {
                Keep::Memory => Ok((self.dump_for_copies(build).await?, None)),
                Keep::FilesOnly => Ok((self.copy_files(build).await?, None)),
            },
            SandboxState::Creating
            | SandboxState::Pausing
            | SandboxState::Resuming
            | SandboxState::Killing
            | SandboxState::Killed
            | SandboxState::Failed => Err(PauseFailure::Gone),
        }
    }

    async fn hold_still(&self, build: BuildRecord) -> Result<(CopySource, Option<oneshot::Receiver<()>>), PauseFailure> {
        let dump = match self.record.snapshot {
            Some(id) => self.core.store.read(move |db| snapshots::by_id(db, id)).await?,
            None => None,
        };
        let (until_dropped, dropped) = oneshot::channel();
        let disk = self.core.config.data_dir.join("sandboxes").join(self.id.as_str()).join("disk.img");
        Ok((self.source(build, disk, dump, Held::Still { _until_dropped: until_dropped }), Some(dropped)))
    }

    async fn dump_for_copies(&mut self, build: BuildRecord) -> Result<CopySource, PauseFailure> {
        self.require_dumpable(Writing::Copy(Keep::Memory)).await?;
        let snapshot = SnapshotId::random();
        let dumped = self.dump(snapshot, AfterDump::KeepRunning).await?;
        self.core.failpoints.pass("copy.dumped").await;
        let folder = DumpFolder::of(&self.core, snapshot);
        folder.put_in_place().await;
        self.core.failpoints.pass("copy.renamed").await;
        let row = snapshot_row(&self.core, snapshot, &self.record, &dumped).await;
        tracing::info!(sandbox.id = %self.id, standstill_ms = dumped.standstill.as_millis(), "Dumped running sandbox {}", self.id);
        let disk = folder.disk();
        Ok(self.source(build, disk, Some(row), Held::Made { core: Arc::clone(&self.core), folder, keep: AtomicBool::new(false) }))
    }

    /// Nothing of what runs is looked at: what keeps memory from being dumped keeps no file from being copied.
    async fn copy_files(&mut self, build: BuildRecord) -> Result<CopySource, PauseFailure> {
        self.require_room(Writing::Copy(Keep::FilesOnly)).await?;
        let id = SnapshotId::random();
        let folder = DumpFolder::of(&self.core, id);
        folder.make().await.map_err(|error| PauseFailure::Dump(Arc::new(error)))?;
        let runtime = Arc::clone(&self.core.runtime);
        if let Err(error) = self.serve_during(runtime.copy_disk(self.id, folder.disk())).await {
            folder.remove().await;
            return Err(error.into());
        }
        folder.put_in_place().await;
        let row = SnapshotRecord {
            id,
            sandbox: self.id,
            key: self.core.runtime.dump_key(),
            control_secret: self.record.control_secret.clone(),
            memory_bytes: ByteSize(0),
            disk_bytes: ByteSize(folder.bytes().await),
            created_at: self.core.clock.now(),
            synced: false,
            volumes: self.record.spec.volumes.clone(),
        };
        let disk = folder.disk();
        Ok(self.source(build, disk, Some(row), Held::Made { core: Arc::clone(&self.core), folder, keep: AtomicBool::new(false) }))
    }

    fn source(&self, build: BuildRecord, disk: PathBuf, dump: Option<SnapshotRecord>, held: Held) -> CopySource {
        let record = &self.record;
        CopySource { spec: record.spec.clone(), build, generation: record.generation, boot_id: record.boot_id.clone(), disk, dump, held }
    }
}
