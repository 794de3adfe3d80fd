//! Calls of E2B's that this server does not serve: a 501 that names the call, so that nobody searches a 404 for a typo.

use super::super::ApiState;
use super::super::error::ApiError;
use axum::Router;
use axum::extract::Request;
use axum::routing::{any, get, post};

/// All of them that have a path of their own.
pub(super) fn routes() -> Router<ApiState> {
    Router::new()
        .route("/v3/templates", post(build))
        .route("/v2/templates/{id}", any(build))
        .route("/v2/templates/{id}/builds/{build}", post(build))
        .route("/templates/{id}/builds/{build}", post(build))
        .route("/templates/{id}/builds/{build}/status", get(build))
        .route("/templates/{id}/builds/{build}/logs", get(build))
        .route("/templates/{id}/files/{hash}", get(build))
        .route("/templates/tags", any(build))
        .route("/volumes", any(volumes))
        .route("/volumes/{id}", any(volumes))
        .route("/volumecontent/{*path}", any(volumes))
        .route("/secrets", any(secrets))
        .route("/secrets/{id}", any(secrets))
}

pub(super) async fn build(request: Request) -> ApiError {
    refuse(&request, "templates cannot be built or changed through the API yet; `stillbox template build` builds the built-in ones")
}

async fn volumes(request: Request) -> ApiError {
    refuse(&request, "this server has no volumes")
}

async fn secrets(request: Request) -> ApiError {
    refuse(&request, "this server stores no secrets; pass them as envVars")
}

fn refuse(request: &Request, what: &str) -> ApiError {
    ApiError::not_served(format_args!("{} {}", request.method(), request.uri().path()), what)
}
