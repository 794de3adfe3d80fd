//! CRIU, as the helper process uses it: stops a sandbox's time and lets it go on elsewhere.
//!
//! [`dump`] and [`restore`] run `criu swrk` with every option of the recipe; the caller's work happens in the hooks,
//! at the moments that CRIU stops for. One operation per helper process, called from its only thread:
//!
//! ```text
//! dump:     place::prepare ─> dump { tasks frozen … images written … on_frozen … } ─> tasks gone, or going on
//! restore:  restore { uid base, lazy fill, cgroups, own mounts … in_place … set_up_netns … before_it_runs } ─> tasks going on
//! ```
//!
//! What a failure leaves: a failed dump leaves the tasks running as they were, also where CRIU was killed in its middle
//! ([`cure`]); a failed restore leaves no task of
//! this operation (CRIU kills init, and with it the tree) and the images untouched. Never touches mounts of the
//! host's namespace, the disk or the cgroup's limits: those are the caller's.

mod cure;
mod failure;
pub(super) mod files;
mod frozen;
mod images;
mod journal;
pub(crate) mod lazy;
pub(crate) mod place;
mod swrk;

use crate::runtime::{AfterDump, GHOST_BYTES_MAX};
use crate::sys::netns::Netns;
use crate::sys::{loopback, sock_diag};
use frozen::Frozen;
use images::ImageView;
use nix::sched::CloneFlags;
use place::Seat;
use rust_criu::rust_criu_protobuf::rpc;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use swrk::{End, Guard, Swrk, Verb};

/// CRIU's own bound on collecting and freezing the tasks: the sandbox stands still for at most this long before a
/// dump gives up.
const FREEZE_TIMEOUT_S: u32 = 5;

/// What a hook fails with.
pub(crate) type HookError = Box<dyn std::error::Error + Send + Sync>;

/// Why a dump or restore failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CriuError {
    /// The executable did not start.
    #[error("cannot start CRIU {}; see `stillbox doctor`", path.display())]
    Spawn {
        /// The executable.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A folder of the operation cannot be used.
    #[error("cannot use {} for CRIU's images or logs", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// CRIU cannot be given what it runs in.
    #[error(transparent)]
    Place(#[from] place::PlaceError),
    /// The dump cannot be restored as it is.
    #[error(transparent)]
    Images(#[from] images::ImagesError),
    /// The memory cannot come in lazily.
    #[error(transparent)]
    Lazy(#[from] lazy::LazyError),
    /// CRIU said no, or died.
    #[error("CRIU could not {verb} the sandbox: {reason}; its log is {}", log.display())]
    Refused {
        /// `dump` or `restore`.
        verb: &'static str,
        /// CRIU's first errors, without the harmless ones.
        reason: String,
        /// The whole story.
        log: PathBuf,
    },
    /// It was killed in the middle of a dump; what it had changed in the tasks was undone and they go on.
    #[error("CRIU was killed in the middle of the dump; the sandbox goes on as it was; its log is {}", log.display())]
    Killed {
        /// How far it came.
        log: PathBuf,
    },
    /// It was killed in the middle of a dump, and what it had changed in the tasks is there still.
    #[error("CRIU was killed in the middle of the dump and left the sandbox torn; its log is {}", log.display())]
    Torn {
        /// How far it came.
        log: PathBuf,
        /// What could not be undone.
        #[source]
        source: cure::CureError,
    },
    /// It took longer than the caller allows; CRIU was killed.
    #[error("CRIU did not {verb} the sandbox within {} s; its log is {}", deadline.as_secs(), log.display())]
    TimedOut {
        /// `dump` or `restore`.
        verb: &'static str,
        /// The bound.
        deadline: Duration,
        /// How far it came.
        log: PathBuf,
    },
    /// The caller's own step failed; CRIU was told so and undid its work.
    #[error("{moment} of the {verb} failed")]
    Hook {
        /// `dump` or `restore`.
        verb: &'static str,
        /// CRIU's name of the moment.
        moment: String,
        /// The step's error.
        #[source]
        source: HookError,
    },
    /// The conversation with CRIU broke in a way that no version >= 4.2 should.
    #[error("CRIU's answer to {verb} makes no sense: {detail}")]
    Protocol {
        /// `dump` or `restore`.
        verb: &'static str,
        /// What was seen.
        detail: String,
    },
}

impl CriuError {
    /// The file that a restore could not open, and why: one that others have changed, since CRIU made sure of it at the dump.
    pub(crate) fn unopened_file(&self) -> Option<(String, String)> {
        match self {
            Self::Refused { reason, .. } => failure::unopened_file(reason),
            _ => None,
        }
    }
}

/// What to dump, and where to.
#[derive(Debug)]
pub(crate) struct DumpOptions<'a> {
    /// The CRIU to run.
    pub(crate) criu: &'a Path,
    /// The sandbox's pid 1, as the host sees it.
    pub(crate) init: i32,
    /// An existing, empty folder for the images.
    pub(crate) images: &'a Path,
    /// An existing folder for `dump.log`.
    pub(crate) work: &'a Path,
    /// What becomes of the tasks.
    pub(crate) after: AfterDump,
    /// The cgroups that they are in.
    pub(crate) cgroups: &'a [PathBuf],
    /// Mounts that are not the sandbox's own: `mnt[path inside]:name`.
    pub(crate) externals: Vec<String>,
    /// Bound on the whole operation, memory writing included.
    pub(crate) deadline: Duration,
}

/// What a dump did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DumpReport {
    /// From just before the tasks were seized until CRIU was done with them; an upper bound.
    pub(crate) standstill: Duration,
}

/// Dumps the tree below `init`.
///
/// `on_frozen` is called when the images are complete and the tasks still stand: the moment to copy the disk, and
/// the last one to say no. When it fails the tasks go on, whatever `after` says.
pub(crate) fn dump(options: &DumpOptions<'_>, mut on_frozen: impl FnMut() -> Result<(), HookError>) -> Result<DumpReport, CriuError> {
    let images = open_folder(options.images)?;
    let work = open_folder(options.work)?;
    let mut request = shared_options(&images, &work, Verb::Dump);
    request.pid = Some(options.init);
    request.external.clone_from(&options.externals);
    request.leave_running = Some(options.after == AfterDump::KeepRunning);
    request.tcp_skip_in_flight = Some(true);
    // The veth goes away or the tasks stand still: nobody outside can see a half-dumped connection.
    request.network_lock = Some(rpc::Criu_network_lock_method::SKIP.into());
    request.ghost_limit = Some(GHOST_BYTES_MAX);
    request.timeout = Some(FREEZE_TIMEOUT_S);

    let journal = journal::begin(options.work).map_err(|source| CriuError::Folder { path: options.work.to_owned(), source })?;
    let guard = Guard { cgroups: options.cgroups, journal };
    let mut swrk = Swrk::start(options.criu, Verb::Dump, options.work, &Seat::Here, options.deadline, Some(guard))?;
    let mut frozen_at = None;
    let outcome = swrk.run(request, |moment, _pid| match moment {
        "pre-dump" => {
            frozen_at = Some(Instant::now());
            Ok(())
        }
        "post-dump" => on_frozen(),
        _ => Ok(()),
    });
    let report = match outcome {
        Ok(_) => Ok(DumpReport { standstill: frozen_at.map_or(Duration::ZERO, |at| at.elapsed()) }),
        Err(error) => Err(undo(&mut swrk, options, error)),
    };
    journal::end(options.work).map_err(|source| CriuError::Folder { path: options.work.to_owned(), source })?;
    report
}

/// Whether a dump with this work folder was begun by a helper that then died, and may have left something in the tasks.
pub(crate) fn is_left_open(work: &Path) -> bool {
    journal::is_open(work)
}

/// Undoes what a dump left whose helper and CRIU were both killed. The tasks of `cgroups` ran on meanwhile.
pub(crate) fn undo_left_open(work: &Path, cgroups: &[PathBuf]) -> Result<(), CriuError> {
    let cured = cure::cure(work, cgroups, Some(Frozen::freeze(cgroups)));
    journal::end(work).map_err(|source| CriuError::Folder { path: work.to_owned(), source })?;
    cured.map_err(|source| CriuError::Torn { log: work.join(Verb::Dump.log_name()), source })
}

/// A CRIU that fails undoes its work before it says so; what a killed one left is undone here.
fn undo(swrk: &mut Swrk, options: &DumpOptions<'_>, error: CriuError) -> CriuError {
    let log = || options.work.join(Verb::Dump.log_name());
    match (swrk.end(), error) {
        (End::AfterItsAnswer, error) => error,
        (End::InTheMiddle(frozen), error) => match (cure::cure(options.work, options.cgroups, frozen), error) {
            (Ok(()), CriuError::Refused { .. }) => CriuError::Killed { log: log() },
            (Ok(()), error) => error,
            (Err(source), _) => CriuError::Torn { log: log(), source },
        },
    }
}

/// What to restore, and from where.
#[derive(Debug)]
pub(crate) struct RestoreOptions<'a> {
    /// The CRIU to run: the one that wrote the images.
    pub(crate) criu: &'a Path,
    /// The folder of the dump. Only read, so that many restores may use it at once.
    pub(crate) images: &'a Path,
    /// An existing folder of this sandbox alone, for logs, the lazy fill's state and a view of the images.
    pub(crate) work: &'a Path,
    /// How far the view of the images in `work` is.
    pub(crate) view: View,
    /// The mounted root file system.
    pub(crate) root: &'a Path,
    /// First host uid and gid of the sandbox's range, whatever it was at the dump.
    pub(crate) uid_base: u32,
    /// The sandbox's fresh cgroups: one folder on v2, one per hierarchy on v1.
    pub(crate) cgroups: &'a [PathBuf],
    /// What the mounts are that the dump only names: `mnt[name]:path here`.
    pub(crate) externals: Vec<String>,
    /// Whether memory is read before or after the tasks run.
    pub(crate) memory: Memory<'a>,
    /// Bound on the whole operation.
    pub(crate) deadline: Duration,
}

/// The images as one restore needs them ([`ImageView`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum View {
    /// Nobody made one.
    ToMake,
    /// Made ahead, for the same images and ids ([`make_ahead`]).
    Made,
}

/// When a restore reads the memory images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Memory<'a> {
    /// All of it before the tasks run.
    Now,
    /// As it is touched, and the rest in the background, by a process that outlives this one; see
    /// [`crate::runtime::fill`].
    Lazily {
        /// This program, which is run as `<executable> runtime lazy-pages …` ([`lazy::serve`]).
        executable: &'a Path,
    },
}

/// The caller's part in a restore, in this order.
#[derive(Debug)]
pub(crate) struct Hooks<P, N, B> {
    /// This process is where CRIU is going to run, in a mount namespace of its own with the sandbox's root: what else CRIU
    /// has to find is put there.
    pub(crate) in_place: P,
    /// Gets the new network namespace, which has lo, still down, and nothing else: lo up, link, the address of the dump,
    /// route and sysctls are made here (a missing address fails the restore of a connection, a missing ping_group_range
    /// that of a ping socket).
    pub(crate) set_up_netns: N,
    /// Gets init's pid, as the host sees it, with everything restored and nothing running yet: the last moment to say no.
    pub(crate) before_it_runs: B,
}

/// What a restore made.
#[derive(Debug)]
pub(crate) struct Restored {
    /// The sandbox's pid 1, as the host sees it. A child of this process, so of the server once this one has ended.
    pub(crate) init: i32,
    /// What is over with the restore, and ends when this is dropped.
    pub(crate) over: Over,
}

/// A CRIU in its last steps, and the view of the images that it read.
#[derive(Debug)]
pub(crate) struct Over {
    // Dropped in this order.
    _swrk: Swrk,
    _view: Option<ImageView>,
}

/// Makes in `work` what a restore there would make first: the view of the images, and the log, since making a file costs
/// more than writing it.
pub(crate) fn make_ahead(images: &Path, work: &Path, uid_base: u32) -> Result<(), CriuError> {
    ImageView::make(images, work, uid_base)?.keep();
    let log = work.join(Verb::Restore.log_name());
    File::create(&log).map(drop).map_err(|source| CriuError::Folder { path: log, source })
}

/// Restores the tree into its cgroups, with a cgroup namespace rooted in them. On v1 this process moves there too; its mount
/// namespace is another one afterwards. Before the last hook, connections to the outside are reset.
pub(crate) fn restore<P, N, B>(options: &RestoreOptions<'_>, hooks: Hooks<P, N, B>) -> Result<Restored, CriuError>
where
    P: FnOnce() -> Result<(), HookError>,
    N: FnMut(&Netns) -> Result<(), HookError>,
    B: FnMut(i32) -> Result<(), HookError>,
{
    let Hooks { in_place, mut set_up_netns, mut before_it_runs } = hooks;
    let view = match options.view {
        View::ToMake => ImageView::make(options.images, options.work, options.uid_base)?,
        View::Made => ImageView::made(options.work)?,
    };
    let images = open_folder(view.folder())?;
    let work = open_folder(options.work)?;
    let mut request = shared_options(&images, &work, Verb::Restore);
    request.root = Some(options.root.to_string_lossy().into_owned());
    request.external.clone_from(&options.externals);
    request.rst_sibling = Some(true);
    request.lazy_pages = Some(options.memory != Memory::Now);
    let filler = match options.memory {
        Memory::Now => lazy::forget(options.work).map(|()| None)?,
        // Before this process moves: what is read from the images must not be charged to the sandbox.
        Memory::Lazily { executable } => Some(lazy::spawn(executable, options.criu, options.work)?),
    };
    let seat = place::seat_in(options.cgroups)?;
    // The filler stays behind: it would hold the root's mount for as long as it reads.
    let _notes = place::prepare_for_restore(options.criu, options.root)?;
    in_place().map_err(|source| CriuError::Hook { verb: Verb::Restore.name(), moment: "in-place".to_owned(), source })?;

    let mut swrk = Swrk::start(options.criu, Verb::Restore, options.work, &seat, options.deadline, None)?;
    let mut netns = None;
    let response = swrk.run(request, |moment, pid| match moment {
        "setup-namespaces" => {
            let (made, _) = netns.insert((Netns::of_process(pid)?, pid));
            set_up_netns(made)?;
            if view.has_connections() {
                // What is in a connection's queue and was not sent yet is sent while it is restored, perhaps before its
                // peer is there: the kernel would reset it.
                made.run(loopback::mute)?;
            }
            Ok(())
        }
        "post-restore" => {
            let (netns, init) = netns.as_ref().ok_or("CRIU made no network namespace")?;
            if view.has_connections() {
                // All are there now.
                netns.run(|| loopback::unmute().and_then(|()| sock_diag::reset_outside_connections()))?;
            }
            before_it_runs(*init)
        }
        _ => Ok(()),
    })?;
    let view = match filler {
        Some(filler) => {
            view.keep();
            filler.go_on();
            None
        }
        None => Some(view),
    };
    match response.restore.as_ref().map(rpc::Criu_restore_resp::pid) {
        Some(init) if init > 0 => Ok(Restored { init, over: Over { _swrk: swrk, _view: view } }),
        _ => Err(CriuError::Protocol { verb: Verb::Restore.name(), detail: "no pid in a successful restore".to_owned() }),
    }
}

/// What dump and restore must agree on.
fn shared_options(images: &File, work: &File, verb: Verb) -> rpc::Criu_opts {
    let mut options = rpc::Criu_opts::new();
    options.images_dir_fd = Some(images.as_raw_fd());
    options.work_dir_fd = Some(work.as_raw_fd());
    options.log_file = Some(verb.log_name().to_owned());
    options.log_level = Some(2);
    // CRIU stops for our hooks only when asked to.
    options.notify_scripts = Some(true);
    // The cgroup is this process's, made fresh and joined before; CRIU restores none.
    options.manage_cgroups = Some(true);
    options.manage_cgroups_mode = Some(rpc::Criu_cg_mode::IGNORE.into());
    // Connections live, the netns around them is made anew.
    options.empty_ns = Some(CloneFlags::CLONE_NEWNET.bits().cast_unsigned());
    options.tcp_established = Some(true);
    options.file_locks = Some(true);
    options.link_remap = Some(true);
    options.ext_unix_sk = Some(true);
    options.orphan_pts_master = Some(true);
    options
}

fn open_folder(path: &Path) -> Result<File, CriuError> {
    let folder = File::open(path).and_then(|file| match file.metadata()?.is_dir() {
        true => Ok(file),
        false => Err(std::io::ErrorKind::NotADirectory.into()),
    });
    folder.map_err(|source| CriuError::Folder { path: path.to_owned(), source })
}
