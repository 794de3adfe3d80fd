//! Errors of this API, in the body that both of HopX's clients read: `error` and `message` hold the same text, `code`
//! decides which exception they raise.
//!
//! None of them is a 429 or a 5xx: Python's client tries again on most of these, JavaScript's on all.

use std::time::SystemTime;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::blocking::Lost;
use crate::files::describe;
use crate::logs::rfc3339;
use crate::paths::PathError;
use crate::process::spawn::SpawnError;
use crate::users::UserError;

/// What went wrong, in HopX's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    InvalidRequest,
    InvalidPath,
    NotFound,
    MethodNotAllowed,
    FileNotFound,
    FileAlreadyExists,
    DirectoryNotFound,
    PermissionDenied,
    NoSpace,
    CommandFailed,
    ExecutionFailed,
    ProcessNotFound,
    DesktopNotAvailable,
    Internal,
}

impl Code {
    const fn word_and_status(self) -> (&'static str, StatusCode) {
        match self {
            Code::InvalidRequest => ("INVALID_REQUEST", StatusCode::BAD_REQUEST),
            Code::InvalidPath => ("INVALID_PATH", StatusCode::BAD_REQUEST),
            Code::NotFound => ("NOT_FOUND", StatusCode::NOT_FOUND),
            Code::MethodNotAllowed => ("METHOD_NOT_ALLOWED", StatusCode::METHOD_NOT_ALLOWED),
            Code::FileNotFound => ("FILE_NOT_FOUND", StatusCode::NOT_FOUND),
            Code::FileAlreadyExists => ("FILE_ALREADY_EXISTS", StatusCode::CONFLICT),
            Code::DirectoryNotFound => ("DIRECTORY_NOT_FOUND", StatusCode::BAD_REQUEST),
            Code::PermissionDenied => ("PERMISSION_DENIED", StatusCode::FORBIDDEN),
            Code::NoSpace => ("INSUFFICIENT_STORAGE", StatusCode::UNPROCESSABLE_ENTITY),
            Code::CommandFailed => ("COMMAND_FAILED", StatusCode::UNPROCESSABLE_ENTITY),
            Code::ExecutionFailed => ("EXECUTION_FAILED", StatusCode::UNPROCESSABLE_ENTITY),
            Code::ProcessNotFound => ("PROCESS_NOT_FOUND", StatusCode::NOT_FOUND),
            // A 501 would be tried three times by JavaScript's client.
            Code::DesktopNotAvailable => ("DESKTOP_NOT_AVAILABLE", StatusCode::UNPROCESSABLE_ENTITY),
            // Nothing that was tried is known to have happened, and nothing would be different a second later.
            Code::Internal => ("INTERNAL_ERROR", StatusCode::UNPROCESSABLE_ENTITY),
        }
    }
}

/// An answer that is not a success.
#[derive(Debug, Clone)]
pub(super) struct HopxError {
    code: Code,
    message: String,
    path: Option<String>,
    details: Map<String, Value>,
}

impl HopxError {
    pub(super) fn new(code: Code, message: impl Into<String>) -> HopxError {
        HopxError { code, message: message.into(), path: None, details: Map::new() }
    }

    pub(super) fn invalid(message: impl Into<String>) -> HopxError {
        HopxError::new(Code::InvalidRequest, message)
    }

    /// About this path; clients show it.
    pub(super) fn at(mut self, path: impl Into<String>) -> HopxError {
        let path = path.into();
        self.details.insert("path".to_owned(), json!(path));
        self.path = Some(path);
        self
    }

    pub(super) fn with_detail(mut self, name: &str, value: Value) -> HopxError {
        self.details.insert(name.to_owned(), value);
        self
    }

    /// The same failure as one of code, not of a command.
    pub(super) fn of_execution(mut self) -> HopxError {
        if self.code == Code::CommandFailed {
            self.code = Code::ExecutionFailed;
        }
        self
    }

    /// What WebSockets send instead of a response.
    pub(super) fn message(&self) -> Value {
        let (word, _) = self.code.word_and_status();
        json!({ "type": "error", "error": self.message, "message": self.message, "code": word, "timestamp": rfc3339(SystemTime::now()) })
    }

    fn body(&self, request_id: &str) -> String {
        let (word, _) = self.code.word_and_status();
        let mut body = json!({
            "error": self.message, "message": self.message, "code": word, "details": self.details,
            "request_id": request_id, "timestamp": rfc3339(SystemTime::now()),
        });
        if let (Some(path), Some(body)) = (&self.path, body.as_object_mut()) {
            body.insert("path".to_owned(), json!(path));
        }
        body.to_string()
    }
}

/// Without a body yet: [`word`] knows the request's id.
impl IntoResponse for HopxError {
    fn into_response(self) -> Response {
        let mut response = self.code.word_and_status().1.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// Gives an error its body.
pub(super) fn word(mut response: Response, request_id: &str) -> Response {
    match response.extensions_mut().remove::<HopxError>() {
        Some(error) => (response.status(), [(header::CONTENT_TYPE, "application/json")], error.body(request_id)).into_response(),
        None => response,
    }
}

/// 16 hex characters, for who compares a client's error with a log.
pub(super) fn new_request_id() -> String {
    let mut random = [0; 8];
    // Ids without randomness are no worse than none: nothing depends on them.
    let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty());
    format!("{:016x}", u64::from_ne_bytes(random))
}

impl From<JsonRejection> for HopxError {
    fn from(rejection: JsonRejection) -> HopxError {
        HopxError::invalid(rejection.body_text())
    }
}

impl From<QueryRejection> for HopxError {
    fn from(rejection: QueryRejection) -> HopxError {
        HopxError::invalid(rejection.body_text())
    }
}

impl From<Lost> for HopxError {
    fn from(lost: Lost) -> HopxError {
        HopxError::new(Code::Internal, lost.to_string())
    }
}

impl From<UserError> for HopxError {
    fn from(error: UserError) -> HopxError {
        HopxError::new(Code::Internal, describe(&error))
    }
}

impl From<PathError> for HopxError {
    fn from(error: PathError) -> HopxError {
        HopxError::new(Code::InvalidPath, error.to_string())
    }
}

/// A program that could not be started: what the request says is wrong, or the sandbox lacks it.
impl From<SpawnError> for HopxError {
    fn from(error: SpawnError) -> HopxError {
        let code = match &error {
            SpawnError::NoCommand | SpawnError::Nul | SpawnError::EnvName { .. } => Code::InvalidRequest,
            SpawnError::Path(_) => Code::InvalidPath,
            SpawnError::CwdMissing { .. } | SpawnError::CwdNotDirectory { .. } => Code::DirectoryNotFound,
            SpawnError::NotFound { .. } | SpawnError::Pty(_) | SpawnError::Pipes(_) | SpawnError::Exec { .. } => Code::CommandFailed,
        };
        HopxError::new(code, describe(&error))
    }
}
