//! What a restore leaves beside the disk, for a server that comes after the one that asked for it.
//!
//! From the moment that restored processes run, the disk goes on with them: it no longer belongs to the memory in the
//! dump. The helper says so in the sandbox's folder before that moment, and once more when it is done; the row is written
//! later. It need not survive a power cut, which no process survives either: it is written in place, which costs a third
//! of a rename.

use super::layout::SandboxFolder;
use crate::model::KernelRef;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

/// What became of the latest restore of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Restored {
    /// Nothing of it ran: the disk is as it was at the dump.
    Nothing,
    /// It was restored whole; these processes may live.
    Whole(KernelRef),
    /// Its processes had begun to run when the helper ended.
    Torn,
}

/// The content of the mark.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Mark {
    kernel: KernelRef,
    whole: bool,
}

/// What the mark in this folder says.
pub(super) fn read(folder: &SandboxFolder) -> io::Result<Restored> {
    let text = match fs::read(place(folder)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Restored::Nothing),
        other => other?,
    };
    Ok(match serde_json::from_slice(&text) {
        Ok(Mark { kernel, whole: true }) => Restored::Whole(kernel),
        // Cut short by a death, or by a full disk: it had come that far.
        Ok(Mark { whole: false, .. }) | Err(_) => Restored::Torn,
    })
}

/// Says that these processes run from now on. That there is a file says so, whatever is in it.
pub(super) fn begin(folder: &SandboxFolder, kernel: &KernelRef) -> io::Result<()> {
    fs::write(place(folder), serde_json::to_vec(&Mark { kernel: kernel.clone(), whole: false })?)
}

/// Says that nothing is left to do for them. Called after [`begin`] for the same.
pub(super) fn complete(folder: &SandboxFolder, kernel: &KernelRef) -> io::Result<()> {
    let mut text = serde_json::to_vec(&Mark { kernel: kernel.clone(), whole: true })?;
    // Over "false": a shorter file would have to be cut first, and half of this is no mark but that of a torn one.
    text.push(b' ');
    fs::OpenOptions::new().write(true).open(place(folder))?.write_all(&text)
}

/// The processes are gone and what became of the disk is known.
pub(super) fn forget(folder: &SandboxFolder) -> io::Result<()> {
    match fs::remove_file(place(folder)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn place(folder: &SandboxFolder) -> PathBuf {
    folder.path().join("restored.json")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ProcessRef, SandboxId};
    use crate::runtime::layout::Layout;

    #[test]
    fn a_restore_is_nothing_then_torn_then_whole_until_it_is_forgotten() {
        let data_dir = tempfile::tempdir().unwrap();
        let folder = Layout::new(data_dir.path()).unwrap().sandbox(SandboxId::random());
        fs::create_dir_all(folder.path()).unwrap();
        let init = ProcessRef { pid: 7, start_ticks: 8 };
        let kernel = KernelRef { init, slot: 1, uid_base: 65_536, host_boot_id: "boot".into(), agent: "agent".into() };
        assert_eq!(read(&folder).unwrap(), Restored::Nothing);
        begin(&folder, &kernel).unwrap();
        assert_eq!(read(&folder).unwrap(), Restored::Torn);
        complete(&folder, &kernel).unwrap();
        assert_eq!(read(&folder).unwrap(), Restored::Whole(kernel));
        fs::write(place(&folder), "{").unwrap();
        assert_eq!(read(&folder).unwrap(), Restored::Torn);
        forget(&folder).unwrap();
        forget(&folder).unwrap();
        assert_eq!(read(&folder).unwrap(), Restored::Nothing);
    }
}
