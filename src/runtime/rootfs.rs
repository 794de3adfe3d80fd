//! A sandbox's root file system: its disk, the shared layers and the agent's, one over the other.
//!
//! ```text
//! sandboxes/<id>/disk   the ext4 image (or folder), ids mapped to the sandbox's range       ─┐
//! layers/<id> …         shared, ids mapped in the helper's private mount namespace only     ─┼─> sandboxes/<id>/root
//! agents/<sha256>       bottom: the agent, mount points                                     ─┘    overlay
//! ```
//!
//! Both mounts lie in the host's mount namespace, so that the next server finds them. [`mount_root`] forks and changes
//! namespaces: helper process only. [`unmount_root`] is for the server.

use super::disk::DiskKind;
use super::layout::SandboxFolder;
use super::uids::IDS_PER_SANDBOX;
use crate::sys::disk::sync_filesystem;
use crate::sys::loop_device::{self, LoopDevice};
use crate::sys::mount::{NewFilesystem, attach, clone_mount, map_ids, open_beneath};
use crate::sys::mount_elsewhere::unmount_elsewhere;
use crate::sys::tree;
use crate::sys::userns::{FilesystemIdentity, new_user_namespace};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where the helper gathers an overlay's parts and containers' roots: a tmpfs in a private mount namespace.
pub(super) const STAGE: &str = "/run";
/// How long the kernel may take to give a loop device back after the last unmount.
const DETACH_TIME_MAX: Duration = Duration::from_secs(10);
/// How long it takes when no other mount namespace has the disk; after that they are looked through.
const DETACH_TIME_USUAL: Duration = Duration::from_millis(100);
/// Major number of loop devices.
const LOOP_MAJOR: u64 = 7;

/// Whether what the last boot left in the kernel's own folders is taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Boot {
    /// pid 1 will be started: /dev and the agent's files must be ours again.
    Cold,
    /// pid 1 will be restored and expects everything as it was.
    Restore,
}

/// All that a root file system is made of.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RootPlan {
    /// Where it is mounted.
    pub folder: SandboxFolder,
    /// What its disk is.
    pub disk: DiskKind,
    /// The agent's layer.
    pub agent: PathBuf,
    /// The template's layers, bottom to top.
    pub layers: Vec<PathBuf>,
    /// First host id of the sandbox.
    pub uid_base: u32,
    /// How pid 1 will come.
    pub boot: Boot,
}

/// Why a root file system was not mounted or not unmounted.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// A step failed.
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
    /// A layer has something else where the kernel's folders are to be mounted.
    #[error("the root file system has no plain /{}; remove what is there from the template", path.display())]
    Unusable {
        /// The path inside.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The disk is in use although no mount namespace shows it: what was written may not be in the image yet.
    #[error("loop device {number} still holds {} {} s after the unmount", path.display(), DETACH_TIME_MAX.as_secs())]
    StillAttached {
        /// N of /dev/loopN.
        number: u32,
        /// The image.
        path: PathBuf,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RootError {
    let path = path.to_owned();
    move |source| RootError::Io { action, path, source }
}

/// Mounts disk and root of a sandbox. Returns the user namespace whose map the mounts use; the sandbox's processes
/// belong in it. What a failure leaves is undone by [`unmount_root`].
pub fn mount_root(plan: &RootPlan) -> Result<OwnedFd, RootError> {
    let userns = new_user_namespace(plan.uid_base, IDS_PER_SANDBOX).map_err(failed("make a user namespace for", plan.folder.path()))?;
    for path in [plan.folder.disk_mount(), plan.folder.root_mount()] {
        super::disk::make_private(&path).map_err(failed("make", &path))?;
    }
    mount_disk(plan, userns.as_fd())?;
    let host = File::open("/proc/self/ns/mnt").map_err(failed("open", Path::new("/proc/self/ns/mnt")))?;
    let root = enter_stage()
        .map_err(failed("make a private mount namespace at", Path::new(STAGE)))
        .and_then(|()| build_overlay(plan, userns.as_fd()));
    setns(&host, CloneFlags::CLONE_NEWNS).map_err(|errno| failed("go back to", Path::new("/proc/self/ns/mnt"))(errno.into()))?;
    let target = plan.folder.root_mount();
    attach(root?, &target).map_err(failed("mount the root at", &target))?;
    Ok(userns)
}

fn mount_disk(plan: &RootPlan, userns: BorrowedFd<'_>) -> Result<(), RootError> {
    let disk = match plan.disk {
        DiskKind::Image => {
            wait_until_detached(&plan.folder.disk_image())?;
            mount_image(&plan.folder.disk_image())?
        }
        DiskKind::Folder => {
            let folder = plan.folder.disk_folder();
            clone_mount(&folder).map_err(failed("open", &folder))?
        }
    };
    map_ids(disk.as_fd(), userns).map_err(failed("map the ids of the disk of", plan.folder.path()))?;
    let target = plan.folder.disk_mount();
    attach(disk, &target).map_err(failed("mount the disk at", &target))
}

/// Without `noinit_itable` a kernel thread would write the inode tables of the empty disk, 320 MB of zeroes for 20 GB.
/// `discard` gives the host back what is deleted inside. Without barriers an fsync inside reaches the host's page cache,
/// which outlives every process, and not its disk: a sandbox does not survive a power cut, and one that is paused is
/// synced then. With them each file that an init copies up would wait for the host's disk, and for whoever else writes.
fn mount_image(image: &Path) -> Result<OwnedFd, RootError> {
    let attempt = || {
        let device = LoopDevice::attach(&open_nameless(image)?)?;
        let disk = NewFilesystem::open(c"ext4")?;
        disk.set(c"source", &device.path())?;
        disk.flag(c"noinit_itable")?;
        disk.flag(c"discard")?;
        disk.flag(c"nobarrier")?;
        disk.set(c"errors", Path::new("remount-ro"))?;
        disk.create()
    };
    attempt().map_err(failed("mount the file system in", image))
}

/// Opens `image` through a mount of its folder that is attached nowhere: every sandbox may read in sysfs which file is
/// behind each loop device, and in this way that is `/disk.img` and not the id of its neighbour.
pub(super) fn open_nameless(image: &Path) -> io::Result<File> {
    let (Some(folder), Some(name)) = (image.parent(), image.file_name()) else { return Err(io::ErrorKind::InvalidInput.into()) };
    let folder = clone_mount(folder)?;
    open_beneath(folder.as_fd(), Path::new(name), libc::O_RDWR).map(File::from)
}

/// A cold boot finds no device, shared memory or terminal of the last one, as after any reboot, and nothing but folders
/// where the runtime mounts. `root` is whatever root inside made of it: no symbolic link is followed here.
///
/// Done through the overlay: its index refuses files that were taken out of the upper layer behind its back.
fn renew_kernel_folders(root: &Path) -> io::Result<()> {
    for name in ["proc", "sys", "dev", "run"] {
        ensure_folder(&root.join(name))?;
    }
    let dev = root.join("dev");
    for entry in fs::read_dir(&dev)? {
        remove_any(&entry?.path())?;
    }
    fs::set_permissions(&dev, fs::Permissions::from_mode(0o755))?;
    for (name, mode) in [("pts", 0o755), ("shm", 0o1777)] {
        fs::create_dir(dev.join(name))?;
        fs::set_permissions(dev.join(name), fs::Permissions::from_mode(mode))?;
    }
    let agents_own = root.join("run/stillbox");
    let boot_id = root.join(super::agent::BOOT_ID_PATH.trim_start_matches('/'));
    if !fs::symlink_metadata(&agents_own).is_ok_and(|found| found.is_dir())
        || !fs::symlink_metadata(&boot_id).is_ok_and(|found| found.is_file())
    {
        remove_any(&agents_own)?;
        ensure_folder(&agents_own)?;
        fs::write(&boot_id, super::agent::BOOT_ID_UNSET)?;
    }
    Ok(())
}

fn ensure_folder(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
        remove_any(path)?;
        fs::create_dir(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

fn remove_any(path: &Path) -> io::Result<()> {
    match tree::remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Moves the calling process into a mount namespace of its own, with an empty tmpfs at [`STAGE`]. It follows the
/// host's unmounts (a private copy would pin disks that the server unmounts); what is mounted here stays here.
pub(super) fn enter_stage() -> io::Result<()> {
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), STAGE, Some("tmpfs"), flags, Some("mode=755,size=16m"))?;
    Ok(())
}

/// Layers go in by short relative names: host paths would show in the sandbox's /proc/mounts, and all options of a
/// mount have to fit in one page.
fn build_overlay(plan: &RootPlan, userns: BorrowedFd<'_>) -> Result<OwnedFd, RootError> {
    let stage = Path::new(STAGE);
    let mut lower = String::new();
    for (position, layer) in std::iter::once(&plan.agent).chain(&plan.layers).enumerate() {
        let name = position.to_string();
        stage_layer(layer, &stage.join(&name), userns).map_err(failed("map the ids of layer", layer))?;
        // Bottom to top here, top to bottom there.
        lower = match lower.is_empty() {
            true => name,
            false => format!("{name}:{lower}"),
        };
    }
    let disk = plan.folder.disk_mount();
    let merge = || {
        std::os::unix::fs::symlink(&disk, stage.join("d"))?;
        fs::create_dir(stage.join("root"))?;
        std::env::set_current_dir(stage)?;
        // index and nfs_export make inotify handles and open files survive a dump; redirect_dir lets programs rename
        // the layers' folders, as they can on any disk.
        let options = format!("lowerdir={lower},upperdir=d/upper,workdir=d/work,index=on,nfs_export=on,redirect_dir=on");
        let identity = FilesystemIdentity::assume(plan.uid_base)?;
        mount(Some("overlay"), "root", Some("overlay"), MsFlags::empty(), Some(options.as_str()))?;
        std::env::set_current_dir("/")?;
        if plan.boot == Boot::Cold {
            renew_kernel_folders(&stage.join("root"))?;
        }
        drop(identity);
        clone_mount(&stage.join("root"))
    };
    let root = merge().map_err(failed("put the layers together over", &disk))?;
    check_kernel_folders(root.as_fd())?;
    Ok(root)
}

fn stage_layer(layer: &Path, target: &Path, userns: BorrowedFd<'_>) -> io::Result<()> {
    fs::create_dir(target)?;
    let mount = clone_mount(layer)?;
    map_ids(mount.as_fd(), userns)?;
    attach(mount, target)
}

/// What the runtime mounts on, binds or executes must be where it looks, reached through no symbolic link: an image
/// could otherwise have it mount on, or show, a path of the host's.
fn check_kernel_folders(root: BorrowedFd<'_>) -> Result<(), RootError> {
    for (path, flags) in [
        ("proc", libc::O_DIRECTORY),
        ("sys", libc::O_DIRECTORY),
        ("dev/pts", libc::O_DIRECTORY),
        ("dev/shm", libc::O_DIRECTORY),
        (super::agent::AGENT_PATH, 0),
        (super::agent::BOOT_ID_PATH, 0),
    ] {
        let path = Path::new(path.trim_start_matches('/'));
        open_beneath(root, path, libc::O_PATH | flags).map_err(|source| RootError::Unusable { path: path.to_owned(), source })?;
    }
    Ok(())
}

/// What root inside has taken out of a mounted root that the next mount of it needs, if anything.
pub(super) fn missing_in(root: &Path) -> io::Result<Option<PathBuf>> {
    let root = File::open(root)?;
    match check_kernel_folders(root.as_fd()) {
        Err(RootError::Unusable { path, .. }) => Ok(Some(path)),
        Ok(()) | Err(RootError::Io { .. } | RootError::StillAttached { .. }) => Ok(None),
    }
}

/// Whether an unmounted disk is going to be used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskNext {
    /// Everything written must be in it.
    Kept,
    /// It will be removed.
    Removed,
}

/// Unmounts root and disk of a sandbox whose processes are gone. A disk that is kept is flushed, and its loop device has
/// let go of the image: only then is the image whole. Succeeds when nothing is mounted.
///
/// A foreign process with a private copy of the mount table would keep the disk for as long as it lives: the copies are
/// unmounted there. Nobody waits for the end of that when the disk will be removed.
pub fn unmount_root(folder: &SandboxFolder, next: DiskNext) -> Result<(), RootError> {
    let disk_mount = folder.disk_mount();
    let number = loop_number(&disk_mount);
    let devices = mounted_at([&folder.root_mount(), &disk_mount]);
    if next == DiskNext::Kept && number.is_some() {
        // An unmount is no flush while another mount namespace still has the file system.
        let opened = File::open(&disk_mount).map_err(failed("open", &disk_mount))?;
        sync_filesystem(opened.as_fd()).map_err(failed("sync", &disk_mount))?;
    }
    for path in [folder.root_mount(), disk_mount] {
        unmount(&path).map_err(failed("unmount", &path))?;
    }
    if number.is_some_and(|number| !detaches_soon(number, &folder.disk_image())) {
        let copies = unmount_elsewhere(&devices).map_err(failed("enter the mount namespaces that keep", folder.path()))?;
        for copy in copies {
            tracing::info!(pid = copy.pid, "Unmounted {} in the mount namespace of {} too", folder.path().display(), copy.command);
        }
    }
    match next {
        DiskNext::Kept => wait_until_detached(&folder.disk_image()),
        DiskNext::Removed => Ok(()),
    }
}

/// The devices of what is mounted at `paths`; what is merely a folder there is not ours to unmount elsewhere.
fn mounted_at<const N: usize>(paths: [&Path; N]) -> BTreeSet<u64> {
    let device = |path: &Path| fs::metadata(path).ok().map(|found| found.dev());
    let mounted = |path: &&Path| device(path) != path.parent().and_then(device);
    paths.into_iter().filter(mounted).filter_map(device).collect()
}

/// Whether the device lets go of the image in the time that the kernel takes when nobody else has it mounted.
fn detaches_soon(number: u32, image: &Path) -> bool {
    let deadline = Instant::now() + DETACH_TIME_USUAL;
    loop {
        match loop_device::is_attached(number, image) {
            Ok(false) => return true,
            _ if Instant::now() > deadline => return false,
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// N of the /dev/loopN that is mounted at `path`.
fn loop_number(path: &Path) -> Option<u32> {
    let device = fs::metadata(path).ok()?.dev();
    let is_loop = nix::sys::stat::major(device) == LOOP_MAJOR;
    is_loop.then(|| u32::try_from(nix::sys::stat::minor(device)).ok())?
}

/// Takes away whatever is mounted at `path`, one over the other.
fn unmount(path: &Path) -> io::Result<()> {
    loop {
        // Lazily: a helper that is just leaving its namespace must not turn an unmount into EBUSY. Whether the disk is
        // free is seen by its loop device.
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Waits until no loop device has this image: a second one beside it would be a second file system on the same bytes.
fn wait_until_detached(image: &Path) -> Result<(), RootError> {
    let deadline = Instant::now() + DETACH_TIME_MAX;
    while let Some(number) = loop_device::holder_of(image).map_err(failed("look for the loop device of", image))? {
        if Instant::now() > deadline {
            return Err(RootError::StillAttached { number, path: image.to_owned() });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
