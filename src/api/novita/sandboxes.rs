//! Creating and listing sandboxes.

use super::super::ApiState;
use super::super::body::Json as Body;
use super::super::e2b::ask::Query;
use super::super::e2b::list::{self, Page};
use super::super::e2b::new_sandbox::{Version, Wanted};
use super::super::e2b::sandboxes::{idempotency_key, sandbox};
use super::super::e2b::wire::Sandbox;
use super::super::error::ApiError;
use super::rules::{self, Bounds, DEFAULT_TIMEOUT_S};
use super::secrets;
use super::wire;
use axum::Json;
use axum::extract::State;
use http::{HeaderMap, StatusCode};

/// Rows of a page when none are asked for, and the most that are given.
const PAGE: u32 = 100;
const PAGE_MAX: u32 = 1000;
/// The one machine that this is, for clients that name one.
const NODE: &str = "local";

/// `POST /sandboxes`.
pub(super) async fn create(
    State(state): State<ApiState>,
    headers: HeaderMap,
    Body(mut new): Body<wire::NewSandbox>,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    let key = idempotency_key(&headers)?;
    let secrets = new.secrets.take().unwrap_or_default();
    let wanted = parse(new, bounds(&state))?;
    let mut spec = wanted.resolved(&state).await?;
    secrets::bind(&state, secrets, &mut spec).await?;
    let record = state.registry.create(spec, key).await?;
    Ok((StatusCode::CREATED, Json(sandbox(&state, record))))
}

/// The bounds of this server.
pub(super) fn bounds(state: &ApiState) -> Bounds<'_> {
    Bounds { novita: &state.config.novita, timeout_max: state.config.timeout_max }
}

fn parse(mut new: wire::NewSandbox, bounds: Bounds<'_>) -> Result<Wanted, ApiError> {
    check_node(new.node_id.as_deref())?;
    let (timeout, metadata) = (new.common.timeout, new.common.metadata.clone().unwrap_or_default());
    new.common.allow_internet_access = new.common.allow_internet_access.or(new.allow_internet_access);
    // Checked by the rules below, with this dialect's bound.
    new.common.timeout = Some(DEFAULT_TIMEOUT_S);
    let mut wanted = Wanted::parse(new.common, Version::One, bounds.timeout_max.max(std::time::Duration::from_secs(300)))?;
    rules::apply(&mut wanted.lifecycle, timeout, &metadata, bounds)?;
    Ok(wanted)
}

/// A node that is asked for must be this one.
pub(super) fn check_node(node: Option<&str>) -> Result<(), ApiError> {
    match node {
        None | Some("" | NODE) => Ok(()),
        Some(other) => {
            let shown: String = other.chars().take(64).collect();
            Err(ApiError::bad_request(format!("nodeID is '{shown}'; this server is one machine, '{NODE}': leave the field out")))
        }
    }
}

/// `GET /v2/sandboxes`: two pages of Novita's guide disagree about the largest page, so more than that is cut, not refused.
pub(super) async fn page(State(state): State<ApiState>, query: Query) -> Result<Page, ApiError> {
    let limit = match query.get("limit") {
        None => PAGE,
        Some(_) => query.limit(u32::MAX)?.min(PAGE_MAX),
    };
    list::page_of(&state, &query, limit).await
}
