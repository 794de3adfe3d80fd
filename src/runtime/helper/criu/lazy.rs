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
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// It starts in some milliseconds; this is for a machine in trouble.
const START_TIMEOUT_MS: u16 = 10_000;

/// What the wrapper is told on its command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LazyPages {
    /// The CRIU of the restore.
    pub(crate) criu: PathBuf,
    /// The work folder of the restore; the view of the images in it ([`super::ImageView`]) must be kept.
    pub(crate) work: PathBuf,
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

/// Starts the wrapper (`executable` is this program) and waits until CRIU listens in the work folder;
/// [`super::restore`] comes next. Called before [`super::join_cgroups`]: what it reads must not be charged to the
/// sandbox.
pub(crate) fn spawn(executable: &Path, lazy: &LazyPages) -> Result<(), LazyError> {
    fill::begin(&lazy.work).map_err(|source| LazyError::Record { work: lazy.work.clone(), source })?;
    let start_error = |source| LazyError::Start { log: lazy.log(), source };
    let mut wrapper = Command::new(executable);
    wrapper.args(["runtime", "lazy-pages"]).args(lazy.arguments());
    // Its own process group: an interrupt at the server's terminal is not for it.
    wrapper.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = wrapper.spawn().map_err(start_error)?;
    let stdout = child.stdout.take().ok_or_else(|| start_error(io::ErrorKind::BrokenPipe.into()))?;
    match wait_for_byte(stdout) {
        Ok(()) => Ok(()),
        Err(source) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(start_error(source))
        }
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
    let filled = die_with_parent(&mut criu).status().is_ok_and(|status| status.success());
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
