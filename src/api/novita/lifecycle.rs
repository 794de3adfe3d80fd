//! Timeouts, pause, connect, resume and reset.

use super::super::ApiState;
use super::super::body::{Json as Body, OptionalJson};
use super::super::e2b::ask::SandboxPath;
use super::super::e2b::sandboxes::sandbox;
use super::super::e2b::wire::{Sandbox, SetTimeout};
use super::super::error::ApiError;
use super::rules::DEFAULT_TIMEOUT_S;
use super::sandboxes::bounds;
use super::wire;
use crate::model::{ByteSize, Keep, OnTimeout, PublicTraffic, SandboxId, Secure};
use crate::sandbox::{Adjust, AdjustError, AfterReset, Connected, CreateError, PauseError, ResetError, TokenKind};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;

/// Far beyond what any quota allows, and no overflow.
const HOTPLUG_MIB_MAX: u64 = 1 << 24;

/// `POST /sandboxes/{id}/timeout`: from now on, in both directions. A paused sandbox answers 404: the 1.x clients resume
/// only after that.
pub(super) async fn set_timeout(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    Body(asked): Body<SetTimeout>,
) -> Result<StatusCode, ApiError> {
    let run_max = state.registry.get(id)?.spec.lifecycle.run_max;
    let timeout = bounds(&state).end_of_life(asked.timeout, run_max)?;
    state.registry.set_timeout(id, timeout).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /sandboxes/{id}/pause`: 204 once its memory is on disk, however the client wants to wait; callers that come
/// while it is under way wait for the same end. What cannot be paused is no 409, which the SDKs take for "is paused".
pub(super) async fn pause(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    OptionalJson(_asked): OptionalJson<wire::Pause>,
) -> Result<StatusCode, ApiError> {
    state.registry.pause(id, Keep::Memory).await.map_err(not_paused)?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) fn not_paused(error: PauseError) -> ApiError {
    match error {
        refused @ PauseError::NotDumpable { .. } => ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, refused.to_string()),
        other => other.into(),
    }
}

/// `POST /sandboxes/{id}/connect`: 200 when it ran, 201 when it was resumed.
pub(super) async fn connect(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    OptionalJson(asked): OptionalJson<wire::Connect>,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    let (timeout, adjust) = parse_connect(&state, id, &asked)?;
    state.registry.adjust(id, adjust).await?;
    let (status, record) = match state.registry.connect(id, timeout).await? {
        Connected::WasRunning(record) => (StatusCode::OK, record),
        Connected::Resumed(record) => (StatusCode::CREATED, record),
    };
    Ok((status, Json(sandbox(&state, *record))))
}

/// `POST /sandboxes/{id}/resume`, of 1.x clients: 409 when it runs.
pub(super) async fn resume(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    OptionalJson(asked): OptionalJson<wire::Connect>,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    let (timeout, adjust) = parse_connect(&state, id, &asked)?;
    let record = state.registry.resume(id, timeout, adjust.on_timeout).await?;
    Ok((StatusCode::CREATED, Json(sandbox(&state, record))))
}

fn parse_connect(state: &ApiState, id: SandboxId, asked: &wire::Connect) -> Result<(std::time::Duration, Adjust), ApiError> {
    let run_max = state.registry.get(id)?.spec.lifecycle.run_max;
    let timeout = bounds(state).end_of_life(asked.timeout.unwrap_or(DEFAULT_TIMEOUT_S), run_max)?;
    Ok((timeout, Adjust { on_timeout: auto_pause(asked.auto_pause), ..access(&asked.access) }))
}

/// The beta clients send `autoPause: false` with every connect, and what was set at create is to outlast resumes: only
/// `true` changes anything.
fn auto_pause(asked: Option<bool>) -> Option<OnTimeout> {
    (asked == Some(true)).then_some(OnTimeout::Pause(Keep::Memory))
}

fn access(asked: &wire::Access) -> Adjust {
    let in_network = asked.network.as_ref().and_then(|network| network.allow_public_traffic);
    Adjust {
        on_timeout: None,
        secure: asked.secure.map(|secure| if secure { Secure::Token } else { Secure::Open }),
        public_traffic: asked
            .allow_public_traffic
            .or(in_network)
            .map(|allowed| if allowed { PublicTraffic::Allowed } else { PublicTraffic::TokenOnly }),
        memory: None,
    }
}

/// `POST /sandboxes/{id}/reset`: memory and processes go, files stay, and unless told otherwise it boots anew.
pub(super) async fn reset(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    OptionalJson(asked): OptionalJson<wire::Reset>,
) -> Result<Response, ApiError> {
    let lifecycle = state.registry.get(id)?.spec.lifecycle;
    let timeout = match asked.timeout {
        Some(seconds) => bounds(&state).lifetime(seconds, lifecycle.run_max)?,
        None => lifecycle.timeout,
    };
    let after = if asked.resume == Some(false) { AfterReset::StayPaused } else { AfterReset::Boot { timeout } };
    let record = state.registry.reset(id, access(&asked.access), after).await?;
    Ok(match record.spec.network.public_traffic {
        PublicTraffic::Allowed => StatusCode::NO_CONTENT.into_response(),
        PublicTraffic::TokenOnly => {
            Json(wire::WasReset { traffic_access_token: state.registry.token(TokenKind::TrafficAccess, id) }).into_response()
        }
    })
}

/// `POST /sandboxes/{id}/hotplug-memory`: so much beyond what its template gives, 0 for none.
pub(super) async fn hotplug_memory(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    Body(asked): Body<wire::HotplugMemory>,
) -> Result<StatusCode, ApiError> {
    let spec = state.registry.get(id)?.spec;
    let beyond = u64::try_from(asked.requested_size_mib).ok().filter(|mib| *mib <= HOTPLUG_MIB_MAX);
    let beyond = beyond.ok_or_else(|| {
        let asked = asked.requested_size_mib;
        ApiError::bad_request(format!("requested_size_mib is {asked}; it must be a number of MiB from 0 to {HOTPLUG_MIB_MAX}"))
    })?;
    let (_, builds) = state.templates.get(spec.template).await?;
    let base = builds.iter().find(|build| build.id == spec.build).map_or(spec.resources.memory, |build| build.resources.memory);
    let memory = ByteSize(base.bytes() + ByteSize::mib(beyond).bytes());
    state.registry.adjust(id, Adjust { memory: Some(memory), ..Adjust::default() }).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl From<AdjustError> for ApiError {
    fn from(error: AdjustError) -> Self {
        match error {
            AdjustError::Unknown(unknown) => unknown.into(),
            AdjustError::InTransition { .. } => Self::conflict(error.to_string()),
            AdjustError::Running(_) | AdjustError::NeedsToken(_) => Self::bad_request(error.to_string()),
            AdjustError::Full(full) => CreateError::from(full).into(),
            AdjustError::Memory { .. } => Self::conflict(error.to_string()),
            AdjustError::Store(failure) => failure.into(),
        }
    }
}

impl From<ResetError> for ApiError {
    fn from(error: ResetError) -> Self {
        match error {
            ResetError::Stop(error) => error.into(),
            ResetError::Adjust(error) => error.into(),
            ResetError::Boot(error) => error.into(),
        }
    }
}
