//! POST /commands/run and /commands/background: a program and its arguments, most often a line for bash.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::HopxError;
use super::jobs::{self, NewJob};
use super::run::{self, Program};
use crate::logs::rfc3339;
use crate::process::spawn::ProcessConfig;
use crate::state::Agent;

/// Of commands that name no timeout.
const TIMEOUT_DEFAULT_S: f64 = 120.0;
/// Nothing runs longer than a day.
const TIMEOUT_MAX_S: f64 = 86_400.0;

#[derive(Debug, Deserialize)]
pub(super) struct Request {
    command: String,
    #[serde(default)]
    args: Vec<String>,
    timeout: Option<f64>,
    #[serde(alias = "working_dir")]
    workdir: Option<String>,
    #[serde(default)]
    env: Option<BTreeMap<String, String>>,
    name: Option<String>,
}

/// A request's timeout in seconds.
pub(super) fn timeout(asked: Option<f64>, default_s: f64) -> Result<Duration, HopxError> {
    let seconds = asked.unwrap_or(default_s);
    match seconds > 0.0 && seconds <= TIMEOUT_MAX_S {
        true => Ok(Duration::from_secs_f64(seconds)),
        false => Err(HopxError::invalid(format!("timeout is {seconds}; it must be more than 0 and at most {TIMEOUT_MAX_S} seconds"))),
    }
}

impl Request {
    /// A line without arguments is a line for a shell.
    pub(super) async fn program(self, agent: &Agent) -> Result<(Program, String, Option<String>), HopxError> {
        if self.command.trim().is_empty() {
            return Err(HopxError::invalid("command is empty"));
        }
        let timeout = timeout(self.timeout, TIMEOUT_DEFAULT_S)?;
        let shown = shown(&self.command, &self.args);
        let (cmd, args) = match self.args.is_empty() && self.command.contains(char::is_whitespace) {
            true => ("/bin/sh".to_owned(), vec!["-c".to_owned(), self.command]),
            false => (self.command, self.args),
        };
        let cwd = Some(run::workdir(agent, self.workdir).await?);
        let config = ProcessConfig { cmd, args, envs: self.env.unwrap_or_default(), cwd };
        Ok((Program { config, input: None, timeout }, shown, self.name))
    }
}

/// What was asked for, without the shell that clients put around it.
fn shown(command: &str, args: &[String]) -> String {
    match args {
        [flag, line] if flag == "-c" => line.clone(),
        _ => std::iter::once(command).chain(args.iter().map(String::as_str)).collect::<Vec<_>>().join(" "),
    }
}

pub(super) async fn run(State(agent): State<Arc<Agent>>, request: Result<Json<Request>, JsonRejection>) -> Result<Json<Value>, HopxError> {
    let Json(request) = request?;
    let (program, command, _name) = request.program(&agent).await?;
    let (pid, finished) = run::to_end(&agent, program).await?;
    Ok(Json(json!({
        "stdout": finished.stdout,
        "stderr": finished.stderr,
        "exit_code": finished.outcome.exit_code(),
        "execution_time": finished.took.as_secs_f64(),
        "success": finished.outcome.is_success(),
        "pid": pid,
        "command": command,
        "timestamp": rfc3339(SystemTime::now()),
    })))
}

pub(super) async fn background(
    State(agent): State<Arc<Agent>>,
    request: Result<Json<Request>, JsonRejection>,
) -> Result<Json<Value>, HopxError> {
    let Json(request) = request?;
    let (program, command, name) = request.program(&agent).await?;
    let job = NewJob { name: name.unwrap_or_else(|| command.chars().take(80).collect()), language: "bash", command };
    let mut answer = jobs::begin(&agent, program, job)?;
    // JavaScript's client shows these of every command.
    answer["stdout"] = json!("");
    answer["stderr"] = json!("");
    answer["exit_code"] = json!(0);
    answer["execution_time"] = json!(0.0);
    answer["success"] = json!(true);
    Ok(Json(answer))
}
