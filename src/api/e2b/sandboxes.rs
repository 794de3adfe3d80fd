//! Creating, showing and killing sandboxes, and how a record looks on the wire.

use super::super::ApiState;
use super::super::body::Json as Body;
use super::super::error::ApiError;
use super::ask::SandboxPath;
use super::new_sandbox::{Version, Wanted};
use super::{network, wire};
use crate::model::{AutoResume, Keep, OnTimeout, PublicTraffic, SandboxRecord, SandboxState, Secure, VolumeMount};
use crate::sandbox::TokenKind;
use axum::Json;
use axum::extract::State;
use http::{HeaderMap, StatusCode};

/// `POST /sandboxes`.
pub(super) async fn create(
    state: State<ApiState>,
    headers: HeaderMap,
    Body(new): Body<wire::NewSandbox>,
) -> Result<(StatusCode, Json<wire::Sandbox>), ApiError> {
    create_as(Version::One, state, headers, new).await
}

/// `POST /v2/sandboxes`.
pub(super) async fn create_v2(
    state: State<ApiState>,
    headers: HeaderMap,
    Body(new): Body<wire::NewSandbox>,
) -> Result<(StatusCode, Json<wire::Sandbox>), ApiError> {
    create_as(Version::Two, state, headers, new).await
}

async fn create_as(
    version: Version,
    State(state): State<ApiState>,
    headers: HeaderMap,
    new: wire::NewSandbox,
) -> Result<(StatusCode, Json<wire::Sandbox>), ApiError> {
    let key = idempotency_key(&headers)?;
    let wanted = Wanted::parse(new, version, state.config.timeout_max)?;
    let record = state.registry.create(wanted.resolved(&state).await?, key).await?;
    Ok((StatusCode::CREATED, Json(sandbox(&state, record))))
}

pub(in crate::api) fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    let is_good = |key: &&str| (1..=255).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    value
        .to_str()
        .ok()
        .filter(is_good)
        .map(Some)
        .ok_or_else(|| ApiError::bad_request("Idempotency-Key must be 1 to 255 characters of A-Z, a-z, 0-9 and '-'"))
}

/// `GET /sandboxes/{id}`.
pub(super) async fn info(State(state): State<ApiState>, SandboxPath(id): SandboxPath) -> Result<Json<wire::SandboxDetail>, ApiError> {
    let record = state.registry.get(id)?;
    Ok(Json(detail(&state, record)))
}

/// `DELETE /sandboxes/{id}`.
pub(super) async fn kill(State(state): State<ApiState>, SandboxPath(id): SandboxPath) -> Result<StatusCode, ApiError> {
    state.registry.kill(id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What create, connect, resume and fork answer.
pub(in crate::api) fn sandbox(state: &ApiState, record: SandboxRecord) -> wire::Sandbox {
    let is_private = record.spec.network.public_traffic == PublicTraffic::TokenOnly;
    wire::Sandbox {
        template_id: record.spec.template.to_string(),
        sandbox_id: record.id.to_string(),
        client_id: wire::CLIENT_ID,
        envd_version: wire::ENVD_VERSION,
        envd_access_token: envd_token(state, &record),
        traffic_access_token: is_private.then(|| state.registry.token(TokenKind::TrafficAccess, record.id)),
        alias: record.spec.alias,
        domain: Some(state.config.domain.clone()),
    }
}

fn envd_token(state: &ApiState, record: &SandboxRecord) -> Option<String> {
    (record.spec.secure == Secure::Token).then(|| state.registry.token(TokenKind::EnvdAccess, record.id))
}

/// An entry of a list.
pub(super) fn listed(record: SandboxRecord) -> wire::ListedSandbox {
    let resources = record.spec.resources;
    wire::ListedSandbox {
        template_id: record.spec.template.to_string(),
        sandbox_id: record.id.to_string(),
        client_id: wire::CLIENT_ID,
        alias: record.spec.alias,
        started_at: wire::Time(record.started_at),
        end_at: wire::Time(record.end_at),
        cpu_count: resources.cpu_count,
        memory_mb: resources.memory.whole_mib(),
        disk_size_mb: resources.disk.whole_mib(),
        metadata: record.spec.metadata,
        state: shown_state(record.state),
        envd_version: wire::ENVD_VERSION,
        volume_mounts: record.spec.volumes.iter().map(volume_mount).collect(),
    }
}

fn volume_mount(mount: &VolumeMount) -> wire::VolumeMount {
    wire::VolumeMount { name: mount.name.to_string(), path: mount.path.to_string() }
}

/// E2B knows two words; a sandbox is running only while it can be used.
const fn shown_state(state: SandboxState) -> wire::State {
    match state {
        SandboxState::Creating | SandboxState::Running => wire::State::Running,
        SandboxState::Pausing | SandboxState::Paused | SandboxState::Resuming => wire::State::Paused,
        // Nobody is shown these: for their users they are gone.
        SandboxState::Killing | SandboxState::Killed | SandboxState::Failed => wire::State::Paused,
    }
}

/// What info answers.
fn detail(state: &ApiState, record: SandboxRecord) -> wire::SandboxDetail {
    let lifecycle = record.spec.lifecycle;
    wire::SandboxDetail {
        envd_access_token: envd_token(state, &record),
        domain: Some(state.config.domain.clone()),
        allow_internet_access: record.spec.network.allow_internet_access,
        network: network::shown(&record.spec.network),
        lifecycle: wire::ShownLifecycle {
            auto_resume: lifecycle.auto_resume == AutoResume::On,
            on_timeout: match lifecycle.on_timeout {
                OnTimeout::Kill => "kill",
                OnTimeout::Pause(_) => "pause",
            },
        },
        pause_mode: (record.state == SandboxState::Paused).then_some(record.paused).flatten().map(|keep| match keep {
            Keep::Memory => wire::PauseMode::Full,
            Keep::FilesOnly => wire::PauseMode::Filesystem,
        }),
        listed: listed(record),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idempotency_key_is_checked_before_anything_is_made() {
        let key = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("idempotency-key", value.parse().unwrap());
            idempotency_key(&headers).map(|key| key.map(str::to_owned)).map_err(|error| error.code_and_message().0)
        };
        assert_eq!(key("0A-z"), Ok(Some("0A-z".to_owned())));
        assert_eq!(key(&"k".repeat(255)), Ok(Some("k".repeat(255))));
        for bad in ["", "a b", "a_b", &"k".repeat(256)] {
            assert_eq!(key(bad), Err(400), "{bad}");
        }
        assert_eq!(idempotency_key(&HeaderMap::new()).unwrap(), None);
    }
}
