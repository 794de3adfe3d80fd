//! Copies: forks that run at once, and snapshots that sandboxes are created from later.

use super::super::ApiState;
use super::super::body::OptionalJson;
use super::super::error::ApiError;
use super::ask::{self, Query, SandboxPath};
use super::cursor::{self, NEXT_TOKEN};
use super::{error, sandboxes, teams, wire};
use crate::model::{Keep, SandboxId, SandboxState};
use crate::sandbox::{Fork, ListOrder, PauseError, SnapshotInfo, SnapshotQuery, Strictness};
use axum::Json;
use axum::extract::State;
use http::{HeaderMap, StatusCode};

const FORK_TIMEOUT_S: i64 = 15;
const FORKS_MAX: i64 = 100;
const PAGE_MAX: u32 = 100;
const NAME_MAX: usize = 128;

/// `POST /sandboxes/{id}/fork`: one entry per copy, each a success or an error of its own.
pub(super) async fn fork(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    OptionalJson(asked): OptionalJson<wire::Fork>,
) -> Result<(StatusCode, Json<Vec<wire::ForkResult>>), ApiError> {
    let count = match asked.count.unwrap_or(1) {
        count @ 1..=FORKS_MAX => u32::try_from(count).expect("1 to 100 fits"),
        other => return Err(ApiError::bad_request(format!("count is {other}; it must be a number from 1 to {FORKS_MAX}"))),
    };
    let timeout = ask::lifetime(asked.timeout.unwrap_or(FORK_TIMEOUT_S), state.config.timeout_max)?;
    require_running(&state, id)?;
    let copies = state.registry.fork(id, Fork::of(count, timeout, Strictness::PerCopy)).await?;
    let entries = copies.into_iter().map(|copy| match copy {
        Ok(record) => wire::ForkResult::Sandbox(Box::new(sandboxes::sandbox(&state, record))),
        Err(failed) => {
            let (code, message) = error::entry(failed);
            wire::ForkResult::Error { code, message }
        }
    });
    Ok((StatusCode::CREATED, Json(entries.collect())))
}

/// `POST /sandboxes/{id}/snapshots`.
pub(super) async fn create(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    OptionalJson(asked): OptionalJson<wire::NewSnapshot>,
) -> Result<(StatusCode, Json<wire::Snapshot>), ApiError> {
    let keep = match asked.memory {
        Some(false) => Keep::FilesOnly,
        Some(true) | None => Keep::Memory,
    };
    let name = asked.name.as_deref().map(snapshot_name).transpose()?;
    require_running(&state, id)?;
    let snapshot = state.registry.snapshot(id, name.as_deref(), keep).await?;
    Ok((StatusCode::CREATED, Json(shown(snapshot))))
}

/// `GET /snapshots`.
pub(super) async fn page(State(state): State<ApiState>, query: Query) -> Result<(HeaderMap, Json<Vec<wire::Snapshot>>), ApiError> {
    let page = state
        .registry
        .snapshots(SnapshotQuery {
            sandbox: query.get("sandboxID").map(ask::sandbox_id).transpose()?,
            name: query.get("name").map(bare_name),
            limit: query.limit(PAGE_MAX)?,
            after: query.get("nextToken").map(|token| cursor::row(token, ListOrder::Descending)).transpose()?,
        })
        .await?;
    let mut headers = HeaderMap::new();
    if let Some((at, id)) = page.next {
        headers.insert(NEXT_TOKEN, cursor::token(at, id, ListOrder::Descending));
    }
    Ok((headers, Json(page.snapshots.into_iter().map(shown).collect())))
}

/// The core could copy a paused sandbox; E2B's dialect wants it running.
fn require_running(state: &ApiState, id: SandboxId) -> Result<(), ApiError> {
    match state.registry.get(id)?.state {
        SandboxState::Running | SandboxState::Creating => Ok(()),
        paused_or_changing @ (SandboxState::Pausing
        | SandboxState::Paused
        | SandboxState::Resuming
        | SandboxState::Killing
        | SandboxState::Killed
        | SandboxState::Failed) => Err(PauseError::InTransition { id, state: paused_or_changing }.into()),
    }
}

/// `name` or `name:tag` in lower case, after our own team's name was taken off.
pub(in crate::api) fn snapshot_name(asked: &str) -> Result<String, ApiError> {
    let lower = asked.trim().to_ascii_lowercase();
    let bare = lower.strip_prefix(teams::SLUG).and_then(|rest| rest.strip_prefix('/')).unwrap_or(&lower);
    let (name, tag) = bare.split_once(':').map_or((bare, None), |(name, tag)| (name, Some(tag)));
    let is_name = |text: &str, more: &[u8]| {
        (1..=NAME_MAX).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || more.contains(&byte))
    };
    match is_name(name, b"-_") && tag.is_none_or(|tag| is_name(tag, b"-_.")) {
        true => Ok(bare.to_owned()),
        false => {
            let shown: String = asked.chars().take(NAME_MAX).collect();
            Err(ApiError::bad_request(format!(
                "name is '{shown}'; it must be 1 to {NAME_MAX} characters of a-z, 0-9, '-' and '_', and may be followed by ':tag'"
            )))
        }
    }
}

/// A name to look for, without team and tag.
fn bare_name(asked: &str) -> String {
    let lower = asked.to_ascii_lowercase();
    lower.rsplit('/').next().and_then(|name| name.split(':').next()).unwrap_or_default().to_owned()
}

fn shown(snapshot: SnapshotInfo) -> wire::Snapshot {
    match snapshot.name {
        Some(name) => {
            let name = format!("{}/{name}", teams::SLUG);
            wire::Snapshot { snapshot_id: format!("{name}:{}", snapshot.tag), names: vec![name] }
        }
        None => wire::Snapshot { snapshot_id: format!("{}:{}", snapshot.template, snapshot.tag), names: Vec::new() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{SnapshotId, TemplateId};

    #[test]
    fn a_snapshots_name_is_read_with_and_without_team_and_tag() {
        for (asked, name) in [("Nightly", "nightly"), ("local/nightly:v2", "nightly:v2"), ("a_b-1", "a_b-1")] {
            assert_eq!(snapshot_name(asked).unwrap(), name);
        }
        for bad in ["", "a b", "other/x", "a:", ":a", "a:b:c", &"n".repeat(129)] {
            let error = snapshot_name(bad).unwrap_err();
            assert!(error.code_and_message().1.starts_with("name is '"), "{bad}");
        }
        assert_eq!(bare_name("local/Nightly:v2"), "nightly");
    }

    #[test]
    fn a_snapshot_is_shown_by_its_name_or_its_template() {
        let template = TemplateId::random();
        let info = SnapshotInfo {
            template,
            snapshot: SnapshotId::random(),
            sandbox: SandboxId::random(),
            name: None,
            tag: "default".into(),
            created_at: time::OffsetDateTime::UNIX_EPOCH,
        };
        let unnamed = serde_json::to_value(shown(info.clone())).unwrap();
        assert_eq!(unnamed, serde_json::json!({"snapshotID": format!("{template}:default"), "names": []}));
        let named = serde_json::to_value(shown(SnapshotInfo { name: Some("nightly".into()), tag: "v2".into(), ..info })).unwrap();
        assert_eq!(named, serde_json::json!({"snapshotID": "local/nightly:v2", "names": ["local/nightly"]}));
    }
}
