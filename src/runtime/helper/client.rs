//! The server's side of the helper: one process per operation.

use super::{HelperStep, Operation};
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

/// What a helper may say on standard error that still helps.
const COMPLAINT_BYTES_MAX: usize = 2000;

/// Why an operation was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HelperError {
    /// The process did not start, or its pipes broke.
    #[error("the runtime helper {verb} could not be run")]
    Run {
        /// Which operation.
        verb: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was killed.
    #[error("the runtime helper {verb} took longer than {} s and was killed", limit.as_secs())]
    TimedOut {
        /// Which operation.
        verb: &'static str,
        /// The bound.
        limit: Duration,
    },
    /// It ended without an answer.
    #[error("the runtime helper {verb} ended with {status} and no answer: {complaint}")]
    NoAnswer {
        /// Which operation.
        verb: &'static str,
        /// How.
        status: std::process::ExitStatus,
        /// What it wrote to standard error.
        complaint: String,
    },
    /// It did the operation up to a step that failed.
    #[error(transparent)]
    Step(#[from] HelperStep),
}

/// Runs one operation in a process of its own. Dropping the future kills that process, whatever it was doing.
pub(crate) async fn call<O: Operation>(helper: &Path, limit: Duration, operation: &O) -> Result<O::Answer, HelperError> {
    call_on(spawn(helper, O::VERB)?, limit, operation).await
}

/// A helper that waits for its request. Dropping it kills it.
pub(crate) fn spawn(helper: &Path, verb: &'static str) -> Result<Child, HelperError> {
    Command::new(helper)
        .args(["runtime", verb])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| HelperError::Run { verb, source })
}

/// Has a helper of the operation's verb do it.
pub(crate) async fn call_on<O: Operation>(mut child: Child, limit: Duration, operation: &O) -> Result<O::Answer, HelperError> {
    let verb = O::VERB;
    let run = |source| HelperError::Run { verb, source };
    let request = serde_json::to_vec(operation).map_err(|error| run(error.into()))?;
    let mut stdin = child.stdin.take().expect("standard input was asked for as a pipe");
    let talk = async {
        stdin.write_all(&request).await?;
        drop(stdin);
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(limit, talk).await.map_err(|_| HelperError::TimedOut { verb, limit })?.map_err(run)?;
    let answer: Result<Result<O::Answer, HelperStep>, _> = serde_json::from_slice(&output.stdout);
    match answer {
        Ok(answer) => Ok(answer?),
        Err(_) => {
            let complaint = String::from_utf8_lossy(&output.stderr).trim().chars().take(COMPLAINT_BYTES_MAX).collect();
            Err(HelperError::NoAnswer { verb, status: output.status, complaint })
        }
    }
}
