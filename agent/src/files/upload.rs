//! POST /files: one or many files out of one body, streamed to the disk as it comes in.

use std::collections::HashSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use axum::http::StatusCode;
use flate2::read::MultiGzDecoder;
use serde::Serialize;

use super::encoding::Coding;
use super::multipart::{Multipart, MultipartError};
use super::store::{StoreError, Target};
use super::{describe, io_status};
use crate::error::HttpError;
use crate::filesystem::entry::base_name;
use crate::filesystem::metadata::{self, Metadata};
use crate::filesystem::ops::{self, EnsureError, Ensured, Owner};
use crate::paths::{self, PathError};
use crate::users::User;

/// How the body carries its files.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The body is the file.
    Raw,
    Multipart {
        boundary: String,
    },
}

/// Everything about an upload but its body.
#[derive(Debug)]
pub(crate) struct Upload {
    pub(crate) user: User,
    pub(crate) default_workdir: String,
    /// The `path` of the query; without it each part's file name counts.
    pub(crate) path: Option<String>,
    pub(crate) kind: Kind,
    pub(crate) coding: Coding,
    pub(crate) metadata: Metadata,
    /// Content-Length, for the message about a full disk.
    pub(crate) declared_bytes: Option<u64>,
}

/// One file in the answer. Clients compare it whole: no further fields.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Written {
    pub(crate) name: String,
    pub(crate) path: String,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Metadata::is_empty")]
    metadata: Metadata,
}

impl Written {
    /// Metadata is read back: a file system that keeps none shows in the answer.
    pub(crate) fn read(path: &Path) -> Written {
        let shown = path.to_string_lossy().into_owned();
        Written { name: base_name(path), path: shown, kind: "file", metadata: metadata::read(path) }
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum UploadError {
    #[error("path query parameter is required for raw body upload")]
    NoPath,
    #[error("error getting multipart custom part file name: filename not found in Content-Disposition header")]
    NoFilename,
    #[error("error resolving path")]
    Path(#[from] PathError),
    #[error(
        "you cannot upload multiple files to the same path '{}' in one upload request, \
         only the first specified file was uploaded",
        path.display()
    )]
    Duplicate { path: PathBuf },
    #[error(transparent)]
    Multipart(#[from] MultipartError),
    #[error("attempted to write {bytes} bytes")]
    NoSpace {
        bytes: u64,
        #[source]
        source: StoreError,
    },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A failed upload with the files that were whole before it failed: they stay.
#[derive(Debug)]
pub(crate) struct Failure {
    error: UploadError,
    written: Vec<Written>,
}

impl Upload {
    /// Stores everything in `body`. `made_directories` is called after directories were made and before a file
    /// is made in them, so that recursive watchers see it.
    pub(crate) fn run(&self, body: impl Read, made_directories: &dyn Fn()) -> Result<Vec<Written>, Failure> {
        let mut run = Run { upload: self, made_directories, paths: HashSet::new(), written: Vec::new() };
        let result = match self.coding {
            Coding::Identity => run.all(body),
            Coding::Gzip => run.all(MultiGzDecoder::new(body)),
        };
        match result {
            Ok(()) => Ok(run.written),
            Err(error) => Err(Failure { error, written: run.written }),
        }
    }
}

/// An upload under way.
struct Run<'a> {
    upload: &'a Upload,
    made_directories: &'a dyn Fn(),
    paths: HashSet<PathBuf>,
    written: Vec<Written>,
}

impl Run<'_> {
    fn all(&mut self, mut body: impl Read) -> Result<(), UploadError> {
        match &self.upload.kind {
            Kind::Raw => {
                let path = self.upload.path.as_deref().ok_or(UploadError::NoPath)?;
                self.one(path, &mut body)
            }
            Kind::Multipart { boundary } => self.parts(body, boundary),
        }
    }

    fn parts(&mut self, body: impl Read, boundary: &str) -> Result<(), UploadError> {
        let mut parts = Multipart::new(body, boundary)?;
        while let Some(part) = parts.next_part()? {
            // Other fields of a form mean nothing here.
            if part.name.as_deref() == Some("file") {
                let path = self.upload.path.as_ref().or(part.filename.as_ref());
                self.one(path.ok_or(UploadError::NoFilename)?, &mut parts)?;
            }
        }
        Ok(())
    }

    fn one(&mut self, path: &str, content: &mut dyn Read) -> Result<(), UploadError> {
        let Upload { user, default_workdir, metadata, .. } = self.upload;
        let path = paths::resolve(path, user, default_workdir)?;
        if !self.paths.insert(path.clone()) {
            return Err(UploadError::Duplicate { path });
        }
        let owner = Owner { uid: user.uid, gid: user.gid };
        if let Some(parent) = path.parent()
            && ops::ensure_dirs(parent, owner).map_err(StoreError::from)? == Ensured::Made
        {
            (self.made_directories)();
        }
        let stored = Target { path: &path, owner, metadata }.store(content);
        stored.map_err(|error| self.with_declared_size(error))?;
        self.written.push(Written::read(&path));
        Ok(())
    }

    fn with_declared_size(&self, error: StoreError) -> UploadError {
        match (self.upload.declared_bytes, error) {
            (Some(bytes), source @ StoreError::NoSpace { .. }) => UploadError::NoSpace { bytes, source },
            (_, error) => UploadError::Store(error),
        }
    }
}

impl From<Failure> for HttpError {
    fn from(Failure { error, written }: Failure) -> HttpError {
        let mut message = describe(&error);
        if !written.is_empty() {
            let paths: Vec<&str> = written.iter().map(|written| written.path.as_str()).collect();
            message = format!("{message}; these files were uploaded: {}", paths.join(", "));
        }
        HttpError::new(error.status(), message)
    }
}

impl UploadError {
    fn status(&self) -> StatusCode {
        match self {
            UploadError::NoPath | UploadError::NoFilename | UploadError::Path(_) | UploadError::Duplicate { .. } => StatusCode::BAD_REQUEST,
            UploadError::Multipart(MultipartError::Io(source)) => source_status(source),
            UploadError::Multipart(_) => StatusCode::BAD_REQUEST,
            UploadError::NoSpace { .. } => StatusCode::INSUFFICIENT_STORAGE,
            UploadError::Store(error) => store_status(error),
        }
    }
}

fn store_status(error: &StoreError) -> StatusCode {
    match error {
        StoreError::Directory { .. } | StoreError::Parents(EnsureError::File { .. }) => StatusCode::BAD_REQUEST,
        StoreError::NoInodes { .. } | StoreError::NoSpace { .. } | StoreError::NoMetadataSpace { .. } => StatusCode::INSUFFICIENT_STORAGE,
        StoreError::Source { source, .. } => source_status(source),
        StoreError::Parents(EnsureError::Io { source, .. }) | StoreError::Io { source, .. } => io_status(source),
    }
}

/// The body itself was the problem: too slow, or not what it claims to be.
fn source_status(source: &std::io::Error) -> StatusCode {
    match source.kind() {
        std::io::ErrorKind::TimedOut => StatusCode::REQUEST_TIMEOUT,
        _ => StatusCode::BAD_REQUEST,
    }
}
