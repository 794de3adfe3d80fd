//! One context: a kernel, and the task that owns it. Cells wait in the task's queue, so one runs at a time.
//!
//! ```text
//!            first cell, or warm           cell                 done, failed
//! no kernel ────────────────────> waiting ───────> running cell ────────────> waiting
//!     ^                                               │ died, restart
//!     └───────────────────────────────────────────────┘ the cell fails as ContextRestarting
//! ```
//! A client that goes away leaves its cell interrupted, unless the sandbox was paused or copied meanwhile: that cuts
//! every connection, and the cell of a resumed sandbox goes on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until};

use super::kernel::{EnvChange, Event, Kernel, Randomness, Visibility};
use super::languages::Language;
use super::output::{Failure, Output};
use super::process::StartError;
use super::{Cell, Facts};
use crate::memory;
use crate::state::Agent;
use crate::wire::LogLevel;

/// Cells that may wait for one context.
const QUEUE_MAX: usize = 1024;
/// Outputs that a slow client may be behind; then the kernel's own buffers fill.
const OUTPUTS_MAX: usize = 1024;
/// Between a client's disconnect and the interrupt, if nobody waits for the kernel: a pause cuts connections some time
/// before it stops the processes, and by the first /init after it the cell is known to be one that goes on.
const GRACE: Duration = Duration::from_secs(3);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// An interrupted cell that goes on is interrupted again.
const INTERRUPT_EVERY: Duration = Duration::from_secs(5);

/// The rest of the agent's end of a context. Dropped, the context ends.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) facts: Arc<Facts>,
    cells: mpsc::Sender<Job>,
    orders: mpsc::UnboundedSender<Order>,
}

#[derive(Debug)]
struct Job {
    cell: Cell,
    outputs: mpsc::Sender<Output>,
}

#[derive(Debug)]
enum Order {
    /// Have a kernel waiting; answered when it does, or cannot be had.
    Warm(oneshot::Sender<()>),
    /// Forget all state; answered when a new kernel waits.
    Restart(oneshot::Sender<Result<(), StartError>>),
    /// The sandbox has become another, or has other variables.
    Introduce(Randomness),
}

#[derive(Debug, thiserror::Error)]
#[error("more than {QUEUE_MAX} cells wait for this context")]
pub(crate) struct QueueFull;

impl Handle {
    pub(super) fn start(agent: &Arc<Agent>, facts: Facts, language: Language) -> Handle {
        let facts = Arc::new(facts);
        let (cells, queue) = mpsc::channel(QUEUE_MAX);
        let (orders, ordered) = mpsc::unbounded_channel();
        let envs = agent.identity().envs.clone();
        let context = Context {
            agent: Arc::clone(agent),
            facts: Arc::clone(&facts),
            language,
            kernel: None,
            envs,
            queue,
            waiting: VecDeque::new(),
            ordered,
        };
        tokio::spawn(context.run());
        Handle { facts, cells, orders }
    }

    /// Queues a cell. Its outputs end with the cell.
    pub(super) fn execute(&self, cell: Cell) -> Result<mpsc::Receiver<Output>, QueueFull> {
        let (outputs, receiver) = mpsc::channel(OUTPUTS_MAX);
        self.cells.try_send(Job { cell, outputs }).map_err(|_| QueueFull)?;
        Ok(receiver)
    }

    /// Starts the kernel ahead of the first cell. The receiver may be dropped.
    pub(super) fn warm(&self) -> oneshot::Receiver<()> {
        let (done, receiver) = oneshot::channel();
        let _ = self.orders.send(Order::Warm(done));
        receiver
    }

    pub(super) async fn restart(&self) -> Result<(), StartError> {
        let (done, receiver) = oneshot::channel();
        let _ = self.orders.send(Order::Restart(done));
        // Removed while it restarts: there is nothing left to say.
        receiver.await.unwrap_or(Ok(()))
    }

    pub(super) fn introduce(&self, randomness: Randomness) {
        let _ = self.orders.send(Order::Introduce(randomness));
    }
}

#[derive(Debug)]
struct Context {
    agent: Arc<Agent>,
    facts: Arc<Facts>,
    language: Language,
    kernel: Option<Kernel>,
    /// The sandbox's variables that the kernel has.
    envs: BTreeMap<String, String>,
    queue: mpsc::Receiver<Job>,
    /// Taken from the queue while a cell ran.
    waiting: VecDeque<Job>,
    ordered: mpsc::UnboundedReceiver<Order>,
}

/// How a cell ended, for the context.
enum Ended {
    Done,
    /// The kernel is gone with it.
    Lost(String),
    /// The kernel was gone before it could get the cell, for this reason: no code of it has run.
    NotBegun(String),
    Restarted(oneshot::Sender<Result<(), StartError>>),
    Removed,
}

impl Context {
    /// Until the handle is dropped, and with it the kernel.
    async fn run(mut self) {
        loop {
            if let Some(job) = self.waiting.pop_front() {
                match self.serve(job).await {
                    true => continue,
                    false => return,
                }
            }
            // All arms are cancel-safe.
            tokio::select! {
                biased;
                order = self.ordered.recv() => match order {
                    Some(order) => self.obey(order).await,
                    None => return,
                },
                job = self.queue.recv() => match job {
                    Some(job) => if !self.serve(job).await { return },
                    None => return,
                },
                reason = death(&mut self.kernel) => self.lose(&reason),
            }
        }
    }

    async fn obey(&mut self, order: Order) {
        match order {
            Order::Warm(done) => {
                if let Err(error) = self.start_kernel().await {
                    self.warn("could not start a kernel ahead of its first cell", &error.to_string());
                }
                let _ = done.send(());
            }
            Order::Restart(done) => self.restart(done).await,
            Order::Introduce(randomness) => self.introduce(randomness).await,
        }
    }

    async fn restart(&mut self, done: oneshot::Sender<Result<(), StartError>>) {
        self.kernel = None;
        let _ = done.send(self.start_kernel().await);
    }

    async fn introduce(&mut self, randomness: Randomness) {
        let envs = self.agent.identity().envs.clone();
        let change = EnvChange::between(&self.envs, &envs);
        self.envs = envs;
        if let Some(kernel) = &mut self.kernel
            && let Err(error) = kernel.introduce(&change, randomness).await
        {
            self.warn("could not tell a kernel whose it is now", &error.to_string());
        }
    }

    fn lose(&mut self, reason: &str) {
        self.kernel = None;
        self.warn("a kernel ended between two cells", reason);
    }

    fn warn(&self, message: &str, reason: &str) {
        let fields = [("context", self.facts.id.clone()), ("language", self.facts.language.clone()), ("reason", reason.to_owned())];
        self.agent.log.write(LogLevel::Warn, message, fields);
    }

    async fn start_kernel(&mut self) -> Result<(), StartError> {
        if self.kernel.is_none() {
            self.envs = self.agent.identity().envs.clone();
            let mut kernel = Kernel::start(&self.agent, &self.language, &self.facts.cwd).await?;
            kernel.practise(&self.facts.language).await;
            self.kernel = Some(kernel);
        }
        Ok(())
    }

    /// Runs one cell to its end. False when the context has been removed.
    async fn serve(&mut self, job: Job) -> bool {
        if job.outputs.is_closed() {
            return true;
        }
        let Job { cell, outputs } = job;
        let mut ended = self.try_cell(&cell, &outputs).await;
        if matches!(ended, Ended::NotBegun(_)) {
            self.kernel = None;
            ended = self.try_cell(&cell, &outputs).await;
        }
        memory::release_later();
        match ended {
            Ended::Done => true,
            Ended::Removed => false,
            Ended::Lost(reason) | Ended::NotBegun(reason) => {
                self.kernel = None;
                let value = format!("Context was restarted, since its kernel ended: {reason}. What it held is lost");
                let _ = outputs.send(Output::Failed(Failure::new("ContextRestarting", value))).await;
                true
            }
            Ended::Restarted(done) => {
                let _ = outputs.send(Output::Failed(Failure::new("ContextRestarting", "Context was restarted"))).await;
                drop(outputs);
                self.restart(done).await;
                true
            }
        }
    }

    async fn try_cell(&mut self, cell: &Cell, outputs: &mpsc::Sender<Output>) -> Ended {
        // It may have died a moment ago, and nobody has looked.
        self.kernel.take_if(|kernel| kernel.is_dead());
        match self.start_kernel().await {
            Ok(()) => self.run_cell(cell, outputs).await,
            Err(error) => {
                let failure = Failure::new("KernelStartError", format!("the {} kernel could not be started: {error}", self.facts.language));
                let _ = outputs.send(Output::Failed(failure)).await;
                Ended::Done
            }
        }
    }

    async fn run_cell(&mut self, cell: &Cell, outputs: &mpsc::Sender<Output>) -> Ended {
        let set = EnvChange { set: cell.envs.clone(), unset: Vec::new() };
        // What the sandbox's user has changed since the cell before.
        let envs = self.agent.identity().envs.clone();
        let changed = EnvChange::between(&self.envs, &envs);
        self.envs = envs;
        let Some(kernel) = &mut self.kernel else { return Ended::Lost("it is not there".to_owned()) };
        let begun = async {
            if !changed.is_empty() {
                kernel.change_env(&self.facts.language, &changed).await?;
            }
            if let Some(cwd) = &cell.cwd {
                kernel.enter(&self.facts.language, cwd).await?;
            }
            if !set.is_empty() {
                kernel.change_env(&self.facts.language, &set).await?;
            }
            kernel.begin(&cell.code, Visibility::Shown).await
        };
        if let Err(error) = begun.await {
            return Ended::NotBegun(error.to_string());
        }
        // From here on the kernel may run it, heard of or not: a cell must not run twice.
        let ended = self.follow(cell, outputs).await;
        if matches!(ended, Ended::Done) && !set.is_empty() {
            self.take_back(cell).await;
        }
        ended
    }

    /// Gives the sandbox's own variables their values again and removes the others of the cell.
    async fn take_back(&mut self, cell: &Cell) {
        let (set, unset): (Vec<_>, Vec<_>) = cell.envs.keys().cloned().partition(|name| self.envs.contains_key(name));
        let set = set.into_iter().filter_map(|name| self.envs.get(&name).cloned().map(|value| (name, value))).collect();
        let Some(kernel) = &mut self.kernel else { return };
        if let Err(error) = kernel.change_env(&self.facts.language, &EnvChange { set, unset }).await {
            self.lose(&error.to_string());
        }
    }

    /// Passes outputs on until the cell ends. A client that is gone changes only that nobody gets them.
    async fn follow(&mut self, cell: &Cell, outputs: &mpsc::Sender<Output>) -> Ended {
        let generation = self.agent.identity().generation;
        let mut deadline = cell.time_max.map(|time| Instant::now() + time);
        let (mut interrupt_at, mut gone_at): (Option<Instant>, Option<Instant>) = (None, None);
        let mut is_urgent = false;
        let mut is_watched = true;
        loop {
            let Some(kernel) = &mut self.kernel else { return Ended::Lost("it is not there".to_owned()) };
            // Cancel-safe, all of them: queues, timers, and a kernel that keeps what it has read.
            tokio::select! {
                biased;
                order = self.ordered.recv() => match order {
                    None => return Ended::Removed,
                    Some(Order::Restart(done)) => return Ended::Restarted(done),
                    Some(Order::Warm(done)) => drop(done.send(())),
                    Some(Order::Introduce(randomness)) => self.introduce(randomness).await,
                },
                event = kernel.next() => match event {
                    Event::Output(output) => drop(outputs.send(output).await),
                    Event::Done => return Ended::Done,
                    Event::Died(reason) => return Ended::Lost(reason),
                    Event::DiedBefore(reason) => return Ended::NotBegun(reason),
                },
                job = self.queue.recv(), if self.waiting.len() < QUEUE_MAX => match job {
                    Some(job) => self.waiting.push_back(job),
                    None => return Ended::Removed,
                },
                () = outputs.closed(), if is_watched => {
                    is_watched = false;
                    (gone_at, interrupt_at) = (Some(Instant::now()), Some(Instant::now() + LOOK_EVERY));
                }
                () = until(deadline) => {
                    (deadline, is_urgent) = (None, true);
                    interrupt_at = Some(Instant::now());
                }
                () = until(interrupt_at) => {
                    let somebody_waits = self.waiting.iter().any(|job| !job.outputs.is_closed());
                    is_urgent |= somebody_waits || gone_at.is_some_and(|at| at.elapsed() >= GRACE);
                    // Connections are cut by a pause and by a fork; nobody has given up the cell then.
                    let was_stopped = !is_watched && self.agent.identity().generation != generation && cell.time_max.is_none();
                    interrupt_at = match (was_stopped, is_urgent) {
                        (true, _) => None,
                        (false, false) => Some(Instant::now() + LOOK_EVERY),
                        (false, true) => {
                            kernel.interrupt().await;
                            Some(Instant::now() + INTERRUPT_EVERY)
                        }
                    };
                }
            }
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Why the kernel ended, once it has; what it says between cells belongs to nobody.
async fn death(kernel: &mut Option<Kernel>) -> String {
    let Some(kernel) = kernel else { return std::future::pending().await };
    loop {
        match kernel.next().await {
            Event::Died(reason) | Event::DiedBefore(reason) => return reason,
            // One that says done again and again must not keep the agent's one thread.
            Event::Output(_) | Event::Done => sleep(Duration::from_millis(1)).await,
        }
    }
}
