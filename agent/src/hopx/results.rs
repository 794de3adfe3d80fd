//! Executions whose results are fetched later. Only the host starts them, for requests with a callback: it waits for the
//! result here and tells it to whom the request named, which is nothing that a sandbox could be trusted to do.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::timeout;

use super::error::{Code, HopxError};
use super::execute::{self, Request};
use super::pieces::{self, Finished, Outcome};
use crate::memory;
use crate::state::Agent;

/// Results that wait to be fetched; the oldest go first.
const RESULTS_MAX: usize = 64;
/// How long one question may wait for an answer.
const WAIT_MAX_S: u64 = 60;

/// None while it runs.
type Pending = watch::Receiver<Option<Arc<Value>>>;

#[derive(Debug, Default)]
pub(super) struct Results(Mutex<VecDeque<(String, Pending)>>);

#[derive(Debug, Deserialize)]
pub(super) struct Wait {
    wait_s: Option<u64>,
}

/// POST /executions: starts it and answers at once.
pub(super) async fn start(
    State(agent): State<Arc<Agent>>,
    request: Result<Json<Request>, JsonRejection>,
) -> Result<Json<Value>, HopxError> {
    let Json(request) = request?;
    let execution = request.checked(&agent).await?;
    let language = execution.language;
    let pieces = execute::begin(&agent, execution)?;
    let id = super::error::new_request_id();
    let (done, result) = watch::channel(None);
    agent.hopx.results.add(id.clone(), result);
    let shown_id = id.clone();
    tokio::spawn(async move {
        let result = match pieces::gather(pieces).await {
            Some(finished) => shown(&shown_id, finished, language),
            None => json!({ "execution_id": shown_id, "status": "failed", "error": "the end was lost" }),
        };
        done.send_replace(Some(Arc::new(result)));
        memory::release_later();
    });
    Ok(Json(json!({ "execution_id": id, "status": "queued" })))
}

/// GET /executions/{id}: its result, or `running` when the time to wait is over.
pub(super) async fn get(
    State(agent): State<Arc<Agent>>,
    Path(id): Path<String>,
    query: Result<Query<Wait>, QueryRejection>,
) -> Result<Json<Value>, HopxError> {
    let Query(Wait { wait_s }) = query?;
    let mut result = agent.hopx.results.find(&id).ok_or_else(|| HopxError::new(Code::NotFound, format!("execution '{id}' not found")))?;
    let wait = Duration::from_secs(wait_s.unwrap_or(0).min(WAIT_MAX_S));
    let ended = timeout(wait, result.wait_for(Option::is_some)).await.ok().and_then(Result::ok).and_then(|ended| (*ended).clone());
    Ok(Json(ended.map_or_else(|| json!({ "execution_id": id, "status": "running" }), |ended| Value::clone(&ended))))
}

fn shown(id: &str, finished: Finished, language: super::languages::Language) -> Value {
    let status = match finished.outcome {
        Outcome::TimedOut(_) => "timeout",
        outcome if outcome.is_success() => "completed",
        Outcome::Exited(_) => "failed",
    };
    let mut shown = execute::shown(finished, language);
    shown["execution_id"] = json!(id);
    shown["status"] = json!(status);
    if status != "completed" {
        shown["error"] = shown["stderr"].clone();
    }
    shown
}

impl Results {
    fn add(&self, id: String, result: Pending) {
        let mut results = self.lock();
        results.push_back((id, result));
        if results.len() > RESULTS_MAX {
            results.pop_front();
        }
    }

    fn find(&self, id: &str) -> Option<Pending> {
        self.lock().iter().find(|(known, _)| known == id).map(|(_, result)| result.clone())
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(String, Pending)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
