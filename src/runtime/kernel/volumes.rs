//! Volumes that come to a running sandbox, or leave it.

use super::{BoxError, Kernel, Shared, step};
use crate::model::{SandboxId, VolumeMount};
use crate::runtime::helper::Blame;
use crate::runtime::helper::client::HelperError;
use crate::runtime::helper::container::userns_of;
use crate::runtime::helper::volumes::{AttachError, Unmountable, attach_inside, fitted};
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
        let fitted = self.blocking(move |shared| -> Result<_, BoxError> {
            let binds = shared.volumes.binds(&[mount])?;
            Ok(fitted(&binds, userns_of(init)?.as_fd())?)
        });
        let mounts = fitted.await.map_err(step(id, "opening a volume"))?;
        let attached = self.blocking(move |_| attach_inside(mounts, init, uid_base)).await;
        attached.map_err(|error| match error {
            AttachError::Unmountable(unmountable) => unmountable.into(),
            AttachError::Io(error) => step(id, "mounting a volume")(error),
        })
    }

    pub(super) async fn unmount_in_running(&self, id: SandboxId, mount: VolumeMount, how: UnmountHow) -> Result<Unmounted, RuntimeError> {
        let init = self.live(id)?.kernel.init.pid;
        let unmounted = self.blocking(move |shared| shared.unmount_inside(init, &mount, how)).await;
        unmounted.map_err(step(id, "unmounting a volume"))
    }
}

impl From<Unmountable> for RuntimeError {
    fn from(Unmountable { path, wrong }: Unmountable) -> Self {
        Self::BadMountPath { path, wrong }
    }
}

/// What a start failed with: something about its volumes, or a step.
pub(super) fn start_error(id: SandboxId, doing: &'static str) -> impl FnOnce(HelperError) -> RuntimeError {
    move |error| match &error {
        HelperError::Step(failed) => match failed.blame().cloned() {
            Some(Blame::MountPath(unmountable)) => unmountable.into(),
            Some(Blame::VolumeFile { path, why }) => RuntimeError::VolumeFile { path, why },
            None => step(id, doing)(error),
        },
        HelperError::Run { .. } | HelperError::TimedOut { .. } | HelperError::NoAnswer { .. } => step(id, doing)(error),
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
