//! The one team of a server that somebody hosts for themselves.

use super::super::error::ApiError;
use super::wire;
use axum::Json;
use http::HeaderMap;

/// Stands before names of templates and snapshots, as in `local/nightly`.
pub(super) const SLUG: &str = "local";
/// E2B's are UUIDs; the CLI wants to parse one.
const ID: &str = "00000000-0000-4000-8000-000000000001";

/// `GET /teams`. The key is the one that the caller has just shown to be good.
pub(super) async fn all(headers: HeaderMap) -> Result<Json<[wire::Team; 1]>, ApiError> {
    let key = headers.get("x-api-key").and_then(|value| value.to_str().ok()).unwrap_or_default();
    Ok(Json([wire::Team { team_id: ID, name: SLUG, api_key: key.to_owned(), is_default: true }]))
}
