//! Lazy restores: the process that fills a sandbox's memory after it already runs.
//!
//! ```text
//! helper ── spawn ──> wrapper (`stillbox runtime lazy-pages`, outlives the helper and the server)
//!                        └── criu lazy-pages: exit 0 ──> wrapper writes fill.done
//! ```
//!
//! Until `fill.done` is there, pages of the sandbox exist in the images only: a dump would lose them, and when the
//! wrapper dies the sandbox has to be killed and restored again. [`crate::runtime::fill`] tells the two apart.

use super::images;
use crate::runtime::fill;
use crate::sys::command::die_with_parent;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

/// It starts in some milliseconds; this is for a machine in trouble.
const START_TIMEOUT_MS: u16 = 10_000;

/// What the wrapper is told on its command line: the CRIU and the work folder of the restore. The view of the images
/// in that folder is its to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LazyPages {
    criu: PathBuf,
    work: PathBuf,
}

/// Why memory cannot be filled lazily.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LazyError {
    /// The wrapper or CRIU did not start.
    #[error("cannot start CRIU's lazy-pages; its log is {}", log.display())]
    Start {
        /// Its log, if it came so far.
        log: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The state of the fill cannot be recorded.
    #[error("cannot record the fill in {}", work.display())]
    Record {
        /// The work folder.
        work: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl LazyPages {
    /// The subcommand's arguments, as [`LazyPages::from_arguments`] reads them.
    fn arguments(&self) -> [OsString; 2] {
        [self.criu.clone().into(), self.work.clone().into()]
    }

    /// Reads what follows `runtime lazy-pages` on the command line.
    pub(crate) fn from_arguments(arguments: &[OsString]) -> Option<LazyPages> {
        match arguments {
            [criu, work] => Some(LazyPages { criu: criu.into(), work: work.into() }),
            _ => None,
        }
    }

    fn log(&self) -> PathBuf {
        self.work.join("lazy-pages.log")
    }
}

/// Records that all memory comes with the restore itself.
pub(super) fn forget(work: &Path) -> Result<(), LazyError> {
    fill::forget(work).map_err(|source| LazyError::Record { work: work.to_owned(), source })
}

/// Starts the wrapper and waits until CRIU listens in the work folder.
pub(super) fn spawn(executable: &Path, criu: &Path, work: &Path) -> Result<Filler, LazyError> {
    fill::begin(work).map_err(|source| LazyError::Record { work: work.to_owned(), source })?;
    let lazy = LazyPages { criu: criu.to_owned(), work: work.to_owned() };
    let start_error = |source| LazyError::Start { log: lazy.log(), source };
    let mut wrapper = Command::new(executable);
    wrapper.args(["runtime", "lazy-pages"]).args(lazy.arguments());
    // Its own process group: an interrupt at the server's terminal is not for it.
    wrapper.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut filler = Filler { child: wrapper.spawn().map_err(start_error)?, work: work.to_owned() };
    let stdout = filler.child.stdout.take().ok_or_else(|| start_error(io::ErrorKind::BrokenPipe.into()))?;
    wait_for_byte(stdout).map_err(start_error)?;
    Ok(filler)
}

/// A wrapper that waits for the restore to succeed. Dropped before, or dead with this process, it ends.
#[derive(Debug)]
pub(super) struct Filler {
    child: Child,
    work: PathBuf,
}

impl Filler {
    /// The restore has succeeded: the wrapper goes on by itself.
    pub(super) fn go_on(mut self) {
        if let Some(mut stdin) = self.child.stdin.take() {
            // A wrapper that died is for the server to see (`Fill::Lost`); the sandbox is torn either way.
            let _ = stdin.write_all(&[1]);
        }
        std::mem::forget(self);
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // Its end of file.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
        // Nothing runs that could miss a page.
        let _ = fill::forget(&self.work);
    }
}

/// CRIU writes one byte when it listens; an end of file means that it died before.
fn wait_for_byte(mut status: impl Read + AsFd) -> io::Result<()> {
    let ready = poll(&mut [PollFd::new(status.as_fd(), PollFlags::POLLIN)], PollTimeout::from(START_TIMEOUT_MS))?;
    match ready {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => status.read_exact(&mut [0]),
    }
}

/// The wrapper's whole life: runs CRIU until the memory is filled and records how that ended.
pub(crate) fn serve(lazy: &LazyPages) -> ExitCode {
    // Held until this process ends: that, and nothing else, says that the fill goes on.
    let Ok(_going_on) = fill::hold(&lazy.work) else { return ExitCode::FAILURE };
    let mut criu = Command::new(&lazy.criu);
    criu.args(["--no-default-config", "lazy-pages", "--status-fd", "1", "-v2", "-o"]).arg(lazy.log());
    criu.arg("-D").arg(images::folder_in(&lazy.work)).arg("-W").arg(&lazy.work);
    criu.env_clear().stdin(Stdio::null()).stderr(Stdio::null());
    let Ok(mut criu) = die_with_parent(&mut criu).spawn() else { return ExitCode::FAILURE };
    // The helper says so when the restore has succeeded; an end of file means that there is nothing to fill.
    if io::stdin().read_exact(&mut [0]).is_err() {
        let _ = criu.kill();
    }
    let filled = criu.wait().is_ok_and(|status| status.success());
    if !filled || fill::record_done(&lazy.work).is_err() {
        return ExitCode::FAILURE;
    }
    // What stays behind lies in the sandbox's own folder and goes with it.
    let _ = images::remove(&images::folder_in(&lazy.work));
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wrapper_reads_back_what_it_was_told() {
        let lazy = LazyPages { criu: "/c".into(), work: "/w ork".into() };
        assert_eq!(LazyPages::from_arguments(&lazy.arguments()), Some(lazy.clone()));
        assert_eq!(LazyPages::from_arguments(&lazy.arguments()[..1]), None);
    }
}
