//! The server's side of the helper: one process per operation.

use super::nursery::{Helper, Nursery};
use super::{HelperStep, Operation};
use crate::sys::process::ChildEnd;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// What a helper may say on standard error that still helps.
const COMPLAINT_BYTES_MAX: usize = 2000;
/// Between two looks whether a restore is at work.
const LOOK_EVERY: Duration = Duration::from_millis(5);

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
    #[error("the runtime helper {verb} ended with {end} and no answer: {complaint}")]
    NoAnswer {
        /// Which operation.
        verb: &'static str,
        /// How.
        end: String,
        /// What it wrote to standard error.
        complaint: String,
    },
    /// It did the operation up to a step that failed.
    #[error(transparent)]
    Step(#[from] HelperStep),
}

/// Runs operations, each in a process of its own.
#[derive(Debug)]
pub(crate) struct Helpers {
    nursery: Nursery,
    limit: Duration,
    /// At work.
    restores: AtomicUsize,
}

/// Counts a restore for as long as it is at work.
struct AtRestore<'a>(&'a AtomicUsize);

impl<'a> AtRestore<'a> {
    fn begin(restores: &'a AtomicUsize) -> Self {
        restores.fetch_add(1, Ordering::Relaxed);
        Self(restores)
    }
}

impl Drop for AtRestore<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Helpers {
    /// Of `program`, which may take `limit` for an operation.
    pub(crate) fn new(program: &Path, limit: Duration) -> Self {
        Self { nursery: Nursery::new(program), limit, restores: AtomicUsize::new(0) }
    }

    /// Gets ready for the first operation.
    pub(crate) fn start(&self) {
        self.nursery.start();
    }

    /// Runs one operation. Dropping the future kills the process, whatever it was doing.
    pub(crate) async fn call<O: Operation>(&self, operation: &O) -> Result<O::Answer, HelperError> {
        let helper = self.nursery.spawn(O::VERB).await?;
        let limit = self.limit;
        let output = tokio::time::timeout(limit, converse(helper, operation)).await;
        output.map_err(|_| HelperError::TimedOut { verb: O::VERB, limit })?
    }

    /// [`Helpers::call`], which [`Helpers::calm`] waits for.
    pub(crate) async fn restore<O: Operation>(&self, operation: &O) -> Result<O::Answer, HelperError> {
        let _at_work = AtRestore::begin(&self.restores);
        self.call(operation).await
    }

    /// Resolves when no restore is at work, at the latest after `wait_max`. Cancel-safe.
    pub(crate) async fn calm(&self, wait_max: Duration) {
        let deadline = tokio::time::Instant::now() + wait_max;
        while self.restores.load(Ordering::Relaxed) > 0 && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Nothing more is going to be asked for.
    pub(crate) fn close(&self) {
        self.nursery.close();
    }
}

/// Has a helper of the operation's verb do it.
async fn converse<O: Operation>(helper: Helper, operation: &O) -> Result<O::Answer, HelperError> {
    let verb = O::VERB;
    let run = |source| HelperError::Run { verb, source };
    let Helper { process, mut stdin, mut stdout, mut stderr } = helper;
    let request = serde_json::to_vec(operation).map_err(|error| run(error.into()))?;
    // One that has ended already does not read; what it said instead is what counts.
    let _ = stdin.write_all(&request).await;
    drop(stdin);
    let (mut said, mut complained) = (Vec::new(), Vec::new());
    tokio::try_join!(stdout.read_to_end(&mut said), stderr.read_to_end(&mut complained)).map_err(run)?;
    let end = process.ended().await.map_err(run)?;
    let answer: Result<Result<O::Answer, HelperStep>, _> = serde_json::from_slice(&said);
    match answer {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(HelperError::NoAnswer { verb, end: described(end), complaint: shortened(&complained) }),
    }
}

fn described(end: Option<ChildEnd>) -> String {
    match end {
        Some(ChildEnd::Exited(status)) => format!("exit status {status}"),
        Some(ChildEnd::Signaled(signal)) => format!("signal {signal}"),
        None => "an unknown status".to_owned(),
    }
}

fn shortened(complaint: &[u8]) -> String {
    String::from_utf8_lossy(complaint).trim().chars().take(COMPLAINT_BYTES_MAX).collect()
}
