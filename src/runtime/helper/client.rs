//! The server's side of the helper: one process per operation.

use super::nursery::{Helper, HelperProcess, Nursery};
use super::{HelperStep, Operation};
use crate::sys::process::ChildEnd;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

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
    /// Of `program`, which may take `limit` for an operation, for the sandboxes of `data_dir`; `criu` is the one that is run
    /// most.
    pub(crate) fn new(program: &Path, criu: Option<&Path>, data_dir: &Path, limit: Duration) -> Self {
        Self { nursery: Nursery::new(program, criu, data_dir), limit, restores: AtomicUsize::new(0) }
    }

    /// Gets ready for the first operation.
    pub(crate) fn start(&self) {
        self.nursery.start();
    }

    /// Runs one operation, and waits for the end of its process. Dropping the future kills that, whatever it was doing.
    pub(crate) async fn call<O: Operation>(&self, operation: &O) -> Result<O::Answer, HelperError> {
        let within_limit = self.within_limit::<O, _>(async {
            let (answer, process) = converse(self.nursery.spawn(O::VERB).await?, operation).await?;
            process.ended().await.map_err(|source| HelperError::Run { verb: O::VERB, source })?;
            Ok(answer?)
        });
        within_limit.await
    }

    /// [`Helpers::call`], which [`Helpers::calm`] waits for. Somebody waits for what is restored: its process ends later.
    pub(crate) async fn restore<O: Operation>(&self, operation: &O) -> Result<O::Answer, HelperError> {
        let _at_work = AtRestore::begin(&self.restores);
        let within_limit = self.within_limit::<O, _>(async {
            let (answer, process) = converse(self.nursery.spawn(O::VERB).await?, operation).await?;
            tokio::spawn(see_off(process, self.limit));
            Ok(answer?)
        });
        within_limit.await
    }

    async fn within_limit<O: Operation, T>(&self, work: impl Future<Output = Result<T, HelperError>>) -> Result<T, HelperError> {
        let limit = self.limit;
        let output = tokio::time::timeout(limit, work).await;
        output.map_err(|_| HelperError::TimedOut { verb: O::VERB, limit })?
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

/// Has a helper of the operation's verb do it, until it has answered.
async fn converse<O: Operation>(helper: Helper, operation: &O) -> Result<(Result<O::Answer, HelperStep>, HelperProcess), HelperError> {
    let verb = O::VERB;
    let run = |source| HelperError::Run { verb, source };
    let Helper { process, mut stdin, stdout, mut stderr } = helper;
    let request = serde_json::to_vec(operation).map_err(|error| run(error.into()))?;
    // One that has ended already does not read; what it said instead is what counts.
    let _ = stdin.write_all(&request).await;
    drop(stdin);
    let mut said = Vec::new();
    BufReader::new(stdout).read_until(b'\n', &mut said).await.map_err(run)?;
    let answer: Result<Result<O::Answer, HelperStep>, _> = serde_json::from_slice(&said);
    match answer {
        Ok(answer) => Ok((answer, process)),
        Err(_) => {
            let mut complained = Vec::new();
            stderr.read_to_end(&mut complained).await.map_err(run)?;
            let end = process.ended().await.map_err(run)?;
            Err(HelperError::NoAnswer { verb, end: described(end), complaint: shortened(&complained) })
        }
    }
}

/// A helper that has answered has only itself to clean up. Whoever must not meet it waits for its lock.
async fn see_off(process: HelperProcess, limit: Duration) {
    // After that it is killed; its status interests nobody.
    let _ = tokio::time::timeout(limit, process.ended()).await;
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
