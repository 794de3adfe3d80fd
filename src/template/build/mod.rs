//! Builds of templates by their users: registered, ordered, done in the background, watched (contract/e2b.md 5).
//!
//! ```text
//! register ──> waiting ──start──> building ──┬──> ready   (its tags lead to it from then on)
//!                                            └──> error   (failed, cancelled, or the server ended)
//! ```
//! Intent first: the row is `building` before anything is done. A build is never taken up again by the next server: its
//! plan may hold secrets and is not stored; the next server finds the row and says what happened. What the steps made
//! until then is in the cache.

mod copier;
mod driver;
mod expand;
mod harvest;
mod log;
mod merge;
mod plan;
mod queue;
mod register;
mod state;
mod uploads;
mod view;

pub use plan::{Base, Cache, Plan, Step};
pub use queue::{BuildsMeans, StartBuildError};
pub use register::{NewBuild, RegisterError, Registered};
pub use uploads::{Upload, UploadError};

use super::ResolveError;
use crate::model::{BuildFailure, BuildId, BuildRecord, ByteSize, LogEntry, LogLevel, TemplateId};
use crate::sandbox::LogQuery;
use crate::store::{builds, templates};
use driver::Means;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};

/// Bounds of builds. Each has a key in config/stillbox.toml.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuildConfig {
    /// Builds that work at once; more wait.
    pub at_once: u32,
    /// Builds that may wait.
    pub waiting_max: u32,
    /// How long one step may take.
    pub step_time_max: Duration,
    /// One archive of a COPY step.
    pub upload_bytes_max: ByteSize,
    /// How long what a step made is kept for builds to come, after the last that used it.
    pub cache_kept: Duration,
}

impl Default for BuildConfig {
    fn default() -> Self {
        Self {
            at_once: 2,
            waiting_max: 64,
            step_time_max: Duration::from_secs(3600),
            upload_bytes_max: ByteSize::gib(4),
            cache_kept: Duration::from_secs(30 * 24 * 3600),
        }
    }
}

/// All builds of this data folder. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Builds {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    means: Means,
    config: BuildConfig,
    key: crate::sandbox::InstallKey,
    resources: crate::model::Resources,
    places: Semaphore,
    /// Builds that wait or work; `true` is sent to stop one.
    running: Mutex<HashMap<BuildId, watch::Sender<Option<Stop>>>>,
    tasks: Mutex<tokio::task::JoinSet<()>>,
}

/// Why a build is to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    Cancelled,
    ServerEnds,
}

/// How far a build is.
#[derive(Debug, Clone, PartialEq)]
pub struct BuildStatus {
    /// Its row.
    pub build: BuildRecord,
    /// Why it failed.
    pub failure: Option<BuildFailure>,
}

/// Lines of a build's log that are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogPage {
    /// This level or louder.
    pub level: LogLevel,
    /// Lines to leave out at the beginning.
    pub offset: u64,
    /// At most this many.
    pub limit: u32,
}

impl Builds {
    /// How far a build of this template is.
    pub async fn status(&self, template: TemplateId, build: BuildId) -> Result<BuildStatus, ResolveError> {
        let found = self.inner.means.store.read(move |db| Ok((templates::build(db, build)?, builds::failure_of(db, build)?))).await?;
        match found {
            (Some(record), failure) if record.template == template => Ok(BuildStatus { build: record, failure }),
            _ => Err(ResolveError::UnknownBuild { template: template.to_string(), build }),
        }
    }

    /// A page of its log, oldest first. To be asked for after the status, so that no line is missed at the end.
    pub async fn log(&self, build: BuildId, page: LogPage) -> Result<Vec<LogEntry>, ResolveError> {
        Ok(self.inner.means.store.log_page(build.to_string(), page.level, page.offset, page.limit).await?)
    }

    /// Lines of its log from a moment on, or back from it.
    pub async fn log_from(&self, build: BuildId, query: LogQuery) -> Result<Vec<LogEntry>, ResolveError> {
        Ok(self.inner.means.store.logs(build.to_string(), query.range()).await?)
    }

    /// The part of the build that a log line is of.
    pub fn step_of(entry: &LogEntry) -> Option<&str> {
        entry.fields.get(log::STEP).map(String::as_str)
    }

    /// Whether the archive with this hash is there.
    pub fn has_files(&self, template: TemplateId, hash: &str) -> Result<bool, UploadError> {
        Ok(self.inner.means.uploads.place(template, hash)?.is_file())
    }

    /// Gives a template the archive that was uploaded for another; without it there, nothing happens.
    pub async fn share_files(&self, from: TemplateId, to: TemplateId, hash: &str) -> Result<(), UploadError> {
        self.inner.means.uploads.share(from, to, hash).await
    }

    /// Begins to take an archive.
    pub async fn upload(&self, template: TemplateId, hash: &str) -> Result<Upload, UploadError> {
        self.inner.means.uploads.begin(template, hash).await
    }

    /// What allows its bearer to upload this archive until then (seconds since 1970), and nothing else.
    pub fn sign_upload(&self, template: TemplateId, hash: &str, expires: i64) -> String {
        self.inner.key.sign(UPLOAD, &upload_text(template, hash, expires))
    }

    /// Whether `signature` is that.
    pub fn may_upload(&self, template: TemplateId, hash: &str, expires: i64, signature: &str) -> bool {
        self.inner.key.is_signed(UPLOAD, &upload_text(template, hash, expires), signature)
    }
}

const UPLOAD: &str = "template-upload";

fn upload_text(template: TemplateId, hash: &str, expires: i64) -> String {
    format!("{template}/{hash}/{expires}")
}
