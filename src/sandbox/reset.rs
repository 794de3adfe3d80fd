//! reset: processes and memory go, files stay.
//!
//! A pause that keeps the files, then, if it is to run, a cold boot: two verbs of its driver. A server that dies in
//! between leaves a paused sandbox with its files, which is what a reset without a boot is.

use super::adjust::{Adjust, AdjustError};
use super::error::UnknownSandbox;
use super::pause::PauseError;
use super::registry::Registry;
use super::resume::{ConnectError, Connected};
use crate::model::{Keep, SandboxId, SandboxRecord};
use std::time::Duration;

/// What comes after the memory is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterReset {
    /// Nothing: it is paused.
    StayPaused,
    /// It boots and lives for so long.
    Boot {
        /// From the boot on.
        timeout: Duration,
    },
}

/// Why a sandbox was not reset, or not booted.
#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    /// It could not be stopped and is as it was.
    #[error(transparent)]
    Stop(#[from] PauseError),
    /// It is stopped; who may reach it could not be changed.
    #[error(transparent)]
    Adjust(#[from] AdjustError),
    /// It is stopped and stays paused.
    #[error(transparent)]
    Boot(#[from] ConnectError),
}

impl From<UnknownSandbox> for ResetError {
    fn from(unknown: UnknownSandbox) -> Self {
        Self::Stop(unknown.into())
    }
}

/// Takes its processes and memory away, whatever state it is in.
async fn stop(registry: &Registry, id: SandboxId) -> Result<(), ResetError> {
    match registry.pause(id, Keep::FilesOnly).await {
        Ok(_) | Err(PauseError::AlreadyPaused(_)) => {}
        Err(error) => return Err(error.into()),
    }
    // A pause that was under way already, or over, may have kept the memory.
    registry.forget_memory(id).await?;
    Ok(())
}

pub(super) async fn reset(registry: Registry, id: SandboxId, adjust: Adjust, after: AfterReset) -> Result<SandboxRecord, ResetError> {
    stop(&registry, id).await?;
    let record = registry.adjust(id, adjust).await?;
    match after {
        AfterReset::StayPaused => Ok(record),
        AfterReset::Boot { timeout } => match registry.connect(id, timeout).await? {
            Connected::WasRunning(record) | Connected::Resumed(record) => Ok(*record),
        },
    }
}
