//! The plain HTTP side of files: GET and POST /files, POST /files/compose.
//!
//! The handlers here find out who asks and for what; the work is blocking and happens on blocking threads, in
//! modules that read and write plain streams:
//!
//! ```text
//! body ─> upload (gzip, multipart) ─> store ─> disk        compose
//! disk ─> download (conditions, encoding) ─> body
//! ```

pub(crate) mod body;
mod compose;
mod conditions;
mod content_type;
pub(crate) mod download;
mod encoding;
pub(crate) mod multipart;
mod signature;
pub(crate) mod store;
mod upload;

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE,
    IF_UNMODIFIED_SINCE, RANGE,
};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;

use crate::auth::{self, HeaderAccess};
use crate::blocking;
use crate::error::HttpError;
use crate::filesystem::metadata;
use crate::paths;
use crate::state::{Access, Agent, Identity};
use compose::Compose;
use conditions::Conditions;
use download::Wish;
use signature::{Claim, Operation};
use upload::{Kind, Upload, Written};

const METADATA_PREFIX: &str = "x-metadata-";
/// The body of a compose request: some thousand paths.
const COMPOSE_BYTES_MAX: usize = 4 << 20;

pub(crate) fn routes() -> Router<Arc<Agent>> {
    Router::new().route("/files", get(read).post(write)).route("/files/compose", post(join).layer(DefaultBodyLimit::max(COMPOSE_BYTES_MAX)))
}

#[derive(Debug, Deserialize)]
struct Parameters {
    path: Option<String>,
    username: Option<String>,
    signature: Option<String>,
    signature_expiration: Option<i64>,
}

async fn read(
    State(agent): State<Arc<Agent>>,
    parameters: Result<Query<Parameters>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, HttpError> {
    let Query(parameters) = parameters.map_err(malformed)?;
    let identity = agent.identity();
    allow(&identity, &headers, &parameters, Operation::Read)?;
    let user = auth::user_or(&identity, &headers, parameters.username.as_deref())?;
    let path = parameters.path.as_deref().unwrap_or_default();
    let path = paths::resolve(path, &user, &identity.default_workdir).map_err(|error| HttpError::bad_request(error.to_string()))?;
    let download = blocking::run(move || download::open(&path, wish(&headers))).await??;
    Ok(download.into_response())
}

async fn write(
    State(agent): State<Arc<Agent>>,
    parameters: Result<Query<Parameters>, QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Vec<Written>>, HttpError> {
    let upload = match upload(&agent.identity(), parameters, &headers) {
        Ok(upload) => upload,
        Err(refusal) => {
            body::read_away(body).await;
            return Err(refusal);
        }
    };
    let work = move |body| upload.run(body, &|| agent.watchers.settle());
    let written = body::consume(body, work).await??;
    Ok(Json(written))
}

/// What the request says about its body, if its sender may write at all.
fn upload(identity: &Identity, parameters: Result<Query<Parameters>, QueryRejection>, headers: &HeaderMap) -> Result<Upload, HttpError> {
    let Query(parameters) = parameters.map_err(malformed)?;
    allow(identity, headers, &parameters, Operation::Write)?;
    Ok(Upload {
        user: auth::user_or(identity, headers, parameters.username.as_deref())?,
        default_workdir: identity.default_workdir.clone(),
        path: parameters.path,
        kind: kind(headers)?,
        coding: encoding::of_content(text(headers, CONTENT_ENCODING))
            .map_err(|error| HttpError::bad_request(format!("error decompressing request body: {error}")))?,
        metadata: metadata::parse(metadata_headers(headers))
            .map_err(|error| HttpError::bad_request(format!("invalid metadata: {error}")))?,
        declared_bytes: text(headers, CONTENT_LENGTH).and_then(|length| length.parse().ok()),
    })
}

async fn join(State(agent): State<Arc<Agent>>, headers: HeaderMap, body: axum::body::Bytes) -> Result<Json<Written>, HttpError> {
    let request: compose::Request =
        serde_json::from_slice(&body).map_err(|error| HttpError::bad_request(format!("invalid request body: {error}")))?;
    let identity = agent.identity();
    let user = auth::user_or(&identity, &headers, request.username.as_deref())?;
    let compose = Compose::resolve(&request, &user, &identity.default_workdir)?;
    Ok(Json(blocking::run(move || compose.run(&|| agent.watchers.settle())).await??))
}

fn malformed(rejection: QueryRejection) -> HttpError {
    HttpError::bad_request(rejection.body_text())
}

/// The routes' own rule: the token in the header, or a signature that somebody with the token made.
fn allow(identity: &Identity, headers: &HeaderMap, parameters: &Parameters, operation: Operation) -> Result<(), HttpError> {
    match (auth::access_by_header(identity, headers), &identity.access) {
        (HeaderAccess::Granted, _) => Ok(()),
        (HeaderAccess::Missing, Access::Token(token)) => {
            let claim = Claim {
                path: parameters.path.as_deref().unwrap_or_default(),
                operation,
                username: parameters.username.as_deref().unwrap_or_default(),
                expiration_unix: parameters.signature_expiration,
            };
            claim.verify(parameters.signature.as_deref(), token, unix_now()).map_err(|error| HttpError::unauthorized(error.to_string()))
        }
        (HeaderAccess::Denied | HeaderAccess::Missing, _) => {
            Err(HttpError::unauthorized("access token present in header but does not match"))
        }
    }
}

fn unix_now() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX)
}

fn kind(headers: &HeaderMap) -> Result<Kind, HttpError> {
    let content_type = text(headers, CONTENT_TYPE).unwrap_or_default();
    let media_type = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    match media_type.as_str() {
        "application/octet-stream" => Ok(Kind::Raw),
        media_type if media_type.starts_with("multipart/") => {
            // A missing one is reported with the body's other errors.
            Ok(Kind::Multipart { boundary: multipart::boundary(content_type).unwrap_or_default() })
        }
        _ => Err(HttpError::bad_request(format!(
            "unsupported content type: {content_type}, expected multipart/form-data or application/octet-stream"
        ))),
    }
}

fn metadata_headers(headers: &HeaderMap) -> impl Iterator<Item = (&str, &[u8])> {
    headers.iter().filter_map(|(name, value)| Some((name.as_str().strip_prefix(METADATA_PREFIX)?, value.as_bytes())))
}

pub(crate) fn wish(headers: &HeaderMap) -> Wish<'_> {
    Wish {
        accept_encoding: text(headers, ACCEPT_ENCODING).unwrap_or_default(),
        conditions: Conditions {
            if_match: text(headers, IF_MATCH),
            if_none_match: text(headers, IF_NONE_MATCH),
            if_modified_since: text(headers, IF_MODIFIED_SINCE),
            if_unmodified_since: text(headers, IF_UNMODIFIED_SINCE),
            if_range: text(headers, IF_RANGE),
            range: text(headers, RANGE),
        },
    }
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// An error with its causes: the client is all there is to read them.
pub(crate) fn describe(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// The status of a system call's failure that has no better name.
fn io_status(error: &io::Error) -> StatusCode {
    match error.kind() {
        io::ErrorKind::InvalidFilename | io::ErrorKind::InvalidInput => StatusCode::BAD_REQUEST,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => StatusCode::FORBIDDEN,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StatusCode::INSUFFICIENT_STORAGE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
