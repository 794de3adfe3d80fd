//! Our own calls, below `/stillbox/`, for what no cloud's dialect has: used by our command line, with the same key.

use super::ApiState;
use super::auth::require_key;
use super::error::ApiError;
use crate::model::{ByteSize, Keep, SandboxId};
use crate::template::{AdoptError, Manifest, ManifestError, Thoroughness};
use crate::volume::VolumeInfo;
use axum::extract::{Path, State};
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use axum::{Json, Router};
use http::StatusCode;
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;

pub(super) fn routes(state: &ApiState) -> Router<ApiState> {
    Router::new()
        .route("/stillbox/sandboxes/{id}", get(inside))
        .route("/stillbox/sandboxes/{id}/findings", get(findings))
        .route("/stillbox/builds/{id}/cancel", post(cancel_build))
        .route("/stillbox/disk", get(disk))
        .route("/stillbox/disk/gc", post(collect_garbage))
        .route("/stillbox/volumes", get(volumes).post(make_volume))
        .route("/stillbox/templates", post(adopt))
        .route("/stillbox/templates/{name}/manifest", get(manifest))
        .route_layer(from_fn_with_state(state.clone(), require_key))
}

fn parsed(id: &str) -> Result<SandboxId, ApiError> {
    id.parse().map_err(|error: crate::model::ParseIdError| ApiError::bad_request(error.to_string()))
}

/// What the kernel and the disk hold of a sandbox: for people who look after the machine.
async fn inside(State(state): State<ApiState>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let record = state.registry.get(parsed(&id)?)?;
    let dump = match record.snapshot {
        Some(snapshot) => state.registry.disk_use().await?.dumps.into_iter().find(|dump| dump.snapshot == snapshot),
        None => None,
    };
    Ok(Json(json!({
        "sandboxID": record.id.as_str(),
        "state": record.state.as_str(),
        "initPid": record.kernel.as_ref().map(|kernel| kernel.init.pid),
        "slot": record.kernel.as_ref().map(|kernel| kernel.slot),
        "uidBase": record.kernel.as_ref().map(|kernel| kernel.uid_base),
        "generation": record.generation,
        "kept": record.paused.map(|keep| match keep {
            Keep::Memory => "memory",
            Keep::FilesOnly => "files",
        }),
        "dump": dump.map(|dump| json!({
            "snapshotID": dump.snapshot.as_str(),
            "memoryBytes": dump.memory.bytes(),
            "synced": dump.synced,
        })),
    })))
}

/// What would keep a sandbox from being paused now; an empty list when nothing would.
async fn findings(State(state): State<ApiState>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let findings = state.registry.explain(parsed(&id)?).await?;
    let findings: Vec<Value> =
        findings.into_iter().map(|finding| json!({ "pid": finding.pid, "command": finding.command, "reason": finding.reason })).collect();
    Ok(Json(json!({ "findings": findings })))
}

/// Stops a build that is under way; its status says so soon afterwards.
async fn cancel_build(State(state): State<ApiState>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let id = id.parse().map_err(|error: crate::model::ParseIdError| ApiError::bad_request(error.to_string()))?;
    match state.builds.cancel(id) {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(ApiError::not_found(format!("build {id} is not under way"))),
    }
}

async fn disk(State(state): State<ApiState>) -> Result<Json<Value>, ApiError> {
    let disk = state.registry.disk_use().await?;
    let dumps: Vec<Value> = disk
        .dumps
        .iter()
        .map(|dump| {
            json!({
                "snapshotID": dump.snapshot.as_str(),
                "sandboxID": dump.sandbox.as_str(),
                "keptFor": dump.kept_for.as_ref().map(ToString::to_string),
                "memoryBytes": dump.memory.bytes(),
                "diskBytes": dump.disk.bytes(),
                "createdAt": dump.created_at.format(&Rfc3339).unwrap_or_default(),
                "synced": dump.synced,
            })
        })
        .collect();
    let host = disk.room.as_ref().map(|room| {
        json!({
            "path": room.path.display().to_string(),
            "freeBytes": room.free.bytes(),
            "floorBytes": room.floor.bytes(),
            "isLow": room.is_short_of(ByteSize(0)),
        })
    });
    Ok(Json(json!({ "dumps": dumps, "usedBytes": disk.used.bytes(), "limitBytes": disk.limit.bytes(), "host": host })))
}

async fn collect_garbage(State(state): State<ApiState>) -> Result<Json<Value>, ApiError> {
    let dumps = state.registry.collect_garbage().await?;
    let layers = state.templates.collect_garbage(Thoroughness::Everything).await.map_err(ApiError::internal)?;
    Ok(Json(json!({ "freedBytes": dumps.bytes() + layers.bytes() })))
}

/// Volumes with their sizes, which E2B's clients do not ask for.
async fn volumes(State(state): State<ApiState>) -> Result<Json<Value>, ApiError> {
    let infos = state.volumes.list().await?;
    Ok(Json(infos.iter().map(volume).collect()))
}

/// A volume of any size.
async fn make_volume(State(state): State<ApiState>, Json(new): Json<NewVolume>) -> Result<Json<Value>, ApiError> {
    let name = new.name.parse().map_err(|error: crate::model::ParseVolumeError| ApiError::bad_request(error.to_string()))?;
    let info = state.volumes.create(name, new.size_bytes.map(ByteSize)).await?;
    Ok(Json(volume(&info)))
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct NewVolume {
    name: String,
    size_bytes: Option<u64>,
}

fn volume(info: &VolumeInfo) -> Value {
    json!({
        "volumeID": info.record.id.to_string(),
        "name": info.record.name.as_str(),
        "sizeBytes": info.record.size.bytes(),
        "usedBytes": info.used.bytes(),
        "createdAt": info.record.created_at.format(&Rfc3339).unwrap_or_default(),
    })
}

/// All of a template but its layers' files, for an export by who can read those.
async fn manifest(State(state): State<ApiState>, Path(name): Path<String>) -> Result<Json<Manifest>, ApiError> {
    match state.templates.manifest_of(&name).await {
        Ok(manifest) => Ok(Json(manifest)),
        Err(ManifestError::Resolve(error)) => Err(error.into()),
        Err(error @ (ManifestError::Unfinished(_) | ManifestError::Snapshot(_))) => Err(ApiError::conflict(error.to_string())),
    }
}

/// Makes a template of layers that were imported into the data folder.
async fn adopt(State(state): State<ApiState>, Json(manifest): Json<Manifest>) -> Result<Json<Value>, ApiError> {
    match state.templates.adopt(manifest).await {
        Ok(resolved) => Ok(Json(json!({ "templateID": resolved.template.id.as_str(), "buildID": resolved.build.id.to_string() }))),
        Err(AdoptError::Name(error)) => Err(error.into()),
        Err(error @ AdoptError::NoLayer(_)) => Err(ApiError::bad_request(error.to_string())),
        Err(error @ (AdoptError::Hold { .. } | AdoptError::Store(_) | AdoptError::Interrupted(_))) => Err(ApiError::internal(error)),
    }
}
