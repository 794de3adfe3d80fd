//! What may be changed of a sandbox that exists already, beside its end and its network.

use super::driver::Driver;
use super::error::{StoreFailure, UnknownSandbox};
use super::places::Full;
use crate::model::{ByteSize, Keep, OnTimeout, PublicTraffic, Resources, SandboxId, SandboxRecord, SandboxState, Secure};

/// What is to be changed; `None` leaves it as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Adjust {
    /// What happens when its time is up.
    pub on_timeout: Option<OnTimeout>,
    /// Whether its agent wants a token. The agent learns it when it comes up, so only of a paused one.
    pub secure: Option<Secure>,
    /// Whether user ports want the traffic token.
    pub public_traffic: Option<PublicTraffic>,
    /// Its memory limit, from now on and in every run to come.
    pub memory: Option<ByteSize>,
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
    /// There is not so much memory to give.
    #[error(transparent)]
    Full(#[from] Full),
    /// The kernel refused: it uses more than that, most often.
    #[error("sandbox {id} cannot have a memory limit of {memory}; it may use more at the moment")]
    Memory {
        /// The sandbox.
        id: SandboxId,
        /// What was asked for.
        memory: ByteSize,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
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
        self.record.spec.resources.memory = adjust.memory.unwrap_or(before.resources.memory);
        if self.record.spec == before {
            return Ok(self.record.clone());
        }
        let checked = match self.check_access(before.secure) {
            Ok(()) => self.set_memory(before.resources).await,
            Err(error) => Err(error),
        };
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

    /// Gives a running one the memory that its record says by now.
    async fn set_memory(&mut self, before: Resources) -> Result<(), AdjustError> {
        let (id, now) = (self.id, self.record.spec.resources);
        let Some(run) = self.run.as_mut().filter(|_| now != before) else { return Ok(()) };
        run.place.resize(&self.core.places, now)?;
        let (runtime, memory) = (std::sync::Arc::clone(&self.core.runtime), now.memory);
        // Quick, and not worth serving others meanwhile: they would meet a record that is half changed.
        let Err(error) = runtime.set_memory(id, memory).await else { return Ok(()) };
        // There was room for it before.
        let _shrinks_back = run.place.resize(&self.core.places, before);
        Err(AdjustError::Memory { id, memory, source: Box::new(error) })
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
