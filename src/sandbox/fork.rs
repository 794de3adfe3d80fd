//! fork: one source, many copies side by side, each with an id, tokens, network and disk of its own.

use super::copy::CopySource;
use super::core::Core;
use super::create::{CreateError, create_copy};
use super::driver::{Request, answered};
use super::error::UnknownSandbox;
use super::pause::PauseError;
use super::snapshot::{SnapshotInfo, store_source};
use crate::model::{EndReason, Keep, OnTimeout, SandboxId, SandboxRecord, SandboxSpec};
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

impl From<UnknownSandbox> for ForkError {
    fn from(unknown: UnknownSandbox) -> Self {
        Self::Source(unknown.into())
    }
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
    /// Replaces the source's when given.
    pub on_timeout: Option<OnTimeout>,
}

impl Fork {
    /// Copies that end as their source would.
    pub const fn of(count: u32, timeout: Duration, strictness: Strictness) -> Self {
        Self { count, timeout, strictness, on_timeout: None }
    }
}

/// Each copy or why it is missing.
pub type Copies = Vec<Result<SandboxRecord, CreateError>>;

/// Copies a sandbox. Runs in a task of its own, so that all-or-none holds when the caller vanishes.
pub(super) async fn fork(core: &Arc<Core>, id: SandboxId, fork: Fork) -> Result<Copies, ForkError> {
    let task_core = Arc::clone(core);
    to_its_end(core, id, async move {
        let source = Arc::new(source_of(&task_core, id, Keep::Memory).await?);
        copies_of(&task_core, &source, fork).await
    })
    .await
}

/// As [`fork`], and what the copies came from stays as a template, unless there is none of them, or it has no memory.
pub(super) async fn fork_and_store(core: &Arc<Core>, id: SandboxId, fork: Fork) -> Result<(Copies, Option<SnapshotInfo>), ForkError> {
    let task_core = Arc::clone(core);
    to_its_end(core, id, async move {
        let source = Arc::new(source_of(&task_core, id, Keep::Memory).await?);
        let copies = copies_of(&task_core, &source, fork).await?;
        let stored = match copies.iter().any(Result::is_ok) {
            true => store_source(&task_core, id, &source, None).await?,
            false => None,
        };
        Ok((copies, stored))
    })
    .await
}

/// Runs `work` in a task of its own: it goes on when the caller vanishes.
pub(super) async fn to_its_end<T: Send + 'static, E: From<UnknownSandbox> + Send + 'static>(
    core: &Core,
    id: SandboxId,
    work: impl Future<Output = Result<T, E>> + Send + 'static,
) -> Result<T, E> {
    let (reply, answer) = oneshot::channel();
    core.spawn(async move {
        let result = work.await;
        let _caller_may_be_gone = reply.send(result);
    });
    answered(id, answer).await
}

async fn copies_of(core: &Arc<Core>, source: &Arc<CopySource>, fork: Fork) -> Result<Copies, ForkError> {
    let spec = copy_spec(&source.spec, fork);
    let copies: Copies =
        stream::iter(0..fork.count).map(|_| create_copy(core, spec.clone(), Arc::clone(source))).buffered(SIDE_BY_SIDE).collect().await;
    match fork.strictness {
        Strictness::PerCopy => Ok(copies),
        Strictness::AllOrNone => all_or_none(core, copies).await,
    }
}

/// Asks the driver for a source of copies.
pub(super) async fn source_of(core: &Core, id: SandboxId, keep: Keep) -> Result<CopySource, PauseError> {
    let handle = core.live(id)?;
    let (reply, answer) = oneshot::channel();
    handle.requests.send(Request::Copy { keep, reply }).await.map_err(|_| UnknownSandbox(id))?;
    answered(id, answer).await
}

/// What was set for the source holds for a copy, but for its time and what happens then.
fn copy_spec(source: &SandboxSpec, fork: Fork) -> SandboxSpec {
    let mut spec = source.clone();
    spec.lifecycle.timeout = fork.timeout;
    spec.lifecycle.on_timeout = fork.on_timeout.unwrap_or(spec.lifecycle.on_timeout);
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
