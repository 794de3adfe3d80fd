//! Creating, showing and removing sandboxes, their tokens, and how a record looks on the wire.

use super::super::ApiState;
use super::ask::{Body, SandboxPath};
use super::error::HopxError;
use super::new_sandbox::Wanted;
use super::public_host::{REGION, public_host};
use super::wire;
use crate::model::{Keep, SandboxId, SandboxRecord, SandboxState};
use axum::Json;
use axum::extract::State;
use http::{HeaderMap, StatusCode, Uri};

/// The one organization of a server that somebody hosts for themselves.
const ORGANIZATION: u32 = 1;
/// The one node.
const NODE: &str = "local";

/// `POST /v1/sandboxes`.
pub(super) async fn create(
    State(state): State<ApiState>,
    uri: Uri,
    headers: HeaderMap,
    Body(new): Body<wire::NewSandbox>,
) -> Result<(StatusCode, Json<wire::NewSandboxAnswer>), HopxError> {
    let wanted = Wanted::parse(new, state.config.timeout_max)?;
    let resolved = state.templates.resolve(&wanted.template).await?;
    let record = state.registry.create(wanted.of(&resolved), None).await?;
    let token = token(&state, record.id);
    Ok((StatusCode::CREATED, Json(wire::NewSandboxAnswer { sandbox: shown(&state, &uri, &headers, record), token })))
}

/// `GET /v1/sandboxes/{id}`.
pub(super) async fn info(
    State(state): State<ApiState>,
    uri: Uri,
    headers: HeaderMap,
    SandboxPath(id): SandboxPath,
) -> Result<Json<wire::Sandbox>, HopxError> {
    let record = state.registry.get(id)?;
    Ok(Json(shown(&state, &uri, &headers, record)))
}

/// `DELETE /v1/sandboxes/{id}`.
pub(super) async fn remove(State(state): State<ApiState>, SandboxPath(id): SandboxPath) -> Result<Json<wire::Deleted>, HopxError> {
    state.registry.kill(id).await?;
    Ok(Json(wire::Deleted { id: id.to_string(), deleted: true }))
}

/// `POST /v1/sandboxes/{id}/token/refresh`, in every state: clients ask for it before they resume.
pub(super) async fn refresh_token(State(state): State<ApiState>, SandboxPath(id): SandboxPath) -> Result<Json<wire::Token>, HopxError> {
    state.registry.get(id)?;
    Ok(Json(token(&state, id)))
}

fn token(state: &ApiState, id: SandboxId) -> wire::Token {
    let bearer = state.registry.issue_bearer(id);
    wire::Token { auth_token: bearer.token, token_expires_at: wire::Time(bearer.expires_at) }
}

/// A record for the client that asks by these headers.
pub(super) fn shown(state: &ApiState, uri: &Uri, headers: &HeaderMap, record: SandboxRecord) -> wire::Sandbox {
    let public_host = public_host(&state.config.domain, uri, headers, record.id);
    let resources = record.spec.resources;
    wire::Sandbox {
        object: "sandbox",
        id: record.id.to_string(),
        status: status(&record),
        organization_id: ORGANIZATION,
        template_id: record.spec.template.to_string(),
        node_id: NODE,
        region: REGION,
        direct_url: public_host.clone(),
        public_host,
        resources: wire::Resources {
            vcpu: resources.cpu_count,
            memory_mb: resources.memory.whole_mib(),
            disk_mb: resources.disk.whole_mib(),
        },
        internet_access: record.spec.network.allow_internet_access.unwrap_or(true),
        live_mode: true,
        timeout_seconds: record.spec.lifecycle.timeout.as_secs(),
        expires_at: wire::Time(record.end_at),
        created_at: wire::Time(record.created_at),
        template_name: record.spec.alias,
    }
}

/// HopX's word for where a sandbox stands. One that is waking is still paused: `connect` then resumes it and waits for
/// the same end.
pub(super) const fn status(record: &SandboxRecord) -> &'static str {
    match (record.state, record.paused) {
        (SandboxState::Creating, _) => "creating",
        (SandboxState::Running, _) => "running",
        (SandboxState::Paused | SandboxState::Resuming, Some(Keep::FilesOnly)) => "stopped",
        (SandboxState::Pausing | SandboxState::Paused | SandboxState::Resuming, _) => "paused",
        // Nobody is shown these: for their users they are gone.
        (SandboxState::Killing | SandboxState::Killed, _) => "deleted",
        (SandboxState::Failed, _) => "error",
    }
}
