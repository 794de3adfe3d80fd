//! Copies: clones that run at once, and commits that sandboxes are created from later.

use super::super::ApiState;
use super::super::body::OptionalJson;
use super::super::e2b::ask::SandboxPath;
use super::super::e2b::sandboxes::sandbox;
use super::super::e2b::snapshots::snapshot_name;
use super::super::e2b::templates;
use super::super::e2b::wire::Template;
use super::super::error::ApiError;
use super::account;
use super::rules::DEFAULT_TIMEOUT_S;
use super::sandboxes::{bounds, check_node};
use super::wire;
use crate::model::{Keep, OnTimeout, SandboxState};
use crate::sandbox::{CreateError, Fork, ForkError, Full, Strictness};
use axum::Json;
use axum::extract::State;
use http::StatusCode;
use std::time::Duration;

/// `POST /sandboxes/{id}/clone`. The parent goes on as it was; clones run, inherit everything but what happens at their
/// end (they are killed), and come with the template that they were started from.
pub(super) async fn clone(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    OptionalJson(asked): OptionalJson<wire::Clone>,
) -> Result<(StatusCode, Json<wire::Cloned>), ApiError> {
    check_node(asked.node_id.as_deref())?;
    let strictness = if asked.strict == Some(true) { Strictness::AllOrNone } else { Strictness::PerCopy };
    let count = count(&state, asked.count.unwrap_or(1), strictness)?;
    let parent = state.registry.get(id)?;
    let lifecycle = parent.spec.lifecycle;
    let timeout = match (asked.timeout, parent.state) {
        (Some(seconds), _) => bounds(&state).lifetime(seconds, lifecycle.run_max)?,
        (None, SandboxState::Paused | SandboxState::Pausing) => Duration::from_secs(DEFAULT_TIMEOUT_S.unsigned_abs()),
        (
            None,
            SandboxState::Creating
            | SandboxState::Running
            | SandboxState::Resuming
            | SandboxState::Killing
            | SandboxState::Killed
            | SandboxState::Failed,
        ) => lifecycle.timeout,
    };
    let fork = Fork { on_timeout: Some(OnTimeout::Kill), ..Fork::of(count, timeout, strictness) };
    let (copies, stored) = state.registry.fork_and_store(id, fork).await?;
    let (made, failed): (Vec<_>, Vec<_>) = copies.into_iter().partition(Result::is_ok);
    if let (true, Some(Err(first))) = (made.is_empty(), failed.into_iter().next()) {
        return Err(ForkError::Copy(first).into());
    }
    let sandboxes = made.into_iter().flatten().map(|record| sandbox(&state, record)).collect();
    let snapshot_template_id = stored.map(|stored| stored.template.to_string());
    Ok((StatusCode::CREATED, Json(wire::Cloned { sandboxes, snapshot_template_id })))
}

/// From one to as many as could run if nothing else did; when all must succeed, to as many as can run now.
fn count(state: &ApiState, asked: i64, strictness: Strictness) -> Result<u32, ApiError> {
    let (taken, max) = state.registry.places();
    let count = u32::try_from(asked).ok().filter(|count| (1..=max.running).contains(count));
    let count = count.ok_or_else(|| {
        ApiError::bad_request(format!("count is {asked}; it must be a number from 1 to {} (sandbox.running_max)", max.running))
    })?;
    match strictness {
        Strictness::AllOrNone if taken.running.saturating_add(count) > max.running => {
            Err(CreateError::from(Full::Sandboxes { running: taken.running, limit: max.running }).into())
        }
        Strictness::AllOrNone | Strictness::PerCopy => Ok(count),
    }
}

/// `POST /sandboxes/{id}/commit`.
pub(super) async fn commit(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    OptionalJson(asked): OptionalJson<wire::Commit>,
) -> Result<(StatusCode, Json<Template>), ApiError> {
    let name = asked.alias.as_deref().filter(|alias| !alias.is_empty()).map(snapshot_name).transpose()?;
    let stored = state.registry.snapshot(id, name.as_deref(), Keep::Memory).await?;
    let template = templates::one(&state, stored.template).await?;
    Ok((StatusCode::CREATED, Json(account::with_a_last_start(template))))
}
