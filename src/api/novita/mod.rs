//! Novita's control plane, as its SDKs speak it (contract novita.md): E2B's wherever Novita's is silent.
//!
//! Which dialect a call is in, its headers say ([`is_spoken_in`]): a call of a Novita SDK meets [`over`], whose routes
//! come before E2B's. What only Novita has is served to everybody ([`own`]), so that a plain HTTP client can use it too.
//! `wire` is what its JSON has beyond E2B's; `rules` reads the lifecycle out of a sandbox's metadata; the others are a
//! file per resource. Both of its protocols (1.x, and 2.x "modern") are understood at once: no field or unit of one means
//! something else in the other.

mod account;
mod caller;
mod copies;
mod lifecycle;
mod observe;
mod rules;
mod sandboxes;
mod secrets;
mod volumes;
mod wire;

pub use rules::NovitaConfig;

use super::ApiState;
use super::auth::require_key;
use super::e2b::ask::{no_such_sandbox, sandbox_id};
use super::error::ApiError;
use axum::Router;
use axum::extract::Request;
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::Response;
use axum::routing::{get, patch, post};
pub(super) use caller::is_spoken_in;
use tower::ServiceExt;

/// What Novita answers otherwise than E2B, in front of everything else.
pub(super) fn over(state: &ApiState, rest: Router) -> Router {
    let instead = rest.clone();
    let different = Router::new()
        .route("/sandboxes", post(sandboxes::create))
        .route("/v2/sandboxes", post(sandboxes::create).get(sandboxes::page))
        .route("/sandboxes/metrics", get(observe::latest_metrics))
        .route("/sandboxes/{id}/timeout", post(lifecycle::set_timeout))
        .route("/sandboxes/{id}/connect", post(lifecycle::connect))
        .route("/v2/sandboxes/{id}/connect", post(lifecycle::connect))
        .route("/sandboxes/{id}/resume", post(lifecycle::resume))
        .route("/sandboxes/{id}/pause", post(lifecycle::pause))
        .route("/sandboxes/{id}/metrics", get(observe::metrics))
        .route("/v2/templates", get(account::templates))
        .route("/secrets", get(secrets::all).post(secrets::create))
        .route("/secrets/{name}", get(secrets::info).put(secrets::replace).delete(secrets::remove))
        .route("/volumes", get(volumes::all).post(volumes::create))
        .route("/volumes/{id}", get(volumes::info))
        // Otherwise `{id}` above would take them.
        .merge(account())
        .route_layer(from_fn_with_state(state.clone(), require_key));
    different
        .method_not_allowed_fallback(move |mut request: Request| {
            // The parameters of the path that did not take it would be counted with those of the one that does.
            request.extensions_mut().clear();
            instead.clone().oneshot(request)
        })
        .with_state(state.clone())
        .fallback_service(rest)
        .layer(from_fn(forgive_ids))
}

/// An id that nobody can have is, to Novita's clients, an id that nobody has: their `kill` answers false to it.
async fn forgive_ids(request: Request, next: Next) -> Result<Response, ApiError> {
    const NO_IDS: [&str; 3] = ["metrics", "quota", "events"];
    let path = request.uri().path();
    let after = path.strip_prefix("/v2").unwrap_or(path).strip_prefix("/sandboxes/");
    let id = after.and_then(|rest| rest.split('/').next()).filter(|id| !NO_IDS.contains(id));
    match id.map(sandbox_id) {
        Some(Err(_)) => Err(no_such_sandbox(id.unwrap_or_default())),
        Some(Ok(_)) | None => Ok(next.run(request).await),
    }
}

/// What E2B does not have.
pub(super) fn own(state: &ApiState) -> Router<ApiState> {
    account()
        .route("/sandboxes/{id}/clone", post(copies::clone))
        .route("/sandboxes/{id}/commit", post(copies::commit))
        .route("/sandboxes/{id}/reset", post(lifecycle::reset))
        .route("/sandboxes/{id}/hotplug-memory", post(lifecycle::hotplug_memory))
        .route("/sandboxes/{id}/volume-mounts", post(volumes::mount).delete(volumes::unmount))
        .route("/volumes/{id}", patch(volumes::update))
        .route_layer(from_fn_with_state(state.clone(), require_key))
}

fn account() -> Router<ApiState> {
    Router::new().route("/sandboxes/quota", get(account::quota)).route("/sandboxes/events", get(account::events))
}
