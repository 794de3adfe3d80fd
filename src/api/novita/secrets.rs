//! Stored secrets as Novita's clients know them: a variable of a sandbox holds the placeholder, and what is sent to one
//! of the secret's hosts carries the value in its place.

use super::super::ApiState;
use super::super::body::Json as Body;
use super::super::e2b::ask::Segment;
use super::super::e2b::wire::Time;
use super::super::error::ApiError;
use super::wire;
use crate::model::{EgressTarget, SandboxSpec, SecretRecord};
use crate::sandbox::{NewSecret, SecretContent, SecretError};
use axum::Json;
use axum::extract::State;
use http::StatusCode;
use std::collections::BTreeMap;

const NAME_MAX: usize = 128;
const HOSTS_MAX: usize = 100;

/// `POST /secrets`.
pub(super) async fn create(
    State(state): State<ApiState>,
    Body(new): Body<wire::NewSecret>,
) -> Result<(StatusCode, Json<wire::SecretBinding>), ApiError> {
    let content = content(new.content)?;
    let record = state.registry.create_secret(NewSecret { name: name(new.name)?, content }).await?;
    Ok((StatusCode::CREATED, Json(binding(record))))
}

/// `GET /secrets`.
pub(super) async fn all(State(state): State<ApiState>) -> Result<Json<wire::Secrets>, ApiError> {
    Ok(Json(wire::Secrets { secrets: state.registry.secrets().await?.into_iter().map(binding).collect() }))
}

/// `GET /secrets/{name}`.
pub(super) async fn info(State(state): State<ApiState>, Segment(name): Segment) -> Result<Json<wire::SecretBinding>, ApiError> {
    Ok(Json(binding(state.registry.secret(&name).await?)))
}

/// `PUT /secrets/{name}`: for every sandbox at once; the placeholder stays.
pub(super) async fn replace(
    State(state): State<ApiState>,
    Segment(name): Segment,
    Body(new): Body<wire::SecretContent>,
) -> Result<Json<wire::SecretBinding>, ApiError> {
    Ok(Json(binding(state.registry.update_secret(&name, content(new)?).await?)))
}

/// `DELETE /secrets/{name}`.
pub(super) async fn remove(State(state): State<ApiState>, Segment(name): Segment) -> Result<Json<wire::DeletedSecret>, ApiError> {
    Ok(Json(wire::DeletedSecret { deleted: state.registry.remove_secret(&name).await?.name }))
}

/// Gives a new sandbox the placeholders of its secrets, variable by variable, and lets what it sends carry their values.
pub(super) async fn bind(state: &ApiState, secrets: BTreeMap<String, String>, spec: &mut SandboxSpec) -> Result<(), ApiError> {
    for (variable, name) in secrets {
        if spec.env.contains_key(&variable) {
            return Err(ApiError::bad_request(format!("envVars and secrets both define '{variable}'")));
        }
        if !is_variable(&variable) {
            let shown: String = variable.chars().take(NAME_MAX).collect();
            return Err(ApiError::bad_request(format!("secrets names the variable '{shown}'; it must be letters, digits and '_'")));
        }
        let record = state.registry.secret(&name).await.map_err(|error| match error {
            SecretError::Unknown(name) => {
                ApiError::bad_request(format!("secrets['{variable}'] names the secret '{name}', which does not exist"))
            }
            other => other.into(),
        })?;
        spec.env.insert(variable, record.placeholder);
        spec.network.secrets.push(record.name);
    }
    spec.network.secrets.sort();
    spec.network.secrets.dedup();
    Ok(())
}

fn is_variable(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

fn name(text: String) -> Result<String, ApiError> {
    let is_in = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let is_name = text.len() <= NAME_MAX && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.bytes().all(is_in);
    let shown: String = text.chars().take(NAME_MAX).collect();
    is_name.then_some(text).ok_or_else(|| {
        ApiError::bad_request(format!(
            "name is '{shown}'; a secret's name has 1 to {NAME_MAX} letters, digits, '.', '_' and '-', and begins with a letter or digit"
        ))
    })
}

fn content(content: wire::SecretContent) -> Result<SecretContent, ApiError> {
    if !(1..=HOSTS_MAX).contains(&content.hosts.len()) {
        return Err(ApiError::bad_request(format!("hosts has {} entries; it must have 1 to {HOSTS_MAX}", content.hosts.len())));
    }
    let mut hosts = Vec::new();
    for host in &content.hosts {
        let host = parse_host(host)?;
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    Ok(SecretContent { value: content.value, metadata: None, hosts: Some(hosts), description: content.description })
}

fn parse_host(text: &str) -> Result<String, ApiError> {
    match text.trim().parse() {
        Ok(EgressTarget::Domain(name)) => Ok(name),
        Ok(EgressTarget::Block { .. }) | Err(_) => {
            let shown: String = text.chars().take(128).collect();
            Err(ApiError::bad_request(format!("hosts has '{shown}'; it must be a host name such as api.example.com, or *.example.com")))
        }
    }
}

fn binding(record: SecretRecord) -> wire::SecretBinding {
    wire::SecretBinding {
        name: record.name,
        hosts: record.hosts,
        placeholder: record.placeholder,
        has_secret: true,
        status: "ready",
        description: record.description,
        updated_at: Time(record.updated_at),
    }
}
