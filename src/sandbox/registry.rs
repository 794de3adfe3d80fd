//! The face of the core: every verb, what it needs, what it answers.

use super::adjust::{Adjust, AdjustError};
use super::bearer::{Bearer, BearerError};
use super::commands::Witness;
use super::config::SandboxConfig;
use super::core::{Core, Seams};
use super::create::{self, CreateError};
use super::disk_use::{self, DiskUse};
use super::driver::{Request, answered};
use super::error::{StoreFailure, UnknownSandbox};
use super::events::{self, EventPage, EventQuery, Failure};
use super::fork::{self, Copies, Fork, ForkError};
use super::list::{self, ListError, ListPage, ListQuery};
use super::logs::{self, LogQuery, MetricsError};
use super::network::NetworkError;
use super::pause::PauseError;
use super::places::{PlacesMax, PlacesTaken};
use super::ready_state::{self, ReadyStateError};
use super::recover::{self, OpenError};
use super::reset::{self, AfterReset, ResetError};
use super::resume::{ConnectError, Connected, ResumeAsk};
use super::route::{self, Route, RouteError};
use super::secrets::{NewSecret, SecretContent, SecretError};
use super::snapshot::{self, SnapshotInfo, SnapshotPage, SnapshotQuery};
use super::timeout::{NewEnd, TimeoutError};
use super::tokens::{InstallKey, TokenKind};
use super::volume_mounts::{VolumeChange, VolumeChangeError};
use super::workshop::{Workshop, WorkshopError, WorkshopRequest};
use super::{housekeeping, secrets, timers};
use crate::model::{
    BuildId, BuildRecord, ByteSize, EndReason, EventKind, Keep, LogEntry, MetricPoint, NetworkPolicy, OnTimeout, SandboxId, SandboxRecord,
    SandboxSpec, SandboxState, SecretRecord,
};
use crate::runtime::{Finding, Runtime};
use crate::store::Store;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::sync::oneshot;

/// How long a change waits for a verb that is under way; as long as the slowest of them may take.
const STILL_WAIT_MAX: Duration = Duration::from_secs(60);
/// How often it asks when the sandbox says nothing new.
const STILL_ASK_AGAIN: Duration = Duration::from_millis(20);

/// All sandboxes of this data folder. Cheap to clone. Dropping the last clone without [`Registry::close`] stops the
/// drivers where they are; the next server finds what they left.
#[derive(Debug, Clone)]
pub struct Registry {
    core: Arc<Core>,
    _tasks: Arc<AbortOnDrop>,
}

/// Drivers hold the core, so the core cannot stop them by being dropped.
#[derive(Debug)]
struct AbortOnDrop(Arc<Core>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.take_tasks().abort_all();
    }
}

/// Ends a sandbox for a reason and waits for it. `false` when there is none.
pub(super) async fn kill(core: &Core, id: SandboxId, reason: EndReason) -> bool {
    let Ok(handle) = core.live(id) else { return false };
    let (reply, answer) = oneshot::channel();
    let sent = handle.requests.send(Request::Kill { reason, reply }).await;
    sent.is_ok() && answer.await.is_ok()
}

impl Registry {
    /// Reads the store, takes over running sandboxes, finishes or undoes what was half done, sweeps leftovers, starts
    /// timers and metrics.
    pub async fn open(config: SandboxConfig, key: InstallKey, store: Store, runtime: Arc<dyn Runtime>) -> Result<Self, OpenError> {
        Self::open_with(config, key, store, runtime, Seams::default()).await
    }

    /// [`Registry::open`] in replaceable surroundings.
    pub async fn open_with(
        config: SandboxConfig,
        key: InstallKey,
        store: Store,
        runtime: Arc<dyn Runtime>,
        seams: Seams,
    ) -> Result<Self, OpenError> {
        let core = Arc::new(Core::new(config, key, store, runtime, seams));
        // Before recovery starts drivers, so that a failure in the middle stops them.
        let tasks = Arc::new(AbortOnDrop(Arc::clone(&core)));
        // Before sandboxes of an earlier server go on: what they send may carry one.
        secrets::publish(&core).await?;
        recover::recover(&core).await?;
        core.spawn(timers::run(Arc::clone(&core)));
        core.spawn(housekeeping::run(Arc::clone(&core)));
        Ok(Self { core, _tasks: tasks })
    }

    /// Creates a sandbox and waits until its agent is ready. A request with an idempotency key that was seen before
    /// answers the same sandbox. The sandbox goes on when the caller vanishes.
    pub async fn create(&self, spec: SandboxSpec, idempotency_key: Option<&str>) -> Result<SandboxRecord, CreateError> {
        create::create(&self.core, spec, idempotency_key.map(ToOwned::to_owned)).await
    }

    /// Makes sure that creates from this build restore a dump of its ready state, so that the first one does already.
    pub async fn make_ready(&self, build: BuildId) -> Result<(), ReadyStateError> {
        ready_state::ensure(&self.core, build).await
    }

    /// The commands of a build that is not ready yet, told to the witness, and the dump of the state they lead to. On
    /// [`ReadyStateError::Dump`] creates from it would work, by cold starts. Dropping the future gives the commands up.
    pub async fn reach_ready_state(&self, build: BuildRecord, witness: Box<dyn Witness>) -> Result<(), ReadyStateError> {
        ready_state::first(&self.core, build, witness).await
    }

    /// A sandbox for build steps.
    pub async fn open_workshop(&self, request: WorkshopRequest) -> Result<Workshop, WorkshopError> {
        Workshop::open(&self.core, request).await
    }

    /// Stores a secret under a name that no other has.
    pub async fn create_secret(&self, new: NewSecret) -> Result<SecretRecord, SecretError> {
        secrets::create(&self.core, new).await
    }

    /// Replaces the value of a secret, by its id or name; requests that begin later carry the new one.
    pub async fn update_secret(&self, key: &str, content: SecretContent) -> Result<SecretRecord, SecretError> {
        secrets::update(&self.core, key.to_owned(), content).await
    }

    /// Removes a secret, by its id or name.
    pub async fn remove_secret(&self, key: &str) -> Result<SecretRecord, SecretError> {
        secrets::remove(&self.core, key.to_owned()).await
    }

    /// A secret by its id or name. Its value is for nobody to be told.
    pub async fn secret(&self, key: &str) -> Result<SecretRecord, SecretError> {
        secrets::find(&self.core, key.to_owned()).await
    }

    /// All secrets, oldest first.
    pub async fn secrets(&self) -> Result<Vec<SecretRecord>, StoreFailure> {
        secrets::all(&self.core).await
    }

    /// A live sandbox as it is now.
    pub fn get(&self, id: SandboxId) -> Result<SandboxRecord, UnknownSandbox> {
        let view = self.core.live(id)?.view;
        let record = Arc::clone(&view.borrow().record);
        Ok(Arc::unwrap_or_clone(record))
    }

    /// One page of live sandboxes.
    pub async fn list(&self, query: ListQuery) -> Result<ListPage, ListError> {
        list::list(&self.core, query).await
    }

    /// Ends it and removes its files. From the moment of the call on it is unknown to everybody; returns when its
    /// processes are gone.
    pub async fn kill(&self, id: SandboxId) -> Result<(), UnknownSandbox> {
        if kill(&self.core, id, EndReason::Killed).await { Ok(()) } else { Err(UnknownSandbox(id)) }
    }

    /// Sets the end of a running one to now + `timeout`; may shorten.
    pub async fn set_timeout(&self, id: SandboxId, timeout: Duration) -> Result<SandboxRecord, TimeoutError> {
        self.set_end(id, timeout, NewEnd::In(timeout)).await
    }

    /// Moves the end of a running one to now + `timeout` if that is later.
    pub async fn extend(&self, id: SandboxId, timeout: Duration) -> Result<SandboxRecord, TimeoutError> {
        self.set_end(id, timeout, NewEnd::AtLeast(timeout)).await
    }

    async fn set_end(&self, id: SandboxId, asked: Duration, end: NewEnd) -> Result<SandboxRecord, TimeoutError> {
        let limit = self.core.config.timeout_max;
        if asked > limit {
            return Err(TimeoutError::TooLong { asked, limit });
        }
        self.ask(id, |reply| Request::SetEnd { end, reply }).await
    }

    /// Makes sure that it runs: a running one is extended, a paused one resumed with end = now + `timeout`. Waits for a
    /// pause under way. Concurrent calls share one resume.
    pub async fn connect(&self, id: SandboxId, timeout: Duration) -> Result<Connected, ConnectError> {
        self.wake(id, ResumeAsk { timeout, on_timeout: None, keep: Keep::Memory }).await
    }

    /// As connect, but a paused one starts from its files alone: what memory it has is given up, once it can be started.
    pub async fn boot(&self, id: SandboxId, timeout: Duration) -> Result<Connected, ConnectError> {
        self.wake(id, ResumeAsk { timeout, on_timeout: None, keep: Keep::FilesOnly }).await
    }

    /// As connect for a paused one; `AlreadyRunning` for a running one. `on_timeout` replaces the lifecycle's when given.
    pub async fn resume(&self, id: SandboxId, timeout: Duration, on_timeout: Option<OnTimeout>) -> Result<SandboxRecord, ConnectError> {
        if self.get(id)?.state == SandboxState::Running {
            return Err(ConnectError::AlreadyRunning(id));
        }
        match self.wake(id, ResumeAsk { timeout, on_timeout, keep: Keep::Memory }).await? {
            Connected::Resumed(record) => Ok(*record),
            Connected::WasRunning(_) => Err(ConnectError::AlreadyRunning(id)),
        }
    }

    async fn wake(&self, id: SandboxId, ask: ResumeAsk) -> Result<Connected, ConnectError> {
        let limit = self.core.config.timeout_max;
        if ask.timeout > limit {
            return Err(ConnectError::TooLong { asked: ask.timeout, limit });
        }
        self.ask(id, |reply| Request::Resume { ask, reply }).await
    }

    /// Pauses it, waiting for the end. While one is under way, callers wait for the same end.
    pub async fn pause(&self, id: SandboxId, keep: Keep) -> Result<SandboxRecord, PauseError> {
        self.ask(id, |reply| Request::Pause { keep, reply }).await
    }

    /// Changes how it ends and who may reach it. What a change needs is said at each field of [`Adjust`].
    /// Waits for the end of a verb that is under way.
    pub async fn adjust(&self, id: SandboxId, adjust: Adjust) -> Result<SandboxRecord, AdjustError> {
        self.when_still(id, || self.ask(id, |reply| Request::Adjust { adjust, reply })).await
    }

    /// Mounts one more volume in a running one, or one less.
    pub async fn change_volumes(&self, id: SandboxId, change: VolumeChange) -> Result<SandboxRecord, VolumeChangeError> {
        self.ask(id, |reply| Request::Volumes { change, reply }).await
    }

    /// A paused one keeps its files only; a running one is left alone. Waits as an adjust does.
    pub async fn forget_memory(&self, id: SandboxId) -> Result<SandboxRecord, AdjustError> {
        self.when_still(id, || self.ask(id, |reply| Request::ForgetMemory { reply })).await
    }

    /// Asks again whenever the sandbox says something new of itself, until it is no longer in the middle of a verb.
    async fn when_still<F: Future<Output = Result<SandboxRecord, AdjustError>>>(
        &self,
        id: SandboxId,
        ask: impl Fn() -> F,
    ) -> Result<SandboxRecord, AdjustError> {
        let deadline = tokio::time::Instant::now() + STILL_WAIT_MAX;
        let mut view = self.core.live(id)?.view;
        loop {
            match ask().await {
                Err(AdjustError::InTransition { .. }) if tokio::time::Instant::now() < deadline => {
                    // The last word of a verb may come before it is over: not every round waits for a new one.
                    let _news_or_not = tokio::time::timeout(STILL_ASK_AGAIN, view.changed()).await;
                }
                answer => return answer,
            }
        }
    }

    /// Takes its processes and memory away, keeps its files, and boots it anew if asked to. Goes on when the caller
    /// vanishes.
    pub async fn reset(&self, id: SandboxId, adjust: Adjust, after: AfterReset) -> Result<SandboxRecord, ResetError> {
        fork::to_its_end(&self.core, id, reset::reset(self.clone(), id, adjust, after)).await
    }

    /// What sandboxes with processes have together, and what they may have.
    pub fn places(&self) -> (PlacesTaken, PlacesMax) {
        self.core.places.in_use()
    }

    /// Copies it: the source goes on as it was, running or paused. One entry per copy asked for; with
    /// [`super::Strictness::AllOrNone`] the first failure removes the other copies and is the answer.
    pub async fn fork(&self, id: SandboxId, fork: Fork) -> Result<Copies, ForkError> {
        let result = fork::fork(&self.core, id, fork).await;
        self.event(id, EventKind::Fork, &result);
        result
    }

    /// As [`Registry::fork`], and what the copies came from is stored as a template, which is told unless there is no copy
    /// or the source was paused without its memory.
    pub async fn fork_and_store(&self, id: SandboxId, fork: Fork) -> Result<(Copies, Option<SnapshotInfo>), ForkError> {
        let result = fork::fork_and_store(&self.core, id, fork).await;
        self.event(id, EventKind::Fork, &result);
        result
    }

    /// Stores a copy of a running sandbox as a template of its own; the source goes on. A name that exists gets a new
    /// build. `name` was checked by the caller: `name` or `name:tag`, in lower case.
    pub async fn snapshot(&self, id: SandboxId, name: Option<&str>, keep: Keep) -> Result<SnapshotInfo, ForkError> {
        let result = snapshot::snapshot(&self.core, id, name.map(ToOwned::to_owned), keep).await;
        self.event(id, EventKind::Snapshot, &result);
        result
    }

    /// One page of stored snapshots, newest first.
    pub async fn snapshots(&self, query: SnapshotQuery) -> Result<SnapshotPage, ListError> {
        snapshot::list(&self.core, query).await
    }

    /// What would keep it from being paused now.
    pub async fn explain(&self, id: SandboxId) -> Result<Vec<Finding>, PauseError> {
        let state = self.get(id)?.state;
        if state != SandboxState::Running {
            return Err(PauseError::InTransition { id, state });
        }
        self.core.runtime.findings(id).await.map_err(|error| PauseError::Dump { id, source: Box::new(error) })
    }

    /// All dumps of this data folder and what they take.
    pub async fn disk_use(&self) -> Result<DiskUse, StoreFailure> {
        disk_use::disk_use(&self.core).await
    }

    /// Removes now what housekeeping would remove within a minute; returns the bytes of dumps given back.
    pub async fn collect_garbage(&self) -> Result<ByteSize, StoreFailure> {
        disk_use::collect_garbage(&self.core).await
    }

    /// Replaces the egress half of its network policy.
    pub async fn set_network(&self, id: SandboxId, policy: NetworkPolicy) -> Result<(), NetworkError> {
        let policy = Box::new(policy);
        self.ask(id, |reply| Request::SetNetwork { policy, reply }).await
    }

    /// Its samples in the range, oldest first; also of killed ones while their history is kept.
    pub async fn metrics(&self, id: SandboxId, range: Range<OffsetDateTime>) -> Result<Vec<MetricPoint>, MetricsError> {
        logs::metrics(&self.core, id, range).await
    }

    /// The newest sample of each; unknown ids are absent.
    pub async fn latest_metrics(&self, ids: &[SandboxId]) -> Result<BTreeMap<SandboxId, MetricPoint>, StoreFailure> {
        Ok(self.core.store.latest_metrics(ids.to_vec()).await?)
    }

    /// What was done with sandboxes, those included that are gone.
    pub async fn events(&self, query: EventQuery) -> Result<EventPage, StoreFailure> {
        events::query(&self.core, query).await
    }

    /// Its log lines; also of killed ones while their history is kept.
    pub async fn logs(&self, id: SandboxId, query: LogQuery) -> Result<Vec<LogEntry>, MetricsError> {
        logs::query(&self.core, id, query).await
    }

    /// Where to send a proxied request. Wakes a paused sandbox if its lifecycle says so, waiting at most
    /// `wake_wait_max`. Cancel-safe: a wake that began goes on.
    pub async fn route(&self, id: SandboxId) -> Result<Route, RouteError> {
        route::route(&self.core, id).await
    }

    /// The running or wakeable sandbox whose envd token makes `is_signed_with` true (contract/e2b.md 1.5).
    pub fn find_by_envd_token(&self, is_signed_with: &mut dyn FnMut(&str) -> bool) -> Option<SandboxId> {
        let candidates = self.core.handles().into_iter().map(|handle| Arc::clone(&handle.view.borrow().record));
        let open = candidates.filter(|record| record.state == SandboxState::Running || record.wakes_on_traffic());
        open.map(|record| record.id).find(|id| is_signed_with(&self.token(TokenKind::EnvdAccess, *id)))
    }

    /// A token of a sandbox, whether it exists or not.
    pub fn token(&self, kind: TokenKind, id: SandboxId) -> String {
        self.core.key.token(kind, id)
    }

    /// Whether `given` is that token, in constant time.
    pub fn accepts_token(&self, kind: TokenKind, id: SandboxId, given: &str) -> bool {
        self.core.key.accepts(kind, id, given)
    }

    /// A new bearer token for a sandbox; earlier ones stay good.
    pub fn issue_bearer(&self, id: SandboxId) -> Bearer {
        self.core.key.issue_bearer(id, self.core.clock.now())
    }

    /// Whose bearer token it is; the sandbox may be gone by now.
    pub fn read_bearer(&self, token: &str) -> Result<SandboxId, BearerError> {
        self.core.key.read_bearer(token, self.core.clock.now())
    }

    /// Stops timers and drivers after the verb each is busy with. Sandboxes run on; the next server takes them over.
    pub async fn close(&self) {
        self.core.start_closing();
        self.core.creates_answered().await;
        // Again until there are none: a create that was accepted just before may add one.
        loop {
            let handles = self.core.handles();
            if handles.is_empty() {
                break;
            }
            for handle in &handles {
                let _ended_by_itself = handle.requests.send(Request::Close).await;
            }
            for mut handle in handles {
                while handle.view.changed().await.is_ok() {}
            }
        }
        self.core.take_tasks().shutdown().await;
    }

    fn event<T, E: Failure>(&self, id: SandboxId, kind: EventKind, result: &Result<T, E>) {
        if let Ok(record) = self.get(id) {
            events::keep(&self.core, &record, kind, result);
        }
    }

    /// Sends a request to the driver of a live sandbox and awaits its answer.
    async fn ask<T, E: From<UnknownSandbox>>(
        &self,
        id: SandboxId,
        request: impl FnOnce(oneshot::Sender<Result<T, E>>) -> Request,
    ) -> Result<T, E> {
        let handle = self.core.live(id)?;
        let (reply, answer) = oneshot::channel();
        handle.requests.send(request(reply)).await.map_err(|_| UnknownSandbox(id))?;
        answered(id, answer).await
    }
}
