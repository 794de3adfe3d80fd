//! POST /files/compose: many files become one, and go. Clients upload large files in pieces and join them here.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use axum::http::StatusCode;
use serde::Deserialize;

use super::store::is_full;
use super::upload::Written;
use super::{describe, io_status};
use crate::error::HttpError;
use crate::filesystem::aside::Aside;
use crate::filesystem::ops::{self, EnsureError, Ensured, Owner};
use crate::paths::{self, PathError};
use crate::users::User;

#[derive(Debug, Deserialize)]
pub(crate) struct Request {
    #[serde(default)]
    source_paths: Vec<String>,
    #[serde(default)]
    destination: String,
    pub(crate) username: Option<String>,
}

/// The request with its paths resolved.
#[derive(Debug)]
pub(crate) struct Compose {
    sources: Vec<PathBuf>,
    destination: PathBuf,
    owner: Owner,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ComposeError {
    #[error("source_paths must not be empty")]
    NoSources,
    #[error("destination is required")]
    NoDestination,
    #[error("error resolving path")]
    Path(#[from] PathError),
    #[error("source path {path:?} cannot be the same as destination")]
    SourceIsDestination { path: String },
    #[error("source file not found: {}", path.display())]
    SourceNotFound { path: PathBuf },
    #[error("source path is not a regular file: {}", path.display())]
    SourceNotFile { path: PathBuf },
    #[error("destination path is a directory: {}", path.display())]
    DestinationDirectory { path: PathBuf },
    #[error("error ensuring directories")]
    Parents(#[from] EnsureError),
    #[error("not enough disk space available")]
    NoSpace,
    #[error("error {doing} {}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Compose {
    pub(crate) fn resolve(request: &Request, user: &User, default_workdir: &str) -> Result<Compose, ComposeError> {
        if request.source_paths.is_empty() {
            return Err(ComposeError::NoSources);
        }
        if request.destination.is_empty() {
            return Err(ComposeError::NoDestination);
        }
        let destination = paths::resolve(&request.destination, user, default_workdir)?;
        let resolve_source = |path: &String| match paths::resolve(path, user, default_workdir)? {
            source if source == destination => Err(ComposeError::SourceIsDestination { path: path.clone() }),
            source => Ok(source),
        };
        let sources = request.source_paths.iter().map(resolve_source).collect::<Result<_, _>>()?;
        Ok(Compose { sources, destination, owner: Owner { uid: user.uid, gid: user.gid } })
    }

    /// Until all sources are joined the destination is as it was; only then the sources go.
    pub(crate) fn run(&self, made_directories: &dyn Fn()) -> Result<Written, ComposeError> {
        for path in &self.sources {
            match fs::metadata(path) {
                Ok(found) if found.is_file() => {}
                Ok(_) => return Err(ComposeError::SourceNotFile { path: path.clone() }),
                Err(_) => return Err(ComposeError::SourceNotFound { path: path.clone() }),
            }
        }
        if self.destination.is_dir() {
            return Err(ComposeError::DestinationDirectory { path: self.destination.clone() });
        }
        if let Some(parent) = self.destination.parent()
            && ops::ensure_dirs(parent, self.owner)? == Ensured::Made
        {
            made_directories();
        }
        let whole = Aside::of(&self.destination).map_err(failed("naming", &self.destination))?;
        self.join(&whole.path)?;
        whole.place(&self.destination).map_err(failed("renaming the whole to", &self.destination))?;
        for path in &self.sources {
            // The whole is in place; a source that stays is no reason to call that a failure.
            drop(fs::remove_file(path));
        }
        Ok(Written::read(&self.destination))
    }

    fn join(&self, whole: &Path) -> Result<(), ComposeError> {
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o644).open(whole).map_err(failed("creating", &self.destination))?;
        fchown(&file, Some(self.owner.uid), Some(self.owner.gid)).map_err(failed("changing the owner of", &self.destination))?;
        for path in &self.sources {
            // copy_file_range: the bytes stay in the kernel, and on some file systems on their blocks.
            File::open(path).and_then(|mut source| io::copy(&mut source, &mut file)).map_err(failed("composing source", path))?;
        }
        Ok(())
    }
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ComposeError {
    let path = path.to_owned();
    move |source| match is_full(&source) {
        true => ComposeError::NoSpace,
        false => ComposeError::Io { doing, path, source },
    }
}

impl From<ComposeError> for HttpError {
    fn from(error: ComposeError) -> HttpError {
        let status = match &error {
            ComposeError::NoSources
            | ComposeError::NoDestination
            | ComposeError::Path(_)
            | ComposeError::SourceIsDestination { .. }
            | ComposeError::SourceNotFile { .. }
            | ComposeError::DestinationDirectory { .. }
            | ComposeError::Parents(EnsureError::File { .. }) => StatusCode::BAD_REQUEST,
            ComposeError::SourceNotFound { .. } => StatusCode::NOT_FOUND,
            ComposeError::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            ComposeError::Parents(EnsureError::Io { source, .. }) | ComposeError::Io { source, .. } => io_status(source),
        };
        HttpError::new(status, describe(&error))
    }
}
