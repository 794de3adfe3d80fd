//! Calls of E2B's that this server does not serve: a 501 that names the call, so that nobody searches a 404 for a typo.

use super::super::ApiState;
use super::super::error::ApiError;
use axum::Router;
use axum::extract::Request;
use axum::routing::post;

/// All of them that have a path of their own.
pub(super) fn routes() -> Router<ApiState> {
    Router::new().route("/templates/{id}/builds/{build}", post(build))
}

pub(super) async fn build(request: Request) -> ApiError {
    refuse(
        &request,
        "builds from an image that the client pushes ended with E2B's first CLI; use Template.build of an SDK from 2.0 on, or `stillbox template build`",
    )
}

fn refuse(request: &Request, what: &str) -> ApiError {
    ApiError::not_served(format_args!("{} {}", request.method(), request.uri().path()), what)
}
