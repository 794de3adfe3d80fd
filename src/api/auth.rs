//! Who may use the control plane: whoever sends one of our API keys.

use super::ApiState;
use super::error::ApiError;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderMap, header};
use sha2::{Digest, Sha256};

/// API keys, as digests: comparing digests takes the same time wherever keys differ, and however long they are.
#[derive(Clone)]
pub(super) struct Keys(Vec<[u8; 32]>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({})", self.0.len())
    }
}

/// Why a request is nobody's; the texts follow E2B's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum AuthError {
    /// No key at all.
    #[error("authorization header is missing: send the API key as X-API-KEY; `stillbox env` prints it")]
    Missing,
    /// Not one of ours.
    #[error("Invalid API key: `stillbox env` prints the one of this server")]
    Invalid,
}

impl Keys {
    pub(super) fn of(keys: &[String]) -> Self {
        Self(keys.iter().map(|key| Sha256::digest(key).into()).collect())
    }

    /// Whether the request carries one of the keys, as `X-API-KEY` or `Authorization: Bearer`.
    pub(super) fn check(&self, headers: &HeaderMap) -> Result<(), AuthError> {
        let given = given_key(headers).ok_or(AuthError::Missing)?;
        let digest: [u8; 32] = Sha256::digest(given).into();
        let is_known = self.0.iter().fold(false, |known, key| known | is_same(key, &digest));
        is_known.then_some(()).ok_or(AuthError::Invalid)
    }
}

fn is_same(key: &[u8; 32], digest: &[u8; 32]) -> bool {
    key.iter().zip(digest).fold(0, |differing, (a, b)| differing | (a ^ b)) == 0
}

fn given_key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = || headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    headers.get("x-api-key").map(http::HeaderValue::as_bytes).or_else(bearer).map(<[u8]>::trim_ascii).filter(|key| !key.is_empty())
}

/// The layer in front of every call but `/health`.
pub(super) async fn require_key(State(state): State<ApiState>, request: Request, next: Next) -> Result<Response, ApiError> {
    state.keys.check(request.headers()).map_err(ApiError::unauthorized)?;
    Ok(next.run(request).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &'static str, value: &str) -> Result<(), AuthError> {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        Keys::of(&["e2b_00".to_owned(), "other".to_owned()]).check(&headers)
    }

    #[test]
    fn each_key_opens_under_both_header_names() {
        assert_eq!(check("x-api-key", "e2b_00"), Ok(()));
        assert_eq!(check("x-api-key", "other"), Ok(()));
        assert_eq!(check("authorization", "Bearer e2b_00"), Ok(()));
    }

    #[test]
    fn no_key_and_a_wrong_key_are_told_apart() {
        for value in ["e2b_0", "e2b_000", "E2B_00"] {
            assert_eq!(check("x-api-key", value), Err(AuthError::Invalid), "{value}");
        }
        assert_eq!(check("x-api-key", ""), Err(AuthError::Missing));
        assert_eq!(check("authorization", "Basic e2b_00"), Err(AuthError::Missing));
        assert_eq!(Keys::of(&[]).check(&HeaderMap::new()), Err(AuthError::Missing));
    }
}
