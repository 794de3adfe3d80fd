//! create: a row, a place, processes, an agent that knows whose it is.
//!
//! `Reserved` (place taken, row `creating`) -> [`Prepared`] -> `Started` -> `Ready` -> row `running`. Any failure
//! destroys what was made and leaves a row `failed` with the reason.

use super::commands;
use super::config::CreateBy;
use super::core::Core;
use super::driver::Driver;
use super::error::{StoreFailure, chain};
use super::places::{Full, Place};
use super::ready_state;
use super::start::{Origin, Prepared, Ready, StartError, random_boot_id, random_secret, usable_dump};
use super::tokens::TokenKind;
use super::turns::Turns;
use crate::model::{
    BuildRecord, BuildSource, BuildState, EndReason, LogLevel, MountPath, SandboxId, SandboxRecord, SandboxSpec, SandboxState, Secure,
    SnapshotRecord, TemplateId, VolumeName,
};
use crate::runtime::{DiskSource, Exhausted, RuntimeError};
use crate::store::{Db, StoreError, idempotency, sandboxes, snapshots, templates, volumes};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use tokio::sync::oneshot;

/// Why no sandbox was created. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// All places are taken.
    #[error(transparent)]
    TooMany(#[from] Full),
    /// The server is stopping.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// It was killed before it was ready.
    #[error("sandbox {0} was killed while it was being created")]
    Killed(SandboxId),
    /// The same idempotency key came with another request.
    #[error("idempotency key '{key}' was used for a different request; use a new key")]
    IdempotencyConflict {
        /// The key.
        key: String,
    },
    /// The build it names cannot be used.
    #[error("build {build} of template {template} is {state}; only a ready build can be started")]
    NotReady {
        /// The template.
        template: TemplateId,
        /// The build.
        build: crate::model::BuildId,
        /// Its state.
        state: &'static str,
    },
    /// A volume that it is to mount was removed meanwhile.
    #[error("invalid mounts: volume '{0}' does not exist any more")]
    NoVolume(VolumeName),
    /// The snapshot that it is made from brings a volume of its own to this path.
    #[error("invalid mounts: '{path}' is taken by volume '{taken_by}', which the snapshot has mounted there")]
    MountTaken {
        /// The path.
        path: MountPath,
        /// Whose it is.
        taken_by: VolumeName,
    },
    /// Something else than a folder is where a volume was to be mounted.
    #[error("invalid mounts: no volume can be mounted at '{path}': {wrong}")]
    BadMountPath {
        /// The path.
        path: MountPath,
        /// What is in the way.
        wrong: String,
    },
    /// The memory that it is made from has a file open on a volume that is not there as it was.
    #[error("'{path}' is open on a volume in the memory that the sandbox is made from, and cannot be opened any more: {why}; put it back")]
    VolumeFile {
        /// Where the file was, inside.
        path: String,
        /// The kernel's reason.
        why: String,
    },
    /// The machine has no room for it.
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    /// The kernel side failed.
    #[error("sandbox {id} could not be started")]
    Start {
        /// The id it would have had; names its log lines.
        id: SandboxId,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
}

/// What became of an attempt to write the first row.
enum Reserved {
    New,
    /// An earlier request with the same key made this one.
    Replay(SandboxId),
    /// The key was used for something else.
    Conflict,
    NoVolume(VolumeName),
}

/// An idempotency key, and what was asked for with it.
#[derive(Debug, Clone)]
struct Keyed {
    key: String,
    request_hash: String,
}

/// A sandbox from a build. Goes on when the caller vanishes.
pub(super) async fn create(core: &Arc<Core>, spec: SandboxSpec, key: Option<String>) -> Result<SandboxRecord, CreateError> {
    let under_way = core.create_under_way().await;
    if core.is_closing() {
        return Err(CreateError::ShuttingDown);
    }
    let (reply, answer) = oneshot::channel();
    let task_core = Arc::clone(core);
    core.spawn(async move {
        let _until_answered = under_way;
        let result = create_to_end(&task_core, spec, key).await;
        let _caller_may_be_gone = reply.send(result);
    });
    answer.await.unwrap_or(Err(CreateError::ShuttingDown))
}

async fn create_to_end(core: &Arc<Core>, spec: SandboxSpec, key: Option<String>) -> Result<SandboxRecord, CreateError> {
    let keyed = key.map(|key| Keyed { key, request_hash: request_hash(&spec) });
    if let Some(keyed) = &keyed
        && let Some(earlier) = replay(core, keyed).await?
    {
        return earlier_one(core, earlier).await;
    }
    let build = ready_build(core, &spec).await?;
    let spec = with_volumes_of(core, spec, &build).await?;
    let place = core.places.take(spec.resources)?;
    let driver = Driver::of_new(core, new_record(core, spec, 1));
    let reserved = reserve(core, &driver.record, keyed.clone()).await;
    match reserved {
        Ok(Reserved::New) => return run_to_ready(driver, Origin::Build(Box::new(build)), place).await,
        Ok(_) | Err(_) => driver.discard(),
    }
    drop(place);
    match reserved? {
        Reserved::Replay(earlier) => earlier_one(core, earlier).await,
        Reserved::NoVolume(name) => Err(CreateError::NoVolume(name)),
        Reserved::New | Reserved::Conflict => {
            Err(CreateError::IdempotencyConflict { key: keyed.map(|keyed| keyed.key).unwrap_or_default() })
        }
    }
}

/// A sandbox as a copy of another; `source` is held until it runs.
pub(super) async fn create_copy(
    core: &Arc<Core>,
    spec: SandboxSpec,
    source: Arc<super::copy::CopySource>,
) -> Result<SandboxRecord, CreateError> {
    if core.is_closing() {
        return Err(CreateError::ShuttingDown);
    }
    let place = core.places.take(spec.resources)?;
    let mut record = new_record(core, spec, source.generation + 1);
    record.boot_id.clone_from(&source.boot_id);
    let driver = Driver::of_new(core, record);
    let refused = match reserve(core, &driver.record, None).await {
        Ok(Reserved::NoVolume(name)) => Some(CreateError::NoVolume(name)),
        Ok(Reserved::New | Reserved::Replay(_) | Reserved::Conflict) => None,
        Err(error) => Some(error.into()),
    };
    if let Some(error) = refused {
        driver.discard();
        return Err(error);
    }
    run_to_ready(driver, Origin::Copy(source), place).await
}

async fn run_to_ready(driver: Driver, origin: Origin, place: Place) -> Result<SandboxRecord, CreateError> {
    let (id, (reply, answer)) = (driver.id, oneshot::channel());
    driver.spawn(origin, place, reply);
    answer.await.unwrap_or(Err(CreateError::Killed(id)))
}

fn new_record(core: &Core, spec: SandboxSpec, generation: u64) -> SandboxRecord {
    let now = core.clock.now();
    SandboxRecord {
        id: SandboxId::random(),
        state: SandboxState::Creating,
        created_at: now,
        started_at: now,
        end_at: spec.lifecycle.end_of_run(now, spec.lifecycle.timeout),
        spec,
        kernel: None,
        control_secret: random_secret(),
        next_control_secret: Some(random_secret()),
        generation,
        paused: None,
        snapshot: None,
        end_reason: None,
        ended_at: None,
        boot_id: random_boot_id(),
    }
}

async fn ready_build(core: &Core, spec: &SandboxSpec) -> Result<BuildRecord, CreateError> {
    let (template, id) = (spec.template, spec.build);
    let build = core.store.read(move |db| templates::build(db, id)).await.map_err(StoreFailure::from)?;
    let state = match build {
        Some(build) if build.state == BuildState::Ready => return Ok(build),
        Some(build) => match build.state {
            BuildState::Waiting => "waiting",
            BuildState::Building => "building",
            BuildState::Ready | BuildState::Error => "failed",
        },
        None => "gone",
    };
    Err(CreateError::NotReady { template, build: id, state })
}

/// The processes in a snapshot have their volumes mounted; a sandbox made from it has them too, and those it asks for.
async fn with_volumes_of(core: &Core, mut spec: SandboxSpec, build: &BuildRecord) -> Result<SandboxSpec, CreateError> {
    let (BuildSource::Sandbox(_), Some(dump)) = (build.source, build.dump) else { return Ok(spec) };
    let dump = core.store.read(move |db| snapshots::by_id(db, dump)).await.map_err(StoreFailure::from)?;
    for mount in dump.into_iter().flat_map(|dump| dump.volumes) {
        if spec.volumes.iter().any(|asked| asked.path == mount.path) {
            return Err(CreateError::MountTaken { path: mount.path, taken_by: mount.name });
        }
        spec.volumes.push(mount);
    }
    Ok(spec)
}

fn request_hash(spec: &SandboxSpec) -> String {
    let text = serde_json::to_vec(spec).expect("the model's types are plain data with text keys");
    hex::encode(Sha256::digest(text))
}

async fn replay(core: &Core, keyed: &Keyed) -> Result<Option<SandboxId>, CreateError> {
    let asked = keyed.key.clone();
    match core.store.read(move |db| idempotency::seen(db, &asked)).await.map_err(StoreFailure::from)? {
        None => Ok(None),
        Some(seen) if seen.request_hash == keyed.request_hash => Ok(Some(seen.sandbox)),
        Some(_) => Err(CreateError::IdempotencyConflict { key: keyed.key.clone() }),
    }
}

/// Writes the first row. Two requests with one key meet here: the store has one writer.
async fn reserve(core: &Core, record: &SandboxRecord, keyed: Option<Keyed>) -> Result<Reserved, StoreFailure> {
    let record = record.clone();
    let written = core.store.write(move |db| insert_unless_seen(db, &record, keyed.as_ref()));
    Ok(written.await?)
}

fn insert_unless_seen(db: &Db<'_>, record: &SandboxRecord, keyed: Option<&Keyed>) -> Result<Reserved, StoreError> {
    if let Some(keyed) = keyed
        && let Some(seen) = idempotency::seen(db, &keyed.key)?
    {
        let is_same = seen.request_hash == keyed.request_hash;
        return Ok(if is_same { Reserved::Replay(seen.sandbox) } else { Reserved::Conflict });
    }
    // From here on the row keeps them from being removed.
    if let Some(mount) = volumes::missing(db, &record.spec.volumes)? {
        return Ok(Reserved::NoVolume(mount.name.clone()));
    }
    sandboxes::insert(db, record)?;
    templates::count_spawn(db, record.spec.template, record.created_at)?;
    if let Some(Keyed { key, request_hash }) = keyed {
        idempotency::remember(db, key, request_hash, record.id, record.created_at)?;
    }
    Ok(Reserved::New)
}

/// The sandbox that the first request with this key made, once it is ready.
async fn earlier_one(core: &Core, id: SandboxId) -> Result<SandboxRecord, CreateError> {
    if let Some(mut handle) = core.handle(id)
        && let Ok(view) = handle.view.wait_for(|view| view.record.state != SandboxState::Creating).await
        && view.record.state.is_live()
    {
        return Ok(view.record.as_ref().clone());
    }
    Err(CreateError::Killed(id))
}

/// What a driver needs to read before it can decide.
async fn dump_of(core: &Core, record: &SandboxRecord, build: &BuildRecord) -> Result<Option<SnapshotRecord>, StartError> {
    let Some(dump) = build.dump else { return Ok(None) };
    let row = core.store.read(move |db| snapshots::by_id(db, dump)).await.unwrap_or_else(|error| {
        tracing::warn!(build = %build.id, error = chain(&error), "Could not read the dump of build {}", build.id);
        None
    });
    usable_dump(core, record, build, row)
}

impl Driver {
    /// The first verb of a new sandbox.
    pub(super) async fn start(&mut self, origin: Origin, place: Place) -> Result<(), CreateError> {
        self.core.failpoints.pass("create.intended").await;
        let begun = std::time::Instant::now();
        match self.start_from(origin).await {
            Ok(ready) => self.go_live(ready, place, begun.elapsed()).await,
            Err(error) => Err(self.undo_create(error).await),
        }
    }

    async fn start_from(&mut self, origin: Origin) -> Result<Ready, StartError> {
        match origin {
            Origin::Copy(source) => {
                let prepared = Prepared::from_copy(&self.core, &self.record, &source);
                let ready = self.start_prepared(prepared, self.core.copy_turns.clone()).await;
                self.hold_until_filled(source);
                ready
            }
            Origin::Build(build) => self.start_from_build(*build).await,
        }
    }

    /// The source's images are read until the copy has all its memory. A copy that tears ends by itself.
    fn hold_until_filled(&self, source: Arc<super::copy::CopySource>) {
        let (core, id) = (Arc::clone(&self.core), self.id);
        self.core.spawn(async move {
            let _torn_or_gone = core.runtime.filled(id).await;
            drop(source);
        });
    }

    async fn start_from_build(&mut self, build: BuildRecord) -> Result<Ready, StartError> {
        let dump = match (self.core.config.create_by, build.source) {
            (CreateBy::ColdStart, BuildSource::Recipe) => None,
            (CreateBy::Restore, _) | (CreateBy::ColdStart, BuildSource::Sandbox(_)) => dump_of(&self.core, &self.record, &build).await?,
        };
        let Some(dump) = dump else { return self.start_cold(build).await };
        let prepared = Prepared::from_build_dump(&self.core, &self.record, &build, &dump);
        match (self.start_prepared(prepared, self.core.turns.clone()).await, build.source) {
            // A cold start would find the same in its way.
            (refused @ Err(StartError::Runtime(RuntimeError::BadMountPath { .. } | RuntimeError::Exhausted(_))), _) => refused,
            (Err(error), BuildSource::Recipe) if !self.is_killing() => {
                tracing::warn!(sandbox.id = %self.id, build = %build.id, error = chain(&error), "Could not restore the dump of build {}; starting cold", build.id);
                self.destroy().await;
                self.start_cold(build).await
            }
            (result, BuildSource::Recipe | BuildSource::Sandbox(_)) => result,
        }
    }

    /// What a dump of the ready state saves: the agent's start and the build's commands. Makes one for the next.
    async fn start_cold(&mut self, build: BuildRecord) -> Result<Ready, StartError> {
        let prepared = Prepared::cold(&self.core, &self.record, &build, DiskSource::Fresh);
        let ready = self.start_prepared(prepared, self.core.turns.clone()).await?;
        let token = match self.record.spec.secure {
            Secure::Token => Some(self.core.key.token(TokenKind::EnvdAccess, self.id)),
            Secure::Open => None,
        };
        let core = Arc::clone(&self.core);
        let mut nobody = commands::Nobody;
        let commands = commands::run(&core, self.id, &build, token.as_deref(), &mut nobody);
        match self.serve_until_killed(commands).await {
            Some(ran) => ran?,
            None => return Err(StartError::Killed),
        }
        ready_state::make_later(&self.core, build);
        Ok(ready)
    }

    async fn start_prepared(&mut self, prepared: Prepared, turns: Turns) -> Result<Ready, StartError> {
        match self.serve_until_killed(turns.take()).await {
            Some(turn) => turn.spend_on(self.start_in_turn(prepared)).await,
            None => Err(StartError::Killed),
        }
    }

    async fn start_in_turn(&mut self, prepared: Prepared) -> Result<Ready, StartError> {
        let core = Arc::clone(&self.core);
        let started = self.serve_during(prepared.start(Arc::clone(&core))).await?;
        self.record.kernel = Some(started.kernel.clone());
        core.failpoints.pass("create.started").await;
        let introduced = self.serve_until_killed(started.introduce(core, self.id)).await;
        introduced.unwrap_or(Err(StartError::Killed))
    }

    async fn go_live(&mut self, ready: Ready, place: Place, took: std::time::Duration) -> Result<(), CreateError> {
        self.core.failpoints.pass("create.initialised").await;
        self.record.state = SandboxState::Running;
        (self.record.control_secret, self.record.next_control_secret) = (ready.control_secret, None);
        if let Err(error) = self.write_row().await {
            let _the_store_is_the_story = self.undo_create(StartError::Killed).await;
            return Err(StoreFailure::from(error).into());
        }
        self.open_run(place).await;
        tracing::info!(sandbox.id = %self.id, took_ms = took.as_millis(), "Created sandbox {}", self.id);
        Ok(())
    }

    /// Nothing of it is left but a row with the reason; its idempotency key may be used again.
    async fn undo_create(&mut self, error: StartError) -> CreateError {
        let (id, detail) = (self.id, chain(&error));
        tracing::warn!(sandbox.id = %id, error = detail, "Could not create sandbox {id}");
        self.log_line(LogLevel::Error, format!("sandbox could not be created: {detail}"));
        self.destroy().await;
        self.record.state = SandboxState::Failed;
        (self.record.kernel, self.record.ended_at) = (None, Some(self.core.clock.now()));
        self.record.end_reason = Some(self.kill_reason.clone().unwrap_or(EndReason::CreateFailed { detail }));
        self.publish();
        let record = self.record.clone();
        let written = self.core.store.write(move |db| {
            sandboxes::update(db, &record)?;
            idempotency::forget(db, record.id)
        });
        if let Err(error) = written.await {
            tracing::error!(sandbox.id = %id, error = chain(&error), "Could not record that sandbox {id} failed");
        }
        match error {
            StartError::Killed => CreateError::Killed(id),
            StartError::Runtime(RuntimeError::BadMountPath { path, wrong }) => CreateError::BadMountPath { path, wrong },
            StartError::Runtime(RuntimeError::VolumeFile { path, why }) => CreateError::VolumeFile { path, why },
            StartError::Runtime(RuntimeError::Exhausted(exhausted)) => exhausted.into(),
            StartError::Runtime(_) | StartError::Agent(_) | StartError::Commands(_) | StartError::Ended(_) | StartError::Misfit(_) => {
                CreateError::Start { id, source: Box::new(error) }
            }
        }
    }
}
