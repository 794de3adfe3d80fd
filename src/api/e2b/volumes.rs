//! Volumes: making, listing and removing them (contract e2b.md 2.7).

use super::super::ApiState;
use super::super::body::Json as Body;
use super::super::error::ApiError;
use super::ask::Segment;
use super::wire;
use crate::model::VolumeId;
use crate::volume::{ChangeError, MountsError, VolumeInfo};
use axum::Json;
use axum::extract::State;
use http::StatusCode;

/// `POST /volumes`.
pub(super) async fn create(
    State(state): State<ApiState>,
    Body(new): Body<wire::NewVolume>,
) -> Result<(StatusCode, Json<wire::VolumeAndToken>), ApiError> {
    let name = new.name.parse().map_err(|error: crate::model::ParseVolumeError| ApiError::bad_request(error.to_string()))?;
    let info = state.volumes.create(name, None).await?;
    Ok((StatusCode::CREATED, Json(with_token(&state, &info))))
}

/// `GET /volumes`.
pub(super) async fn all(State(state): State<ApiState>) -> Result<Json<Vec<wire::Volume>>, ApiError> {
    let infos = state.volumes.list().await?;
    Ok(Json(infos.iter().map(volume).collect()))
}

/// `GET /volumes/{id}`.
pub(super) async fn info(State(state): State<ApiState>, Segment(id): Segment) -> Result<Json<wire::VolumeAndToken>, ApiError> {
    let info = state.volumes.get(volume_id(&id)?).await?;
    Ok(Json(with_token(&state, &info)))
}

/// `DELETE /volumes/{id}`.
pub(super) async fn remove(State(state): State<ApiState>, Segment(id): Segment) -> Result<StatusCode, ApiError> {
    state.volumes.remove(volume_id(&id)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The `{id}` of a volume's path.
pub(in crate::api) fn volume_id(text: &str) -> Result<VolumeId, ApiError> {
    text.parse().map_err(|error: crate::model::ParseIdError| ApiError::bad_request(error.to_string()))
}

pub(in crate::api) fn volume(info: &VolumeInfo) -> wire::Volume {
    wire::Volume { volume_id: info.record.id.to_string(), name: info.record.name.to_string() }
}

pub(in crate::api) fn with_token(state: &ApiState, info: &VolumeInfo) -> wire::VolumeAndToken {
    wire::VolumeAndToken { volume: volume(info), token: state.volumes.token(info.record.id) }
}

impl From<ChangeError> for ApiError {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::Unknown(_) => Self::not_found(error.to_string()),
            ChangeError::NameTaken(_) | ChangeError::TooMany { .. } | ChangeError::Size { .. } | ChangeError::Shrinks { .. } => {
                Self::bad_request(error.to_string())
            }
            ChangeError::InUse { .. } | ChangeError::CannotGrowNow { .. } => Self::conflict(error.to_string()),
            ChangeError::NoRoom(_) => Self::new(StatusCode::INSUFFICIENT_STORAGE, error.to_string()),
            ChangeError::Storage(_) | ChangeError::Store(_) => Self::internal(error),
        }
    }
}

impl From<MountsError> for ApiError {
    fn from(error: MountsError) -> Self {
        match error {
            MountsError::Unknown(_) | MountsError::Path(_) | MountsError::Twice(_) => Self::bad_request(error.to_string()),
            MountsError::Store(_) => Self::internal(error),
        }
    }
}
