//! E2B's control plane, as its official SDKs and CLI speak it (contract e2b.md 2).
//!
//! `wire` is its JSON, `error` the core's errors in its words; `ask` reads ids and queries; the others are a file per
//! resource. Path parameters are percent-decoded after routing, as one segment.

pub(in crate::api) mod ask;
mod builds;
mod cursor;
pub(in crate::api) mod error;
mod header_rules;
mod lifecycle;
pub(in crate::api) mod list;
pub(in crate::api) mod network;
pub(in crate::api) mod new_sandbox;
pub(in crate::api) mod observe;
pub(in crate::api) mod sandboxes;
mod secrets;
pub(in crate::api) mod snapshots;
mod teams;
pub(in crate::api) mod templates;
mod unserved;
mod volume_content;
pub(in crate::api) mod volumes;
pub(in crate::api) mod wire;

use super::ApiState;
use super::auth::require_key;
use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post, put};

/// Every call of the dialect, those that are not served included.
pub(super) fn routes(state: &ApiState) -> Router<ApiState> {
    let with_key = sandboxes().merge(snapshots_and_templates()).merge(template_builds()).merge(volumes()).merge(unserved::routes());
    let open =
        Router::new().route("/health", get(health)).route("/templates/{id}/files/{hash}", put(builds::upload)).merge(volume_contents());
    with_key.route_layer(from_fn_with_state(state.clone(), require_key)).merge(open)
}

fn sandboxes() -> Router<ApiState> {
    Router::new()
        .route("/sandboxes", post(sandboxes::create).get(list::running))
        .route("/v2/sandboxes", post(sandboxes::create_v2).get(list::page))
        .route("/sandboxes/metrics", get(observe::latest_metrics))
        .route("/sandboxes/{id}", get(sandboxes::info).delete(sandboxes::kill))
        .route("/sandboxes/{id}/timeout", post(lifecycle::set_timeout))
        .route("/sandboxes/{id}/refreshes", post(lifecycle::refresh))
        .route("/sandboxes/{id}/connect", post(lifecycle::connect))
        .route("/v2/sandboxes/{id}/connect", post(lifecycle::connect))
        .route("/sandboxes/{id}/resume", post(lifecycle::resume))
        .route("/sandboxes/{id}/pause", post(lifecycle::pause))
        .route("/sandboxes/{id}/fork", post(snapshots::fork))
        .route("/sandboxes/{id}/snapshots", post(snapshots::create))
        .route("/sandboxes/{id}/network", put(network::replace))
        .route("/sandboxes/{id}/metrics", get(observe::metrics))
        .route("/sandboxes/{id}/logs", get(observe::logs))
        .route("/v2/sandboxes/{id}/logs", get(observe::logs_v2))
}

fn snapshots_and_templates() -> Router<ApiState> {
    Router::new()
        .route("/snapshots", get(snapshots::page))
        .route("/templates", get(templates::all).post(unserved::build))
        .route("/v2/templates", get(templates::page).post(builds::request))
        .route("/templates/aliases/{alias}", get(templates::alias))
        .route("/templates/{id}", get(templates::details).post(unserved::build).delete(templates::remove).patch(templates::update))
        .route("/v2/templates/{id}", post(builds::request_again).patch(templates::update_v2))
        .route("/templates/{id}/tags", get(templates::tags))
        .route("/templates/tags", post(templates::assign_tags).delete(templates::remove_tags))
        .route("/teams", get(teams::all))
        .route("/secrets", get(secrets::page).post(secrets::create))
        .route("/secrets/{id}", get(secrets::info).post(secrets::update).delete(secrets::remove))
}

fn template_builds() -> Router<ApiState> {
    Router::new()
        .route("/v3/templates", post(builds::request))
        .route("/v2/templates/{id}/builds/{build}", post(builds::start))
        .route("/templates/{id}/builds/{build}/status", get(builds::status))
        .route("/templates/{id}/builds/{build}/logs", get(builds::logs))
        .route("/templates/{id}/files/{hash}", get(builds::file_link))
}

fn volumes() -> Router<ApiState> {
    Router::new()
        .route("/volumes", get(volumes::all).post(volumes::create))
        .route("/volumes/{id}", get(volumes::info).delete(volumes::remove))
}

/// Each volume has a token of its own.
fn volume_contents() -> Router<ApiState> {
    let path = get(volume_content::stat).patch(volume_content::update).delete(volume_content::remove);
    Router::new()
        .route("/volumecontent/{id}/path", path)
        .route("/volumecontent/{id}/dir", get(volume_content::list).post(volume_content::make_folder))
        .route("/volumecontent/{id}/file", get(volume_content::read).put(volume_content::write))
}

/// Whether the server answers at all; needs no key. JSON, because HopX's clients ask here too and parse it.
async fn health() -> axum::Json<serde_json::Value> {
    axum::Json(serde_json::json!({ "status": "ok" }))
}
