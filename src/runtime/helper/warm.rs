//! Helpers that run before there is anything to do: the program is loaded and waits for its request, which spares a
//! restore the 2 ms that this takes. Each still does one operation and ends.

use super::Operation;
use super::client::{HelperError, call_on, spawn};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::process::Child;
use tokio::sync::Semaphore;

/// A helper that was taken is replaced a little later: until then the CPUs belong to what it does.
const REFILL_DELAY: Duration = Duration::from_millis(40);

/// Between two looks whether any is at work.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Starts helpers for one verb ahead, and bounds how many are at work at once.
#[derive(Debug, Clone)]
pub(crate) struct WarmHelpers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    program: PathBuf,
    limit: Duration,
    verb: &'static str,
    ready_max: usize,
    /// `None` once closed. They die with the server: their input ends.
    ready: Mutex<Option<Vec<Child>>>,
    at_work_max: u32,
    at_work: Semaphore,
}

impl WarmHelpers {
    /// Of `program`, which may take `limit` for an operation. `at_work_max` run at once; the rest wait in a row, so that the
    /// first are done when the last begin, and not all late together.
    pub(crate) fn new<O: Operation>(program: &Path, limit: Duration, ready_max: usize, at_work_max: u32) -> Self {
        let at_work_max = at_work_max.max(1);
        Self(Arc::new(Inner {
            program: program.to_owned(),
            limit,
            verb: O::VERB,
            ready_max,
            ready: Mutex::new(Some(Vec::new())),
            at_work_max,
            at_work: Semaphore::new(at_work_max as usize),
        }))
    }

    /// [`super::client::call`] by a helper that is ready, else by a new one.
    pub(crate) async fn call<O: Operation>(&self, operation: &O) -> Result<O::Answer, HelperError> {
        debug_assert_eq!(O::VERB, self.0.verb, "each verb has helpers of its own");
        // The semaphore is never closed; without a permit it would only be slower.
        let _one_of_few = self.0.at_work.acquire().await;
        let child = match self.take() {
            Some(child) => child,
            None => spawn(&self.0.program, self.0.verb)?,
        };
        self.refill_later();
        call_on(child, self.0.limit, operation).await
    }

    /// Resolves when none is at work, at the latest after `wait_max`. Cancel-safe.
    pub(crate) async fn idle(&self, wait_max: Duration) {
        // Looked at and not acquired: who waits for all permits keeps those out who want one.
        let deadline = tokio::time::Instant::now() + wait_max;
        while self.0.at_work.available_permits() < self.0.at_work_max as usize && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Starts as many as are to be ready.
    pub(crate) fn refill(&self) {
        let mut ready = self.0.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(ready) = ready.as_mut() else { return };
        while ready.len() < self.0.ready_max {
            match spawn(&self.0.program, self.0.verb) {
                Ok(child) => ready.push(child),
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "Could not start a runtime helper ahead of time");
                    return;
                }
            }
        }
    }

    /// Ends those that wait; none is started ahead any more.
    pub(crate) fn close(&self) {
        drop(self.0.ready.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    fn take(&self) -> Option<Child> {
        let mut ready = self.0.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let ready = ready.as_mut()?;
        std::iter::from_fn(|| ready.pop()).find_map(|mut child| match child.try_wait() {
            Ok(None) => Some(child),
            // Somebody ended it.
            Ok(Some(_)) | Err(_) => None,
        })
    }

    fn refill_later(&self) {
        if self.0.ready_max == 0 {
            return;
        }
        let helpers = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(REFILL_DELAY).await;
            helpers.refill();
        });
    }
}
