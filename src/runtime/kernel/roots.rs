//! Root file systems made before anybody asks: disk copied and mounted, overlay on top, ids mapped to a range of their
//! own. A create that finds one gives it the sandbox's name and restores into it at once.
//!
//! ```text
//!  wanted ──> making (helper, in the background) ──> ready: roots/<name> ──> taken: sandboxes/<id>
//!                                                       └──> removed (its dump is gone, others are wanted more, close)
//! ```
//!
//! A rename of the folder is all that taking one needs: the mounts below it go with it. So a root lies below `roots/`
//! and is nobody's, or below a sandbox's folder and is that sandbox's, whenever the server dies; the next one removes
//! what is below `roots/`. Which roots are wanted is in [`shelf`].

mod shelf;

use super::{BoxError, Kernel, Shared};
use crate::model::{ByteSize, SandboxId};
use crate::runtime::disk::{DiskKind, make_private};
use crate::runtime::helper::prepare::{NewRoot, Prepare};
use crate::runtime::helper::wait_until_idle;
use crate::runtime::layout::SandboxFolder;
use crate::runtime::rootfs::{Boot, DiskNext, RootPlan, unmount_root};
use crate::runtime::uids::UidLease;
use crate::runtime::{DiskSource, StartFrom, StartRequest};
use shelf::{Shelf, Step};
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

/// A root that was taken is replaced a little later: making one would compete with the restore into it, and whoever is
/// low in priority and holds the kernel's lock of all mounts keeps everybody waiting.
const REFILL_DELAY: Duration = Duration::from_millis(40);
/// How long a moment without restores is waited for; where there is none, roots are made all the same.
const CALM_WAIT_MAX: Duration = Duration::from_millis(200);
/// How long nothing is made after that failed.
const REFILL_PAUSE: Duration = Duration::from_secs(5);
/// How often it is looked whether the dumps behind the ready roots still exist.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long roots of a dump are kept that nobody asks for, while there is another one.
const IDLE_KEPT: Duration = Duration::from_secs(600);

/// What a root is made of. Two sandboxes with the same recipe may have each other's roots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Recipe {
    /// The dump's disk image.
    disk: PathBuf,
    /// The dump's CRIU images.
    images: PathBuf,
    layers: Vec<String>,
    agent: String,
}

/// A root that is nobody's yet.
#[derive(Debug)]
pub(super) struct Root {
    folder: SandboxFolder,
    uids: UidLease,
}

/// The roots of one server.
#[derive(Debug)]
pub(super) struct Roots {
    shelf: Mutex<Shelf<Recipe, Root>>,
    changed: Notify,
    closing: watch::Sender<bool>,
    filler: Mutex<JoinSet<()>>,
}

impl Recipe {
    /// Of a request whose roots are worth making ahead: those of a dump that many creates restore.
    pub(super) fn of(request: &StartRequest) -> Option<Self> {
        match (&request.disk, &request.from) {
            (DiskSource::PooledCopyOf(disk), StartFrom::Dump { images, agent, .. }) => {
                Some(Self { disk: disk.clone(), images: images.clone(), layers: request.layers.clone(), agent: agent.clone() })
            }
            _ => None,
        }
    }
}

impl Roots {
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            shelf: Mutex::new(Shelf::new(capacity)),
            changed: Notify::new(),
            closing: watch::Sender::new(false),
            filler: Mutex::default(),
        }
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf<Recipe, Root>> {
        // No code panics while it holds the lock half-way through a change.
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits so long, or until the roots are closed.
    async fn pause(&self, time: Duration) {
        let mut closing = self.closing.subscribe();
        // Either way it is over.
        let _ = tokio::time::timeout(time, closing.wait_for(|is_closing| *is_closing)).await;
    }

    /// After a change that may give the filler something to do.
    fn changed<T>(&self, change: impl FnOnce(&mut Shelf<Recipe, Root>) -> T) -> T {
        let done = change(&mut self.shelf());
        self.changed.notify_one();
        done
    }
}

impl Kernel {
    /// Starts to make roots as they are wanted, until [`Kernel::empty_roots`].
    pub(super) fn keep_roots(&self) {
        if self.0.config.pool_roots == 0 || self.0.disks.kind() == DiskKind::Folder {
            return;
        }
        let filler = self.clone();
        let mut tasks = self.0.roots.filler.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.spawn(async move { filler.fill_roots().await });
    }

    /// Makes a ready root the sandbox's own; `None` when there is none, and what a failure left is removed with the
    /// sandbox's folder. More of the kind are made from now on.
    pub(super) async fn take_root(&self, request: &StartRequest) -> Option<UidLease> {
        let recipe = Recipe::of(request)?;
        let root = self.0.roots.changed(|shelf| shelf.take(&recipe, Instant::now()))?;
        let id = request.id;
        let renamed = self.blocking(move |shared| shared.name_root(root, id)).await;
        match renamed {
            Ok(uids) => Some(uids),
            Err(error) => {
                tracing::warn!(sandbox.id = %id, %error, "A root made ahead could not be used; making one for sandbox {id}");
                None
            }
        }
    }

    /// Makes roots for this request before the first of its kind comes.
    pub(super) fn expect_root(&self, request: &StartRequest) {
        if let Some(recipe) = Recipe::of(request) {
            self.0.roots.changed(|shelf| shelf.want(&recipe, Instant::now()));
        }
    }

    /// Ends the making, and removes what is ready.
    pub(super) async fn empty_roots(&self) {
        let ready = self.0.roots.changed(Shelf::close);
        self.0.roots.closing.send_replace(true);
        let mut tasks = std::mem::take(&mut *self.0.roots.filler.lock().unwrap_or_else(PoisonError::into_inner));
        while tasks.join_next().await.is_some() {}
        self.remove_roots(ready).await;
    }

    async fn fill_roots(&self) {
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            let step = self.0.roots.shelf().next();
            match step {
                Step::Closed => return,
                Step::Remove(roots) => {
                    self.remove_roots(roots).await;
                    continue;
                }
                Step::Make { kind, count } => {
                    self.0.roots.pause(REFILL_DELAY).await;
                    self.0.helpers.calm(CALM_WAIT_MAX).await;
                    self.make_roots(kind, count).await;
                    continue;
                }
                Step::Nothing => {}
            }
            tokio::select! {
                // Cancel-safe: a permit that is not taken stays.
                () = self.0.roots.changed.notified() => {}
                // Cancel-safe: a timer.
                _ = look.tick() => self.forget_unwanted().await,
            }
        }
    }

    async fn make_roots(&self, recipe: Recipe, count: u32) {
        let begun = std::time::Instant::now();
        if let Err(error) = self.blocking(|shared| shared.disks.require(ByteSize(0))).await {
            // The log has it already, and nothing is started meanwhile that would want them.
            tracing::debug!(%error, "No root file systems are made ahead of time");
            self.0.roots.shelf().put(&recipe, count, Vec::new());
            return self.0.roots.pause(REFILL_PAUSE).await;
        }
        let made = self.try_make_roots(&recipe, count).await;
        let roots = match made {
            Ok(roots) => roots,
            Err(error) => {
                tracing::warn!(error = &*error as &dyn std::error::Error, "Could not make root file systems ahead of time");
                self.0.roots.shelf().put(&recipe, count, Vec::new());
                self.forget_unwanted().await;
                return self.0.roots.pause(REFILL_PAUSE).await;
            }
        };
        let (surplus, ready) = {
            let mut shelf = self.0.roots.shelf();
            (shelf.put(&recipe, count, roots), shelf.ready())
        };
        tracing::debug!(count, ready, took_ms = begun.elapsed().as_millis(), "Made {count} root file systems ahead of time");
        self.remove_roots(surplus).await;
    }

    /// One helper makes them all. Of a batch that fails, nothing stays.
    async fn try_make_roots(&self, recipe: &Recipe, count: u32) -> Result<Vec<Root>, BoxError> {
        let layout = &self.0.layout;
        let mut roots = Vec::new();
        for _ in 0..count {
            let Ok(uids) = self.0.uids.lease() else { break };
            roots.push(Root { folder: layout.root(&uuid::Uuid::new_v4().simple().to_string()), uids });
        }
        let plan = |root: &Root| NewRoot {
            image: recipe.disk.clone(),
            images: recipe.images.clone(),
            plan: RootPlan {
                folder: root.folder.clone(),
                disk: DiskKind::Image,
                agent: layout.agent_layer(&recipe.agent),
                layers: recipe.layers.iter().map(|layer| layout.layer(layer)).collect(),
                uid_base: root.uids.base(),
                boot: Boot::Restore,
            },
        };
        let prepare = Prepare { place: layout.roots(), roots: roots.iter().map(plan).collect() };
        match self.0.helpers.call(&prepare).await {
            Ok(()) => Ok(roots),
            Err(error) => {
                self.remove_roots(roots).await;
                Err(error.into())
            }
        }
    }

    /// Roots of dumps that are gone, and of those that nobody asks for any more.
    async fn forget_unwanted(&self) {
        let recipes = self.0.roots.shelf().kinds();
        let gone = self.blocking(move |_| recipes.into_iter().filter(|recipe| !recipe.disk.exists()).collect::<Vec<_>>()).await;
        let roots = {
            let mut shelf = self.0.roots.shelf();
            let mut roots = shelf.forget_idle(Instant::now(), IDLE_KEPT);
            roots.extend(gone.iter().flat_map(|recipe| shelf.forget(recipe)));
            roots
        };
        self.remove_roots(roots).await;
    }

    async fn remove_roots(&self, roots: Vec<Root>) {
        if !roots.is_empty() {
            self.blocking(move |_| roots.into_iter().for_each(remove_or_tell)).await;
        }
    }
}

impl Shared {
    /// The sandbox's folder does not exist.
    fn name_root(&self, root: Root, id: SandboxId) -> io::Result<UidLease> {
        let renamed = std::fs::rename(root.folder.path(), self.layout.sandbox(id).path());
        match renamed {
            Ok(()) => Ok(root.uids),
            Err(error) => {
                remove_or_tell(root);
                Err(error)
            }
        }
    }

    /// Removes all roots that an earlier server made ahead, after its helper has ended.
    pub(super) fn sweep_roots(&self) -> Result<(), BoxError> {
        let place = self.layout.roots();
        make_private(place.path())?;
        wait_until_idle(&place, self.config.helper_time_max)?;
        for entry in std::fs::read_dir(place.path())?.flatten() {
            if entry.file_type()?.is_dir() {
                remove(&SandboxFolder::at(entry.path()))?;
            }
        }
        Ok(())
    }
}

fn remove(folder: &SandboxFolder) -> Result<(), BoxError> {
    unmount_root(folder, DiskNext::Removed)?;
    match std::fs::remove_dir_all(folder.path()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// The next server's sweep tries again.
fn remove_or_tell(root: Root) {
    if let Err(error) = remove(&root.folder) {
        tracing::error!(error = &*error as &dyn std::error::Error, "Root {} cannot be removed", root.folder.path().display());
    }
}
