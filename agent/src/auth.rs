//! Who may ask (access token, control secret) and as whom (Basic-auth user name, else the default user).
//!
//! /files has rules of its own, since signed URLs carry no header: it is exempt here and asks [`access_by_header`]
//! before it looks for a signature.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::error::HttpError;
use crate::state::{Access, Agent, Identity};
use crate::users::{self, User, UserError};
use crate::wire::{CONTROL_HEADER, INIT_PATH, LOGS_PATH};

const ACCESS_TOKEN_HEADER: &str = "x-access-token";
const UNAUTHORIZED: &str = "unauthorized access, please provide a valid access token or method signing if supported";

/// What the `X-Access-Token` header of a request amounts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderAccess {
    /// Granted: the sandbox is open, or the header carries its token.
    Granted,
    /// The sandbox has a token and the request shows none.
    Missing,
    /// The request shows another token, or /init has not come yet.
    Denied,
}

pub(crate) fn access_by_header(identity: &Identity, headers: &HeaderMap) -> HeaderAccess {
    let shown = headers.get(ACCESS_TOKEN_HEADER).map(|value| value.as_bytes());
    match (&identity.access, shown) {
        (Access::Closed, _) => HeaderAccess::Denied,
        (Access::Open, _) => HeaderAccess::Granted,
        (Access::Token(_), None) => HeaderAccess::Missing,
        (Access::Token(token), Some(shown)) if secrets_equal(token.as_bytes(), shown) => HeaderAccess::Granted,
        (Access::Token(_), Some(_)) => HeaderAccess::Denied,
    }
}

/// Middleware in front of every route, RPC included.
pub(crate) async fn require_token(State(agent): State<Arc<Agent>>, request: Request, next: Next) -> Result<Response, HttpError> {
    if has_own_rule(request.uri().path()) || access_by_header(&agent.identity(), request.headers()) == HeaderAccess::Granted {
        return Ok(next.run(request).await);
    }
    Err(HttpError::unauthorized(UNAUTHORIZED))
}

fn has_own_rule(path: &str) -> bool {
    matches!(path, "/health" | "/files" | INIT_PATH | LOGS_PATH)
}

/// Compares the header of a host's request with the current control secret.
pub(crate) fn check_control_secret(secret: &str, headers: &HeaderMap) -> Result<(), HttpError> {
    let shown = headers.get(CONTROL_HEADER).map(|value| value.as_bytes()).unwrap_or_default();
    if secrets_equal(secret.as_bytes(), shown) {
        return Ok(());
    }
    Err(HttpError::unauthorized("missing or wrong control secret"))
}

/// Takes the same time wherever the two differ.
pub(crate) fn secrets_equal(left: &[u8], right: &[u8]) -> bool {
    left.len() == right.len() && left.iter().zip(right).fold(0, |different, (a, b)| different | (a ^ b)) == 0
}

/// The user that a request names by Basic auth, else the sandbox's default user.
pub(crate) fn user(identity: &Identity, headers: &HeaderMap) -> Result<User, UserError> {
    users::by_name(&basic_username(headers).unwrap_or_else(|| identity.default_user.clone()))
}

/// As [`user`], with a name from elsewhere in the request (a query, a body) standing before the header's.
pub(crate) fn user_or(identity: &Identity, headers: &HeaderMap, name: Option<&str>) -> Result<User, UserError> {
    match name.filter(|name| !name.is_empty()) {
        Some(name) => users::by_name(name),
        None => user(identity, headers),
    }
}

impl From<UserError> for HttpError {
    fn from(error: UserError) -> HttpError {
        let status = match error {
            UserError::Unknown { .. } => StatusCode::UNAUTHORIZED,
            UserError::Read { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        HttpError::new(status, error.to_string())
    }
}

/// The part before the colon; passwords mean nothing here. Another scheme or bad base64 counts as no name.
fn basic_username(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, encoded) = value.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
    let name = decoded.split(':').next()?;
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(axum::http::HeaderName::from_static(name), value.parse().unwrap())])
    }

    fn identity(access: Access) -> Identity {
        Identity { access, ..Identity::generic(String::new()) }
    }

    #[test]
    fn a_token_grants_only_itself() {
        let secured = identity(Access::Token("secret".into()));
        assert_eq!(access_by_header(&secured, &headers("x-access-token", "secret")), HeaderAccess::Granted);
        assert_eq!(access_by_header(&secured, &headers("x-access-token", "secreT")), HeaderAccess::Denied);
        assert_eq!(access_by_header(&secured, &headers("x-access-token", "")), HeaderAccess::Denied);
        assert_eq!(access_by_header(&secured, &HeaderMap::new()), HeaderAccess::Missing);
    }

    #[test]
    fn nobody_may_ask_before_the_first_init_and_everybody_when_open() {
        assert_eq!(access_by_header(&identity(Access::Closed), &HeaderMap::new()), HeaderAccess::Denied);
        assert_eq!(access_by_header(&identity(Access::Open), &HeaderMap::new()), HeaderAccess::Granted);
    }

    #[test]
    fn basic_auth_names_the_user_and_ignores_the_password() {
        assert_eq!(basic_username(&headers("authorization", "Basic dXNlcjo=")), Some("user".into()));
        assert_eq!(basic_username(&headers("authorization", "basic cm9vdDp4OnkK")), Some("root".into()));
        assert_eq!(basic_username(&headers("authorization", "Bearer dXNlcjo=")), None);
        assert_eq!(basic_username(&headers("authorization", "Basic Og==")), None);
        assert_eq!(basic_username(&headers("authorization", "Basic %%")), None);
    }

    #[test]
    fn the_control_secret_has_to_match_in_full() {
        assert!(check_control_secret("abc", &headers("x-stillbox-control", "abc")).is_ok());
        assert!(check_control_secret("abc", &headers("x-stillbox-control", "ab")).is_err());
        assert!(check_control_secret("abc", &HeaderMap::new()).is_err());
    }
}
