//! /files/…: texts and bytes in and out, listings, folders. Paths that are not absolute are below the workspace.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

use super::WORKSPACE;
use super::error::{Code, HopxError};
use super::run;
use crate::blocking;
use crate::files::body;
use crate::files::describe;
use crate::files::download::{self, DownloadError};
use crate::files::multipart::{self, Multipart};
use crate::files::store::{StoreError, Target, is_full};
use crate::filesystem::aside::Aside;
use crate::filesystem::entry::{Entry, Kind};
use crate::filesystem::metadata::Metadata;
use crate::filesystem::ops::{self, EnsureError, Ensured, ListError, Owner, is_missing};
use crate::logs::rfc3339;
use crate::memory;
use crate::state::Agent;
use crate::users::Names;

/// A text that is answered in JSON. Downloads have no limit.
const TEXT_BYTES_MAX: u64 = 64 << 20;
/// A form's field other than the file.
const FIELD_BYTES_MAX: u64 = 64 << 10;

pub(super) fn routes() -> Router<Arc<Agent>> {
    Router::new()
        .route("/files/read", get(read))
        .route("/files/download", get(download))
        .route("/files/write", post(write))
        .route("/files/list", get(list))
        .route("/files/exists", get(exists))
        .route("/files/mkdir", post(mkdir))
        .route("/files/remove", delete(remove).post(remove))
        .route("/files/upload", post(upload).layer(DefaultBodyLimit::disable()))
}

#[derive(Debug, Deserialize)]
struct ByPath {
    path: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Write {
    path: String,
    content: String,
    mode: Option<String>,
    encoding: Option<String>,
    overwrite: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct MakeDir {
    path: String,
}

/// What a path in a request means.
pub(super) fn resolve(path: &str) -> Result<PathBuf, HopxError> {
    match path {
        "" => Err(HopxError::new(Code::InvalidPath, "path is empty")),
        path if path.contains('\0') => Err(HopxError::new(Code::InvalidPath, "path contains a NUL byte").at(path.replace('\0', "\\0"))),
        path => Ok(Path::new(WORKSPACE).join(path)),
    }
}

fn asked(query: Result<Query<ByPath>, QueryRejection>, otherwise: Option<&str>) -> Result<(String, PathBuf), HopxError> {
    let Query(query) = query?;
    let path = query.path.or(otherwise.map(str::to_owned)).ok_or_else(|| HopxError::invalid("the query parameter path is required"))?;
    let resolved = resolve(&path)?;
    Ok((path, resolved))
}

async fn owner(agent: &Agent) -> Result<Owner, HopxError> {
    let user = run::user(agent)?;
    Ok(Owner { uid: user.uid, gid: user.gid })
}

fn done(path: &str, message: &str) -> Json<Value> {
    Json(json!({ "success": true, "path": path, "message": message, "timestamp": rfc3339(SystemTime::now()) }))
}

async fn read(query: Result<Query<ByPath>, QueryRejection>) -> Result<Json<Value>, HopxError> {
    let (shown, path) = asked(query, None)?;
    let bytes = {
        let shown = shown.clone();
        blocking::run(move || read_whole(&path, &shown)).await??
    };
    let size = bytes.len();
    let content = String::from_utf8(bytes).map_err(|_| {
        HopxError::new(Code::InvalidRequest, "the file is not UTF-8 text; get its bytes from /files/download").at(shown.clone())
    })?;
    memory::release_later();
    Ok(Json(json!({ "content": content, "path": shown, "size": size })))
}

fn read_whole(path: &Path, shown: &str) -> Result<Vec<u8>, HopxError> {
    let failed = |error: io::Error| io_error(&error, shown, "reading");
    if fs::metadata(path).map_err(failed)?.is_dir() {
        return Err(HopxError::new(Code::InvalidPath, format!("'{shown}' is a directory")).at(shown));
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(TEXT_BYTES_MAX + 1).read_to_end(&mut bytes)).map_err(failed)?;
    match bytes.len() as u64 > TEXT_BYTES_MAX {
        true => Err(HopxError::invalid(format!("the file is larger than {TEXT_BYTES_MAX} bytes; get it from /files/download")).at(shown)),
        false => Ok(bytes),
    }
}

async fn download(query: Result<Query<ByPath>, QueryRejection>, headers: HeaderMap) -> Result<Response, HopxError> {
    let (shown, path) = asked(query, None)?;
    let opened = blocking::run(move || download::open(&path, crate::files::wish(&headers))).await?;
    Ok(opened.map_err(|error| download_error(&error, &shown))?.into_response())
}

async fn write(State(agent): State<Arc<Agent>>, request: Result<Json<Write>, JsonRejection>) -> Result<Json<Value>, HopxError> {
    let Json(Write { path: shown, content, mode, encoding, overwrite }) = request?;
    let path = resolve(&shown)?;
    let mode = mode.as_deref().map(parse_mode).transpose()?;
    let bytes = match encoding.as_deref() {
        None | Some("" | "utf-8" | "utf8" | "text") => content.into_bytes(),
        Some("base64") => {
            STANDARD.decode(content).map_err(|error| HopxError::invalid(format!("content is not base64: {error}")).at(shown.clone()))?
        }
        Some(other) => return Err(HopxError::invalid(format!("encoding is '{other}'; it must be utf-8 or base64")).at(shown)),
    };
    let (size, owner) = (bytes.len(), owner(&agent).await?);
    let work = {
        let shown = shown.clone();
        move || {
            if overwrite == Some(false) && path.exists() {
                return Err(HopxError::new(Code::FileAlreadyExists, format!("'{shown}' already exists")).at(shown));
            }
            store(&agent, &path, owner, &mut bytes.as_slice(), mode).map_err(|error| store_error(&error, &shown))
        }
    };
    blocking::run(work).await??;
    memory::release_later();
    let Json(mut answer) = done(&shown, "written");
    answer["size"] = json!(size);
    Ok(Json(answer))
}

/// Octal, with or without the leading zero.
fn parse_mode(text: &str) -> Result<u32, HopxError> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let mode = u32::from_str_radix(digits, 8).ok().filter(|mode| *mode <= 0o7777);
    mode.ok_or_else(|| HopxError::invalid(format!("mode is '{text}'; it must be octal, such as 0644")))
}

/// Makes the parents, writes, sets the mode: in the order that watchers are used to.
fn store(agent: &Agent, path: &Path, owner: Owner, source: &mut dyn Read, mode: Option<u32>) -> Result<(), StoreError> {
    if let Some(parent) = path.parent()
        && ops::ensure_dirs(parent, owner)? == Ensured::Made
    {
        agent.watchers.settle();
    }
    Target { path, owner, metadata: &Metadata::new() }.store(source)?;
    if let Some(mode) = mode {
        let set = fs::set_permissions(path, Permissions::from_mode(mode));
        set.map_err(|source| StoreError::Io { doing: "changing the mode of", path: path.to_owned(), source })?;
    }
    Ok(())
}

async fn list(State(agent): State<Arc<Agent>>, query: Result<Query<ByPath>, QueryRejection>) -> Result<Json<Value>, HopxError> {
    let (shown, path) = asked(query, Some(WORKSPACE))?;
    if path == Path::new(WORKSPACE) {
        run::ensure_workspace(&agent).await?;
    }
    let listed = blocking::run(move || ops::list_dir(&path, 1, &Names::read())).await?;
    let files: Vec<Value> = listed.map_err(|error| list_error(&error, &shown))?.into_iter().map(file).collect();
    memory::release_later();
    Ok(Json(json!({ "count": files.len(), "files": files, "path": shown })))
}

/// With the names of both clients.
fn file(entry: Entry) -> Value {
    let is_directory = entry.kind == Kind::Directory;
    let modified = u64::try_from(entry.modified.seconds).unwrap_or_default();
    let modified = rfc3339(UNIX_EPOCH + Duration::new(modified, u32::try_from(entry.modified.nanos).unwrap_or_default()));
    json!({
        "name": entry.name, "path": entry.path, "size": entry.size,
        "is_directory": is_directory, "is_dir": is_directory, "permissions": entry.permissions,
        "owner": entry.owner, "group": entry.group, "modified_time": modified, "modified": modified,
    })
}

async fn exists(query: Result<Query<ByPath>, QueryRejection>) -> Result<Json<Value>, HopxError> {
    let (shown, path) = asked(query, None)?;
    let found = blocking::run(move || fs::symlink_metadata(path)).await?;
    match found {
        Ok(_) => Ok(Json(json!({ "exists": true, "path": shown }))),
        Err(error) if is_missing(&error) => Ok(Json(json!({ "exists": false, "path": shown }))),
        Err(error) => Err(io_error(&error, &shown, "looking at")),
    }
}

/// A folder that is there already is a success.
async fn mkdir(State(agent): State<Arc<Agent>>, request: Result<Json<MakeDir>, JsonRejection>) -> Result<Json<Value>, HopxError> {
    let Json(MakeDir { path: shown }) = request?;
    let (path, owner) = (resolve(&shown)?, owner(&agent).await?);
    let made = blocking::run(move || {
        let made = ops::ensure_dirs(&path, owner);
        agent.watchers.settle();
        made
    });
    match made.await? {
        Ok(_) => Ok(done(&shown, "made")),
        Err(error) => Err(ensure_error(&error, &shown)),
    }
}

async fn remove(query: Result<Query<ByPath>, QueryRejection>) -> Result<Json<Value>, HopxError> {
    let (shown, path) = asked(query, None)?;
    if path.parent().is_none() {
        return Err(HopxError::new(Code::PermissionDenied, "the root folder cannot be removed").at(shown));
    }
    let removed = blocking::run(move || match fs::symlink_metadata(&path) {
        Ok(_) => ops::remove(&path).map_err(|error| error.source),
        Err(error) => Err(error),
    });
    removed.await?.map_err(|error| io_error(&error, &shown, "removing"))?;
    Ok(done(&shown, "removed"))
}

/// A form with a file and a path, in either order: JavaScript's client sends the path last.
async fn upload(
    State(agent): State<Arc<Agent>>,
    query: Result<Query<ByPath>, QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, HopxError> {
    let Query(query) = query?;
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let boundary = multipart::boundary(content_type)
        .ok_or_else(|| HopxError::invalid(format!("content type is '{content_type}'; it must be multipart/form-data with a boundary")))?;
    let owner = owner(&agent).await?;
    let work = move |body| Upload { agent: &agent, owner, path: query.path, spooled: None }.run(body, &boundary);
    let (path, size) = body::consume(body, work).await??;
    let Json(mut answer) = done(&path, "uploaded");
    answer["size"] = json!(size);
    Ok(Json(answer))
}

/// An upload under way, on a blocking thread.
struct Upload<'a> {
    agent: &'a Agent,
    owner: Owner,
    path: Option<String>,
    /// The file, while it is not known where it belongs.
    spooled: Option<File>,
}

impl Upload<'_> {
    fn run(mut self, body: impl Read, boundary: &str) -> Result<(String, u64), HopxError> {
        let malformed = |error: &dyn std::error::Error| HopxError::invalid(format!("the form is malformed: {}", describe(error)));
        let mut parts = Multipart::new(body, boundary).map_err(|error| malformed(&error))?;
        let mut stored = None;
        while let Some(part) = parts.next_part().map_err(|error| malformed(&error))? {
            match part.name.as_deref() {
                Some("path") => {
                    let mut path = String::new();
                    parts.by_ref().take(FIELD_BYTES_MAX).read_to_string(&mut path).map_err(|error| malformed(&error))?;
                    self.path = Some(path);
                }
                Some("file") => stored = self.file(&mut parts)?.or(stored),
                _ => {}
            }
        }
        let path = self.path.clone().ok_or_else(|| HopxError::invalid("the form has no field path"))?;
        match (stored, self.spooled.take()) {
            (Some(size), _) => Ok((path, size)),
            (None, Some(mut file)) => {
                let size = file.rewind().and_then(|()| self.store(&path, &mut file)).map_err(|error| io_error(&error, &path, "storing"))?;
                Ok((path, size?))
            }
            (None, None) => Err(HopxError::invalid("the form has no field file")),
        }
    }

    /// Into its place if that is known, else aside.
    fn file(&mut self, content: &mut dyn Read) -> Result<Option<u64>, HopxError> {
        if let Some(path) = self.path.clone() {
            return self.store(&path, content).map_err(|error| io_error(&error, &path, "storing"))?.map(Some);
        }
        let spooled = spool(content).map_err(|error| io_error(&error, "/tmp", "keeping the upload in"))?;
        self.spooled = Some(spooled);
        Ok(None)
    }

    fn store(&self, shown: &str, content: &mut dyn Read) -> io::Result<Result<u64, HopxError>> {
        let path = match resolve(shown) {
            Ok(path) => path,
            Err(error) => return Ok(Err(error)),
        };
        let stored = store(self.agent, &path, self.owner, content, None).map_err(|error| store_error(&error, shown));
        match stored {
            Ok(()) => Ok(Ok(fs::metadata(&path)?.len())),
            Err(error) => Ok(Err(error)),
        }
    }
}

/// A file without a name, which goes when it is closed.
fn spool(content: &mut dyn Read) -> io::Result<File> {
    let aside = Aside::of(Path::new("/tmp/upload"))?;
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&aside.path)?;
    drop(aside);
    io::copy(content, &mut file)?;
    Ok(file)
}

fn io_error(error: &io::Error, shown: &str, doing: &str) -> HopxError {
    let code = match error.kind() {
        _ if is_missing(error) => return HopxError::new(Code::FileNotFound, format!("'{shown}' not found")).at(shown),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Code::PermissionDenied,
        io::ErrorKind::InvalidFilename | io::ErrorKind::InvalidInput => Code::InvalidPath,
        _ if is_full(error) => Code::NoSpace,
        _ => Code::Internal,
    };
    HopxError::new(code, format!("error {doing} '{shown}': {error}")).at(shown)
}

fn download_error(error: &DownloadError, shown: &str) -> HopxError {
    match error {
        DownloadError::NotFound { .. } => HopxError::new(Code::FileNotFound, format!("'{shown}' not found")).at(shown),
        DownloadError::Directory { .. } => HopxError::new(Code::InvalidPath, format!("'{shown}' is a directory")).at(shown),
        DownloadError::NotAcceptable(_) | DownloadError::IdentityNotAcceptable => HopxError::invalid(describe(error)).at(shown),
        DownloadError::Io { source, .. } => io_error(source, shown, "opening"),
    }
}

fn ensure_error(error: &EnsureError, shown: &str) -> HopxError {
    match error {
        EnsureError::File { .. } => HopxError::new(Code::FileAlreadyExists, describe(error)).at(shown),
        EnsureError::Io { source, .. } => io_error(source, shown, "making"),
    }
}

fn store_error(error: &StoreError, shown: &str) -> HopxError {
    let code = match error {
        StoreError::Directory { .. } => Code::InvalidPath,
        StoreError::Parents(error) => return ensure_error(error, shown),
        StoreError::NoInodes { .. } | StoreError::NoSpace { .. } | StoreError::NoMetadataSpace { .. } => Code::NoSpace,
        StoreError::Source { .. } => Code::InvalidRequest,
        StoreError::Io { source, doing, .. } => return io_error(source, shown, doing),
    };
    HopxError::new(code, describe(error)).at(shown)
}

fn list_error(error: &ListError, shown: &str) -> HopxError {
    let code = match error {
        ListError::NotFound { .. } => return HopxError::new(Code::FileNotFound, format!("'{shown}' not found")).at(shown),
        ListError::NotDirectory { .. } | ListError::LinkLoop { .. } => Code::InvalidPath,
        ListError::TooMany { .. } => Code::InvalidRequest,
        ListError::Io { source, .. } => return io_error(source, shown, "listing"),
    };
    HopxError::new(code, describe(error)).at(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_below_the_workspace_unless_they_are_absolute() {
        assert_eq!(resolve("a/b").unwrap(), PathBuf::from("/workspace/a/b"));
        assert_eq!(resolve("/etc/hosts").unwrap(), PathBuf::from("/etc/hosts"));
        assert!(resolve("").is_err() && resolve("a\0b").is_err());
    }

    #[test]
    fn modes_are_octal() {
        assert_eq!((parse_mode("0644").unwrap(), parse_mode("755").unwrap(), parse_mode("0o600").unwrap()), (0o644, 0o755, 0o600));
        for bad in ["", "rw-r--r--", "99", "77777"] {
            assert!(parse_mode(bad).is_err(), "{bad}");
        }
    }
}
