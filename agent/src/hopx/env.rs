//! /env: the sandbox's own variables. They stand above the template's and below a request's, count for every process
//! that starts from then on, and are shown as they are: HopX's clients delete one by putting back the rest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::HopxError;
use crate::logs::rfc3339;
use crate::state::Agent;

/// Variables of one sandbox.
const VARIABLES_MAX: usize = 1024;

type Variables = BTreeMap<String, String>;

#[derive(Debug, Deserialize)]
pub(super) struct Request {
    env_vars: Variables,
}

pub(super) async fn all(State(agent): State<Arc<Agent>>) -> Json<Value> {
    shown(&agent)
}

pub(super) async fn replace(
    State(agent): State<Arc<Agent>>,
    request: Result<Json<Request>, JsonRejection>,
) -> Result<Json<Value>, HopxError> {
    let Json(request) = request?;
    set(&agent, request.env_vars)
}

pub(super) async fn merge(
    State(agent): State<Arc<Agent>>,
    request: Result<Json<Request>, JsonRejection>,
) -> Result<Json<Value>, HopxError> {
    let Json(request) = request?;
    let mut variables = agent.identity().own_envs.clone();
    variables.extend(request.env_vars);
    set(&agent, variables)
}

pub(super) async fn clear(State(agent): State<Arc<Agent>>) -> Result<Json<Value>, HopxError> {
    set(&agent, Variables::new())
}

fn set(agent: &Agent, variables: Variables) -> Result<Json<Value>, HopxError> {
    if variables.len() > VARIABLES_MAX {
        return Err(HopxError::invalid(format!("there would be {} variables; the limit is {VARIABLES_MAX}", variables.len())));
    }
    let is_bad = |(name, value): &(&String, &String)| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0');
    if let Some((name, _)) = variables.iter().find(is_bad) {
        let name = name.escape_debug();
        return Err(HopxError::invalid(format!(
            "env_vars has the variable '{name}'; names must not be empty or contain '=' or NUL, values no NUL"
        )));
    }
    agent.set_own_envs(variables);
    Ok(shown(agent))
}

fn shown(agent: &Agent) -> Json<Value> {
    let variables = &agent.identity().own_envs;
    Json(json!({ "env_vars": variables, "count": variables.len(), "success": true, "timestamp": rfc3339(SystemTime::now()) }))
}
