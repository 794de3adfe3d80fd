//! The watches that clients hold, each with a bounded queue between the kernel and its reader.
//!
//! A task per watch empties the kernel's queue as soon as it fills, since new directories have to be watched at
//! once. Readers take from our queue, after whatever the kernel has queued by then has been added: who has made a
//! change and asks afterwards finds it.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::entry::Entry;
use super::watch::{Depth, Event, EventKind, Left, NetworkMounts, Watch, WatchError};
use crate::blocking::{self, Lost};
use crate::users::Names;

/// Changes that wait for their reader, in one watch.
const CHANGES_MAX: usize = 8192;
/// Watchers that clients poll and have to remove themselves.
const POLLED_MAX: usize = 100;

/// One change as a client sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) name: String,
    pub(crate) kind: EventKind,
    pub(crate) entry: Option<Entry>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entries {
    Omit,
    Include,
}

/// What to watch, and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    pub(crate) depth: Depth,
    pub(crate) entries: Entries,
    pub(crate) mounts: NetworkMounts,
}

#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum WatcherError {
    #[error(transparent)]
    Watch(Arc<WatchError>),
    #[error("more than {CHANGES_MAX} changes were waiting to be read; some were lost")]
    Overflow,
    #[error("there are {POLLED_MAX} watchers already; remove some")]
    TooMany,
    #[error("watcher with id {id} not found")]
    Unknown { id: String },
    #[error(transparent)]
    Lost(#[from] Lost),
    #[error("no random bytes for an id")]
    Random(#[source] rustix::io::Errno),
}

impl From<WatchError> for WatcherError {
    fn from(error: WatchError) -> WatcherError {
        WatcherError::Watch(Arc::new(error))
    }
}

/// All watches of the agent.
#[derive(Debug, Default)]
pub(crate) struct Watchers {
    /// Every watch there is; dropped ones are swept when the next one starts.
    live: Mutex<Vec<Weak<Shared>>>,
    polled: Mutex<HashMap<String, Subscription>>,
}

impl Watchers {
    /// Starts a watch that lives as long as the returned handle. Changes after this are reported.
    pub(crate) async fn subscribe(&self, root: &Path, options: Options) -> Result<Subscription, WatcherError> {
        let root = root.to_owned();
        let watch = blocking::run(move || Watch::open(&root, options.depth, options.mounts)).await??;
        let subscription = Subscription::start(watch, options.entries)?;
        let mut live = lock(&self.live);
        live.retain(|shared| shared.strong_count() > 0);
        live.push(Arc::downgrade(&subscription.shared));
        Ok(subscription)
    }

    /// As `subscribe`, for a client that polls by the returned id.
    pub(crate) async fn create(&self, root: &Path, options: Options) -> Result<String, WatcherError> {
        if lock(&self.polled).len() >= POLLED_MAX {
            return Err(WatcherError::TooMany);
        }
        let subscription = self.subscribe(root, options).await?;
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).map_err(WatcherError::Random)?;
        let id = format!("w{:016x}", u64::from_ne_bytes(random));
        lock(&self.polled).insert(id.clone(), subscription);
        Ok(id)
    }

    /// Everything since the last call.
    pub(crate) async fn take(&self, id: &str) -> Result<Vec<Change>, WatcherError> {
        let shared = match lock(&self.polled).get(id) {
            Some(subscription) => Arc::clone(&subscription.shared),
            None => return Err(WatcherError::Unknown { id: id.to_owned() }),
        };
        blocking::run(move || shared.take()).await?
    }

    pub(crate) fn remove(&self, id: &str) -> Result<(), WatcherError> {
        match lock(&self.polled).remove(id) {
            Some(_) => Ok(()),
            None => Err(WatcherError::Unknown { id: id.to_owned() }),
        }
    }

    /// Lets every recursive watch notice new directories now. Called between making a directory and making
    /// something in it, so that what follows is reported by the kernel, event by event. Blocks.
    pub(crate) fn settle(&self) {
        let live: Vec<_> = lock(&self.live).iter().filter_map(Weak::upgrade).collect();
        for shared in live.iter().filter(|shared| shared.depth == Depth::Tree) {
            shared.drain();
        }
    }
}

/// A running watch; dropping it ends the watch.
#[derive(Debug)]
pub(crate) struct Subscription {
    shared: Arc<Shared>,
    pump: JoinHandle<()>,
}

impl Subscription {
    fn start(watch: Watch, entries: Entries) -> Result<Subscription, WatcherError> {
        let readiness = watch.readiness()?;
        let depth = watch.depth();
        let queue = Queue { watch, changes: VecDeque::new(), failed: None };
        let shared = Arc::new(Shared { queue: Mutex::new(queue), changed: Notify::new(), depth, entries });
        let pump = tokio::spawn(pump(Arc::clone(&shared), readiness));
        Ok(Subscription { shared, pump })
    }

    /// Waits for changes and takes them all.
    ///
    /// Cancel-safe: what was not returned stays queued.
    pub(crate) async fn next(&self) -> Result<Vec<Change>, WatcherError> {
        loop {
            self.shared.changed.notified().await;
            let changes = self.shared.take_queued()?;
            if !changes.is_empty() {
                return Ok(changes);
            }
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Notify,
    depth: Depth,
    entries: Entries,
}

#[derive(Debug)]
struct Queue {
    watch: Watch,
    changes: VecDeque<Change>,
    /// Changes were lost for good: every reader is told, until the watch is removed.
    failed: Option<WatcherError>,
}

impl Shared {
    /// Moves what the kernel has queued into our queue. Blocks: it lists directories and looks at files.
    fn drain(&self) -> Left {
        let mut queue = lock(&self.queue);
        if queue.failed.is_some() {
            return Left::Nothing;
        }
        let Queue { watch, changes, .. } = &mut *queue;
        let mut describe = Describe { root: watch.root().to_owned(), entries: self.entries, names: None };
        let read = watch.read(&mut |event| push(changes, describe.change(event)));
        let (left, failed) = match read {
            Err(error) => (Left::Nothing, Some(error.into())),
            Ok(_) if changes.len() > CHANGES_MAX => (Left::Nothing, Some(WatcherError::Overflow)),
            Ok(left) => (left, None),
        };
        if failed.is_some() {
            *changes = VecDeque::new();
        }
        queue.failed = failed;
        drop(queue);
        self.changed.notify_one();
        left
    }

    /// Drains until the kernel's queue is empty, with room for readers in between.
    fn drain_all(&self) {
        while self.drain() == Left::Perhaps {}
    }

    fn take(&self) -> Result<Vec<Change>, WatcherError> {
        self.drain();
        self.take_queued()
    }

    fn take_queued(&self) -> Result<Vec<Change>, WatcherError> {
        let mut queue = lock(&self.queue);
        match &queue.failed {
            Some(error) => Err(error.clone()),
            None => Ok(std::mem::take(&mut queue.changes).into()),
        }
    }
}

fn push(changes: &mut VecDeque<Change>, change: Change) {
    // The kernel merges equal neighbours too, but only until our pump has taken the first one.
    if changes.back().is_some_and(|last| last.name == change.name && last.kind == change.kind) {
        changes.pop_back();
    }
    // One more than there may be is enough to tell that there were too many.
    if changes.len() <= CHANGES_MAX {
        changes.push_back(change);
    }
}

/// Turns events into what the client wants to know of them.
struct Describe {
    root: PathBuf,
    entries: Entries,
    names: Option<Names>,
}

impl Describe {
    fn change(&mut self, event: Event) -> Change {
        let wanted = self.entries == Entries::Include && event.kind.carries_entry();
        let entry = wanted.then(|| self.entry(&event)).flatten();
        Change { name: event.name.to_string_lossy().into_owned(), kind: event.kind, entry }
    }

    /// Best effort: the entry may be gone by now.
    fn entry(&mut self, event: &Event) -> Option<Entry> {
        let names = self.names.get_or_insert_with(Names::read);
        let path: PathBuf = self.root.join(&event.name).components().collect();
        Entry::read(&path, &path, names).ok()
    }
}

async fn pump(shared: Arc<Shared>, readiness: AsyncFd<OwnedFd>) {
    while let Ok(mut ready) = readiness.readable().await {
        // Before draining: what comes while we drain makes it ready again.
        ready.clear_ready();
        let draining = Arc::clone(&shared);
        if blocking::run(move || draining.drain_all()).await.is_err() || lock(&shared.queue).failed.is_some() {
            return;
        }
    }
}

/// A panic elsewhere leaves nothing half-done in these: each change to them is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
