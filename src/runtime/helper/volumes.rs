//! Volumes in a sandbox: mounts of what the server has mounted once, made fit for one sandbox.
//!
//! ```text
//! cold start   a mount each ─> attached before pid 1 goes on
//! restore      staged ─> CRIU binds those of the dump ─> the others attached before anything runs
//! dump         named to CRIU as not its own, so that it leaves their content where it is
//! ```
//! What is mounted in a running sandbox later needs no helper: [`super::super::kernel`] uses [`attach_inside`] as well.
//! Where a volume goes, links inside may have a say, as they have for programs inside: what they lead to is looked at again.

use super::super::uids::IDS_PER_SANDBOX;
use super::super::volumes::VolumeBind;
use super::super::volumes::seen::{self, SeenVolume};
use crate::model::{MountPath, VolumeId};
use crate::sys::mount::{attach, attach_over, clone_mount, confine, open_in_root};
use crate::sys::mount_elsewhere::in_mount_namespace_of;
use crate::sys::mountinfo;
use crate::sys::userns::{FilesystemIdentity, new_user_namespace};
use nix::errno::Errno;
use nix::fcntl::readlinkat;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, mkdirat};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Where CRIU finds the volumes of a restore.
const PLACES: &str = "/run/volumes";

/// A mount that is attached nowhere yet, and where it is to go.
#[derive(Debug)]
pub(in crate::runtime) struct FittedMount {
    mount: OwnedFd,
    target: MountPath,
}

/// A path that no volume can be mounted at, in this sandbox: something else than a folder is in the way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[error("no volume can be mounted at '{path}': {wrong}")]
pub(in crate::runtime) struct Unmountable {
    /// Where it was to be mounted.
    pub(in crate::runtime) path: MountPath,
    /// What is in the way.
    pub(in crate::runtime) wrong: String,
}

/// Why a volume is not where it was to be.
#[derive(Debug, thiserror::Error)]
pub(in crate::runtime) enum AttachError {
    /// The path is to blame.
    #[error(transparent)]
    Unmountable(#[from] Unmountable),
    /// This machine is.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Mounts of volumes with the ids of one sandbox.
pub(in crate::runtime) fn fitted(binds: &[VolumeBind], userns: BorrowedFd<'_>) -> io::Result<Vec<FittedMount>> {
    binds.iter().map(|bind| fit(bind, userns)).collect()
}

fn fit(bind: &VolumeBind, userns: BorrowedFd<'_>) -> io::Result<FittedMount> {
    let mount = clone_mount(&bind.source)?;
    confine(mount.as_fd(), userns)?;
    Ok(FittedMount { mount, target: bind.target.clone() })
}

/// Attaches the mounts in the mount namespace of a sandbox's `init`. Folders that are missing on the way are made, and
/// belong to root inside; what is there already is followed as a program inside would follow it.
pub(in crate::runtime) fn attach_inside(mut mounts: Vec<FittedMount>, init: i32, uid_base: u32) -> Result<(), AttachError> {
    if mounts.is_empty() {
        return Ok(());
    }
    // One may lie in another.
    mounts.sort_by(|one, other| one.target.cmp(&other.target));
    // The sandbox's own /proc does not show this process.
    let descriptors = File::open("/proc/self/fd")?;
    in_mount_namespace_of(init, move || {
        let _identity = FilesystemIdentity::assume(uid_base)?;
        let root = fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open("/")?;
        let attach = |mount: &FittedMount| {
            let folder = folder_at(&root, &mount.target)?;
            require_fit(&descriptors, &folder, &mount.target)?;
            Ok(attach_over(mount.mount.as_fd(), folder.as_fd())?)
        };
        Ok(mounts.iter().try_for_each(attach))
    })?
}

fn folder_at(root: &File, target: &MountPath) -> Result<OwnedFd, AttachError> {
    let open = |path: &Path| open_in_root(root.as_fd(), path, libc::O_PATH | libc::O_DIRECTORY, 0);
    let mut path = PathBuf::from("/");
    let mut folder = open(&path)?;
    for part in target.as_str().split('/').skip(1) {
        path.push(part);
        let opened = match open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let made = mkdirat(Some(folder.as_raw_fd()), part, Mode::from_bits_truncate(0o755));
                made.map_err(io::Error::from).and_then(|()| open(&path))
            }
            opened => opened,
        };
        folder = opened.map_err(|error| in_the_way(target, &path, error))?;
    }
    Ok(folder)
}

/// What an error says about the part of a mount path that could be neither opened nor made.
fn in_the_way(target: &MountPath, part: &Path, error: io::Error) -> AttachError {
    let part = part.display();
    let wrong = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOTDIR) => format!("'{part}' is not a folder"),
        // Nothing to open, and nothing that can be made.
        Some(Errno::EEXIST) => format!("'{part}' is a symbolic link that leads nowhere"),
        Some(Errno::ELOOP) => format!("'{part}' is a symbolic link that leads in a circle"),
        Some(Errno::ENAMETOOLONG) => "a part of it is longer than 255 bytes".to_owned(),
        Some(Errno::ENOENT | Errno::EACCES | Errno::EPERM | Errno::EROFS | Errno::ENOSPC) => {
            format!("the folder '{part}' cannot be made: {error}")
        }
        Some(_) | None => return error.into(),
    };
    Unmountable { path: target.clone(), wrong }.into()
}

/// Links may lead to where no volume may be.
fn require_fit(descriptors: &File, folder: &OwnedFd, target: &MountPath) -> Result<(), AttachError> {
    let place = readlinkat(Some(descriptors.as_raw_fd()), folder.as_raw_fd().to_string().as_str()).map_err(io::Error::from)?;
    let fit = place.to_string_lossy().parse::<MountPath>();
    let unfit = |error| Unmountable { path: target.clone(), wrong: format!("a symbolic link leads elsewhere, and {error}") };
    Ok(fit.map(drop).map_err(unfit)?)
}

/// Volumes for a restore, each at a place of its own where only this process and CRIU see it.
#[derive(Debug)]
pub(super) struct Staged<'a> {
    binds: &'a [VolumeBind],
    opened: Vec<(VolumeId, OwnedFd)>,
}

impl<'a> Staged<'a> {
    /// Opens them where the data folder's mounts are seen.
    pub(super) fn open(binds: &'a [VolumeBind], uid_base: u32) -> io::Result<Self> {
        let mut staged = Self { binds, opened: Vec::new() };
        if !binds.is_empty() {
            let userns = new_user_namespace(uid_base, IDS_PER_SANDBOX)?;
            let opened = staged.once_each().map(|bind| Ok((bind.volume, fit(bind, userns.as_fd())?.mount)));
            staged.opened = opened.collect::<io::Result<_>>()?;
        }
        Ok(staged)
    }

    /// Puts them where CRIU is told to look. This process has a mount namespace of its own.
    pub(super) fn put(&self) -> io::Result<()> {
        if self.opened.is_empty() {
            return Ok(());
        }
        fs::create_dir_all(PLACES)?;
        // Of its own, since /run is not. CRIU binds them as root inside, who is nobody here.
        mount(Some("tmpfs"), PLACES, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("size=64k,mode=711"))?;
        for (volume, opened) in &self.opened {
            let place = place_of(*volume);
            fs::create_dir(&place)?;
            attach(opened, &place)?;
        }
        Ok(())
    }

    /// A volume may be mounted at two paths.
    fn once_each(&self) -> impl Iterator<Item = &'a VolumeBind> {
        let mut known = BTreeSet::new();
        self.binds.iter().filter(move |bind| known.insert(bind.volume))
    }

    /// What CRIU is told: where it finds the mounts that the dump names.
    pub(super) fn externals(&self) -> Vec<String> {
        self.once_each().map(|bind| format!("mnt[{}]:{}", bind.volume, place_of(bind.volume).display())).collect()
    }

    /// Attaches what the dump did not bring.
    pub(super) fn attach_missing(&self, init: i32, uid_base: u32) -> Result<(), AttachError> {
        if self.binds.is_empty() {
            return Ok(());
        }
        let table = fs::read(format!("/proc/{init}/mountinfo"))?;
        let there: BTreeSet<u64> = table.split(|byte| *byte == b'\n').filter_map(mountinfo::device).collect();
        let mut missing = Vec::new();
        for bind in self.binds {
            let place = place_of(bind.volume);
            if !there.contains(&fs::metadata(&place)?.dev()) {
                missing.push(FittedMount { mount: clone_mount(&place)?, target: bind.target.clone() });
            }
        }
        attach_inside(missing, init, uid_base)
    }
}

fn place_of(volume: VolumeId) -> PathBuf {
    Path::new(PLACES).join(volume.to_string())
}

/// What a dump leaves where it is.
#[derive(Debug)]
pub(super) struct Left {
    seen: Vec<SeenVolume>,
}

impl Left {
    /// The volumes that a sandbox has mounted, wherever it has moved them.
    pub(super) fn of(init: i32, volumes: &Path) -> io::Result<Self> {
        Ok(Self { seen: seen::mounted_by(init, volumes)? })
    }

    /// What CRIU is told of them. A folder of a volume that is mounted beside it CRIU finds by itself.
    pub(super) fn externals(&self) -> Vec<String> {
        let whole = self.seen.iter().filter(|seen| seen.is_whole);
        whole.map(|seen| format!("mnt[{}]:{}", seen.point.display(), seen.volume)).collect()
    }

    /// The kernel's numbers of their mounts.
    pub(super) fn mounts(&self) -> BTreeSet<u32> {
        self.seen.iter().map(|seen| seen.mount).collect()
    }
}
