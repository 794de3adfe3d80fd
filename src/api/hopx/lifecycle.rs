//! Pause and resume, stop and start, timeouts.
//!
//! A pause keeps the memory and a stop does not: the core's two ways to pause. Whatever is so already is a success, since
//! the clients repeat what they had no answer to.

use super::super::ApiState;
use super::ask::{self, Body, SandboxPath};
use super::error::HopxError;
use super::{sandboxes, wire};
use crate::model::{Keep, SandboxId, SandboxRecord, SandboxState};
use crate::sandbox::{Connected, PauseError};
use axum::Json;
use axum::extract::State;

type Answer = Result<Json<wire::Status>, HopxError>;

/// `POST /v1/sandboxes/{id}/pause`.
pub(super) async fn pause(State(state): State<ApiState>, SandboxPath(id): SandboxPath) -> Answer {
    put_to_rest(&state, id, Keep::Memory).await
}

/// `POST /v1/sandboxes/{id}/stop`: keeps the files and drops processes and memory.
pub(super) async fn stop(State(state): State<ApiState>, SandboxPath(id): SandboxPath) -> Answer {
    put_to_rest(&state, id, Keep::FilesOnly).await
}

async fn put_to_rest(state: &ApiState, id: SandboxId, keep: Keep) -> Answer {
    let record = match state.registry.pause(id, keep).await {
        Ok(record) => record,
        Err(PauseError::AlreadyPaused(_)) => state.registry.get(id)?,
        Err(error) => return Err(error.into()),
    };
    match record.paused {
        Some(kept) if kept != keep => Err(HopxError::wrong_state(match kept {
            Keep::Memory => format!("sandbox {id} is paused; resume it before you stop it"),
            Keep::FilesOnly => format!("sandbox {id} is stopped; start it before you pause it"),
        })),
        Some(_) | None => Ok(status(&record)),
    }
}

/// `POST /v1/sandboxes/{id}/resume`: goes on where the pause was.
pub(super) async fn resume(State(state): State<ApiState>, SandboxPath(id): SandboxPath) -> Answer {
    wake(&state, id, Keep::Memory).await
}

/// `POST /v1/sandboxes/{id}/start`: a cold boot of a stopped one's files.
pub(super) async fn start(State(state): State<ApiState>, SandboxPath(id): SandboxPath) -> Answer {
    wake(&state, id, Keep::FilesOnly).await
}

async fn wake(state: &ApiState, id: SandboxId, kept: Keep) -> Answer {
    let record = state.registry.get(id)?;
    if record.state == SandboxState::Running {
        return Ok(status(&record));
    }
    match record.paused {
        Some(other) if other != kept => Err(HopxError::wrong_state(match other {
            Keep::Memory => format!("sandbox {id} is paused, with its memory; resume it"),
            Keep::FilesOnly => format!("sandbox {id} is stopped; start it"),
        })),
        Some(_) | None => {
            let timeout = record.spec.lifecycle.timeout.min(state.config.timeout_max);
            match state.registry.connect(id, timeout).await? {
                Connected::WasRunning(record) | Connected::Resumed(record) => Ok(status(&record)),
            }
        }
    }
}

fn status(record: &SandboxRecord) -> Json<wire::Status> {
    Json(wire::Status { id: record.id.to_string(), status: sandboxes::status(record) })
}

/// `PUT /v1/sandboxes/{id}/timeout`: from now on, longer or shorter.
pub(super) async fn set_timeout(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    Body(asked): Body<wire::SetTimeout>,
) -> Result<Json<wire::NewTimeout>, HopxError> {
    let timeout = ask::lifetime(asked.timeout_seconds, state.config.timeout_max)?;
    let record = state.registry.set_timeout(id, timeout).await?;
    Ok(Json(wire::NewTimeout { id: id.to_string(), timeout_seconds: asked.timeout_seconds, expires_at: wire::Time(record.end_at) }))
}
