//! Who has which slot. Bookkeeping only: it makes and removes nothing.
//!
//! ```text
//!  (free number) ──> making ──> ready <──> lent ──> recycling ──> ready, or removed: (free number)
//!  found from an earlier server ──> lent (adopted), or removed (swept)
//! ```

use super::services::{Services, View};
use super::slot::Slot;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

#[derive(Debug)]
pub(super) struct Pool {
    limit: u32,
    state: Mutex<State>,
    /// Told when there may be something to make, or nothing any more.
    changed: Notify,
    closing: watch::Sender<bool>,
    background: Mutex<JoinSet<()>>,
}

/// A slot in somebody's hands, and what it serves there.
#[derive(Debug)]
pub(super) struct Lent {
    pub(super) slot: Slot,
    pub(super) services: Services,
}

#[derive(Debug, Default)]
struct State {
    is_closed: bool,
    /// All numbers that are not free, in whatever stage.
    used: BTreeSet<u32>,
    ready: Vec<Slot>,
    lent: BTreeMap<u32, Lent>,
    found: BTreeSet<u32>,
    /// When one was last asked for.
    taken_at: Option<Instant>,
}

impl State {
    fn reserve(&mut self, limit: u32) -> Option<u32> {
        let number = (0..limit).find(|number| !self.used.contains(number))?;
        self.used.insert(number);
        Some(number)
    }
}

/// What [`Pool::take`] had.
#[derive(Debug)]
pub(super) enum Taken {
    /// A slot.
    Ready(Slot),
    /// The number of one that the caller has to make, or to [`Pool::forget`].
    Number(u32),
    /// Neither.
    None {
        /// How many there are.
        limit: u32,
    },
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while it holds one of these locks half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    pub(super) fn new(limit: u32, found: Vec<u32>) -> Self {
        let found: BTreeSet<u32> = found.into_iter().collect();
        let state = State { used: found.clone(), found, ..State::default() };
        Self {
            limit,
            state: Mutex::new(state),
            changed: Notify::new(),
            closing: watch::Sender::new(false),
            background: Mutex::new(JoinSet::new()),
        }
    }

    /// Runs something that [`Pool::close`] waits for.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut background = lock(&self.background);
        while background.try_join_next().is_some() {}
        background.spawn(work);
    }

    pub(super) fn take(&self) -> Taken {
        let mut state = lock(&self.state);
        state.taken_at = Some(Instant::now());
        let taken = match state.ready.pop() {
            Some(slot) => Taken::Ready(slot),
            None => state.reserve(self.limit).map_or(Taken::None { limit: self.limit }, Taken::Number),
        };
        self.changed.notify_one();
        taken
    }

    /// The number of a slot to be made ahead of time, once fewer than `wanted` are ready; `None` when the pool is closed.
    /// Cancel-safe.
    pub(super) async fn next_to_make(&self, wanted: u32) -> Option<u32> {
        loop {
            {
                let mut state = lock(&self.state);
                if state.is_closed {
                    return None;
                }
                if state.ready.len() < usize::try_from(wanted).unwrap_or(usize::MAX)
                    && let Some(number) = state.reserve(self.limit)
                {
                    return Some(number);
                }
            }
            self.changed.notified().await;
        }
    }

    /// Resolves when the pool is being closed. Cancel-safe.
    pub(super) async fn closing(&self) {
        let mut closing = self.closing.subscribe();
        // The sender lives as long as the pool: there is always an answer.
        drop(closing.wait_for(|is_closing| *is_closing).await);
    }

    pub(super) fn is_closed(&self) -> bool {
        lock(&self.state).is_closed
    }

    /// Resolves when none was asked for within `calm`, at the latest after `wait_max`, or when the pool is being closed.
    /// Cancel-safe.
    pub(super) async fn calm(&self, calm: Duration, wait_max: Duration) {
        let looked = async {
            while let Some(left) = self.until_calm(calm) {
                tokio::time::sleep(left).await;
            }
        };
        tokio::select! {
            // Cancel-safe: it waits on a value that stays.
            () = self.closing() => {}
            // Cancel-safe: timers.
            _calm_or_not = tokio::time::timeout(wait_max, looked) => {}
        }
    }

    fn until_calm(&self, calm: Duration) -> Option<Duration> {
        lock(&self.state).taken_at.and_then(|at| calm.checked_sub(at.elapsed()))
    }

    /// Whether a slot could be put among the ready ones: there are fewer than `ready_max`, and the pool is not closed.
    /// Otherwise the caller removes it.
    pub(super) fn put(&self, slot: Slot, ready_max: u32) -> bool {
        let mut state = lock(&self.state);
        let has_room = state.ready.len() < usize::try_from(ready_max).unwrap_or(usize::MAX);
        if has_room && !state.is_closed {
            state.ready.push(slot);
            return true;
        }
        false
    }

    pub(super) fn lend(&self, lent: Lent) {
        let mut state = lock(&self.state);
        state.found.remove(&lent.slot.number);
        state.lent.insert(lent.slot.number, lent);
    }

    /// A lent slot and where its services are told of a new policy.
    pub(super) fn lent(&self, number: u32) -> Option<(Slot, watch::Sender<View>)> {
        lock(&self.state).lent.get(&number).map(|lent| (lent.slot.clone(), lent.services.view()))
    }

    pub(super) fn take_back(&self, number: u32) -> Option<Lent> {
        lock(&self.state).lent.remove(&number)
    }

    /// The number is free again.
    pub(super) fn forget(&self, number: u32) {
        let mut state = lock(&self.state);
        state.used.remove(&number);
        state.found.remove(&number);
        self.changed.notify_one();
    }

    /// Slots of an earlier server that nobody adopted.
    pub(super) fn unclaimed(&self, keep: &[u32]) -> Vec<u32> {
        lock(&self.state).found.iter().copied().filter(|number| !keep.contains(number)).collect()
    }

    /// Waits for everything in the background, then hands out what is ready and what is lent; the latter stays in use.
    pub(super) async fn close(&self) -> (Vec<Slot>, Vec<Lent>) {
        lock(&self.state).is_closed = true;
        self.closing.send_replace(true);
        self.changed.notify_one();
        let mut background = std::mem::take(&mut *lock(&self.background));
        while background.join_next().await.is_some() {}
        let mut state = lock(&self.state);
        (std::mem::take(&mut state.ready), std::mem::take(&mut state.lent).into_values().collect())
    }

    /// Whether any slot is left.
    pub(super) fn is_in_use(&self) -> bool {
        !lock(&self.state).used.is_empty()
    }
}
