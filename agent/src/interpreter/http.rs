//! E2B's code interpreter on port 49999 (contract/e2b.md section 4): /health, /execute, /contexts.
//!
//! Errors are plain text there. A token that is shown has to be the sandbox's; none need be, since 49999 counts as a
//! port of the user's, whose traffic the proxy guards.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::serve::ListenerExt as _;
use axum::{Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tower_http::cors::{Any, CorsLayer};

use super::languages;
use super::output::Output;
use super::{Cell, InterpreterError, Target};
use crate::auth::{HeaderAccess, access_by_header};
use crate::serve;
use crate::state::Agent;
use crate::wire::{INTERPRETER_PORT, LogLevel};

/// Code of one cell, with its variables.
const BODY_BYTES_MAX: usize = 64 << 20;
/// So that a client that has vanished without a word is noticed.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, Deserialize)]
struct ExecuteRequest {
    code: String,
    context_id: Option<String>,
    language: Option<String>,
    env_vars: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
struct ContextRequest {
    language: Option<String>,
    cwd: Option<String>,
}

/// Serves the port if the template is a code interpreter. A port that is taken costs a line in the log: the template
/// may bring a server of its own.
pub(crate) fn enable(agent: &Arc<Agent>) {
    if !languages::are_installed() {
        return;
    }
    let listening = serve::listen(INTERPRETER_PORT).map_err(io::Error::other).and_then(tokio::net::TcpListener::from_std);
    match listening {
        Ok(listener) => {
            agent.interpreter.state().is_installed = true;
            // Without TCP_NODELAY a short stream waits 40 ms for the peer's delayed acknowledgement.
            let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
            let router = router(Arc::clone(agent));
            tokio::spawn(async move { axum::serve(listener, router).await });
        }
        Err(error) => agent.log.write(LogLevel::Warn, "the code interpreter is not served", [("error", error.to_string())]),
    }
}

fn router(agent: Arc<Agent>) -> Router {
    let cors = CorsLayer::new().allow_origin(Any).allow_methods(Any).allow_headers(Any);
    Router::new()
        .route("/health", get(health))
        .route("/execute", post(execute))
        .route("/contexts", get(list).post(create))
        .route("/contexts/{id}", delete(remove))
        .route("/contexts/{id}/restart", post(restart))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(Arc::clone(&agent), refuse_wrong_token))
        .layer(cors)
        .with_state(agent)
}

/// An answer that is not a success.
#[derive(Debug)]
struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, self.1).into_response()
    }
}

impl From<InterpreterError> for Refusal {
    fn from(error: InterpreterError) -> Refusal {
        let status = match error {
            InterpreterError::UnknownContext(_) => StatusCode::NOT_FOUND,
            InterpreterError::Language(_) | InterpreterError::Cwd(_) => StatusCode::BAD_REQUEST,
            InterpreterError::TooMany | InterpreterError::QueueFull(_) => StatusCode::TOO_MANY_REQUESTS,
            InterpreterError::NotInstalled => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Refusal(status, error.to_string())
    }
}

async fn refuse_wrong_token(State(agent): State<Arc<Agent>>, request: Request, next: Next) -> Result<Response, Refusal> {
    let is_exempt = request.uri().path() == "/health";
    if !is_exempt && access_by_header(&agent.identity(), request.headers()) == HeaderAccess::Denied {
        return Err(Refusal(StatusCode::UNAUTHORIZED, "the X-Access-Token is not this sandbox's".to_owned()));
    }
    Ok(next.run(request).await)
}

/// Not healthy until the warm kernels wait: the template's ready command asks here before it is dumped.
async fn health(State(agent): State<Arc<Agent>>) -> Response {
    match agent.interpreter.is_ready() {
        true => Json("OK").into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "the kernels are starting").into_response(),
    }
}

async fn execute(State(agent): State<Arc<Agent>>, body: Bytes) -> Result<Response, Refusal> {
    let request: ExecuteRequest = read(&body)?;
    let target = match (request.context_id, request.language) {
        (Some(_), Some(_)) => {
            return Err(Refusal(StatusCode::BAD_REQUEST, "Only one of context_id or language can be provided".to_owned()));
        }
        (Some(id), None) => Target::Context(id),
        (None, language) => Target::Language(language.unwrap_or_default()),
    };
    let cell = Cell { code: request.code, envs: request.env_vars.unwrap_or_default(), ..Cell::default() };
    let outputs = agent.interpreter.execute(&agent, target, cell)?;
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], stream(outputs)).into_response())
}

/// A line per output, as it comes; dropped with the connection, and the cell with it.
fn stream(outputs: mpsc::Receiver<Output>) -> Body {
    Body::from_stream(futures_util::stream::unfold(Some(outputs), |outputs| async {
        let mut outputs = outputs?;
        let line = match tokio::time::timeout(KEEPALIVE_EVERY, outputs.recv()).await {
            Err(_) => r#"{"type":"keepalive"}"#.to_owned(),
            Ok(Some(output)) => output.into_json().to_string(),
            Ok(None) => return Some((Ok::<_, Infallible>(Bytes::from_static(b"{\"type\":\"end_of_execution\"}\n")), None)),
        };
        Some((Ok(Bytes::from(line + "\n")), Some(outputs)))
    }))
}

async fn list(State(agent): State<Arc<Agent>>) -> Response {
    Json(agent.interpreter.list()).into_response()
}

async fn create(State(agent): State<Arc<Agent>>, body: Bytes) -> Result<Response, Refusal> {
    let request: ContextRequest = if body.is_empty() { ContextRequest::default() } else { read(&body)? };
    let facts = agent.interpreter.create(&agent, &request.language.unwrap_or_default(), request.cwd.as_deref())?;
    Ok(Json(facts).into_response())
}

async fn restart(State(agent): State<Arc<Agent>>, Path(id): Path<String>) -> Result<Response, Refusal> {
    let restarted = agent.interpreter.restart(&id).await?;
    restarted.map_err(|error| Refusal(StatusCode::INTERNAL_SERVER_ERROR, format!("Failed to restart context {id}: {error}")))?;
    Ok(Json(()).into_response())
}

async fn remove(State(agent): State<Arc<Agent>>, Path(id): Path<String>) -> Result<Response, Refusal> {
    agent.interpreter.remove(&id)?;
    Ok(Json(()).into_response())
}

/// Whatever the content type says: clients differ.
fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|error| Refusal(StatusCode::UNPROCESSABLE_ENTITY, format!("the request cannot be read: {error}")))
}
