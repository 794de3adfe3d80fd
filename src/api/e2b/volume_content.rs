//! The files of a volume over HTTP, without a sandbox: `/volumecontent/{id}/…` (contract e2b.md 2.7).
//!
//! Whoever has a volume's token may do everything with its files, and nothing else.

use super::super::ApiState;
use super::super::body::OptionalJson;
use super::super::error::ApiError;
use super::ask::{Query, Segment};
use super::volumes::volume_id;
use super::wire::{self, Time};
use crate::model::VolumeId;
use crate::volume::{EntryKind, EntryStat, FileError, Force, NewFile, Owner, VolumePath};
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequestParts, Request, State};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use http::request::Parts;
use http::{StatusCode, header};
use http_body_util::BodyExt;
use std::io;
use tokio::io::AsyncReadExt;

/// Bytes that are read from a file at once.
const PIECE: usize = 256 << 10;

/// What a call is about: a volume whose token it brings, a path, and what its query says besides.
#[derive(Debug)]
pub(super) struct Place {
    volume: VolumeId,
    path: VolumePath,
    query: Query,
}

impl FromRequestParts<ApiState> for Place {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &ApiState) -> Result<Self, ApiError> {
        let Segment(id) = Segment::from_request_parts(parts, state).await?;
        let volume = volume_id(&id)?;
        let bearer = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        if !bearer.is_some_and(|token| state.volumes.accepts_token(volume, token.trim())) {
            return Err(ApiError::new(StatusCode::UNAUTHORIZED, "this is not the volume's token; GET /volumes/{id} tells it"));
        }
        let query = Query::of(parts.uri.query().unwrap_or_default());
        Ok(Self { volume, path: VolumePath::parse(query.get("path").unwrap_or("/"))?, query })
    }
}

impl Place {
    fn number(&self, name: &str) -> Result<Option<u32>, ApiError> {
        let wrong = |text: &str| ApiError::bad_request(format!("{name} is '{text}'; it must be a number"));
        self.query.get(name).map(|text| text.parse().map_err(|_| wrong(text))).transpose()
    }

    fn owner(&self) -> Result<Owner, ApiError> {
        let owner = Owner { uid: self.number("uid")?, gid: self.number("gid")?, mode: self.number("mode")? };
        Ok(owner.checked()?)
    }

    /// Python's clients write `True` nowhere, but people do.
    fn force(&self) -> Force {
        match self.query.get("force") {
            Some(text) if text.eq_ignore_ascii_case("true") || text == "1" => Force::Yes,
            Some(_) | None => Force::No,
        }
    }
}

/// `GET …/path`.
pub(super) async fn stat(State(state): State<ApiState>, place: Place) -> Result<Json<wire::VolumeEntry>, ApiError> {
    let path = place.path;
    let found = state.volumes.with_files(place.volume, move |root| root.stat(&path)).await?;
    Ok(Json(entry(found)))
}

/// `PATCH …/path`.
pub(super) async fn update(
    State(state): State<ApiState>,
    place: Place,
    OptionalJson(update): OptionalJson<wire::VolumeEntryUpdate>,
) -> Result<Json<wire::VolumeEntry>, ApiError> {
    let owner = Owner { uid: update.uid, gid: update.gid, mode: update.mode }.checked()?;
    let path = place.path;
    let updated = state.volumes.with_files(place.volume, move |root| root.update(&path, owner)).await?;
    Ok(Json(entry(updated)))
}

/// `DELETE …/path`.
pub(super) async fn remove(State(state): State<ApiState>, place: Place) -> Result<StatusCode, ApiError> {
    let path = place.path;
    state.volumes.with_files(place.volume, move |root| root.remove(&path)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `GET …/dir`.
pub(super) async fn list(State(state): State<ApiState>, place: Place) -> Result<Json<Vec<wire::VolumeEntry>>, ApiError> {
    let depth = place.number("depth")?.unwrap_or(1);
    let path = place.path;
    let found = state.volumes.with_files(place.volume, move |root| root.list(&path, depth)).await?;
    Ok(Json(found.into_iter().map(entry).collect()))
}

/// `POST …/dir`.
pub(super) async fn make_folder(State(state): State<ApiState>, place: Place) -> Result<(StatusCode, Json<wire::VolumeEntry>), ApiError> {
    let (owner, force) = (place.owner()?, place.force());
    let path = place.path;
    let made = state.volumes.with_files(place.volume, move |root| root.make_folder(&path, owner, force)).await?;
    Ok((StatusCode::CREATED, Json(entry(made))))
}

/// `GET …/file`.
pub(super) async fn read(State(state): State<ApiState>, place: Place) -> Result<Response, ApiError> {
    let path = place.path;
    let file = state.volumes.with_files(place.volume, move |root| root.read(&path)).await?;
    let file = tokio::fs::File::from_std(file);
    // Without a length: a sandbox may write to it meanwhile.
    let body = Body::from_stream(stream::try_unfold(file, next_piece));
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

async fn next_piece(mut file: tokio::fs::File) -> io::Result<Option<(Bytes, tokio::fs::File)>> {
    let mut piece = Vec::with_capacity(PIECE);
    match file.read_buf(&mut piece).await? {
        0 => Ok(None),
        _ => Ok(Some((piece.into(), file))),
    }
}

/// `PUT …/file`. Nobody sees the file before all of it is there.
pub(super) async fn write(
    State(state): State<ApiState>,
    place: Place,
    request: Request,
) -> Result<(StatusCode, Json<wire::VolumeEntry>), ApiError> {
    let (owner, force) = (place.owner()?, place.force());
    let path = place.path;
    let mut file = state.volumes.with_files(place.volume, move |root| root.begin_file(&path, owner, force)).await?;
    let mut body = request.into_body();
    let time_max = state.config.body_time_max;
    loop {
        let frame = tokio::time::timeout(time_max, body.frame()).await;
        let stalled = |_| ApiError::new(StatusCode::REQUEST_TIMEOUT, format!("nothing of the file came for {time_max:?}"));
        let Some(frame) = frame.map_err(stalled)? else { break };
        let broken = |_| ApiError::bad_request("the file ended before it was complete");
        if let Ok(piece) = frame.map_err(broken)?.into_data() {
            file = blocking(move || with_piece(file, &piece)).await?;
        }
    }
    let written = blocking(move || file.put_in_place(force)).await?;
    Ok((StatusCode::CREATED, Json(entry(written))))
}

fn with_piece(mut file: NewFile, piece: &[u8]) -> Result<NewFile, FileError> {
    file.write(piece)?;
    Ok(file)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, FileError> + Send + 'static) -> Result<T, FileError> {
    let worked = tokio::task::spawn_blocking(work).await;
    worked.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
}

fn entry(found: EntryStat) -> wire::VolumeEntry {
    wire::VolumeEntry {
        name: found.name,
        kind: match found.kind {
            EntryKind::File => "file",
            EntryKind::Folder => "directory",
            EntryKind::Symlink => "symlink",
            EntryKind::Other => "unknown",
        },
        path: found.path,
        size: found.size,
        mode: found.mode,
        uid: found.uid,
        gid: found.gid,
        atime: Time(found.accessed),
        mtime: Time(found.modified),
        ctime: Time(found.created),
        target: found.target,
    }
}

impl From<FileError> for ApiError {
    fn from(error: FileError) -> Self {
        match error {
            FileError::NoVolume(_) | FileError::NotFound(_) => Self::not_found(error.to_string()),
            FileError::Exists(_) => Self::conflict(error.to_string()),
            FileError::NotFile(_) | FileError::NotFolder(_) | FileError::Invalid(_) => Self::bad_request(error.to_string()),
            FileError::Full => Self::new(StatusCode::INSUFFICIENT_STORAGE, error.to_string()),
            FileError::Storage(_) => Self::internal(error),
        }
    }
}
