//! Builds in the background: a few at once, the others wait; each can be stopped; none outlives its server.

use super::log::BuildLog;
use super::uploads::Uploads;
use super::{BuildConfig, Builds, Inner, Means, Plan, Stop, driver};
use crate::model::{BuildFailure, BuildId, BuildRecord, BuildState, LogLevel, Resources, TemplateId};
use crate::sandbox::{InstallKey, Registry};
use crate::store::{Store, StoreError, builds, templates as rows};
use crate::template::{ResolveError, TemplateConfig, Templates};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use time::OffsetDateTime;
use tokio::sync::{Semaphore, watch};

/// How long a registered build may be started, across restarts of the server.
const NEVER_STARTED: Duration = Duration::from_secs(24 * 3600);

/// Why a build was not begun.
#[derive(Debug, thiserror::Error)]
pub enum StartBuildError {
    /// No such build, or the store failed.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// It was started before.
    #[error("build {0} was started already; request a new build")]
    Started(BuildId),
    /// Too many wait.
    #[error("no more than {limit} builds may wait; try again when some are done, or raise build.waiting_max")]
    TooMany {
        /// The bound.
        limit: u32,
    },
}

impl From<StoreError> for StartBuildError {
    fn from(error: StoreError) -> Self {
        Self::Resolve(error.into())
    }
}

/// What builds are made with.
#[derive(Debug)]
pub struct BuildsMeans {
    /// Bounds.
    pub config: BuildConfig,
    /// Where layers are.
    pub templates_config: TemplateConfig,
    /// Names.
    pub templates: Templates,
    /// Rows and logs.
    pub store: Store,
    /// Sandboxes.
    pub registry: Registry,
    /// Signs links for uploads.
    pub key: InstallKey,
    /// Of builds that ask for nothing else.
    pub resources: Resources,
}

impl Builds {
    /// Ends what an earlier server left under way, forgets what is too old.
    pub async fn open(means: BuildsMeans) -> Result<Self, StoreError> {
        let BuildsMeans { config, templates_config, templates, store, registry, key, resources } = means;
        let uploads = Uploads::of(&templates_config.data_dir, config.upload_bytes_max, templates_config.limits.free_min);
        let means = Means { config: Arc::new(templates_config), store, registry, templates, uploads, step_time_max: config.step_time_max };
        let places = Semaphore::new(usize::try_from(config.at_once).unwrap_or(usize::MAX));
        let inner = Inner { means, config, key, resources, places, running: Default::default(), tasks: Default::default() };
        let builds = Self { inner: Arc::new(inner) };
        builds.end_left_over().await?;
        builds.forget_old().await?;
        Ok(builds)
    }

    async fn end_left_over(&self) -> Result<(), StoreError> {
        for build in self.inner.means.store.read(builds::under_way).await? {
            let failure = Stop::ServerEnds.failure();
            BuildLog::of(&self.inner.means.store, build).say(LogLevel::Error, format!("Build failed: {}", failure.message));
            self.inner.fail(build, failure).await?;
        }
        let limit = OffsetDateTime::now_utc() - NEVER_STARTED;
        for build in self.inner.means.store.read(move |db| builds::waiting_since(db, limit)).await? {
            let message = format!("build was not started within {NEVER_STARTED:?} of its registration");
            self.inner.fail(build, BuildFailure { message, step: None }).await?;
        }
        Ok(())
    }

    async fn forget_old(&self) -> Result<(), StoreError> {
        let means = &self.inner.means;
        let limit = OffsetDateTime::now_utc() - self.inner.config.cache_kept;
        means.store.write(move |db| builds::forget_steps_before(db, limit)).await?;
        for template in means.uploads.templates().await.unwrap_or_default() {
            if means.store.read(move |db| rows::by_id(db, template)).await?.is_none() {
                self.forget_uploads(template).await;
            }
        }
        Ok(())
    }

    async fn forget_uploads(&self, template: TemplateId) {
        if let Err(error) = self.inner.means.uploads.forget(template).await {
            tracing::warn!(%template, %error, "Could not remove the uploads of a template that is gone; the next start tries again");
        }
    }

    /// Begins a registered build. It goes on in the background, whoever leaves.
    pub async fn start(&self, template: TemplateId, build: BuildId, plan: Plan) -> Result<(), StartBuildError> {
        let record = self.status(template, build).await?.build;
        let stopped = self.enter(build)?;
        let begun = self.inner.means.store.write(move |db| builds::change_state(db, build, BuildState::Waiting, BuildState::Building));
        match begun.await {
            Ok(true) => {}
            Ok(false) => {
                self.inner.leave(build);
                return Err(StartBuildError::Started(build));
            }
            Err(error) => {
                self.inner.leave(build);
                return Err(error.into());
            }
        }
        let inner = Arc::clone(&self.inner);
        let mut tasks = self.inner.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move { inner.work(BuildRecord { state: BuildState::Building, ..record }, plan, stopped).await });
        Ok(())
    }

    /// A place among those that wait or work.
    fn enter(&self, build: BuildId) -> Result<watch::Receiver<Option<Stop>>, StartBuildError> {
        let mut running = self.inner.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.contains_key(&build) {
            return Err(StartBuildError::Started(build));
        }
        let limit = self.inner.config.waiting_max.saturating_add(self.inner.config.at_once);
        if running.len() >= usize::try_from(limit).unwrap_or(usize::MAX) {
            return Err(StartBuildError::TooMany { limit: self.inner.config.waiting_max });
        }
        let (stop, stopped) = watch::channel(None);
        running.insert(build, stop);
        Ok(stopped)
    }

    /// Stops a build; `false` when it is not under way. Its row says so soon afterwards.
    pub fn cancel(&self, build: BuildId) -> bool {
        self.inner.stop(build, Stop::Cancelled)
    }

    /// After a template is gone: its builds stop, its uploads and logs go.
    pub async fn forget(&self, template: TemplateId, builds: &[BuildRecord]) {
        for build in builds {
            self.cancel(build.id);
        }
        self.inner.means.store.forget_history(builds.iter().map(|build| build.id.to_string()).collect());
        self.forget_uploads(template).await;
    }

    /// Stops all builds and waits for them: each says in its row that the server ended.
    pub async fn close(&self) {
        let running: Vec<BuildId> = self.inner.running.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect();
        for build in running {
            self.inner.stop(build, Stop::ServerEnds);
        }
        let mut tasks = std::mem::take(&mut *self.inner.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        while tasks.join_next().await.is_some() {}
    }
}

impl Stop {
    fn failure(self) -> BuildFailure {
        let message = match self {
            Self::Cancelled => "build was cancelled",
            Self::ServerEnds => "the server ended while the build was under way; build again, what its steps made is kept",
        };
        BuildFailure { message: message.to_owned(), step: None }
    }
}

impl Inner {
    fn stop(&self, build: BuildId, why: Stop) -> bool {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.get(&build).is_some_and(|stop| stop.send(Some(why)).is_ok())
    }

    fn leave(&self, build: BuildId) {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&build);
    }

    async fn work(&self, build: BuildRecord, plan: Plan, mut stopped: watch::Receiver<Option<Stop>>) {
        let (id, template) = (build.id, build.template);
        let log = BuildLog::of(&self.means.store, id);
        let stop = async {
            let why = stopped.wait_for(Option::is_some).await.ok().and_then(|why| *why);
            why.unwrap_or(Stop::ServerEnds)
        };
        let outcome = tokio::select! {
            biased;
            // Cancel-safe: the row says what became of it, whatever it was doing.
            why = stop => Err(why.failure()),
            outcome = self.wait_and_run(&log, build, plan) => outcome,
        };
        if let Err(failure) = outcome {
            tracing::info!(build = %id, %template, step = failure.step, "Build {id} of template {template} failed: {}", failure.message);
            let message = format!("Build failed: {}", failure.message);
            match &failure.step {
                Some(step) => log.say_of(step, LogLevel::Error, message),
                None => log.say(LogLevel::Error, message),
            }
            if let Err(error) = self.fail(id, failure).await {
                tracing::error!(build = %id, error = &error as &dyn std::error::Error, "Could not record that build {id} failed");
            }
        }
        self.leave(id);
    }

    async fn wait_and_run(&self, log: &BuildLog, build: BuildRecord, plan: Plan) -> Result<(), BuildFailure> {
        if self.places.available_permits() == 0 {
            log.say(
                LogLevel::Info,
                format!("Waiting for others: builds that work at once are limited to {} (build.at_once)", self.config.at_once),
            );
        }
        let closed = |_| Stop::ServerEnds.failure();
        let _place = self.places.acquire().await.map_err(closed)?;
        driver::run(&self.means, log, build, plan).await
    }

    async fn fail(&self, build: BuildId, failure: BuildFailure) -> Result<(), StoreError> {
        let now = OffsetDateTime::now_utc();
        self.means.store.write(move |db| builds::fail(db, build, &failure, now)).await
    }
}
