//! What every part of this room needs: configuration, store, runtime, and the handles of all sandboxes.

use super::activity::Activity;
use super::clock::Clock;
use super::config::SandboxConfig;
use super::driver::Request;
use super::error::UnknownSandbox;
use super::failpoints::Failpoints;
use super::logs::LogReader;
use super::places::{Places, PlacesMax};
use super::ready_state::Attempts;
use super::timers::Timers;
use super::tokens::InstallKey;
use super::turns::Turns;
use crate::model::{SandboxId, SandboxRecord, SandboxSpec};
use crate::runtime::Runtime;
use crate::store::Store;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use tokio::sync::{mpsc, watch};

/// Shared by the registry, the drivers and the timers.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) config: SandboxConfig,
    pub(super) key: InstallKey,
    pub(super) store: Store,
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) clock: Clock,
    pub(super) failpoints: Failpoints,
    pub(super) places: Places,
    pub(super) timers: Timers,
    /// Of creates and resumes.
    pub(super) turns: Turns,
    /// Of forks.
    pub(super) copy_turns: Turns,
    handles: RwLock<HashMap<SandboxId, Handle>>,
    pub(super) ready_states: Attempts,
    /// Held by who changes secrets, until the runtime was told.
    pub(super) telling_secrets: Arc<tokio::sync::Mutex<()>>,
    tasks: Mutex<tokio::task::JoinSet<()>>,
    closing: AtomicBool,
    /// Read by every create until its caller was answered; written by a close, which so waits for them.
    creates: Arc<tokio::sync::RwLock<()>>,
}

/// How others reach a sandbox's driver, and what it last said of itself.
#[derive(Debug, Clone)]
pub(super) struct Handle {
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) view: watch::Receiver<View>,
}

/// What the world may know of a sandbox; replaced as a whole by its driver.
#[derive(Debug, Clone)]
pub(super) struct View {
    pub(super) record: Arc<SandboxRecord>,
    pub(super) spec: Arc<SandboxSpec>,
    /// Exists only while it runs and is open to requests.
    pub(super) run: Option<RunView>,
}

/// What the world may use of the present run.
#[derive(Debug, Clone)]
pub(super) struct RunView {
    /// Becomes true when the run ends.
    pub(super) cut: watch::Receiver<bool>,
    /// For who wants its log as of now.
    pub(super) log: Arc<LogReader>,
    /// Where its use is noted.
    pub(super) activity: Arc<Activity>,
}

impl View {
    pub(super) fn new(record: &SandboxRecord, run: Option<RunView>) -> Self {
        Self { record: Arc::new(record.clone()), spec: Arc::new(record.spec.clone()), run }
    }
}

/// Replaceable surroundings, for tests and for the configuration's failpoint.
#[derive(Debug, Clone, Default)]
pub struct Seams {
    /// The wall clock.
    pub clock: Clock,
    /// Where to stop dead.
    pub failpoints: Failpoints,
}

impl Core {
    pub(super) fn new(config: SandboxConfig, key: InstallKey, store: Store, runtime: Arc<dyn Runtime>, seams: Seams) -> Self {
        Self {
            places: Places::new(PlacesMax { running: config.running_max, cpus: config.cpus_max, memory: config.memory_max }),
            config,
            key,
            store,
            runtime,
            clock: seams.clock,
            failpoints: seams.failpoints,
            timers: Timers::default(),
            turns: Turns::one_by_one(),
            copy_turns: Turns::all_for_one(),
            handles: RwLock::default(),
            ready_states: Attempts::default(),
            telling_secrets: Arc::default(),
            tasks: Mutex::default(),
            closing: AtomicBool::new(false),
            creates: Arc::default(),
        }
    }

    /// Runs something that must finish although nobody awaits it. Ends with the registry.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Takes all tasks out, for [`super::Registry::close`] to await or for its drop to abort.
    pub(super) fn take_tasks(&self) -> tokio::task::JoinSet<()> {
        std::mem::take(&mut self.tasks.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Held by a create from before it begins until its caller was answered.
    pub(super) async fn create_under_way(&self) -> tokio::sync::OwnedRwLockReadGuard<()> {
        Arc::clone(&self.creates).read_owned().await
    }

    /// Waits until every create that was accepted has been answered.
    pub(super) async fn creates_answered(&self) {
        drop(self.creates.write().await);
    }

    pub(super) fn start_closing(&self) {
        self.closing.store(true, Ordering::Release);
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    pub(super) fn add_handle(&self, id: SandboxId, handle: Handle) {
        self.handles.write().unwrap_or_else(PoisonError::into_inner).insert(id, handle);
    }

    pub(super) fn remove_handle(&self, id: SandboxId) {
        self.handles.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// The handle of a sandbox that has a driver, whatever its state.
    pub(super) fn handle(&self, id: SandboxId) -> Option<Handle> {
        self.handles.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// The handle of a sandbox that exists for its users.
    pub(super) fn live(&self, id: SandboxId) -> Result<Handle, UnknownSandbox> {
        let handle = self.handle(id).ok_or(UnknownSandbox(id))?;
        let is_live = handle.view.borrow().record.state.is_live();
        if is_live { Ok(handle) } else { Err(UnknownSandbox(id)) }
    }

    pub(super) fn handles(&self) -> Vec<Handle> {
        self.handles.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Where dumps are.
    pub(super) fn snapshots_dir(&self) -> PathBuf {
        self.config.data_dir.join("snapshots")
    }
}
