//! fork: one source, many copies side by side, each with an id, tokens, network and disk of its own.

use super::copy::CopySource;
use super::core::Core;
use super::create::{CreateError, create_copy};
use super::driver::{Request, answered};
use super::error::UnknownSandbox;
use super::pause::PauseError;
use crate::model::{EndReason, SandboxId, SandboxRecord, SandboxSpec};
use futures_util::{StreamExt, stream};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// Copies that are started at the same time; more would only queue for the same CPUs and make each slower.
const SIDE_BY_SIDE: usize = 8;

/// Why there are no copies. The source is as it was.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// The source cannot be copied in its present state, or its dump failed.
    #[error(transparent)]
    Source(#[from] PauseError),
    /// One copy could not be made.
    #[error(transparent)]
    Copy(#[from] CreateError),
}

/// Whether some copies may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// What succeeded stays.
    PerCopy,
    /// One failure removes all copies of the call.
    AllOrNone,
}

/// What a fork is asked to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fork {
    /// How many copies, at least one.
    pub count: u32,
    /// Time to live of each copy.
    pub timeout: Duration,
    /// Whether some may be missing.
    pub strictness: Strictness,
}

/// Each copy or why it is missing.
pub type Copies = Vec<Result<SandboxRecord, CreateError>>;

/// Copies a sandbox. Runs in a task of its own, so that all-or-none holds when the caller vanishes.
pub(super) async fn fork(core: &Arc<Core>, id: SandboxId, fork: Fork) -> Result<Copies, ForkError> {
    let (reply, answer) = oneshot::channel();
    let task_core = Arc::clone(core);
    core.spawn(async move {
        let result = fork_to_end(&task_core, id, fork).await;
        let _caller_may_be_gone = reply.send(result);
    });
    answer.await.unwrap_or_else(|_| Err(PauseError::from(UnknownSandbox(id)).into()))
}

async fn fork_to_end(core: &Arc<Core>, id: SandboxId, fork: Fork) -> Result<Copies, ForkError> {
    let source = Arc::new(source_of(core, id).await?);
    let spec = copy_spec(&source.spec, fork.timeout);
    let copies: Copies =
        stream::iter(0..fork.count).map(|_| create_copy(core, spec.clone(), Arc::clone(&source))).buffered(SIDE_BY_SIDE).collect().await;
    match fork.strictness {
        Strictness::PerCopy => Ok(copies),
        Strictness::AllOrNone => all_or_none(core, copies).await,
    }
}

/// Asks the driver for a source of copies.
pub(super) async fn source_of(core: &Core, id: SandboxId) -> Result<CopySource, PauseError> {
    let handle = core.live(id)?;
    let (reply, answer) = oneshot::channel();
    handle.requests.send(Request::Copy { reply }).await.map_err(|_| UnknownSandbox(id))?;
    answered(id, answer).await
}

/// What was set for the source holds for a copy, but for its time.
fn copy_spec(source: &SandboxSpec, timeout: Duration) -> SandboxSpec {
    let mut spec = source.clone();
    spec.lifecycle.timeout = timeout;
    spec
}

async fn all_or_none(core: &Core, copies: Copies) -> Result<Copies, ForkError> {
    if copies.iter().all(Result::is_ok) {
        return Ok(copies);
    }
    let (made, failed): (Vec<_>, Vec<_>) = copies.into_iter().partition(Result::is_ok);
    for copy in made.into_iter().flatten() {
        super::registry::kill(core, copy.id, EndReason::Killed).await;
    }
    match failed.into_iter().find_map(Result::err) {
        Some(first) => Err(first.into()),
        None => Ok(Vec::new()),
    }
}
