//! A dump: CRIU writes the tree down, and while it stands still the disk is copied.

use super::super::disk::{DiskError, copy_of_still, sync_mounted};
use super::super::{AfterDump, DUMPED_FILE, Dumped};
use super::criu::files::forget_sizes;
use super::criu::{self, CriuError, DumpOptions, HookError, place};
use super::undo::end_what_is_torn;
use super::volumes::Left;
use super::{AtWork, HelperStep, Later, Operation};
use crate::runtime::layout::SandboxFolder;
use crate::runtime::precheck;
use crate::sys::process::{be_spared_by_the_oom_killer, go_before_others};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Dumps a running sandbox. A failure leaves it running and nothing of it changed.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Dump {
    /// Its folder.
    pub(crate) folder: SandboxFolder,
    /// Its pid 1, as the host sees it.
    pub(crate) init: i32,
    /// An existing, empty folder.
    pub(crate) images: PathBuf,
    /// Where volumes are.
    pub(crate) volumes: PathBuf,
    /// Where a copy of the disk goes, made while the tasks stand still.
    pub(crate) disk_copy: Option<PathBuf>,
    /// What becomes of the tasks.
    pub(crate) after: AfterDump,
    /// The cgroup's folders.
    pub(crate) cgroup_folders: Vec<PathBuf>,
    /// The CRIU to use.
    pub(crate) criu: PathBuf,
    /// Its content address (hex).
    pub(crate) criu_sha256: String,
    /// The agent's content address (hex).
    pub(crate) agent_sha256: String,
    /// Bound on CRIU's work.
    pub(crate) deadline: Duration,
}

impl Operation for Dump {
    const VERB: &'static str = "dump";
    type Answer = Dumped;

    fn folder(&self) -> &SandboxFolder {
        &self.folder
    }

    fn run(&self, _: &mut Later) -> Result<Dumped, HelperStep> {
        go_before_others();
        be_spared_by_the_oom_killer();
        let _notes = place::prepare(&self.criu).map_err(HelperStep::wrap("leaving the host's mounts"))?;
        let work = self.folder.work();
        let left = Left::of(self.init, &self.volumes).map_err(HelperStep::wrap("looking at its volumes"))?;
        let options = DumpOptions {
            criu: &self.criu,
            init: self.init,
            images: &self.images,
            work: &work,
            after: self.after,
            cgroups: &self.cgroup_folders,
            externals: left.externals(),
            deadline: self.deadline,
        };
        self.sync_disk_ahead().map_err(HelperStep::wrap("writing the disk's changes to its image"))?;
        let _criu_at_work = AtWork::of_criu(&self.folder).map_err(HelperStep::wrap("marking CRIU at work"))?;
        let began = Instant::now();
        let mut dumped = None;
        let report = criu::dump(&options, || {
            self.refuse_what_came_since_the_check()?;
            self.copy_disk()?;
            if !left.mounts().is_empty() {
                forget_sizes(&self.images, &left.mounts())?;
            }
            dumped = Some(self.record(began.elapsed())?);
            Ok(())
        });
        if let Err(CriuError::Torn { .. }) = &report {
            end_what_is_torn(self.init);
        }
        let report = report.map_err(HelperStep::wrap("dumping"))?;
        let dumped = dumped.ok_or_else(|| HelperStep::new("dumping", "CRIU did not stop for the disk"))?;
        Ok(Dumped { standstill: report.standstill, ..dumped })
    }
}

impl Dump {
    /// The tasks ran on after the check; now they stand still.
    fn refuse_what_came_since_the_check(&self) -> Result<(), HookError> {
        let found = precheck::never_restored(self.init, &self.volumes)?;
        match found.first() {
            Some(first) => Err(format!("{} (pid {}): {}", first.command, first.pid, first.reason).into()),
            None => Ok(()),
        }
    }

    /// What is written now need not be while the tasks stand still for the copy.
    fn sync_disk_ahead(&self) -> Result<(), DiskError> {
        match self.disk_copy {
            Some(_) => sync_mounted(&self.folder),
            None => Ok(()),
        }
    }

    fn copy_disk(&self) -> Result<(), HookError> {
        match &self.disk_copy {
            Some(copy) => Ok(copy_of_still(&self.folder, copy)?),
            None => Ok(()),
        }
    }

    /// Says beside the images that they are complete, before any task is ended: whoever finds the sandbox dead later
    /// can rely on it.
    fn record(&self, standstill: Duration) -> Result<Dumped, HookError> {
        let dumped =
            Dumped { criu: self.criu_sha256.clone(), agent: self.agent_sha256.clone(), images_bytes: bytes_in(&self.images)?, standstill };
        let mut file = File::create(self.images.join(DUMPED_FILE))?;
        file.write_all(&serde_json::to_vec(&dumped)?)?;
        Ok(dumped)
    }
}

fn bytes_in(folder: &Path) -> io::Result<u64> {
    fs::read_dir(folder)?.map(|entry| Ok(entry?.metadata()?.len())).sum()
}
