//! Start and ready commands of a build: what its sandboxes find running (contract/e2b.md 5).

use super::core::Core;
use super::exec::{self, Agent, Command, Ended, ExecError, Printed, Until};
use crate::model::{BuildRecord, SandboxId};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// How long a process may take to start.
const START_MAX: Duration = Duration::from_secs(10);
/// Pause between two runs of the ready command.
const CHECK_EVERY: Duration = Duration::from_millis(500);
/// How long a start command may take until its ready command succeeds.
const READY_MAX: Duration = Duration::from_secs(600);

/// Why a build's commands did not lead to its ready state.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The agent did not run it.
    #[error("could not run '{command}'")]
    Run {
        /// The command.
        command: String,
        /// Why.
        #[source]
        source: ExecError,
    },
    /// It took too long to come up.
    #[error("'{command}' did not start within {START_MAX:?}")]
    Slow {
        /// The command.
        command: String,
    },
    /// The start command failed before the ready command succeeded.
    #[error("start command failed: {status}")]
    StartFailed {
        /// How it ended.
        status: String,
    },
    /// The ready command went on failing.
    #[error("ready command timed out after {READY_MAX:?}: '{command}'")]
    NeverReady {
        /// The ready command.
        command: String,
    },
}

/// Told what the commands do and print.
pub trait Witness: Send {
    /// The start command runs, or the ready command is asked for the first time.
    fn began(&mut self, _what: &str) {}
    /// A piece of the start command's output.
    fn start_printed(&mut self, _piece: Printed<'_>) {}
}

/// Nobody looks.
#[derive(Debug)]
pub(super) struct Nobody;

impl Witness for Nobody {}

/// Whether the build has anything to run after its start.
pub(super) fn has_any(build: &BuildRecord) -> bool {
    wanted(build.start_command.as_deref()).is_some() || wanted(build.ready_command.as_deref()).is_some()
}

fn wanted(command: Option<&str>) -> Option<&str> {
    command.filter(|command| !command.trim().is_empty())
}

/// Starts the start command and waits until the ready command succeeds. The agent is initialised; no connection of ours
/// is left.
pub(super) async fn run(
    core: &Core,
    id: SandboxId,
    build: &BuildRecord,
    token: Option<&str>,
    witness: &mut dyn Witness,
) -> Result<(), CommandError> {
    let none = BTreeMap::new();
    let agent = Agent { runtime: &core.runtime, id, token };
    let command = |script| Command { user: &build.user, cwd: &build.workdir, env: &none, script };
    let (start, ready) = (wanted(build.start_command.as_deref()), wanted(build.ready_command.as_deref()));
    let Some(ready) = ready else {
        let Some(start) = start else { return Ok(()) };
        witness.began(&format!("Running start command: {start}"));
        return started(agent, command(start)).await;
    };
    let Some(start) = start else {
        witness.began(&format!("Waiting for template to be ready: {ready}"));
        return until_ready(agent, command(ready)).await;
    };
    witness.began(&format!("Running start command: {start}"));
    witness.began(&format!("Waiting for template to be ready: {ready}"));
    let followed = follow(agent, command(start), witness);
    tokio::select! {
        biased;
        // Cancel-safe both: a program goes on when it is not followed any more.
        ready = after_start(until_ready(agent, command(ready))) => ready,
        failed = followed => Err(failed),
    }
}

/// The start command has the first word: most often it is there when it is asked for.
async fn after_start<T>(check: impl Future<Output = T>) -> T {
    tokio::time::sleep(Duration::from_millis(5)).await;
    check.await
}

/// Starts it, and no more.
async fn started(agent: Agent<'_>, command: Command<'_>) -> Result<(), CommandError> {
    let outcome = tokio::time::timeout(START_MAX, exec::run(agent, command, Until::Started, &mut |_| {})).await;
    outcome.map_err(|_| CommandError::Slow { command: command.script.to_owned() })?.map(drop).map_err(could_not(command))
}

/// Resolves only when it failed.
async fn follow(agent: Agent<'_>, command: Command<'_>, witness: &mut dyn Witness) -> CommandError {
    match exec::run(agent, command, Until::Ended, &mut |piece| witness.start_printed(piece)).await {
        Ok(Some(Ended { code, status })) if code != 0 => CommandError::StartFailed { status },
        // It did its work and left the rest to what it started.
        Ok(_) => std::future::pending().await,
        Err(source) => could_not(command)(source),
    }
}

async fn until_ready(agent: Agent<'_>, command: Command<'_>) -> Result<(), CommandError> {
    let deadline = Instant::now() + READY_MAX;
    loop {
        let mut unseen = |_: Printed<'_>| {};
        let check = exec::run(agent, command, Until::Ended, &mut unseen);
        let never = |_| CommandError::NeverReady { command: command.script.to_owned() };
        let ended = tokio::time::timeout_at(deadline, check).await.map_err(never)?.map_err(could_not(command))?;
        if ended.is_some_and(|ended| ended.code == 0) {
            return Ok(());
        }
        tokio::time::sleep(CHECK_EVERY).await;
    }
}

fn could_not(command: Command<'_>) -> impl FnOnce(ExecError) -> CommandError {
    let command = command.script.to_owned();
    move |source| CommandError::Run { command, source }
}
