//! Threads for work that may block: files, above all.
//!
//! Not tokio's pool, because that panics when it has no thread and the kernel gives it none, and a panic of pid 1 is
//! the end of the sandbox: a fork bomb inside and one question from the host would do. Here one thread is made at the
//! start and stays; more come while there is more to do than idle threads, if they can, and go when they are idle.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// Each transfer under way holds one; what comes on top waits.
const THREADS_MAX: usize = 128;
const IDLE_MAX: Duration = Duration::from_secs(10);

/// The work panicked, which ends the agent where panics abort.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the operation was lost")]
pub(crate) struct Lost;

type Job = Box<dyn FnOnce() + Send>;

struct Pool {
    state: Mutex<State>,
    more: Condvar,
}

struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

static POOL: Pool = Pool { state: Mutex::new(State { jobs: VecDeque::new(), threads: 0, idle: 0 }), more: Condvar::new() };

/// Makes the thread that stays. Called once, before anything is run.
pub(crate) fn start() -> io::Result<()> {
    let mut state = POOL.lock();
    state.spawn()
}

/// Runs `work` on a thread of the pool, with the runtime's context.
///
/// Dropping the future does not stop work that has begun.
pub(crate) async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Lost> {
    let (sender, receiver) = oneshot::channel();
    begin(move || drop(sender.send(work())));
    receiver.await.map_err(|_| Lost)
}

/// As [`run`], for work that answers by itself.
pub(crate) fn begin(work: impl FnOnce() + Send + 'static) {
    let runtime = Handle::current();
    let job = move || {
        let _context = runtime.enter();
        work();
    };
    let mut state = POOL.lock();
    state.jobs.push_back(Box::new(job));
    if state.idle < state.jobs.len() && state.threads < THREADS_MAX {
        // A thread that cannot be had now is no failure: those there are will come to the job.
        let _ = state.spawn();
    }
    drop(state);
    POOL.more.notify_one();
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn spawn(&mut self) -> io::Result<()> {
        thread::Builder::new().name("blocking".to_owned()).spawn(work)?;
        self.threads += 1;
        Ok(())
    }
}

/// What each thread does.
fn work() {
    let mut state = POOL.lock();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            // Whoever waits for the answer sees that it never comes.
            drop(catch_unwind(AssertUnwindSafe(job)));
            state = POOL.lock();
            continue;
        }
        state.idle += 1;
        let (woken, waited) = POOL.more.wait_timeout(state, IDLE_MAX).unwrap_or_else(PoisonError::into_inner);
        state = woken;
        state.idle -= 1;
        if waited.timed_out() && state.jobs.is_empty() && state.threads > 1 {
            state.threads -= 1;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_runtime<T>(test: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
    }

    #[test]
    fn work_that_waits_holds_no_other_up() {
        in_runtime(async {
            let (let_go, wait) = std::sync::mpsc::channel::<()>();
            let waiting = tokio::spawn(run(move || wait.recv()));
            tokio::task::yield_now().await;
            assert_eq!(run(|| 1).await.unwrap(), 1);
            let_go.send(()).unwrap();
            waiting.await.unwrap().unwrap().unwrap();
        });
    }

    #[test]
    fn all_of_more_work_than_threads_is_done() {
        in_runtime(async {
            let jobs: Vec<_> = (0..THREADS_MAX * 3)
                .map(|number| {
                    tokio::spawn(run(move || {
                        thread::sleep(Duration::from_millis(1));
                        number
                    }))
                })
                .collect();
            for (number, job) in jobs.into_iter().enumerate() {
                assert_eq!(job.await.unwrap().unwrap(), number);
            }
            assert!(POOL.lock().threads <= THREADS_MAX);
        });
    }

    #[test]
    fn a_panic_is_lost_work_and_no_lost_thread() {
        in_runtime(async {
            assert!(run(|| panic!("on purpose")).await.is_err());
            assert_eq!(run(|| 1).await.unwrap(), 1);
        });
    }
}
