//! HopX's control plane below `/v1`, as its two SDKs speak it (contract hopx.md B1, B2).
//!
//! `wire` is its JSON, `error` the core's errors in its words; `ask` reads bodies, ids and queries; the others are a file
//! per resource. Every success has a JSON body, since the clients parse one. The API inside the sandboxes is not here:
//! the proxy lets its requests through to the agent.

mod ask;
mod builds;
mod callback;
mod error;
mod executions;
mod inside;
mod lifecycle;
mod list;
mod new_sandbox;
mod public_host;
mod reachable;
mod sandboxes;
mod templates;
mod wire;

pub(super) use executions::Callbacks;

use super::ApiState;
use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::Response;
use axum::routing::{any, get, post, put};
use error::HopxError;

/// Every call of the dialect.
pub(super) fn routes(state: &ApiState) -> Router<ApiState> {
    Router::new()
        .route("/v1/sandboxes", post(sandboxes::create).get(list::page))
        .route("/v1/sandboxes/{id}", get(sandboxes::info).delete(sandboxes::remove))
        .route("/v1/sandboxes/{id}/pause", post(lifecycle::pause))
        .route("/v1/sandboxes/{id}/resume", post(lifecycle::resume))
        .route("/v1/sandboxes/{id}/stop", post(lifecycle::stop))
        .route("/v1/sandboxes/{id}/start", post(lifecycle::start))
        .route("/v1/sandboxes/{id}/timeout", put(lifecycle::set_timeout))
        .route("/v1/sandboxes/{id}/token/refresh", post(sandboxes::refresh_token))
        .route("/v1/templates", get(templates::all))
        .route("/v1/templates/build", post(builds::start))
        .route("/v1/templates/build/{id}/status", get(builds::status))
        .route("/v1/templates/build/{id}/logs", get(builds::logs))
        .route("/v1/templates/files/upload-link", post(builds::upload_link))
        .route("/v1/templates/{name}", get(templates::details).delete(templates::remove))
        .route("/v1/{*path}", any(unknown))
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(state.clone(), require_key))
        // These have a signature, and the sandbox's own token, instead of the key.
        .route("/v1/templates/files/{hash}", put(builds::upload))
        .route("/v1/sandboxes/{id}/execute/async", post(executions::start))
        // Outermost, so that it words the errors of all others.
        .layer(from_fn(error::word))
}

async fn require_key(State(state): State<ApiState>, request: Request, next: Next) -> Result<Response, HopxError> {
    state.keys.check(request.headers()).map_err(HopxError::unauthorized)?;
    Ok(next.run(request).await)
}

async fn unknown(request: Request) -> HopxError {
    HopxError::not_found("NOT_FOUND", format!("{} {} is not served", request.method(), request.uri().path()))
}

async fn wrong_method(request: Request) -> HopxError {
    HopxError::wrong_method(format!("{} does not take {}", request.uri().path(), request.method()))
}
