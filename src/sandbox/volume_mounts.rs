//! Volumes that come to a running sandbox, or leave it.
//!
//! Mounting: the row first, since it keeps the volume from being removed; unmounting: the kernel first. A server that
//! dies in between leaves a row that names more than is mounted, and the next start mounts that.

use super::driver::Driver;
use super::error::{Cause, StoreFailure, UnknownSandbox};
use crate::model::{MountPath, SandboxId, SandboxRecord, SandboxState, VolumeMount, VolumeName};
use crate::runtime::{RuntimeError, UnmountHow, Unmounted};
use crate::store::{sandboxes, volumes};
use std::sync::Arc;

/// What is to be changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeChange {
    /// One more volume.
    Mount(VolumeMount),
    /// One less.
    Unmount {
        /// Where it is mounted.
        path: MountPath,
        /// What about its open files.
        busy: WhenBusy,
    },
}

/// What becomes of files that are open on a volume that is to be unmounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenBusy {
    /// Nothing: the volume stays mounted.
    Refuse,
    /// Programs keep them until they close them.
    Detach,
}

/// Why a sandbox has the volumes that it had.
#[derive(Debug, thiserror::Error)]
pub enum VolumeChangeError {
    /// Not there.
    #[error(transparent)]
    Unknown(#[from] UnknownSandbox),
    /// Only a running one is changed.
    #[error("sandbox {id} is {state}; volumes are mounted and unmounted while it runs")]
    NotRunning {
        /// The sandbox.
        id: SandboxId,
        /// Where it stands.
        state: SandboxState,
    },
    /// There is a volume at this path.
    #[error("invalid mounts: the path '{0}' has a volume already")]
    PathTaken(MountPath),
    /// The volume was removed meanwhile.
    #[error("invalid mounts: volume '{0}' does not exist any more")]
    NoVolume(VolumeName),
    /// Something else than a folder is there.
    #[error("invalid mounts: no volume can be mounted at '{path}': {wrong}")]
    BadPath {
        /// The path.
        path: MountPath,
        /// What is in the way.
        wrong: String,
    },
    /// There is none at this path.
    #[error("no volume is mounted at '{0}'")]
    NotMounted(MountPath),
    /// Programs have files open on it.
    #[error("the volume at '{0}' is in use; end what uses it, or force")]
    Busy(MountPath),
    /// The kernel side failed.
    #[error("the volumes of sandbox {id} could not be changed")]
    Kernel {
        /// The sandbox.
        id: SandboxId,
        /// Why.
        #[source]
        source: Cause,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
}

impl Driver {
    /// Changes them; kernel and row are of one mind when this returns.
    pub(super) async fn change_volumes(&mut self, change: VolumeChange) -> Result<SandboxRecord, VolumeChangeError> {
        let (id, state) = (self.id, self.record.state);
        if self.is_killing() {
            return Err(UnknownSandbox(id).into());
        }
        if self.is_busy() || state != SandboxState::Running {
            return Err(VolumeChangeError::NotRunning { id, state });
        }
        match change {
            VolumeChange::Mount(mount) => self.mount_volume(mount).await?,
            VolumeChange::Unmount { path, busy } => self.unmount_volume(path, busy).await?,
        }
        self.publish();
        Ok(self.record.clone())
    }

    async fn mount_volume(&mut self, mount: VolumeMount) -> Result<(), VolumeChangeError> {
        if self.record.spec.volumes.iter().any(|mounted| mounted.path == mount.path) {
            return Err(VolumeChangeError::PathTaken(mount.path));
        }
        self.record.spec.volumes.push(mount.clone());
        let noted = self.note_volumes().await;
        let mounted = match noted {
            Ok(()) => self.core.runtime.mount_volume(self.id, &mount).await.map_err(|error| self.failed(error)),
            Err(error) => Err(error),
        };
        if mounted.is_err() {
            self.record.spec.volumes.pop();
            // A row that names it nevertheless has it mounted at the next start.
            let _the_first_failure_is_told = self.write_row().await;
        }
        mounted
    }

    /// Writes the row, if all its volumes are there.
    async fn note_volumes(&self) -> Result<(), VolumeChangeError> {
        let record = self.record.clone();
        let written = self.core.store.write(move |db| {
            let missing = volumes::missing(db, &record.spec.volumes)?.map(|mount| mount.name.clone());
            if missing.is_none() {
                sandboxes::update(db, &record)?;
            }
            Ok(missing)
        });
        match written.await.map_err(StoreFailure::from)? {
            Some(name) => Err(VolumeChangeError::NoVolume(name)),
            None => Ok(()),
        }
    }

    async fn unmount_volume(&mut self, path: MountPath, busy: WhenBusy) -> Result<(), VolumeChangeError> {
        let mounts = &self.record.spec.volumes;
        let position = mounts.iter().position(|mount| mount.path == path).ok_or_else(|| VolumeChangeError::NotMounted(path.clone()))?;
        let mount = mounts[position].clone();
        let is_last = mounts.iter().filter(|other| other.volume == mount.volume).count() == 1;
        let forced = busy == WhenBusy::Detach;
        let how = if is_last { UnmountHow::Everywhere { forced } } else { UnmountHow::ThisOne { forced } };
        match self.core.runtime.unmount_volume(self.id, &mount, how).await {
            Ok(Unmounted::Done) => {}
            Ok(Unmounted::Busy) => return Err(VolumeChangeError::Busy(path)),
            Err(error) => return Err(self.failed(error)),
        }
        self.record.spec.volumes.remove(position);
        Ok(self.write_row().await.map_err(StoreFailure::from)?)
    }

    fn failed(&self, error: RuntimeError) -> VolumeChangeError {
        match error {
            RuntimeError::BadMountPath { path, wrong } => VolumeChangeError::BadPath { path, wrong },
            other => VolumeChangeError::Kernel { id: self.id, source: Arc::new(other) },
        }
    }
}
