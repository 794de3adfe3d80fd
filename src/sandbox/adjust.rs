//! What may be changed of a sandbox that exists already, beside its end and its network.

use super::driver::Driver;
use super::error::{StoreFailure, UnknownSandbox};
use crate::model::{Keep, OnTimeout, PublicTraffic, SandboxId, SandboxRecord, SandboxState, Secure};

/// What is to be changed; `None` leaves it as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Adjust {
    /// What happens when its time is up.
    pub on_timeout: Option<OnTimeout>,
    /// Whether its agent wants a token. The agent learns it when it comes up, so only of a paused one.
    pub secure: Option<Secure>,
    /// Whether user ports want the traffic token.
    pub public_traffic: Option<PublicTraffic>,
}

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum AdjustError {
    /// Not there.
    #[error(transparent)]
    Unknown(#[from] UnknownSandbox),
    /// A verb is under way.
    #[error("sandbox {id} is {state} and busy; try again")]
    InTransition {
        /// The sandbox.
        id: SandboxId,
        /// Where it stands.
        state: SandboxState,
    },
    /// Whether its agent wants a token cannot be changed while it runs.
    #[error("sandbox {0} is running; `secure` can be changed while it is paused, or by a reset")]
    Running(SandboxId),
    /// A traffic token is worth nothing beside an agent without one.
    #[error("sandbox {0} would keep its ports private with an open agent; set `secure` too")]
    NeedsToken(SandboxId),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
}

impl Driver {
    /// Changes it; the row is written when this returns.
    pub(super) async fn adjust(&mut self, adjust: Adjust) -> Result<SandboxRecord, AdjustError> {
        self.require_still()?;
        let before = self.record.spec.clone();
        let (lifecycle, network) = (&mut self.record.spec.lifecycle, &mut self.record.spec.network);
        lifecycle.on_timeout = adjust.on_timeout.unwrap_or(lifecycle.on_timeout);
        network.public_traffic = adjust.public_traffic.unwrap_or(network.public_traffic);
        self.record.spec.secure = adjust.secure.unwrap_or(before.secure);
        if self.record.spec == before {
            return Ok(self.record.clone());
        }
        let checked = self.check_access(before.secure);
        if let Err(error) = checked {
            self.record.spec = before;
            return Err(error);
        }
        if let Err(error) = self.write_row().await {
            self.record.spec = before;
            return Err(StoreFailure::from(error).into());
        }
        self.publish();
        Ok(self.record.clone())
    }

    fn check_access(&self, before: Secure) -> Result<(), AdjustError> {
        let spec = &self.record.spec;
        if spec.secure != before && self.record.state != SandboxState::Paused {
            return Err(AdjustError::Running(self.id));
        }
        match (spec.secure, spec.network.public_traffic) {
            (Secure::Open, PublicTraffic::TokenOnly) => Err(AdjustError::NeedsToken(self.id)),
            (Secure::Token, _) | (Secure::Open, PublicTraffic::Allowed) => Ok(()),
        }
    }

    /// A paused one loses its memory; its files stay, and its next run is a cold boot.
    pub(super) async fn forget_memory(&mut self) -> Result<SandboxRecord, AdjustError> {
        self.require_still()?;
        if self.record.state == SandboxState::Paused && self.record.snapshot.is_some() {
            self.record.paused = Some(Keep::FilesOnly);
            self.forget_dump().await;
            self.publish();
        }
        Ok(self.record.clone())
    }

    fn require_still(&self) -> Result<(), AdjustError> {
        let (id, state) = (self.id, self.record.state);
        if self.is_killing() {
            return Err(UnknownSandbox(id).into());
        }
        if self.is_busy() { Err(AdjustError::InTransition { id, state }) } else { Ok(()) }
    }
}
