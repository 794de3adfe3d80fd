//! POST /execute and /execute/ipython: code, and everything that it printed and showed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use serde::Deserialize;
use serde_json::{Value, json};

use super::commands::timeout;
use super::error::HopxError;
use super::languages::Language;
use super::run::{self, Finished};
use crate::logs::rfc3339;
use crate::memory;
use crate::state::Agent;

/// Of code that names no timeout.
const TIMEOUT_DEFAULT_S: f64 = 120.0;

#[derive(Debug, Deserialize)]
pub(super) struct Request {
    pub(super) code: String,
    pub(super) language: Option<String>,
    pub(super) timeout: Option<f64>,
    #[serde(alias = "working_dir")]
    pub(super) workdir: Option<String>,
    pub(super) env: Option<BTreeMap<String, String>>,
}

pub(super) async fn execute(
    State(agent): State<Arc<Agent>>,
    request: Result<Json<Request>, JsonRejection>,
) -> Result<Json<Value>, HopxError> {
    let Json(request) = request?;
    let language = Language::named(request.language.as_deref())?;
    let timeout = timeout(request.timeout, TIMEOUT_DEFAULT_S)?;
    let workdir = run::workdir(&agent, request.workdir).await?;
    let program = language.program(request.code, workdir, request.env.unwrap_or_default(), timeout)?;
    let finished = run::to_end(&agent, program).await.map_err(HopxError::of_execution)?;
    memory::release_later();
    Ok(Json(shown(finished, language)))
}

fn shown(finished: Finished, language: Language) -> Value {
    json!({
        "stdout": finished.stdout,
        "stderr": finished.stderr,
        "exit_code": finished.outcome.exit_code(),
        "success": finished.outcome.is_success(),
        "execution_time": finished.took.as_secs_f64(),
        "language": language.word(),
        "timestamp": rfc3339(SystemTime::now()),
    })
}
