//! Stored secrets as E2B's clients know them: write-only values, named by id or name, used in headers of
//! `network.rules` as `${e2b.secrets.<name>}`.

use super::super::ApiState;
use super::super::body::Json as Body;
use super::super::error::ApiError;
use super::ask::{Query, Segment};
use super::{cursor, wire};
use crate::model::{SecretId, SecretRecord};
use crate::sandbox::{ListOrder, NewSecret, SecretContent, SecretError};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use std::collections::BTreeMap;

const PAGE_MAX: u32 = 100;
const NAME_MAX: usize = 128;
const METADATA_MAX: usize = 32;

/// `POST /secrets`.
pub(super) async fn create(
    State(state): State<ApiState>,
    Body(new): Body<wire::NewSecret>,
) -> Result<(StatusCode, Json<wire::Secret>), ApiError> {
    let content = content(new.value, new.metadata)?;
    let record = state.registry.create_secret(NewSecret { name: name(&new.name)?, content }).await?;
    Ok((StatusCode::CREATED, Json(secret(record))))
}

/// `GET /secrets`: oldest first.
pub(super) async fn page(State(state): State<ApiState>, query: Query) -> Result<Response, ApiError> {
    let limit = usize::try_from(query.limit(PAGE_MAX)?).unwrap_or(usize::MAX);
    let after = query.get("nextToken").map(|token| cursor::row::<SecretId>(token, ListOrder::Ascending)).transpose()?;
    let mut records = state.registry.secrets().await?;
    records.retain(|record| after.is_none_or(|after| (record.created_at, record.id) > after));
    let more = records.len() > limit;
    records.truncate(limit);
    let token = records.last().filter(|_| more).map(|last| cursor::token(last.created_at, last.id, ListOrder::Ascending));
    let mut response = Json(records.into_iter().map(secret).collect::<Vec<_>>()).into_response();
    if let Some(token) = token {
        response.headers_mut().insert(cursor::NEXT_TOKEN, token);
    }
    Ok(response)
}

/// `GET /secrets/{id or name}`.
pub(super) async fn info(State(state): State<ApiState>, Segment(key): Segment) -> Result<Json<wire::Secret>, ApiError> {
    Ok(Json(secret(state.registry.secret(&by(&key)).await?)))
}

/// `POST /secrets/{id or name}`: the value becomes the newest version, at once for every sandbox.
pub(super) async fn update(
    State(state): State<ApiState>,
    Segment(key): Segment,
    Body(update): Body<wire::SecretUpdate>,
) -> Result<Json<wire::Secret>, ApiError> {
    let content = content(update.value, update.metadata)?;
    Ok(Json(secret(state.registry.update_secret(&by(&key), content).await?)))
}

/// `DELETE /secrets/{id or name}`.
pub(super) async fn remove(State(state): State<ApiState>, Segment(key): Segment) -> Result<StatusCode, ApiError> {
    state.registry.remove_secret(&by(&key)).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl From<SecretError> for ApiError {
    fn from(error: SecretError) -> Self {
        match error {
            SecretError::Taken(_) => Self::conflict(error.to_string()),
            SecretError::Unknown(_) => Self::not_found(error.to_string()),
            SecretError::Value(_) | SecretError::TooMany => Self::bad_request(error.to_string()),
            SecretError::Store(failure) => failure.into(),
        }
    }
}

fn name(text: &str) -> Result<String, ApiError> {
    let is_name = (1..=NAME_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    let shown: String = text.chars().take(NAME_MAX).collect();
    is_name.then(|| text.to_ascii_lowercase()).ok_or_else(|| {
        ApiError::bad_request(format!("name is '{shown}'; a secret's name has 1 to {NAME_MAX} letters, digits, '_' and '-'"))
    })
}

/// Ids and names of this dialect are lower case; a name with a dot is Novita's, and kept as it is there.
fn by(key: &str) -> String {
    if key.contains('.') { key.to_owned() } else { key.to_ascii_lowercase() }
}

fn content(value: String, metadata: Option<BTreeMap<String, String>>) -> Result<SecretContent, ApiError> {
    if let Some(count) = metadata.as_ref().map(BTreeMap::len).filter(|count| *count > METADATA_MAX) {
        return Err(ApiError::bad_request(format!("metadata has {count} entries; the limit is {METADATA_MAX}")));
    }
    Ok(SecretContent { value, metadata, hosts: None, description: None })
}

fn secret(record: SecretRecord) -> wire::Secret {
    wire::Secret {
        secret_id: record.id.to_string(),
        name: record.name,
        current_version: record.version,
        metadata: record.metadata,
        created_at: wire::Time(record.created_at),
        updated_at: wire::Time(record.updated_at),
    }
}
