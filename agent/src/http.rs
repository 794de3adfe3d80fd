//! The agent's HTTP surface: which path leads where, and the small routes that need no module of their own.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderName, StatusCode};
use axum::middleware;
use axum::routing::{get, post};
use axum::{Json, Router};
use tower_http::cors::{Any, CorsLayer};

use crate::state::Agent;
use crate::wire::{HOPX_PREFIX, INIT_PATH, LOGS_PATH};
use crate::{auth, files, hopx, init, logs, metrics, rpc};

/// Response headers of the Connect protocol that a browser's script has to see.
const EXPOSED_HEADERS: [HeaderName; 6] = [
    HeaderName::from_static("location"),
    HeaderName::from_static("cache-control"),
    HeaderName::from_static("x-content-type-options"),
    HeaderName::from_static("grpc-status"),
    HeaderName::from_static("grpc-message"),
    HeaderName::from_static("grpc-status-details-bin"),
];

pub(crate) fn router(agent: Arc<Agent>) -> Router {
    let rpc = rpc::service(&agent);
    // CORS is outermost: a preflight carries no token.
    let cors = CorsLayer::new().allow_origin(Any).allow_methods(Any).allow_headers(Any).expose_headers(EXPOSED_HEADERS);
    Router::new()
        .route("/health", get(health))
        .route("/envs", get(envs))
        .route("/metrics", get(metrics::get))
        .route(INIT_PATH, post(init::post))
        .route(LOGS_PATH, get(logs::get))
        .merge(files::routes())
        .nest(HOPX_PREFIX, hopx::routes(&agent))
        .fallback_service(rpc)
        .layer(middleware::from_fn_with_state(Arc::clone(&agent), auth::require_token))
        .layer(cors)
        .with_state(agent)
}

async fn health() -> StatusCode {
    StatusCode::NO_CONTENT
}

async fn envs(State(agent): State<Arc<Agent>>) -> Json<BTreeMap<String, String>> {
    Json(agent.identity().envs.clone())
}
