//! Timeouts, pause, resume and connect.

use super::super::ApiState;
use super::super::body::{Json as Body, OptionalJson};
use super::super::error::ApiError;
use super::ask::{self, SandboxPath};
use super::{sandboxes, wire};
use crate::model::{Keep, OnTimeout, SandboxId, SandboxState};
use crate::sandbox::{Connected, PauseError};
use axum::Json;
use axum::extract::State;
use http::StatusCode;
use std::time::Duration;

/// Of connect, in all its versions, when it names none.
const CONNECT_TIMEOUT_S: i64 = 300;
/// Of the old resume.
const RESUME_TIMEOUT_S: i64 = 15;
/// Of refreshes, and the most that they may ask for.
const REFRESH_S: i64 = 15;
const REFRESH_MAX_S: i64 = 3600;

/// `POST /sandboxes/{id}/timeout`.
pub(super) async fn set_timeout(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    Body(asked): Body<wire::SetTimeout>,
) -> Result<StatusCode, ApiError> {
    let timeout = ask::end_of_life(asked.timeout, state.config.timeout_max)?;
    state.registry.set_timeout(id, timeout).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /sandboxes/{id}/refreshes`: keeps it alive for a while, never shortens.
pub(super) async fn refresh(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    OptionalJson(asked): OptionalJson<wire::Refresh>,
) -> Result<StatusCode, ApiError> {
    let duration = match asked.duration.unwrap_or(REFRESH_S) {
        seconds @ 0..=REFRESH_MAX_S => Duration::from_secs(seconds.unsigned_abs()),
        other => {
            return Err(ApiError::bad_request(format!("duration is {other}; it must be a number of seconds from 0 to {REFRESH_MAX_S}")));
        }
    };
    state.registry.extend(id, duration.min(state.config.timeout_max)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /sandboxes/{id}/connect` and its v2: 200 when it ran, 201 when it was resumed.
pub(super) async fn connect(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    OptionalJson(asked): OptionalJson<wire::Connect>,
) -> Result<(StatusCode, Json<wire::Sandbox>), ApiError> {
    let timeout = ask::end_of_life(asked.timeout.unwrap_or(CONNECT_TIMEOUT_S), state.config.timeout_max)?;
    // `memory: false` asks for a cold boot of what was paused with memory; a running one is left alone.
    let connected = match asked.memory {
        Some(false) => state.registry.boot(id, timeout).await?,
        Some(true) | None => state.registry.connect(id, timeout).await?,
    };
    let (status, record) = match connected {
        Connected::WasRunning(record) => (StatusCode::OK, record),
        Connected::Resumed(record) => (StatusCode::CREATED, record),
    };
    Ok((status, Json(sandboxes::sandbox(&state, *record))))
}

/// `POST /sandboxes/{id}/resume`, of old clients.
pub(super) async fn resume(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    OptionalJson(asked): OptionalJson<wire::Resume>,
) -> Result<(StatusCode, Json<wire::Sandbox>), ApiError> {
    let timeout = ask::end_of_life(asked.timeout.unwrap_or(RESUME_TIMEOUT_S), state.config.timeout_max)?;
    let on_timeout = asked.auto_pause.map(|pauses| if pauses { OnTimeout::Pause(Keep::Memory) } else { OnTimeout::Kill });
    let record = state.registry.resume(id, timeout, on_timeout).await?;
    Ok((StatusCode::CREATED, Json(sandboxes::sandbox(&state, record))))
}

/// `POST /sandboxes/{id}/pause`.
pub(super) async fn pause(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    OptionalJson(asked): OptionalJson<wire::Pause>,
) -> Result<StatusCode, ApiError> {
    let keep = if asked.memory == Some(false) { Keep::FilesOnly } else { Keep::Memory };
    refuse_second_pause(&state, id)?;
    state.registry.pause(id, keep).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The core lets several callers wait for one pause; E2B's dialect tells the later ones that it is under way.
fn refuse_second_pause(state: &ApiState, id: SandboxId) -> Result<(), ApiError> {
    match state.registry.get(id)?.state {
        pausing @ SandboxState::Pausing => Err(PauseError::InTransition { id, state: pausing }.into()),
        SandboxState::Creating
        | SandboxState::Running
        | SandboxState::Paused
        | SandboxState::Resuming
        | SandboxState::Killing
        | SandboxState::Killed
        | SandboxState::Failed => Ok(()),
    }
}
