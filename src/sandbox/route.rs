//! Where a proxied request goes: into a running sandbox, or into a paused one that traffic wakes.

use super::activity::{Activity, InUse};
use super::core::{Core, Handle, View};
use super::driver::{Request, answered};
use super::error::UnknownSandbox;
use super::resume::{ConnectError, ResumeAsk};
use crate::model::{AutoResume, Keep, SandboxId, SandboxSpec, SandboxState};
use crate::runtime::Runtime;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Why a request cannot be routed to a port.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// Not there, or paused and not to be woken by traffic.
    #[error(transparent)]
    Unknown(#[from] UnknownSandbox),
    /// It should have been woken and could not.
    #[error(transparent)]
    Wake(ConnectError),
    /// It is waking or pausing for longer than `wake_wait_max`.
    #[error("sandbox {id} is still {state} after {waited:?}")]
    Busy {
        /// The sandbox.
        id: SandboxId,
        /// Where it stands.
        state: SandboxState,
        /// How long the request waited.
        waited: Duration,
    },
}

/// A running sandbox that requests can be sent into; good until `cut` resolves.
#[derive(Debug, Clone)]
pub struct Route {
    /// Whose.
    pub id: SandboxId,
    /// As of the moment of routing: tokens, host mask.
    pub spec: Arc<SandboxSpec>,
    runtime: Arc<dyn Runtime>,
    cut: tokio::sync::watch::Receiver<bool>,
    activity: Arc<Activity>,
}

impl Route {
    /// One attempt to connect to 127.0.0.1:port (else ::1) inside. Refused is `ConnectionRefused`.
    pub async fn dial(&self, port: u16) -> std::io::Result<tokio::net::TcpStream> {
        self.runtime.dial(self.id, port).await
    }

    /// Whoever uses the sandbox holds this meanwhile: it is not idle until the last one is dropped.
    pub fn in_use(&self) -> InUse {
        InUse::of(&self.activity)
    }

    /// Resolves when the sandbox stops, pauses or is killed: connections into it must be closed then. Cancel-safe.
    pub async fn cut(&self) {
        let mut cut = self.cut.clone();
        let _gone_counts_as_cut = cut.wait_for(|cut| *cut).await;
    }
}

/// What a request finds.
enum Door {
    Open(Route),
    /// Closed, and a request may open it.
    Wakes(ResumeAsk),
    /// Somebody else is opening it.
    Opening,
    /// As if it did not exist.
    Shut,
}

/// Finds the way in, waking the sandbox if its lifecycle says so. Cancel-safe: a wake that began goes on.
pub(super) async fn route(core: &Core, id: SandboxId) -> Result<Route, RouteError> {
    let mut handle = core.live(id)?;
    let deadline = Instant::now() + core.config.wake_wait_max;
    loop {
        let view = handle.view.borrow_and_update().clone();
        let waited = match door(core, id, &view) {
            Door::Open(route) => return Ok(route),
            Door::Shut => return Err(UnknownSandbox(id).into()),
            Door::Wakes(ask) => tokio::time::timeout_at(deadline, wake(&handle, id, ask)).await.ok().transpose()?,
            Door::Opening => tokio::time::timeout_at(deadline, handle.view.changed()).await.ok().map(drop),
        };
        if waited.is_none() {
            let state = handle.view.borrow().record.state;
            return Err(RouteError::Busy { id, state, waited: core.config.wake_wait_max });
        }
        if handle.view.has_changed().is_err() {
            return Err(UnknownSandbox(id).into());
        }
    }
}

fn door(core: &Core, id: SandboxId, view: &View) -> Door {
    let record = &view.record;
    let wakes = record.spec.lifecycle.auto_resume == AutoResume::On;
    let ask = ResumeAsk { timeout: record.spec.lifecycle.timeout.max(core.config.wake_timeout_min), on_timeout: None, keep: Keep::Memory };
    match (record.state, &view.run) {
        (SandboxState::Running, Some(run)) => Door::Open(Route {
            id,
            spec: Arc::clone(&view.spec),
            runtime: Arc::clone(&core.runtime),
            cut: run.cut.clone(),
            activity: Arc::clone(&run.activity),
        }),
        (SandboxState::Paused, _) if record.wakes_on_traffic() => Door::Wakes(ask),
        // The dump's id stands in the row from the first moment of a pause that keeps memory.
        (SandboxState::Pausing, _) if wakes && record.snapshot.is_some() => Door::Wakes(ask),
        (SandboxState::Resuming, _) | (SandboxState::Running, None) => Door::Opening,
        (SandboxState::Paused | SandboxState::Pausing, _)
        | (SandboxState::Creating | SandboxState::Killing | SandboxState::Killed | SandboxState::Failed, _) => Door::Shut,
    }
}

async fn wake(handle: &Handle, id: SandboxId, ask: ResumeAsk) -> Result<(), RouteError> {
    let (reply, answer) = oneshot::channel();
    handle.requests.send(Request::Resume { ask, reply }).await.map_err(|_| UnknownSandbox(id))?;
    match answered(id, answer).await {
        Ok(_) => Ok(()),
        Err(ConnectError::Unknown(gone)) => Err(gone.into()),
        Err(error) => Err(RouteError::Wake(error)),
    }
}
