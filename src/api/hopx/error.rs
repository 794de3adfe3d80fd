//! The core's errors in HopX's statuses and words, in the one body that both of its SDKs can read: Python looks into
//! `error`, JavaScript beside it.
//!
//! Its clients repeat a request up to three times on 429 and on 500, 502, 503 and 504 (JavaScript's on every 5xx). What a
//! repetition cannot mend is therefore none of these.

use super::super::auth::AuthError;
use super::super::error::{ApiError, InternalFailure, Wording};
use super::super::layers::RequestId;
use crate::model::SandboxId;
use crate::sandbox::{ConnectError, CreateError, Exhausted, Full, PauseError, StoreFailure, TimeoutError, UnknownSandbox};
use crate::template::build::{RegisterError, StartBuildError, UploadError};
use crate::template::{RemoveError, ResolveError};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use serde_json::{Value, json};
use std::error::Error;
use std::sync::Arc;

/// An answer that is not the one asked for.
#[derive(Debug, Clone)]
pub(super) struct HopxError {
    status: StatusCode,
    code: &'static str,
    message: String,
    details: Value,
    /// For what nobody classified: logged with the request id, never told.
    cause: Option<Arc<dyn Error + Send + Sync>>,
}

impl HopxError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), details: json!({}), cause: None }
    }

    /// 400: the request itself is wrong; the message names field, value and limit.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "VALIDATION_ERROR", message)
    }

    /// 404.
    pub(super) fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, message)
    }

    /// 409: not in the present state.
    pub(super) fn wrong_state(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "INVALID_STATE", message)
    }

    /// 401.
    pub(super) fn unauthorized(error: AuthError) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", error.to_string())
    }

    /// 403: not with this signature.
    pub(super) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "FORBIDDEN", message)
    }

    /// 405.
    pub(super) fn wrong_method(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED", message)
    }

    /// 403 with the word `limit`, which Python raises as a ResourceLimitError and nobody repeats.
    fn limit(message: impl Into<String>, details: Value) -> Self {
        Self { details, ..Self::new(StatusCode::FORBIDDEN, "RESOURCE_LIMIT_EXCEEDED", message) }
    }

    /// For who words it otherwise.
    pub(super) fn into_parts(self) -> (StatusCode, &'static str, String) {
        (self.status, self.code, self.message)
    }

    fn internal(cause: impl Error + Send + Sync + 'static) -> Self {
        Self {
            cause: Some(Arc::new(cause)),
            ..Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "INTERNAL_ERROR",
                "internal error; the server's log has more under the request id",
            )
        }
    }
}

/// Both SDKs look for "sandbox" and "not found" in it.
pub(super) fn no_such_sandbox(id: impl std::fmt::Display) -> HopxError {
    HopxError::not_found("SANDBOX_NOT_FOUND", format!("Sandbox {id} not found"))
}

/// Without a body yet: [`word`] knows the request's id.
impl IntoResponse for HopxError {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// The layer that gives errors their body.
pub(super) async fn word(request: Request, next: Next) -> Response {
    let id = request.extensions().get::<RequestId>().cloned();
    let mut response = next.run(request).await;
    let Some(error) = response.extensions_mut().remove::<HopxError>() else { return response };
    let id = id.as_ref().map_or("", RequestId::as_str);
    let HopxError { status, code, message, details, cause } = error;
    let nested = json!({ "code": code, "message": message, "details": details, "request_id": id });
    let body = json!({ "error": nested, "code": code, "message": message, "request_id": id }).to_string();
    let mut worded = (status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
    if let Some(cause) = cause {
        worded.extensions_mut().insert(InternalFailure { cause, wording: Wording::Dialect });
    }
    worded
}

/// Of what the dialects share: bodies that are too large, too slow or no JSON.
impl From<ApiError> for HopxError {
    fn from(error: ApiError) -> Self {
        let (status, message, cause) = error.into_parts();
        let code = if status == StatusCode::BAD_REQUEST { "VALIDATION_ERROR" } else { "REQUEST_FAILED" };
        Self { cause, ..Self::new(status, code, message) }
    }
}

impl From<UnknownSandbox> for HopxError {
    fn from(UnknownSandbox(id): UnknownSandbox) -> Self {
        no_such_sandbox(id)
    }
}

impl From<StoreFailure> for HopxError {
    fn from(failure: StoreFailure) -> Self {
        Self::internal(failure)
    }
}

/// `limit`, `current` and `available` are in the unit of the place that is missing: sandboxes, CPUs or bytes.
fn too_many(full: Full) -> HopxError {
    let (current, limit) = match full {
        Full::Sandboxes { running, limit } => (u64::from(running), u64::from(limit)),
        Full::Cpus { taken, limit, .. } => (taken, limit),
        Full::Memory { taken, limit, .. } => (taken.bytes(), limit.bytes()),
    };
    HopxError::limit(full.to_string(), json!({ "limit": limit, "current": current, "available": limit.saturating_sub(current) }))
}

/// Not a 507, which these clients repeat.
fn no_room(exhausted: &Exhausted) -> HopxError {
    HopxError::new(StatusCode::CONFLICT, "INSUFFICIENT_STORAGE", exhausted.to_string())
}

fn shutting_down(message: String) -> HopxError {
    HopxError::new(StatusCode::SERVICE_UNAVAILABLE, "SHUTTING_DOWN", message)
}

impl From<CreateError> for HopxError {
    fn from(error: CreateError) -> Self {
        match error {
            CreateError::TooMany(full) => too_many(full),
            CreateError::ShuttingDown => shutting_down(error.to_string()),
            CreateError::Killed(_) | CreateError::VolumeFile { .. } | CreateError::IdempotencyConflict { .. } => {
                Self::wrong_state(error.to_string())
            }
            CreateError::NotReady { .. } | CreateError::NoVolume(_) | CreateError::MountTaken { .. } | CreateError::BadMountPath { .. } => {
                Self::invalid(error.to_string())
            }
            CreateError::Exhausted(exhausted) => no_room(&exhausted),
            CreateError::Start { .. } | CreateError::Store(_) => Self::internal(error),
        }
    }
}

impl From<TimeoutError> for HopxError {
    fn from(error: TimeoutError) -> Self {
        match error {
            TimeoutError::Unknown(unknown) => unknown.into(),
            TimeoutError::NotRunning { .. } => Self::wrong_state(error.to_string()),
            TimeoutError::TooLong { .. } => Self::invalid(error.to_string()),
            TimeoutError::Store(failure) => failure.into(),
        }
    }
}

impl From<PauseError> for HopxError {
    fn from(error: PauseError) -> Self {
        match error {
            PauseError::Unknown(unknown) => unknown.into(),
            PauseError::AlreadyPaused(_) | PauseError::InTransition { .. } | PauseError::NotDumpable { .. } => {
                Self::wrong_state(error.to_string())
            }
            PauseError::SnapshotSpace { .. } | PauseError::Exhausted { .. } => {
                Self::new(StatusCode::CONFLICT, "INSUFFICIENT_STORAGE", error.to_string())
            }
            PauseError::Dump { .. } | PauseError::Store(_) => Self::internal(error),
        }
    }
}

impl From<ConnectError> for HopxError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Unknown(unknown) => unknown.into(),
            ConnectError::AlreadyRunning(_) | ConnectError::InTransition { .. } => Self::wrong_state(error.to_string()),
            ConnectError::TooLong { .. } => Self::invalid(error.to_string()),
            ConnectError::TooMany(full) => too_many(full),
            ConnectError::BadMountPath { .. } | ConnectError::VolumeFile { .. } => Self::wrong_state(error.to_string()),
            ConnectError::Exhausted { exhausted, .. } => no_room(&exhausted),
            ConnectError::Restore { .. } | ConnectError::Store(_) => Self::internal(error),
        }
    }
}

impl From<ResolveError> for HopxError {
    fn from(error: ResolveError) -> Self {
        match error {
            ResolveError::UnknownTemplate(_) | ResolveError::UnknownTag { .. } | ResolveError::UnknownBuild { .. } => {
                Self::not_found("TEMPLATE_NOT_FOUND", error.to_string())
            }
            ResolveError::Malformed { .. } | ResolveError::BadTag { .. } => Self::invalid(error.to_string()),
            ResolveError::Store(_) => Self::internal(error),
        }
    }
}

impl From<RemoveError> for HopxError {
    fn from(error: RemoveError) -> Self {
        match error {
            RemoveError::Resolve(error) => error.into(),
            RemoveError::InUse { .. } => Self::wrong_state(error.to_string()),
        }
    }
}

impl From<RegisterError> for HopxError {
    fn from(error: RegisterError) -> Self {
        match error {
            RegisterError::Resolve(error) => error.into(),
            RegisterError::Snapshot(_) => Self::wrong_state(error.to_string()),
            RegisterError::Size { .. } => Self::invalid(error.to_string()),
        }
    }
}

impl From<StartBuildError> for HopxError {
    fn from(error: StartBuildError) -> Self {
        match error {
            StartBuildError::Resolve(error) => error.into(),
            StartBuildError::Started(_) => Self::wrong_state(error.to_string()),
            StartBuildError::TooMany { limit } => Self::limit(error.to_string(), json!({ "limit": limit })),
        }
    }
}

impl From<UploadError> for HopxError {
    fn from(error: UploadError) -> Self {
        match error {
            UploadError::Hash(_) | UploadError::TooLarge { .. } => Self::invalid(error.to_string()),
            UploadError::Io(_) => Self::internal(error),
        }
    }
}

/// What the pure parts of this dialect say of themselves in tests.
#[cfg(test)]
impl HopxError {
    pub(super) fn status_and_message(&self) -> (u16, &str) {
        (self.status.as_u16(), &self.message)
    }
}

/// So that an id of another form reads as one that nobody has.
impl From<crate::model::ParseIdError> for HopxError {
    fn from(error: crate::model::ParseIdError) -> Self {
        no_such_sandbox(error.text)
    }
}

/// A sandbox's id from a path.
pub(super) fn sandbox_id(text: &str) -> Result<SandboxId, HopxError> {
    Ok(text.parse::<SandboxId>()?)
}
