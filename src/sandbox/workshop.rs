//! A sandbox that a build step runs in: it has no row, belongs to nobody, and what it wrote is taken over by its maker.
//!
//! What a dying server leaves of it is swept like every sandbox without a row.

use super::agent::{self, AgentError};
use super::core::Core;
use super::error::chain;
use super::exec::{self, Agent, Command, Ended, ExecError, Printed, Until};
use super::start::{generic_introduction, random_secret};
use crate::model::{BuildRecord, NetworkPolicy, SandboxId};
use crate::runtime::{DiskSource, RuntimeError, StartFrom, StartRequest, WrittenFiles};
use std::path::Path;
use std::sync::Arc;
use tokio::sync::{OwnedRwLockReadGuard, oneshot};

/// Why a build's sandbox did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum WorkshopError {
    /// The kernel side failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The agent did not come up, or took no file.
    #[error("the agent of the build's sandbox failed")]
    Agent(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The server is stopping.
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl From<AgentError> for WorkshopError {
    fn from(error: AgentError) -> Self {
        Self::Agent(Box::new(error))
    }
}

/// What a build's sandbox is to be: the layers, user, environment and limits of the build as it is so far.
#[derive(Debug, Clone)]
pub struct WorkshopRequest {
    /// A build as far as it has come; its commands are not run.
    pub build: BuildRecord,
}

/// A running sandbox for build steps. Removed when dropped; better by [`Workshop::remove`], which waits.
#[derive(Debug)]
pub struct Workshop {
    core: Arc<Core>,
    id: SandboxId,
    /// A close waits until it is removed: nobody else would end its processes. `None` once it is.
    under_way: Option<OwnedRwLockReadGuard<()>>,
}

impl Workshop {
    /// Starts it and waits for its agent. What a vanished caller began is removed.
    pub(super) async fn open(core: &Arc<Core>, request: WorkshopRequest) -> Result<Self, WorkshopError> {
        let under_way = core.create_under_way().await;
        if core.is_closing() {
            return Err(WorkshopError::ShuttingDown);
        }
        let (reply, answer) = oneshot::channel();
        let task_core = Arc::clone(core);
        // In a task of its own, since a start that is dropped in the middle leaves things behind.
        core.spawn(async move {
            let workshop = Self { core: Arc::clone(&task_core), id: SandboxId::random(), under_way: Some(under_way) };
            let opened = workshop.start(request).await.map(|()| workshop);
            let _caller_may_be_gone = reply.send(opened);
        });
        answer.await.unwrap_or(Err(WorkshopError::ShuttingDown))
    }

    async fn start(&self, request: WorkshopRequest) -> Result<(), WorkshopError> {
        let (core, id, secret) = (&self.core, self.id, random_secret());
        let start = StartRequest {
            id,
            layers: request.build.layers.clone(),
            disk: DiskSource::Fresh,
            resources: request.build.resources,
            network: NetworkPolicy::default(),
            volumes: Vec::new(),
            from: StartFrom::Cold { control_secret: secret.clone() },
        };
        core.runtime.start(start).await?;
        let init = generic_introduction(core, id, &request.build);
        agent::init(&core.runtime, id, [&secret, &init.control_secret], &init, core.config.agent_ready_max).await?;
        Ok(())
    }

    /// Runs a command to its end.
    pub async fn run(&self, command: Command<'_>, on_print: &mut (dyn FnMut(Printed<'_>) + Send)) -> Result<Ended, ExecError> {
        let agent = Agent { runtime: &self.core.runtime, id: self.id, token: None };
        let run = exec::run(agent, command, Until::Ended, on_print);
        tokio::select! {
            biased;
            // Cancel-safe: both are only awaited once.
            ended = run => ended.map(|ended| ended.unwrap_or(Ended { code: -1, status: "unknown".to_owned() })),
            exit = self.core.runtime.exited(self.id) => Err(ExecError::Agent(format!("its sandbox ended: {}", exit.detail).into())),
        }
    }

    /// Puts a file of the host's into it, owned by root.
    pub async fn put(&self, host_file: &Path, path: &str) -> Result<(), WorkshopError> {
        Ok(agent::put_file(&self.core.runtime, self.id, host_file, path).await?)
    }

    /// Ends its processes and shows what was written since it started, until it is removed.
    pub async fn written(&mut self) -> Result<WrittenFiles, WorkshopError> {
        Ok(self.core.runtime.written(self.id).await?)
    }

    /// Removes it with all that was written in it.
    pub async fn remove(mut self) {
        let _until_removed = self.under_way.take();
        destroy(&self.core, self.id).await;
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        if let Some(until_removed) = self.under_way.take() {
            let (core, id) = (Arc::clone(&self.core), self.id);
            self.core.spawn(async move {
                destroy(&core, id).await;
                drop(until_removed);
            });
        }
    }
}

async fn destroy(core: &Core, id: SandboxId) {
    if let Err(error) = core.runtime.destroy(id).await {
        tracing::error!(sandbox.id = %id, error = chain(&error), "Could not remove the sandbox of a build step");
    }
}
