//! The ready state of a build, dumped once so that creates restore it: cold start, start command, ready command, dump.
//!
//! Made in the background by the first create that had to start cold (no dump yet, or another kernel, CPU, CRIU or
//! agent), or ahead of it by [`super::Registry::make_ready`]. The sandbox that it is made of has no row: what a dying
//! server leaves of it is swept.

use super::agent;
use super::commands::{self, CommandError, Nobody, Witness};
use super::config::CreateBy;
use super::core::Core;
use super::dump_folder::DumpFolder;
use super::error::{Cause, chain};
use super::pause::sync_later;
use super::start::{generic_introduction, random_secret};
use crate::model::{
    BuildId, BuildRecord, BuildSource, BuildState, ByteSize, DumpKey, Fit, NetworkPolicy, SandboxId, SnapshotId, SnapshotRecord,
};
use crate::runtime::{AfterDump, DiskSource, DumpRequest, Dumped, RuntimeError, StartFrom, StartRequest};
use crate::store::{snapshots, templates};
use std::collections::BTreeMap;
use std::future::pending;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Why a build has no dump of its ready state.
#[derive(Debug, thiserror::Error)]
pub enum ReadyStateError {
    /// Its start or ready command failed; creates from it would fail the same way.
    #[error("the commands of build {build} do not lead to its ready state")]
    Commands {
        /// The build.
        build: BuildId,
        /// Why.
        #[source]
        source: CommandError,
    },
    /// Everything else; creates from it start cold.
    #[error("could not dump the ready state of build {build}")]
    Dump {
        /// The build.
        build: BuildId,
        /// Why.
        #[source]
        source: Cause,
    },
}

/// What kept one attempt from its end.
enum Failed {
    Commands(CommandError),
    Other(Cause),
}

impl From<Cause> for Failed {
    fn from(cause: Cause) -> Self {
        Self::Other(cause)
    }
}

impl Failed {
    fn of(self, build: BuildId) -> ReadyStateError {
        match self {
            Self::Commands(source) => ReadyStateError::Commands { build, source },
            Self::Other(source) => ReadyStateError::Dump { build, source },
        }
    }
}

/// How long a build whose dump failed is left alone: what failed will mostly fail again, and costs a cold start.
const RETRY_AFTER: Duration = Duration::from_secs(300);

/// Builds whose dump is being made, or failed not long ago.
#[derive(Debug, Default)]
pub(super) struct Attempts(Mutex<BTreeMap<BuildId, Attempt>>);

#[derive(Debug, Clone, Copy)]
enum Attempt {
    UnderWay,
    FailedAt(Instant),
}

impl Attempts {
    /// Whether nobody else makes it; two dumps of one build would only race for the same row.
    fn begin(&self, build: BuildId) -> bool {
        let mut attempts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        !matches!(attempts.insert(build, Attempt::UnderWay), Some(Attempt::UnderWay))
    }

    fn end<T, E>(&self, build: BuildId, made: &Result<T, E>) {
        let mut attempts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match made {
            Ok(_) => attempts.remove(&build),
            Err(_) => attempts.insert(build, Attempt::FailedAt(Instant::now())),
        };
    }

    fn failed_lately(&self, build: BuildId) -> bool {
        let attempts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(attempts.get(&build), Some(Attempt::FailedAt(at)) if at.elapsed() < RETRY_AFTER)
    }
}

/// Makes the dump in the background, unless it is being made or failed lately; a failure is logged.
pub(super) fn make_later(core: &Arc<Core>, build: BuildRecord) {
    if core.config.create_by == CreateBy::ColdStart || build.source != BuildSource::Recipe || core.ready_states.failed_lately(build.id) {
        return;
    }
    let task_core = Arc::clone(core);
    core.spawn(async move {
        if let Err(error) = make(&task_core, build, &mut Nobody, pending()).await {
            tracing::warn!(error = chain(&error), "Creates from this build start cold");
        }
    });
}

/// Makes sure that creates from the build restore a dump that fits this machine.
pub(super) async fn ensure(core: &Arc<Core>, id: BuildId) -> Result<(), ReadyStateError> {
    let failed = |source: Cause| ReadyStateError::Dump { build: id, source };
    let rows = core.store.read(move |db| {
        let build = templates::build(db, id)?;
        let dump = build.as_ref().and_then(|build| build.dump).map(|dump| snapshots::by_id(db, dump)).transpose()?.flatten();
        Ok(build.map(|build| (build, dump)))
    });
    let Some((build, dump)) = rows.await.map_err(|error| failed(Arc::new(error)))? else { return Ok(()) };
    if core.config.create_by == CreateBy::ColdStart || build.state != BuildState::Ready || build.source != BuildSource::Recipe {
        return Ok(());
    }
    match dump.filter(|dump| dump.key.fit(&core.runtime.dump_key()) == Fit::Same) {
        Some(dump) => {
            expect_creates(core, &build, dump.id);
            Ok(())
        }
        None => make(core, build, &mut Nobody, pending()).await,
    }
}

/// For a build that is not ready yet: its commands, told to the witness, and the dump where creates are restores. When
/// the caller vanishes, the commands are given up and their sandbox is removed.
pub(super) async fn first(core: &Arc<Core>, build: BuildRecord, mut witness: Box<dyn Witness>) -> Result<(), ReadyStateError> {
    let (id, (mut reply, answer)) = (build.id, oneshot::channel());
    let task_core = Arc::clone(core);
    core.spawn(async move {
        let made = match task_core.config.create_by {
            CreateBy::Restore => make(&task_core, build, witness.as_mut(), reply.closed()).await,
            CreateBy::ColdStart => try_commands(&task_core, &build, witness.as_mut(), reply.closed()).await,
        };
        // What it still has to say comes before the answer.
        drop(witness);
        let _caller_may_be_gone = reply.send(made);
    });
    let ended = |_| ReadyStateError::Dump { build: id, source: cause(Unwanted) };
    answer.await.map_err(ended)?
}

/// Nobody waits for the ready state any more.
#[derive(Debug, thiserror::Error)]
#[error("it is not waited for any more")]
struct Unwanted;

/// Whether the build's commands lead to its ready state, without keeping it.
async fn try_commands(
    core: &Arc<Core>,
    build: &BuildRecord,
    witness: &mut dyn Witness,
    unwanted: impl Future<Output = ()> + Send,
) -> Result<(), ReadyStateError> {
    if !commands::has_any(build) {
        return Ok(());
    }
    let _until_removed = core.create_under_way().await;
    let id = SandboxId::random();
    let reached = reach(core, id, build, witness, unwanted).await;
    remove(core, id).await;
    reached.map(drop).map_err(|failed| failed.of(build.id))
}

async fn remove(core: &Core, id: SandboxId) {
    if let Err(error) = core.runtime.destroy(id).await {
        tracing::error!(sandbox.id = %id, error = chain(&error), "Could not remove the sandbox of a ready state");
    }
}

async fn make(
    core: &Arc<Core>,
    build: BuildRecord,
    witness: &mut dyn Witness,
    unwanted: impl Future<Output = ()> + Send,
) -> Result<(), ReadyStateError> {
    // Its sandbox is nobody's: a close that did not wait for the end would leave it running.
    let _until_removed = core.create_under_way().await;
    if core.is_closing() || !core.ready_states.begin(build.id) {
        return Ok(());
    }
    let begun = Instant::now();
    let id = SandboxId::random();
    let made = dump_of(core, id, &build, witness, unwanted).await;
    remove(core, id).await;
    core.ready_states.end(build.id, &made);
    let snapshot = made.map_err(|failed| failed.of(build.id))?;
    expect_creates(core, &build, snapshot);
    let took_ms = begun.elapsed().as_millis();
    tracing::info!(build = %build.id, %snapshot, took_ms, "Creates from build {} restore a dump from now on", build.id);
    Ok(())
}

/// What a restore of the dump needs can be made from now on, before the first create asks.
fn expect_creates(core: &Core, build: &BuildRecord, dump: SnapshotId) {
    let (folder, key) = (DumpFolder::of(core, dump), core.runtime.dump_key());
    let from = StartFrom::Dump { images: folder.images(), criu: key.criu, agent: key.agent };
    let disk = DiskSource::PooledCopyOf(folder.disk());
    core.runtime.expect(&StartRequest { disk, from, ..start_request(SandboxId::random(), build, String::new()) });
}

/// Starts a sandbox and leads it to the ready state; the secret that its agent wants next.
async fn reach(
    core: &Arc<Core>,
    id: SandboxId,
    build: &BuildRecord,
    witness: &mut dyn Witness,
    unwanted: impl Future<Output = ()> + Send,
) -> Result<String, Failed> {
    let first_secret = random_secret();
    core.runtime.start(start_request(id, build, first_secret.clone())).await.map_err(cause)?;
    agent::wait_until_up(&core.runtime, id, core.config.agent_ready_max).await.map_err(cause)?;
    tokio::select! {
        biased;
        // Cancel-safe: the sandbox is removed whatever its commands were doing.
        () = unwanted => Err(cause(Unwanted).into()),
        secret = run_commands(core, id, build, first_secret, witness) => secret,
    }
}

async fn dump_of(
    core: &Arc<Core>,
    id: SandboxId,
    build: &BuildRecord,
    witness: &mut dyn Witness,
    unwanted: impl Future<Output = ()> + Send,
) -> Result<SnapshotId, Failed> {
    let snapshot = SnapshotId::random();
    let secret = reach(core, id, build, witness, unwanted).await?;
    let findings = core.runtime.findings(id).await.map_err(cause)?;
    if !findings.is_empty() {
        return Err(cause(RuntimeError::NotDumpable { id, findings }).into());
    }
    let folder = DumpFolder::of(core, snapshot);
    folder.make().await.map_err(cause)?;
    let request = DumpRequest { id, after: AfterDump::KeepRunning, images: folder.images(), disk_copy: Some(folder.disk()) };
    let dumped = match core.runtime.dump(request).await {
        Ok(dumped) => dumped,
        Err(error) => {
            folder.remove().await;
            return Err(cause(error).into());
        }
    };
    folder.put_in_place().await;
    record(core, snapshot, id, build.id, dumped, secret).await.map_err(cause)?;
    sync_later(core, snapshot);
    Ok(snapshot)
}

fn cause(error: impl std::error::Error + Send + Sync + 'static) -> Cause {
    Arc::new(error)
}

fn start_request(id: SandboxId, build: &BuildRecord, control_secret: String) -> StartRequest {
    StartRequest {
        id,
        layers: build.layers.clone(),
        disk: DiskSource::Fresh,
        resources: build.resources,
        network: NetworkPolicy::default(),
        volumes: Vec::new(),
        from: StartFrom::Cold { control_secret },
    }
}

/// The agent is told as much as the commands need, if there are any, and what is the same for all sandboxes: trust, which
/// every create would write again otherwise. Each create tells it the rest.
async fn run_commands(
    core: &Core,
    id: SandboxId,
    build: &BuildRecord,
    secret: String,
    witness: &mut dyn Witness,
) -> Result<String, Failed> {
    let init = generic_introduction(core, id, build);
    agent::init(&core.runtime, id, [&secret, &init.control_secret], &init, core.config.agent_ready_max).await.map_err(cause)?;
    commands::run(core, id, build, None, witness).await.map_err(Failed::Commands)?;
    Ok(init.control_secret)
}

/// The dump's row and the build's in one transaction. The dump before is of no use to new creates; it is removed when
/// those that read it now are done with it (housekeeping.rs).
async fn record(
    core: &Core,
    snapshot: SnapshotId,
    sandbox: SandboxId,
    build: BuildId,
    dumped: Dumped,
    control_secret: String,
) -> Result<(), crate::store::StoreError> {
    let bytes = DumpFolder::of(core, snapshot).bytes().await;
    let row = SnapshotRecord {
        id: snapshot,
        sandbox,
        key: DumpKey { criu: dumped.criu, agent: dumped.agent, ..core.runtime.dump_key() },
        control_secret,
        memory_bytes: ByteSize(dumped.images_bytes),
        disk_bytes: ByteSize(bytes.saturating_sub(dumped.images_bytes)),
        created_at: core.clock.now(),
        synced: false,
        volumes: Vec::new(),
    };
    let written = core.store.write(move |db| {
        snapshots::insert(db, &row)?;
        templates::set_dump(db, build, row.id)
    });
    written.await
}
