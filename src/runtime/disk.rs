//! A sandbox's own disk: a sparse ext4 image of full size, or a plain folder where the machine has no loop devices.
//!
//! Here are the files; mounting them is rootfs.rs. An image holds `upper` and `work` of the overlay with ids from 0.

use super::DiskSource;
use super::config::DiskDriver;
use super::layout::{Layout, SandboxFolder};
use crate::model::ByteSize;
use crate::sys::disk::{Frozen, copy_sparse, sync_filesystem};
use crate::sys::loop_device;
use crate::sys::tree;
use nix::sys::statvfs::statvfs;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where formatting tools are on the distributions, whatever PATH the server was started with.
pub(super) const TOOL_PATH: &str = "/usr/sbin:/sbin:/usr/bin:/bin";

/// What a disk is made of on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskKind {
    /// A file behind a loop device: its size is a limit, and it can be copied while the sandbox stands still.
    Image,
    /// A folder of the host's file system: no size limit, no dumps.
    Folder,
}

/// How full the file system of the data folder is. All disks in it are sparse: together they promise more than there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// The data folder.
    pub path: PathBuf,
    /// Used by anybody.
    pub used: ByteSize,
    /// What is left.
    pub free: ByteSize,
    /// What is to be kept free: `runtime.disk_free_min`.
    pub floor: ByteSize,
}

impl Room {
    /// Whether `need` more would lead below the floor, or what is there does.
    pub fn is_short_of(&self, need: ByteSize) -> bool {
        self.free.bytes() < self.floor.bytes().saturating_add(need.bytes())
    }
}

/// Why a disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Below the floor.
    #[error("{} are free below {}, {need} are needed and {} are kept free", room.free, room.path.display(), room.floor)]
    Full {
        /// As it is.
        room: Room,
        /// What was to be written.
        need: ByteSize,
    },
    /// mkfs failed.
    #[error("mkfs.ext4 of {} failed: {detail}", path.display())]
    Format {
        /// The image.
        path: PathBuf,
        /// What it said, or why it did not run.
        detail: String,
    },
    /// Folders have no copies.
    #[error("disks are folders here, without loop devices (modprobe loop; runtime.disk_driver), and cannot be copied")]
    NoCopies,
    /// A file said no.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// `make`, `copy`, `remove`, `sync`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::Io { action, path, source }
}

/// The disks of one data folder.
#[derive(Debug, Clone)]
pub struct Disks {
    layout: Layout,
    kind: DiskKind,
    free_min: ByteSize,
}

impl Disks {
    /// Looks at what the machine can do.
    pub fn open(layout: Layout, driver: DiskDriver, free_min: ByteSize) -> Self {
        let kind = match driver {
            DiskDriver::Auto if loop_device::available() => DiskKind::Image,
            DiskDriver::Auto | DiskDriver::Folder => DiskKind::Folder,
        };
        Self { layout, kind, free_min }
    }

    /// What disks are made of here.
    pub fn kind(&self) -> DiskKind {
        self.kind
    }

    /// How full the host's disk is.
    pub fn room(&self) -> Result<Room, DiskError> {
        let path = self.layout.data_dir();
        let space = statvfs(path).map_err(|errno| failed("look at", path)(errno.into()))?;
        let bytes = |blocks: u64| ByteSize(blocks * space.fragment_size());
        let (used, free) = (bytes(space.blocks() - space.blocks_free()), bytes(space.blocks_available()));
        Ok(Room { path: path.to_owned(), used, free, floor: self.free_min })
    }

    /// An error when writing so much would leave less than is kept free.
    pub fn require(&self, need: ByteSize) -> Result<(), DiskError> {
        let room = self.room()?;
        match room.is_short_of(need) {
            true => Err(DiskError::Full { room, need }),
            false => Ok(()),
        }
    }

    /// Makes the disk files of a sandbox, replacing what an earlier try left; an `Own` disk is left alone.
    pub fn prepare(&self, folder: &SandboxFolder, source: &DiskSource, size: ByteSize) -> Result<(), DiskError> {
        match (self.kind, source) {
            (_, DiskSource::Own) => Ok(()),
            (DiskKind::Image, DiskSource::Fresh) => copy_image(&self.empty_image(size)?, &folder.disk_image()),
            (DiskKind::Image, DiskSource::CopyOf(image) | DiskSource::PooledCopyOf(image)) => copy_image(image, &folder.disk_image()),
            (DiskKind::Folder, DiskSource::Fresh) => make_disk_folder(&folder.disk_folder()),
            (DiskKind::Folder, DiskSource::CopyOf(_) | DiskSource::PooledCopyOf(_)) => Err(DiskError::NoCopies),
        }
    }

    /// A formatted image of this size, made at the first call and kept.
    fn empty_image(&self, size: ByteSize) -> Result<PathBuf, DiskError> {
        let folder = self.layout.empty_disks();
        let image = folder.join(format!("{}.img", size.bytes()));
        if !image.exists() {
            make_private(&folder).map_err(failed("make", &folder))?;
            // Two sandboxes may be the first of their size at once: each formats a file of its own.
            let aside = folder.join(format!("{}.{}", size.bytes(), uuid::Uuid::new_v4()));
            let formatted = format_image(&aside, size);
            let placed = formatted.and_then(|()| fs::rename(&aside, &image).map_err(failed("make", &image)));
            if placed.is_err() {
                // The first failure is the one worth reporting.
                let _ = fs::remove_file(&aside);
            }
            placed?;
        }
        Ok(image)
    }
}

/// What a copy of this file takes at most.
pub fn bytes_of_copy(image: &Path) -> Result<ByteSize, DiskError> {
    let found = fs::metadata(image).map_err(failed("look at", image))?;
    Ok(ByteSize(found.blocks() * 512))
}

/// Makes `to` a copy of the image `from`: shared blocks or data extents. Replaces an existing `to` at the end.
pub fn copy_image(from: &Path, to: &Path) -> Result<(), DiskError> {
    let aside = to.with_extension("copy");
    let source = File::open(from).map_err(failed("copy", from))?;
    let target = create_private(&aside).map_err(failed("make", &aside))?;
    let copied = copy_sparse(&source, &target).and_then(|_| fs::rename(&aside, to));
    if copied.is_err() {
        // The first failure is the one worth reporting.
        let _ = fs::remove_file(&aside);
    }
    copied.map_err(failed("copy", from))
}

/// Copies a file to one that is new and ours alone; what is a hole stays one.
pub fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    copy_sparse(&source, &target).map(drop)
}

/// Copies the disk of a running sandbox as of one moment: who writes to it waits meanwhile.
pub fn copy_of_mounted(folder: &SandboxFolder, to: &Path) -> Result<(), DiskError> {
    let mount = folder.disk_mount();
    let disk = File::open(&mount).map_err(failed("open", &mount))?;
    let _frozen = Frozen::freeze(disk.as_fd()).map_err(failed("freeze", &mount))?;
    copy_image(&folder.disk_image(), to)
}

/// Copies the disk of a sandbox whose tasks all stand still. Nobody else writes to it: what they have written is in the
/// image after a sync. A freeze would say the same and wait three times for every CPU to pass through the scheduler
/// (`percpu_down_write` in freeze_super), while they stand still.
pub fn copy_of_still(folder: &SandboxFolder, to: &Path) -> Result<(), DiskError> {
    sync_mounted(folder)?;
    copy_image(&folder.disk_image(), to)
}

/// Writes what a mounted disk was told to its image, so that a copy has less to wait for.
pub fn sync_mounted(folder: &SandboxFolder) -> Result<(), DiskError> {
    let mount = folder.disk_mount();
    let synced = File::open(&mount).and_then(|disk| sync_filesystem(disk.as_fd()));
    synced.map_err(failed("sync", &mount))
}

/// No journal: after a crash of the host a sandbox is cold-booted or thrown away, and a journal would double what is
/// written. No reserved blocks: root inside is not our root. Inode tables are zeroed when first used. No room for
/// growth, and the maps side by side: every sandbox begins with a copy of this, 0.3 MB instead of 4.4.
fn format_image(path: &Path, size: ByteSize) -> Result<(), DiskError> {
    let contents = PathBuf::from(format!("{}.contents", path.display()));
    make_disk_folder_io(&contents).map_err(failed("make", &contents))?;
    let file = create_private(path).map_err(failed("make", path))?;
    file.set_len(size.bytes()).map_err(failed("make", path))?;
    let made = Command::new("mkfs.ext4")
        .env_clear()
        .env("PATH", TOOL_PATH)
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode", "-E"])
        .args(["lazy_itable_init=1,nodiscard,packed_meta_blocks=1,root_owner=0:0", "-d"])
        .arg(&contents)
        .arg(path)
        .output();
    // Two empty folders; left behind they do no harm.
    let _ = fs::remove_dir_all(&contents);
    match made {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(DiskError::Format { path: path.to_owned(), detail: String::from_utf8_lossy(&output.stderr).trim().to_owned() }),
        Err(error) => Err(DiskError::Format { path: path.to_owned(), detail: format!("{error}; install e2fsprogs") }),
    }
}

fn make_disk_folder(path: &Path) -> Result<(), DiskError> {
    match tree::remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove", path)(error)),
        _ => {}
    }
    make_disk_folder_io(path).map_err(failed("make", path))
}

fn make_disk_folder_io(path: &Path) -> io::Result<()> {
    for name in ["upper", "work"] {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(path.join(name))?;
    }
    Ok(())
}

/// Makes a folder that only root may enter, with its parents.
pub fn make_private(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn create_private(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Writes a disk that nothing has mounted through to the host's disk.
pub fn sync_image(folder: &SandboxFolder) -> Result<(), DiskError> {
    let image = folder.disk_image();
    match File::open(&image).and_then(|file| file.sync_all()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("sync", &image)(error)),
        _ => Ok(()),
    }
}
