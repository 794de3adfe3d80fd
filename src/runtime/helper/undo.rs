//! Undoing a dump whose helper and CRIU were both killed: by the next helper, once nobody is at work any more.

use super::criu;
use super::{HelperStep, Later, Operation};
use crate::runtime::layout::SandboxFolder;
use crate::sys::process::{kill, open_pidfd};
use std::os::fd::AsFd;
use std::path::PathBuf;

/// Gives the tasks back what they were. Tasks that cannot be given that are ended.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct UndoDump {
    /// The sandbox's folder.
    pub(crate) folder: SandboxFolder,
    /// The cgroup's folders.
    pub(crate) cgroup_folders: Vec<PathBuf>,
    /// Its pid 1, as the host sees it.
    pub(crate) init: i32,
}

impl UndoDump {
    /// Whether there is something to undo.
    pub(crate) fn is_wanted(folder: &SandboxFolder) -> bool {
        criu::is_left_open(&folder.work())
    }
}

impl Operation for UndoDump {
    const VERB: &'static str = "undo-dump";
    type Answer = ();

    fn folder(&self) -> &SandboxFolder {
        &self.folder
    }

    fn run(&self, _: &mut Later) -> Result<(), HelperStep> {
        let undone = criu::undo_left_open(&self.folder.work(), &self.cgroup_folders);
        if undone.is_err() {
            end_what_is_torn(self.init);
        }
        undone.map_err(HelperStep::wrap("undoing a dump"))
    }
}

/// Tasks that run foreign code are worth less than none: pid 1 goes, and the sandbox with its reason in the log.
pub(crate) fn end_what_is_torn(init: i32) {
    let ended = open_pidfd(init).and_then(|init| kill(init.as_fd()));
    // It was dead already.
    drop(ended);
}
