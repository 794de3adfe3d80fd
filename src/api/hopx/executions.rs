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
use super::callback::{Callback, Reach};
use super::error::HopxError;
use super::inside::{self, Answer, AnswerRoom, InsideError};
use crate::model::{EgressTarget, SandboxId, SandboxState};
use crate::sandbox::Registry;
use axum::extract::{FromRequest, Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, header};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Executions whose end is to be told, at once; of one sandbox, whose token is enough to ask for one.
const WAITING_MAX: usize = 256;
const WAITING_OF_ONE_MAX: usize = 32;
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
    reach: Reach,
    places: Arc<Semaphore>,
    by_sandbox: Arc<Mutex<HashMap<SandboxId, usize>>>,
    answers: AnswerRoom,
}

/// A place among those whose end is to be told; dropped, it is free again.
#[derive(Debug)]
struct Place {
    _of_all: OwnedSemaphorePermit,
    id: SandboxId,
    by_sandbox: Arc<Mutex<HashMap<SandboxId, usize>>>,
}

impl Callbacks {
    /// Callbacks may go to the public internet and to these.
    pub(in crate::api) fn new(allow: &[EgressTarget]) -> Self {
        let places = Arc::new(Semaphore::new(WAITING_MAX));
        Self { reach: Reach::new(allow), places, by_sandbox: Arc::default(), answers: AnswerRoom::default() }
    }

    fn place(&self, id: SandboxId) -> Result<Place, HopxError> {
        let full =
            |whose: &str, limit: usize| HopxError::wrong_state(format!("{limit} executions {whose}wait to be told; that is the limit"));
        let of_all = Arc::clone(&self.places).try_acquire_owned().map_err(|_| full("", WAITING_MAX))?;
        let mut counts = lock(&self.by_sandbox);
        let count = counts.entry(id).or_default();
        if *count >= WAITING_OF_ONE_MAX {
            return Err(full("of this sandbox ", WAITING_OF_ONE_MAX));
        }
        *count += 1;
        Ok(Place { _of_all: of_all, id, by_sandbox: Arc::clone(&self.by_sandbox) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = lock(&self.by_sandbox);
        if let Some(count) = counts.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.id);
            }
        }
    }
}

fn lock(counts: &Mutex<HashMap<SandboxId, usize>>) -> MutexGuard<'_, HashMap<SandboxId, usize>> {
    // A count is changed in one step.
    counts.lock().unwrap_or_else(PoisonError::into_inner)
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
    let record = state.registry.get(id)?;
    if record.state != SandboxState::Running {
        return Err(
            HopxError::wrong_state(format!("sandbox {id} is {}; resume or start it first", super::sandboxes::status(&record))).into()
        );
    }
    let (place, answers) = (state.callbacks.place(id)?, state.callbacks.answers.clone());
    let (headers, reach) = (asked.callback_headers.unwrap_or_default(), state.callbacks.reach.clone());
    let callback = Callback::parse(&asked.callback_url, headers, asked.callback_signature_secret, reach).await?;
    let body = Bytes::from(Value::Object(asked.execution).to_string());
    let started = inside::call(&state.registry, id, &answers, (Method::POST, "/executions"), body, START_MAX).await;
    let Answer { status, body: answer, .. } = started.map_err(|error| HopxError::wrong_state(format!("sandbox {id}: {error}")))?;
    if status != StatusCode::OK {
        return Ok((status, [(header::CONTENT_TYPE, "application/json")], answer).into_response());
    }
    let execution = execution_of(&answer).ok_or_else(|| HopxError::wrong_state(format!("sandbox {id} gave no proper answer")))?;
    let shown = json!({
        "execution_id": execution, "status": "queued", "callback_url": callback.url(),
        "message": "the callback URL is told when it ends", "timestamp": now(),
    });
    tokio::spawn(tell(state.registry.clone(), answers, (id, execution), callback, place));
    Ok(axum::Json(shown).into_response())
}

fn allow(state: &ApiState, id: SandboxId, headers: &HeaderMap) -> Result<(), HopxError> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    match bearer.map(|token| state.registry.read_bearer(token.trim())) {
        Some(Ok(held)) if held == id => Ok(()),
        Some(_) | None => state.keys.check(headers).map_err(HopxError::unauthorized),
    }
}

/// What is read of an answer. The rest is passed over: as a tree it would take many times the memory of its text.
#[derive(Deserialize)]
struct Told {
    execution_id: Option<String>,
    status: Option<String>,
}

/// An id of the agent's, which becomes a part of a path.
fn execution_of(answer: &[u8]) -> Option<String> {
    let Told { execution_id: Some(id), .. } = serde_json::from_slice(answer).ok()? else { return None };
    (!id.is_empty() && id.len() <= 64 && id.bytes().all(|byte| byte.is_ascii_alphanumeric())).then_some(id)
}

async fn tell(registry: Registry, answers: AnswerRoom, (id, execution): (SandboxId, String), callback: Callback, _place: Place) {
    let result = result_of(&registry, &answers, id, &execution).await;
    match callback.deliver(result.body()).await {
        Ok(()) => tracing::debug!(sandbox.id = %id, execution, "Told the end of an execution"),
        Err(error) => {
            tracing::debug!(sandbox.id = %id, execution, error = &error as &dyn std::error::Error, "Could not tell the end of an execution")
        }
    }
}

/// What is told: the sandbox's own answer, or that there is none.
#[derive(Debug)]
enum Outcome {
    Answer(Answer),
    Lost(Bytes),
}

impl Outcome {
    fn body(&self) -> Bytes {
        match self {
            Self::Answer(answer) => answer.body.clone(),
            Self::Lost(body) => body.clone(),
        }
    }
}

/// Waits as long as the sandbox lives, paused or not.
async fn result_of(registry: &Registry, answers: &AnswerRoom, id: SandboxId, execution: &str) -> Outcome {
    let lost = |why: &str| {
        let body = json!({ "execution_id": execution, "status": "failed", "error": why, "stdout": "", "stderr": why, "exit_code": 1, "timestamp": now() });
        Outcome::Lost(Bytes::from(body.to_string()))
    };
    let path = format!("/executions/{execution}?wait_s={WAIT}");
    loop {
        match registry.get(id) {
            Err(_gone) => return lost("the sandbox ended before the execution did"),
            // Asking would wake one that traffic wakes.
            Ok(record) if record.state != SandboxState::Running => tokio::time::sleep(ASK_EVERY).await,
            Ok(_) => match inside::call(registry, id, answers, (Method::GET, &path), Bytes::new(), WAIT_MAX).await {
                Ok(answer) if answer.status == StatusCode::OK && is_running(&answer.body) => {}
                Ok(answer) if answer.status == StatusCode::OK => return Outcome::Answer(answer),
                Ok(_) => return lost("the sandbox was stopped before the execution ended"),
                Err(InsideError::Unreachable(_) | InsideError::Slow(_)) => tokio::time::sleep(ASK_EVERY).await,
            },
        }
    }
}

fn is_running(answer: &[u8]) -> bool {
    serde_json::from_slice::<Told>(answer).is_ok_and(|answer| answer.status.as_deref() == Some("running"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sandbox_has_not_all_the_places() {
        let callbacks = Callbacks::new(&[]);
        let (one, other) = (SandboxId::random(), SandboxId::random());
        let mut places: Vec<Place> = (0..WAITING_OF_ONE_MAX).map(|_| callbacks.place(one).unwrap()).collect();
        let (_, _, message) = callbacks.place(one).unwrap_err().into_parts();
        assert!(message.contains("32 executions of this sandbox wait"), "{message}");
        let _others = callbacks.place(other).unwrap();
        places.pop();
        callbacks.place(one).unwrap();
        drop(places);
        assert_eq!(lock(&callbacks.by_sandbox).len(), 1, "only the other's is left");
    }

    #[test]
    fn an_answer_is_running_only_when_it_says_so() {
        assert!(is_running(br#"{"status":"running","stdout":[[[{}]]]}"#));
        for answer in [&br#"{"status":"done"}"#[..], br#"{"status":1}"#, b"{}", b"[", b"running"] {
            assert!(!is_running(answer));
        }
    }

    #[test]
    fn only_an_id_becomes_a_part_of_a_path() {
        assert_eq!(execution_of(br#"{"execution_id":"0a1b"}"#), Some("0a1b".to_owned()));
        for answer in [&br#"{"execution_id":"../x"}"#[..], br#"{"execution_id":""}"#, br#"{"execution_id":1}"#, b"{}", b"no"] {
            assert_eq!(execution_of(answer), None);
        }
    }
}
