//! Whether a lazily restored sandbox has all its memory yet.
//!
//! Two files in the work folder of a restore say it, so that the next server can read it too: `fill.lock`, locked by
//! the process that fills for as long as it lives, and `fill.done`, written when every page is in.
//! While it goes on, pause, fork and snapshot wait; when it was lost, the sandbox is killed and restored again.

use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::io;
use std::path::Path;

const LOCK: &str = "fill.lock";
const DONE: &str = "fill.done";

/// How far the memory of a sandbox is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// All of it is in; true of every sandbox that was not restored lazily.
    Complete,
    /// A process still fills it.
    GoingOn,
    /// The process died: what is missing will never come, the sandbox is torn.
    Lost,
}

/// How the fill of the restore with this work folder stands.
pub fn state(work: &Path) -> io::Result<Fill> {
    let lock = match File::open(work.join(LOCK)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Fill::Complete),
        other => other?,
    };
    match Flock::lock(lock, FlockArg::LockSharedNonblock) {
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(Fill::GoingOn),
        Err((_, errno)) => Err(errno.into()),
        // Only now: a fill that ends between the two looks must not be taken for a lost one.
        Ok(_) => match work.join(DONE).try_exists()? {
            true => Ok(Fill::Complete),
            false => Ok(Fill::Lost),
        },
    }
}

/// Forgets earlier fills: an eager restore into the same work folder.
pub fn forget(work: &Path) -> io::Result<()> {
    for name in [LOCK, DONE] {
        match std::fs::remove_file(work.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    Ok(())
}

/// From here on the memory counts as incomplete, even when the process that fills it never starts.
pub(crate) fn begin(work: &Path) -> io::Result<()> {
    forget(work)?;
    File::create(work.join(LOCK)).map(drop)
}

/// Called by the process that fills; holds for as long as the value lives.
pub(crate) fn hold(work: &Path) -> io::Result<Flock<File>> {
    let lock = File::options().write(true).open(work.join(LOCK))?;
    // Shared looks by the server last for an instant: wait for them.
    Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

/// Every page is in.
pub(crate) fn record_done(work: &Path) -> io::Result<()> {
    File::create(work.join(DONE)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_that_was_never_restored_lazily_is_complete() {
        let work = tempfile::tempdir().unwrap();
        assert_eq!(state(work.path()).unwrap(), Fill::Complete);
    }

    #[test]
    fn a_fill_goes_on_while_its_process_lives_and_is_lost_when_that_ends_early() {
        let work = tempfile::tempdir().unwrap();
        begin(work.path()).unwrap();
        assert_eq!(state(work.path()).unwrap(), Fill::Lost, "never started");
        let process = hold(work.path()).unwrap();
        assert_eq!(state(work.path()).unwrap(), Fill::GoingOn);
        drop(process);
        assert_eq!(state(work.path()).unwrap(), Fill::Lost, "ended without a word");
    }

    #[test]
    fn a_finished_fill_is_complete_until_the_next_begins() {
        let work = tempfile::tempdir().unwrap();
        begin(work.path()).unwrap();
        let process = hold(work.path()).unwrap();
        record_done(work.path()).unwrap();
        drop(process);
        assert_eq!(state(work.path()).unwrap(), Fill::Complete);
        begin(work.path()).unwrap();
        assert_eq!(state(work.path()).unwrap(), Fill::Lost);
        forget(work.path()).unwrap();
        assert_eq!(state(work.path()).unwrap(), Fill::Complete);
    }
}
