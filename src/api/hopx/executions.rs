//! `POST /execute/async` of the API inside: code whose end is told to a URL. The proxy hands it over, because a sandbox
//! neither reaches what its host does nor is to be trusted with requests in the host's name.
//!
//! ```text
//! client ─> here: check the URL ─> agent: start ─> client: queued
//!           a task: wait for the result, across pauses ─> sign ─> POST
//! ```
//! The task is this server's: what was to be told when it is stopped is not told.

use super::super::ApiState;
use super::super::body;
use super::ask::SandboxPath;
use super::callback::Callback;
use super::error::HopxError;
use super::inside::{self, InsideError};
use crate::model::{EgressTarget, SandboxId, SandboxState};
use crate::sandbox::Registry;
use axum::extract::{FromRequest, Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, header};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Executions whose end is to be told, at once.
const WAITING_MAX: usize = 256;
/// Starting one.
const START_MAX: Duration = Duration::from_secs(30);
/// How long one question for a result waits inside, and how long we wait for the answer to it.
const WAIT: &str = "20";
const WAIT_MAX: Duration = Duration::from_secs(30);
/// Between two questions to a sandbox that is paused or does not answer.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// What all such executions share.
#[derive(Debug, Clone)]
pub(in crate::api) struct Callbacks {
    allow: Arc<[EgressTarget]>,
    places: Arc<Semaphore>,
}

impl Callbacks {
    /// Callbacks may go to the public internet and to these.
    pub(in crate::api) fn new(allow: &[EgressTarget]) -> Self {
        Self { allow: allow.into(), places: Arc::new(Semaphore::new(WAITING_MAX)) }
    }
}

#[derive(Debug, Deserialize)]
struct Asked {
    callback_url: String,
    callback_headers: Option<BTreeMap<String, String>>,
    callback_signature_secret: Option<String>,
    /// Goes inside as it is.
    #[serde(flatten)]
    execution: Map<String, Value>,
}

/// An error as the API inside words it: the client that asks is that API's.
pub(super) struct Inside(HopxError);

impl<E: Into<HopxError>> From<E> for Inside {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Inside {
    fn into_response(self) -> Response {
        let (status, code, message) = self.0.into_parts();
        let body = json!({ "error": message, "message": message, "code": code, "details": {}, "timestamp": now() });
        (status, axum::Json(body)).into_response()
    }
}

fn now() -> String {
    OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default()
}

/// The call itself. Who has the sandbox's token may make it, and who has the API key.
pub(super) async fn start(State(state): State<ApiState>, SandboxPath(id): SandboxPath, request: Request) -> Result<Response, Inside> {
    allow(&state, id, request.headers())?;
    let body::Json(asked) = body::Json::<Asked>::from_request(request, &state).await?;
    let allow = Arc::clone(&state.callbacks.allow);
    let headers = asked.callback_headers.unwrap_or_default();
    let callback = Callback::parse(&asked.callback_url, headers, asked.callback_signature_secret, allow).await?;
    let record = state.registry.get(id)?;
    if record.state != SandboxState::Running {
        return Err(
            HopxError::wrong_state(format!("sandbox {id} is {}; resume or start it first", super::sandboxes::status(&record))).into()
        );
    }
    let place = Arc::clone(&state.callbacks.places).try_acquire_owned();
    let place = place.map_err(|_| HopxError::wrong_state(format!("{WAITING_MAX} executions wait to be told; that is the limit")))?;
    let body = Bytes::from(Value::Object(asked.execution).to_string());
    let started = inside::call(&state.registry, id, (Method::POST, "/executions"), body, START_MAX).await;
    let (status, answer) = started.map_err(|error| HopxError::wrong_state(format!("sandbox {id}: {error}")))?;
    if status != StatusCode::OK {
        return Ok((status, [(header::CONTENT_TYPE, "application/json")], answer).into_response());
    }
    let execution = execution_of(&answer).ok_or_else(|| HopxError::wrong_state(format!("sandbox {id} gave no proper answer")))?;
    let shown = json!({
        "execution_id": execution, "status": "queued", "callback_url": callback.url(),
        "message": "the callback URL is told when it ends", "timestamp": now(),
    });
    tokio::spawn(tell(state.registry.clone(), id, execution, callback, place));
    Ok(axum::Json(shown).into_response())
}

fn allow(state: &ApiState, id: SandboxId, headers: &HeaderMap) -> Result<(), HopxError> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    match bearer.map(|token| state.registry.read_bearer(token.trim())) {
        Some(Ok(held)) if held == id => Ok(()),
        Some(_) | None => state.keys.check(headers).map_err(HopxError::unauthorized),
    }
}

/// An id of the agent's, which becomes a part of a path.
fn execution_of(answer: &[u8]) -> Option<String> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    let id = answer["execution_id"].as_str()?;
    (!id.is_empty() && id.len() <= 64 && id.bytes().all(|byte| byte.is_ascii_alphanumeric())).then(|| id.to_owned())
}

async fn tell(registry: Registry, id: SandboxId, execution: String, callback: Callback, _place: OwnedSemaphorePermit) {
    let result = result_of(&registry, id, &execution).await;
    match callback.deliver(result).await {
        Ok(()) => tracing::debug!(sandbox.id = %id, execution, "Told the end of an execution"),
        Err(error) => {
            tracing::debug!(sandbox.id = %id, execution, error = &error as &dyn std::error::Error, "Could not tell the end of an execution")
        }
    }
}

/// Waits as long as the sandbox lives, paused or not.
async fn result_of(registry: &Registry, id: SandboxId, execution: &str) -> Bytes {
    let lost = |why: &str| {
        let body = json!({ "execution_id": execution, "status": "failed", "error": why, "stdout": "", "stderr": why, "exit_code": 1, "timestamp": now() });
        Bytes::from(body.to_string())
    };
    let path = format!("/executions/{execution}?wait_s={WAIT}");
    loop {
        match registry.get(id) {
            Err(_gone) => return lost("the sandbox ended before the execution did"),
            // Asking would wake one that traffic wakes.
            Ok(record) if record.state != SandboxState::Running => tokio::time::sleep(ASK_EVERY).await,
            Ok(_) => match inside::call(registry, id, (Method::GET, &path), Bytes::new(), WAIT_MAX).await {
                Ok((StatusCode::OK, answer)) if is_running(&answer) => {}
                Ok((StatusCode::OK, answer)) => return answer,
                Ok((_status, _)) => return lost("the sandbox was stopped before the execution ended"),
                Err(InsideError::Unreachable(_) | InsideError::Slow(_)) => tokio::time::sleep(ASK_EVERY).await,
            },
        }
    }
}

fn is_running(answer: &[u8]) -> bool {
    serde_json::from_slice::<Value>(answer).is_ok_and(|answer| answer["status"] == "running")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_id_becomes_a_part_of_a_path() {
        assert_eq!(execution_of(br#"{"execution_id":"0a1b"}"#), Some("0a1b".to_owned()));
        for answer in [&br#"{"execution_id":"../x"}"#[..], br#"{"execution_id":""}"#, br#"{"execution_id":1}"#, b"{}", b"no"] {
            assert_eq!(execution_of(answer), None);
        }
    }
}
