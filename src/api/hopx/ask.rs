//! What requests carry: JSON bodies, ids in paths, queries. Errors name the field, its value and the limit.

use super::super::ApiState;
use super::super::body;
use super::error::{HopxError, sandbox_id};
use crate::model::SandboxId;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use http::request::Parts;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// A body that must be there.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<ApiState> for Body<T> {
    type Rejection = HopxError;

    async fn from_request(request: Request, state: &ApiState) -> Result<Self, HopxError> {
        let body::Json(value) = body::Json::from_request(request, state).await?;
        Ok(Self(value))
    }
}

/// The `{id}` of the path.
#[derive(Debug)]
pub(super) struct SandboxPath(pub(super) SandboxId);

impl FromRequestParts<ApiState> for SandboxPath {
    type Rejection = HopxError;

    async fn from_request_parts(parts: &mut Parts, state: &ApiState) -> Result<Self, HopxError> {
        let Segment(text) = Segment::from_request_parts(parts, state).await?;
        sandbox_id(&text).map(Self)
    }
}

/// The `{…}` of the path, percent-decoded.
#[derive(Debug)]
pub(super) struct Segment(pub(super) String);

impl FromRequestParts<ApiState> for Segment {
    type Rejection = HopxError;

    async fn from_request_parts(parts: &mut Parts, state: &ApiState) -> Result<Self, HopxError> {
        let text = Path::<String>::from_request_parts(parts, state).await;
        text.map(|Path(text)| Self(text)).map_err(|error| HopxError::invalid(format!("the path is malformed: {}", error.body_text())))
    }
}

/// The query string, decoded once.
#[derive(Debug)]
pub(super) struct Query(Vec<(String, String)>);

impl FromRequestParts<ApiState> for Query {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &ApiState) -> Result<Self, Self::Rejection> {
        Ok(Self::of(parts.uri.query().unwrap_or_default()))
    }
}

impl Query {
    pub(super) fn of(text: &str) -> Self {
        Self(form_urlencoded::parse(text.as_bytes()).into_owned().collect())
    }

    /// The first value of this name; an empty one counts as absent.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, value)| key == name && !value.is_empty()).map(|(_, value)| value.as_str())
    }

    /// A number from 1 to `max`, which is the default too.
    pub(super) fn limit(&self, max: usize) -> Result<usize, HopxError> {
        let Some(text) = self.get("limit") else { return Ok(max) };
        match text.parse() {
            Ok(limit) if (1..=max).contains(&limit) => Ok(limit),
            Ok(_) | Err(_) => Err(HopxError::invalid(format!("limit is '{text}'; it must be a number from 1 to {max}"))),
        }
    }
}

/// A time to live: at least a second, at most `max`.
pub(super) fn lifetime(seconds: i64, max: Duration) -> Result<Duration, HopxError> {
    let asked = u64::try_from(seconds).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs);
    match asked {
        Some(asked) if asked <= max => Ok(asked),
        Some(_) => Err(HopxError::invalid(format!("timeout_seconds is {seconds}; the limit is {} (sandbox.timeout_max)", max.as_secs()))),
        None => Err(HopxError::invalid(format!("timeout_seconds is {seconds}; it must be greater than 0"))),
    }
}
