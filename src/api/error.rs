//! What every dialect's errors become: a status and `{"code", "message"}`, or a 500 that tells only its request id.

use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde_json::json;
use std::error::Error;
use std::sync::Arc;

/// An answer that is not the one asked for.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    message: String,
    header: Option<(&'static str, &'static str)>,
    /// For what nobody classified: logged with the request id, never told.
    cause: Option<Arc<dyn Error + Send + Sync>>,
}

/// On the way out through the layers, which know the request's id: to be logged with it, and to be worded for the
/// client, unless its dialect has done so.
#[derive(Debug, Clone)]
pub(super) struct InternalFailure {
    pub(super) cause: Arc<dyn Error + Send + Sync>,
    pub(super) wording: Wording,
}

/// Whose words the client gets for an internal error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wording {
    Common,
    Dialect,
}

impl ApiError {
    /// An error that its reader can do something about.
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), header: None, cause: None }
    }

    /// 400: the request itself is wrong; the message names field, value and limit.
    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 401.
    pub(super) fn unauthorized(error: super::auth::AuthError) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, error.to_string())
    }

    /// 404.
    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// 409: not in the present state.
    pub(super) fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, message)
    }

    /// 501: part of the dialect that this server does not serve.
    pub(super) fn not_served(call: impl std::fmt::Display, what: &str) -> Self {
        Self::new(StatusCode::NOT_IMPLEMENTED, format!("{call} is not served: {what}"))
    }

    /// 500: our fault. The chain of `cause` goes to the log, the client gets the request id.
    pub(super) fn internal(cause: impl Error + Send + Sync + 'static) -> Self {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Self { status, message: "internal error".to_owned(), header: None, cause: Some(Arc::new(cause)) }
    }

    /// With a header; newer SDKs read `Retry-After` and `Should-Retry`.
    pub(super) fn with_header(mut self, name: &'static str, value: &'static str) -> Self {
        self.header = Some((name, value));
        self
    }

    /// For entries of a list that fail one by one.
    pub(super) fn code_and_message(&self) -> (u16, &str) {
        (self.status.as_u16(), &self.message)
    }

    /// For a dialect with words of its own: status, message and the cause that is not told.
    pub(super) fn into_parts(self) -> (StatusCode, String, Option<Arc<dyn Error + Send + Sync>>) {
        (self.status, self.message, self.cause)
    }

    /// The cause of an internal error, for those who do not answer with it.
    pub(super) fn cause(&self) -> Option<&(dyn Error + Send + Sync)> {
        self.cause.as_deref()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = body(self.status, &self.message);
        if let Some((name, value)) = self.header {
            response.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        if let Some(cause) = self.cause {
            response.extensions_mut().insert(InternalFailure { cause, wording: Wording::Common });
        }
        response
    }
}

/// The error body that all E2B clients need: JS decides by the `code` in it, Python by the status.
pub(super) fn body(status: StatusCode, message: &str) -> Response {
    let json = json!({ "code": status.as_u16(), "message": message }).to_string();
    (status, [(header::CONTENT_TYPE, "application/json")], json).into_response()
}
