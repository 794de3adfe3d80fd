//! Volumes with a quota, and mounts that come and go while a sandbox runs: what Novita has beyond E2B.

use super::super::ApiState;
use super::super::body::Json as Body;
use super::super::e2b::ask::{Query, SandboxPath, Segment};
use super::super::e2b::volumes::{volume, volume_id, with_token};
use super::super::e2b::wire::VolumeMount;
use super::super::error::ApiError;
use super::wire;
use crate::model::{ByteSize, MountPath, ParseVolumeError, SandboxRecord};
use crate::sandbox::{VolumeChange, VolumeChangeError, WhenBusy};
use crate::volume::VolumeInfo;
use axum::Json;
use axum::extract::State;
use http::StatusCode;

/// `POST /volumes`.
pub(super) async fn create(
    State(state): State<ApiState>,
    Body(new): Body<wire::NewVolume>,
) -> Result<(StatusCode, Json<wire::VolumeWithQuota>), ApiError> {
    let name = new.name.parse().map_err(refused)?;
    let info = state.volumes.create(name, new.quota.size()?).await?;
    Ok((StatusCode::CREATED, Json(with_quota(&state, &info))))
}

/// `GET /volumes`.
pub(super) async fn all(State(state): State<ApiState>) -> Result<Json<Vec<wire::ListedVolume>>, ApiError> {
    let infos = state.volumes.list().await?;
    Ok(Json(infos.iter().map(|info| wire::ListedVolume { volume: volume(info), usage: usage(info) }).collect()))
}

/// `GET /volumes/{id}`.
pub(super) async fn info(State(state): State<ApiState>, Segment(id): Segment) -> Result<Json<wire::VolumeWithQuota>, ApiError> {
    let info = state.volumes.get(volume_id(&id)?).await?;
    Ok(Json(with_quota(&state, &info)))
}

/// `PATCH /volumes/{id}`: more room.
pub(super) async fn update(
    State(state): State<ApiState>,
    Segment(id): Segment,
    Body(quota): Body<wire::VolumeQuota>,
) -> Result<Json<wire::VolumeWithQuota>, ApiError> {
    let id = volume_id(&id)?;
    let info = match quota.size()? {
        Some(size) => state.volumes.grow(id, size).await?,
        None => state.volumes.get(id).await?,
    };
    Ok(Json(with_quota(&state, &info)))
}

/// `POST /sandboxes/{id}/volume-mounts`.
pub(super) async fn mount(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    Body(asked): Body<VolumeMount>,
) -> Result<Json<wire::VolumeMounts>, ApiError> {
    // Before the volume: a client asks about its sandbox.
    state.registry.get(id)?;
    let mounts = state.volumes.mounts(&[(asked.name, asked.path)]).await?;
    let mount = mounts.into_iter().next().ok_or_else(|| ApiError::bad_request("name and path are wanted"))?;
    let record = state.registry.change_volumes(id, VolumeChange::Mount(mount)).await?;
    Ok(Json(mounts_of(record)))
}

/// `DELETE /sandboxes/{id}/volume-mounts?path=…&force=…`.
pub(super) async fn unmount(
    State(state): State<ApiState>,
    SandboxPath(id): SandboxPath,
    query: Query,
) -> Result<Json<wire::VolumeMounts>, ApiError> {
    let path: MountPath = query.get("path").unwrap_or_default().parse().map_err(refused)?;
    let busy = if query.get("force") == Some("true") { WhenBusy::Detach } else { WhenBusy::Refuse };
    let record = state.registry.change_volumes(id, VolumeChange::Unmount { path, busy }).await?;
    Ok(Json(mounts_of(record)))
}

fn refused(error: ParseVolumeError) -> ApiError {
    ApiError::bad_request(error.to_string())
}

fn mounts_of(record: SandboxRecord) -> wire::VolumeMounts {
    let mounts = record.spec.volumes.iter();
    let volume_mounts = mounts.map(|mount| VolumeMount { name: mount.name.to_string(), path: mount.path.to_string() }).collect();
    wire::VolumeMounts { volume_mounts }
}

fn usage(info: &VolumeInfo) -> wire::VolumeUsage {
    wire::VolumeUsage { quota_size_gib: info.record.size.bytes().div_ceil(ByteSize::gib(1).bytes()), used_size_bytes: info.used.bytes() }
}

fn with_quota(state: &ApiState, info: &VolumeInfo) -> wire::VolumeWithQuota {
    wire::VolumeWithQuota { volume: with_token(state, info), usage: usage(info) }
}

impl wire::VolumeQuota {
    /// The number of files has no bound of its own: file systems have far more than a quota asks for.
    fn size(&self) -> Result<Option<ByteSize>, ApiError> {
        let size = |gib: i64| {
            let bytes = u64::try_from(gib).ok().filter(|gib| *gib > 0).and_then(|gib| gib.checked_mul(ByteSize::gib(1).bytes()));
            bytes.map(ByteSize).ok_or_else(|| ApiError::bad_request(format!("quotaSizeGiB is {gib}; it must be a number of GiB from 1 on")))
        };
        self.quota_size_gib.map(size).transpose()
    }
}

impl From<VolumeChangeError> for ApiError {
    fn from(error: VolumeChangeError) -> Self {
        match error {
            VolumeChangeError::Unknown(unknown) => unknown.into(),
            VolumeChangeError::PathTaken(_)
            | VolumeChangeError::NoVolume(_)
            | VolumeChangeError::BadPath { .. }
            | VolumeChangeError::NotMounted(_) => Self::bad_request(error.to_string()),
            VolumeChangeError::NotRunning { .. } | VolumeChangeError::Busy(_) => Self::conflict(error.to_string()),
            VolumeChangeError::Kernel { .. } => Self::internal(error),
            VolumeChangeError::Store(failure) => failure.into(),
        }
    }
}
