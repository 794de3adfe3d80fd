//! Calls of Novita's that this server does not serve: a 501 that says why, so that nobody searches a 404 for a typo.

use super::super::error::ApiError;
use axum::extract::Request;

pub(super) async fn volume_mounts(request: Request) -> ApiError {
    refuse(&request, "a folder of the machine inside a sandbox would keep it from being paused; copy files in and out, or mount S3 in it")
}

fn refuse(request: &Request, what: &str) -> ApiError {
    ApiError::not_served(format_args!("{} {}", request.method(), request.uri().path()), what)
}
