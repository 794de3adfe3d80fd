//! Volumes that come to a running sandbox, or leave it.

use super::{BoxError, Kernel, Shared, step};
use crate::model::{SandboxId, VolumeMount};
use crate::runtime::helper::container::userns_of;
use crate::runtime::helper::volumes::{attach_inside, fitted};
use crate::runtime::volumes::seen;
use crate::runtime::{RuntimeError, UnmountHow, Unmounted};
use crate::sys::mount_elsewhere::in_mount_namespace_of;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

impl Kernel {
    pub(super) async fn mount_in_running(&self, id: SandboxId, mount: VolumeMount) -> Result<(), RuntimeError> {
        let live = self.live(id)?;
        let (init, uid_base) = (live.kernel.init.pid, live.kernel.uid_base);
        let mounted = self.blocking(move |shared| -> Result<(), BoxError> {
            let binds = shared.volumes.binds(&[mount])?;
            let userns = userns_of(init)?;
            Ok(attach_inside(fitted(&binds, userns.as_fd())?, init, uid_base)?)
        });
        mounted.await.map_err(step(id, "mounting a volume"))
    }

    pub(super) async fn unmount_in_running(&self, id: SandboxId, mount: VolumeMount, how: UnmountHow) -> Result<Unmounted, RuntimeError> {
        let init = self.live(id)?.kernel.init.pid;
        let unmounted = self.blocking(move |shared| shared.unmount_inside(init, &mount, how)).await;
        unmounted.map_err(step(id, "unmounting a volume"))
    }
}

impl Shared {
    fn unmount_inside(&self, init: i32, mount: &VolumeMount, how: UnmountHow) -> io::Result<Unmounted> {
        let path = PathBuf::from(mount.path.as_str());
        let points = match how {
            UnmountHow::ThisOne { .. } => vec![path],
            UnmountHow::Everywhere { .. } => {
                let seen = seen::mounted_by(init, &self.layout.volumes())?.into_iter().filter(|seen| seen.volume == mount.volume);
                let mut points: Vec<PathBuf> = seen.map(|seen| seen.point).collect();
                // Without loop devices a volume is a folder of the host's file system, and not told by its device.
                if !self.volumes.have_limits() {
                    points.push(path);
                }
                points
            }
        };
        let lazily = if how.is_forced() { MntFlags::MNT_DETACH } else { MntFlags::empty() };
        in_mount_namespace_of(init, move || {
            // What was mounted last lies on top.
            for point in points.iter().rev() {
                match umount2(point, lazily | MntFlags::UMOUNT_NOFOLLOW) {
                    Err(Errno::EBUSY) => return Ok(Unmounted::Busy),
                    // Unmounted inside already.
                    Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            Ok(Unmounted::Done)
        })
    }
}
