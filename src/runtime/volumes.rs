//! Volumes on disk: storage that outlives sandboxes, mounted once by the server, however many sandboxes see it.
//!
//! ```text
//! volumes/<id>/volume.img a sparse ext4 image: its size is the volume's limit ─ loop device ─> volumes/<id>/files
//! volumes/<id>/files      the storage itself, where the machine has no loop devices
//! ```
//!
//! An image is mounted when it is first needed, and unmounted when the server stops. A sandbox has a mount of its own of
//! the same file system ([`super::helper`]'s `volumes`), which goes on without the server's: so a loop device that has an
//! image already is used again, since a second one would be a second file system on the same bytes. Everything blocks.

pub(crate) mod seen;

use super::disk::{DiskError, DiskKind, Disks, TOOL_PATH, make_private};
use super::layout::{Layout, VolumeFolder};
use super::rootfs::open_nameless;
use crate::model::{ByteSize, MountPath, VolumeId, VolumeMount};
use crate::sys::disk::sync_filesystem;
use crate::sys::loop_device::{self, LoopDevice};
use crate::sys::mount::{NewFilesystem, attach};
use crate::sys::mount_elsewhere::unmount_elsewhere;
use nix::mount::{MntFlags, umount2};
use nix::sys::statvfs::statvfs;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Everybody inside may use a volume: which of a sandbox's users does is not ours to say.
const ROOT_MODE: u32 = 0o777;
/// How long the kernel takes to give a loop device back after the last unmount, when nobody else has it mounted.
const DETACH_TIME_MAX: Duration = Duration::from_millis(300);
/// While a file system is just being shut down, a mount of it is refused.
const MOUNT_TRIES_MAX: u32 = 50;

/// Why a volume's storage cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// Below the floor, or no image could be made.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A tool of e2fsprogs failed.
    #[error("{tool} of {} failed: {detail}", path.display())]
    Tool {
        /// Which.
        tool: &'static str,
        /// The image.
        path: PathBuf,
        /// What it said, or why it did not run.
        detail: String,
    },
    /// This kernel lets nobody grow what is mounted, and a sandbox has it mounted.
    #[error("the volume is mounted in a sandbox, and this machine grows only what is not (that would take CAP_SYS_RESOURCE)")]
    Mounted,
    /// A file said no.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A volume's root on this machine, and where a sandbox is to see it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct VolumeBind {
    /// Which.
    pub(crate) volume: VolumeId,
    /// Where the server has it mounted.
    pub(crate) source: PathBuf,
    /// Where the sandbox sees it.
    pub(crate) target: MountPath,
}

/// The volumes of one data folder. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Volumes(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    layout: Layout,
    disks: Disks,
    /// Held by whoever mounts, unmounts or removes.
    busy: Mutex<()>,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let path = path.to_owned();
    move |source| VolumeError::Io { action, path, source }
}

impl Volumes {
    /// Those below a data folder, made of what its sandboxes' disks are made of.
    pub fn new(layout: Layout, disks: Disks) -> Self {
        Self(Arc::new(Inner { layout, disks, busy: Mutex::default() }))
    }

    fn busy(&self) -> MutexGuard<'_, ()> {
        self.0.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether sizes are limits here.
    pub fn have_limits(&self) -> bool {
        self.0.disks.kind() == DiskKind::Image
    }

    /// Makes an empty one, mounted. What a failure leaves is swept by the next server.
    pub fn make(&self, id: VolumeId, size: ByteSize) -> Result<(), VolumeError> {
        self.0.disks.require(ByteSize(0))?;
        let folder = self.0.layout.volume(id);
        make_private(folder.path()).map_err(failed("make", folder.path()))?;
        if self.have_limits() {
            format_image(&folder.image(), size)?;
        }
        let root = self.open(id)?;
        fs::set_permissions(&root, fs::Permissions::from_mode(ROOT_MODE)).map_err(failed("open to everybody", &root))?;
        match fs::remove_dir(root.join("lost+found")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("clear", &root)(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Its root folder, mounted if it was not. Ids there are those inside.
    pub fn open(&self, id: VolumeId) -> Result<PathBuf, VolumeError> {
        let _busy = self.busy();
        self.mounted(&self.0.layout.volume(id))
    }

    /// Opens what a sandbox is to have mounted.
    pub(crate) fn binds(&self, mounts: &[VolumeMount]) -> Result<Vec<VolumeBind>, VolumeError> {
        let bind =
            |mount: &VolumeMount| Ok(VolumeBind { volume: mount.volume, source: self.open(mount.volume)?, target: mount.path.clone() });
        mounts.iter().map(bind).collect()
    }

    /// How full it is; as much as its image takes when it is not mounted.
    pub fn used(&self, id: VolumeId) -> Result<ByteSize, VolumeError> {
        let folder = self.0.layout.volume(id);
        let files = folder.files();
        let used = match self.have_limits() {
            true if is_mounted(&folder) => {
                let space = statvfs(&files).map_err(|errno| failed("look at", &files)(errno.into()))?;
                (space.blocks() - space.blocks_free()) * space.fragment_size()
            }
            true => fs::metadata(folder.image()).map_err(failed("look at", &folder.image()))?.blocks() * 512,
            false => bytes_below(&files).map_err(failed("look at", &files))?,
        };
        Ok(ByteSize(used))
    }

    /// Gives it more room: while sandboxes use it where the kernel lets us, else only while none does.
    pub fn grow(&self, id: VolumeId, size: ByteSize) -> Result<(), VolumeError> {
        if !self.have_limits() {
            return Ok(());
        }
        let _busy = self.busy();
        let folder = self.0.layout.volume(id);
        self.mounted(&folder)?;
        let image = folder.image();
        let lengthen = || OpenOptions::new().write(true).open(&image)?.set_len(size.bytes());
        lengthen().map_err(failed("lengthen", &image))?;
        if grow_mounted(&image).is_ok() {
            return Ok(());
        }
        unmount(&folder).map_err(failed("unmount", &folder.files()))?;
        let grown = match detaches_soon(&image) {
            true => grow_unmounted(&image),
            false => Err(VolumeError::Mounted),
        };
        self.mounted(&folder)?;
        grown
    }

    /// Removes it and everything in it; nobody has it mounted. Succeeds when it is gone already.
    pub fn remove(&self, id: VolumeId) -> Result<(), VolumeError> {
        let _busy = self.busy();
        self.removed(&self.0.layout.volume(id))
    }

    /// Removes what belongs to none of these: of volumes that were not made, or not removed, to the end.
    pub fn sweep(&self, keep: &BTreeSet<VolumeId>) -> Result<(), VolumeError> {
        let _busy = self.busy();
        let place = self.0.layout.volumes();
        make_private(&place).map_err(failed("make", &place))?;
        for entry in fs::read_dir(&place).map_err(failed("look at", &place))?.flatten() {
            let id = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some(id) = id.filter(|id| !keep.contains(id)) {
                self.removed(&self.0.layout.volume(id))?;
            }
        }
        Ok(())
    }

    /// Unmounts all of them here. Sandboxes keep the mounts that they have.
    pub fn close(&self) {
        let _busy = self.busy();
        for entry in fs::read_dir(self.0.layout.volumes()).into_iter().flatten().flatten() {
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            if let Err(error) = unmount(&self.0.layout.volume(id)) {
                tracing::error!(volume = %id, %error, "Volume {id} cannot be unmounted");
            }
        }
    }

    fn mounted(&self, folder: &VolumeFolder) -> Result<PathBuf, VolumeError> {
        let files = folder.files();
        make_private(&files).map_err(failed("make", &files))?;
        if self.have_limits() && !is_mounted(folder) {
            mount(&folder.image(), &files).map_err(failed("mount the file system in", &folder.image()))?;
        }
        Ok(files)
    }

    fn removed(&self, folder: &VolumeFolder) -> Result<(), VolumeError> {
        let device = unmount(folder).map_err(failed("unmount", &folder.files()))?;
        if let Some(device) = device.filter(|_| !detaches_soon(&folder.image())) {
            // A foreign process with a private copy of the mount table (mmdebstrap, a container runtime) would keep it.
            unmount_elsewhere(&BTreeSet::from([device])).map_err(failed("unmount elsewhere", folder.path()))?;
        }
        match fs::remove_dir_all(folder.path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", folder.path())(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// With a journal, unlike sandboxes' disks: what is in a volume is to survive a power cut. No reserved blocks: root
/// inside is not our root. Room for the growth of a thousand times is kept, as mkfs does by itself.
fn format_image(path: &Path, size: ByteSize) -> Result<(), VolumeError> {
    let make = || OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?.set_len(size.bytes());
    make().map_err(failed("make", path))?;
    let options = ["-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"];
    run("mkfs.ext4", &options, path, path, 0)
}

/// Runs a tool of e2fsprogs on `target`; exit codes up to `code_max` are success.
fn run(tool: &'static str, options: &[&str], target: &Path, image: &Path, code_max: i32) -> Result<(), VolumeError> {
    let ran = Command::new(tool).env_clear().env("PATH", TOOL_PATH).args(options).arg(target).output();
    let detail = match ran {
        Ok(output) if output.status.code().is_some_and(|code| code <= code_max) => return Ok(()),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => format!("{error}; install e2fsprogs"),
    };
    Err(VolumeError::Tool { tool, path: image.to_owned(), detail })
}

fn grow_mounted(image: &Path) -> Result<(), VolumeError> {
    let device = LoopDevice::of_image(image).and_then(|device| device.ok_or_else(|| io::ErrorKind::NotFound.into()));
    let device = device.map_err(failed("find the loop device of", image))?;
    device.take_size_of_file().map_err(failed("lengthen the loop device of", image))?;
    run("resize2fs", &[], &device.path(), image, 0)
}

fn grow_unmounted(image: &Path) -> Result<(), VolumeError> {
    // Not without a check does resize2fs touch what was mounted before; 1 is "errors corrected".
    run("e2fsck", &["-f", "-p"], image, image, 1)?;
    run("resize2fs", &[], image, image, 0)
}

/// `discard` gives the host back what is deleted; barriers stay on, so that an fsync inside reaches the host's disk.
fn mount(image: &Path, files: &Path) -> io::Result<()> {
    for _ in 1..MOUNT_TRIES_MAX {
        match try_mount(image, files) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => std::thread::sleep(Duration::from_millis(20)),
            other => return other,
        }
    }
    try_mount(image, files)
}

fn try_mount(image: &Path, files: &Path) -> io::Result<()> {
    let device = match LoopDevice::of_image(image)? {
        Some(device) => device,
        None => LoopDevice::attach(&open_nameless(image)?)?,
    };
    let filesystem = NewFilesystem::open(c"ext4")?;
    filesystem.set(c"source", &device.path())?;
    filesystem.flag(c"noinit_itable")?;
    filesystem.flag(c"discard")?;
    filesystem.set(c"errors", Path::new("remount-ro"))?;
    attach(filesystem.create()?, files)
}

fn is_mounted(folder: &VolumeFolder) -> bool {
    let device = |path: &Path| fs::metadata(path).ok().map(|found| found.dev());
    device(&folder.files()).is_some_and(|files| Some(files) != device(folder.path()))
}

/// Flushed first: an unmount is no flush while a sandbox has the file system. Tells its device, if it was mounted.
fn unmount(folder: &VolumeFolder) -> io::Result<Option<u64>> {
    let files = folder.files();
    if !is_mounted(folder) {
        return Ok(None);
    }
    let opened = File::open(&files)?;
    sync_filesystem(opened.as_fd())?;
    let device = opened.metadata()?.dev();
    drop(opened);
    umount2(&files, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    Ok(Some(device))
}

/// Whether the loop device lets go of the image in the time that the kernel takes when nobody has it mounted.
fn detaches_soon(image: &Path) -> bool {
    let deadline = Instant::now() + DETACH_TIME_MAX;
    loop {
        match loop_device::holder_of(image) {
            Ok(None) => return true,
            _ if Instant::now() > deadline => return false,
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn bytes_below(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let found = entry.metadata()?;
        bytes += match found.is_dir() {
            true => bytes_below(&entry.path())?,
            false => found.blocks() * 512,
        };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::config::DiskDriver;

    fn volumes(data_dir: &Path) -> Volumes {
        let layout = Layout::new(data_dir).unwrap();
        Volumes::new(layout.clone(), Disks::open(layout, DiskDriver::Auto, ByteSize(0)))
    }

    #[test]
    fn a_volume_keeps_its_files_over_servers_and_has_the_size_that_was_asked_for() {
        let data_dir = tempfile::tempdir().unwrap();
        let (id, first) = (VolumeId::random(), volumes(data_dir.path()));
        first.make(id, ByteSize::mib(64)).unwrap();
        let root = first.open(id).unwrap();
        fs::write(root.join("file"), "kept").unwrap();
        assert_eq!(fs::metadata(&root).unwrap().mode() & 0o7777, ROOT_MODE);
        assert_eq!(fs::read_dir(&root).unwrap().count(), 1, "something else than ours is in it");
        let size = |root: &Path| statvfs(root).map(|space| space.blocks() * space.fragment_size()).unwrap();
        assert!(size(&root) > 50 << 20 && size(&root) <= 64 << 20, "{}", size(&root));
        first.close();
        let image = data_dir.path().join("volumes").join(id.to_string()).join("volume.img");
        assert!(!root.join("file").exists());
        assert!(detaches_soon(&image), "its loop device stays");

        let second = volumes(data_dir.path());
        second.sweep(&BTreeSet::from([id])).unwrap();
        let root = second.open(id).unwrap();
        assert_eq!(fs::read_to_string(root.join("file")).unwrap(), "kept");
        second.grow(id, ByteSize::mib(256)).unwrap();
        assert!(size(&root) > 200 << 20, "{}", size(&root));
        assert_eq!(fs::read_to_string(root.join("file")).unwrap(), "kept");
        second.sweep(&BTreeSet::new()).unwrap();
        assert!(fs::read_dir(data_dir.path().join("volumes")).unwrap().next().is_none());
    }

    #[test]
    fn a_file_system_that_is_still_in_use_is_mounted_again_and_not_attached_twice() {
        let data_dir = tempfile::tempdir().unwrap();
        let (id, volumes) = (VolumeId::random(), volumes(data_dir.path()));
        volumes.make(id, ByteSize::mib(64)).unwrap();
        let root = volumes.open(id).unwrap();
        let held = crate::sys::mount::clone_mount(&root).unwrap();
        volumes.close();
        let again = volumes.open(id).unwrap();
        fs::write(again.join("file"), "one").unwrap();
        let key =
            fs::metadata(data_dir.path().join("volumes").join(id.to_string()).join("volume.img")).map(|file| (file.dev(), file.ino()));
        let holders = || loop_device::holders_of_files_called(Path::new("volume.img")).unwrap();
        let ours = |key: loop_device::FileKey| holders().iter().filter(|(_, file)| *file == key).count();
        let key = key.unwrap();
        assert_eq!(ours(key), 1);
        assert!(matches!(volumes.grow(id, ByteSize::mib(128)), Ok(()) | Err(VolumeError::Mounted)));
        assert_eq!(fs::read_to_string(volumes.open(id).unwrap().join("file")).unwrap(), "one");
        drop(held);
        volumes.remove(id).unwrap();
        assert_eq!(ours(key), 0);
    }
}
