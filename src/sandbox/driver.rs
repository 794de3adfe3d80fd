//! The one task that owns a sandbox: takes requests, asks the queue, runs one verb at a time, publishes what became of
//! it. Verbs are methods of [`Driver`] in files of their own (start.rs, pause.rs, resume.rs, copy.rs, kill.rs).
//!
//! ```text
//!  requests ──> accept ──queue──> run(verb) ──> settle the waiters
//!                 ^                  │
//!                 └── serve_during ──┘   requests are accepted while a verb awaits the kernel
//! ```
//! Nothing here is dropped half-way: callers may vanish, the driver goes on. It ends when the sandbox is gone or when
//! the server closes; in the second case the sandbox runs on.

use super::activity::Activity;
use super::adjust::{Adjust, AdjustError};
use super::copy::CopySource;
use super::core::{Core, Handle, RunView, View};
use super::create::CreateError;
use super::error::UnknownSandbox;
use super::logs::LogReader;
use super::metrics::Sampler;
use super::network::NetworkError;
use super::overdue::Overdue;
use super::pause::{PauseError, PauseFailure};
use super::places::Place;
use super::queue::{Answer, Denied, Ended, Phase, Queue, Step, Ticket, Verb};
use super::resume::{ConnectError, Connected, ResumeAsk, ResumeFailure};
use super::start::Origin;
use super::timeout::{NewEnd, TimeoutError};
use super::volume_mounts::{VolumeChange, VolumeChangeError};
use crate::model::{EndReason, EventKind, Keep, NetworkPolicy, SandboxId, SandboxRecord, SandboxState};
use crate::runtime::{Exit, RuntimeError};
use crate::store::sandboxes;
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};

/// Requests that wait for a driver to take them; beyond that, senders wait.
const REQUESTS_MAX: usize = 64;

/// Where an answer goes; its receiver may be gone.
pub(super) type Reply<T> = oneshot::Sender<T>;

/// What a driver can be asked.
#[derive(Debug)]
pub(super) enum Request {
    Pause {
        keep: Keep,
        reply: Reply<Result<SandboxRecord, PauseError>>,
    },
    Resume {
        ask: ResumeAsk,
        reply: Reply<Result<Connected, ConnectError>>,
    },
    Copy {
        keep: Keep,
        reply: Reply<Result<CopySource, PauseError>>,
    },
    SetNetwork {
        policy: Box<NetworkPolicy>,
        reply: Reply<Result<(), NetworkError>>,
    },
    Adjust {
        adjust: Adjust,
        reply: Reply<Result<SandboxRecord, AdjustError>>,
    },
    Volumes {
        change: VolumeChange,
        reply: Reply<Result<SandboxRecord, VolumeChangeError>>,
    },
    ForgetMemory {
        reply: Reply<Result<SandboxRecord, AdjustError>>,
    },
    SetEnd {
        end: NewEnd,
        reply: Reply<Result<SandboxRecord, TimeoutError>>,
    },
    Kill {
        reason: EndReason,
        reply: Reply<()>,
    },
    /// The timers': its end may have come.
    Expired,
    /// The server stops: end after the verb under way.
    Close,
}

/// Who waits for the end of a verb.
#[derive(Debug)]
pub(super) enum Waiter {
    Create(Reply<Result<SandboxRecord, CreateError>>),
    Pause(Reply<Result<SandboxRecord, PauseError>>),
    Resume(ResumeAsk, Reply<Result<Connected, ConnectError>>),
    Copy(Keep, Reply<Result<CopySource, PauseError>>),
    Network(Box<NetworkPolicy>, Reply<Result<(), NetworkError>>),
    Kill(Reply<()>),
}

/// What exists only while a sandbox has processes and is open to requests.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) place: Place,
    pub(super) cut: watch::Sender<bool>,
    pub(super) sampler: Sampler,
    pub(super) log: Arc<LogReader>,
    pub(super) activity: Arc<Activity>,
}

/// The owner of one sandbox.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) core: Arc<Core>,
    pub(super) id: SandboxId,
    pub(super) record: SandboxRecord,
    pub(super) run: Option<Run>,
    pub(super) kill_reason: Option<EndReason>,
    pub(super) queue: Queue,
    pub(super) overdue: Overdue,
    waiters: BTreeMap<Ticket, Vec<Waiter>>,
    requests: mpsc::Receiver<Request>,
    view: watch::Sender<View>,
    closing: bool,
}

/// What the idle driver met.
enum Idle {
    Request(Request),
    Exited(Exit),
    Filled(Result<(), RuntimeError>),
    SampleDue,
}

/// What a caller is told when the driver ended without an answer: the server stops.
pub(super) async fn answered<T, E: From<UnknownSandbox>>(id: SandboxId, answer: oneshot::Receiver<Result<T, E>>) -> Result<T, E> {
    answer.await.unwrap_or_else(|_| Err(UnknownSandbox(id).into()))
}

impl Driver {
    /// A driver with its handle, which the caller registers before the driver runs.
    fn new(core: Arc<Core>, record: SandboxRecord, queue: Queue) -> (Self, Handle) {
        let (requests, inbox) = mpsc::channel(REQUESTS_MAX);
        let (view, seen) = watch::channel(View::new(&record, None));
        let driver = Self {
            id: record.id,
            core,
            record,
            run: None,
            kill_reason: None,
            queue,
            overdue: Overdue::default(),
            waiters: BTreeMap::new(),
            requests: inbox,
            view,
            closing: false,
        };
        (driver, Handle { requests, view: seen })
    }

    /// The driver of a new sandbox, with its handle in place before the row is written: who finds the row by its
    /// idempotency key finds the driver too.
    pub(super) fn of_new(core: &Arc<Core>, record: SandboxRecord) -> Self {
        let (driver, handle) = Self::new(Arc::clone(core), record, Queue::starting());
        core.add_handle(driver.id, handle);
        driver
    }

    /// Nothing came of it: the row was not written.
    pub(super) fn discard(self) {
        self.core.remove_handle(self.id);
    }

    /// Starts it, its row written. The reply comes when it runs or has failed.
    pub(super) fn spawn(mut self, origin: Origin, place: Place, reply: Reply<Result<SandboxRecord, CreateError>>) {
        let core = Arc::clone(&self.core);
        core.spawn(async move {
            if let Some(ticket) = self.queue.current() {
                self.wait_for(ticket, Waiter::Create(reply));
                let started = self.start(origin, place).await;
                self.event(EventKind::Create, &started);
                self.queue.ended(if started.is_ok() { Ended::Done } else { Ended::Failed });
                self.settle_create(ticket, started);
            }
            self.drive().await;
        });
    }

    /// Starts the driver of a paused sandbox that an earlier server left.
    pub(super) fn spawn_paused(core: &Arc<Core>, record: SandboxRecord) {
        let (driver, handle) = Self::new(Arc::clone(core), record, Queue::settled(Phase::Paused));
        core.add_handle(driver.id, handle);
        core.spawn(driver.drive());
    }

    /// Starts the driver of a running sandbox that was taken over.
    pub(super) async fn spawn_running(core: &Arc<Core>, record: SandboxRecord, place: Place) {
        let (mut driver, handle) = Self::new(Arc::clone(core), record, Queue::settled(Phase::Running));
        driver.open_run(place).await;
        core.add_handle(driver.id, handle);
        core.spawn(driver.drive());
    }

    async fn drive(mut self) {
        loop {
            for ticket in self.queue.take_revoked() {
                self.deny_all(ticket, Denied::Gone);
            }
            if self.closing {
                break;
            }
            match self.queue.next() {
                Some(Step::Run(ticket, verb)) => self.perform(ticket, verb).await,
                Some(Step::Moot(ticket, answer)) => self.settle_moot(ticket, answer).await,
                None if self.queue.phase() == Phase::Gone => break,
                None => self.idle().await,
            }
        }
        self.core.timers.clear(self.id);
        self.core.remove_handle(self.id);
    }

    async fn perform(&mut self, ticket: Ticket, verb: Verb) {
        match verb {
            // Only spawn_new starts a sandbox.
            Verb::Start => self.queue.ended(Ended::Failed),
            Verb::Pause(keep) => {
                let result = self.pause(keep).await;
                self.queue.ended(ended(&result));
                self.settle_pause(ticket, &result);
            }
            Verb::Resume => {
                let ask = self.ask_of(ticket);
                let result = self.resume(&ask).await;
                self.queue.ended(ended(&result));
                self.settle_resume(ticket, &result).await;
            }
            Verb::Copy => self.perform_copy(ticket).await,
            Verb::Network => self.perform_network(ticket).await,
            Verb::Kill => {
                self.kill().await;
                self.queue.ended(Ended::Done);
                self.deny_all(ticket, Denied::Gone);
            }
        }
    }

    /// The source is handed over first; a paused sandbox then stays as it is until the source is dropped.
    async fn perform_copy(&mut self, ticket: Ticket) {
        let id = self.id;
        let keep = self.waiters.get(&ticket).into_iter().flatten().find_map(|waiter| match waiter {
            Waiter::Copy(keep, _) => Some(*keep),
            Waiter::Create(_) | Waiter::Pause(_) | Waiter::Resume(..) | Waiter::Network(..) | Waiter::Kill(_) => None,
        });
        let (answer, still) = match self.copy(keep.unwrap_or(Keep::Memory)).await {
            Ok((source, still)) => (Ok(source), still),
            Err(failure) => (Err(failure.error(id)), None),
        };
        let how = ended(&answer);
        let mut answer = Some(answer);
        self.settle(ticket, |waiter| match (waiter, answer.take()) {
            (Waiter::Copy(_, reply), Some(answer)) => drop(reply.send(answer)),
            (other, _) => other.deny(id, Denied::Busy, SandboxState::Running),
        });
        if let Some(still) = still {
            let _dropped_is_the_signal = self.serve_during(still).await;
        }
        self.queue.ended(how);
    }

    async fn perform_network(&mut self, ticket: Ticket) {
        let Some(Waiter::Network(policy, reply)) = self.waiters.remove(&ticket).and_then(|mut waiters| waiters.pop()) else {
            return self.queue.ended(Ended::Failed);
        };
        let result = self.set_network(*policy).await;
        self.queue.ended(ended(&result));
        let _caller_may_be_gone = reply.send(result);
    }

    async fn idle(&mut self) {
        let met = {
            let (runtime, id, run) = (Arc::clone(&self.core.runtime), self.id, self.run.as_ref());
            let exited = async {
                match run {
                    Some(_) => runtime.exited(id).await,
                    None => std::future::pending().await,
                }
            };
            let filled = async {
                match run.and(self.record.snapshot) {
                    Some(_) => runtime.filled(id).await,
                    None => std::future::pending().await,
                }
            };
            let sample_due = async {
                match run {
                    Some(run) => tokio::time::sleep_until(run.sampler.due()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // Cancel-safe: a request is taken whole or not at all; an exit stays true and is met again; a sample
                // that is due stays due; what is filled stays so. A torn sandbox ends as well, so that comes first.
                biased;
                Some(request) = self.requests.recv() => Idle::Request(request),
                filled = filled => Idle::Filled(filled),
                exit = exited => Idle::Exited(exit),
                () = sample_due => Idle::SampleDue,
            }
        };
        match met {
            Idle::Request(request) => self.accept(request).await,
            Idle::Exited(exit) => self.take_exit(exit),
            Idle::Filled(Ok(())) => self.drop_used_dump(),
            Idle::Filled(Err(torn)) => self.restore_again(torn).await,
            Idle::SampleDue => self.sample().await,
        }
    }

    /// Runs one step of a verb while requests are accepted. The step runs to its end, even when a kill was accepted.
    pub(super) async fn serve_during<T>(&mut self, step: impl Future<Output = T>) -> T {
        let mut step = pin!(step);
        loop {
            tokio::select! {
                biased;
                done = &mut step => return done,
                // Cancel-safe: a request is taken whole or not at all.
                Some(request) = self.requests.recv() => self.accept(request).await,
            }
        }
    }

    /// [`Driver::serve_during`] for a step that may be dropped; `None` when a kill was accepted meanwhile.
    pub(super) async fn serve_until_killed<T>(&mut self, step: impl Future<Output = T>) -> Option<T> {
        let mut step = pin!(step);
        while !self.queue.is_killing() {
            tokio::select! {
                biased;
                done = &mut step => return Some(done),
                // Cancel-safe: a request is taken whole or not at all.
                Some(request) = self.requests.recv() => self.accept(request).await,
            }
        }
        None
    }

    /// Whether a verb is under way or waits.
    pub(super) fn is_busy(&self) -> bool {
        self.queue.is_busy()
    }

    /// Whether a kill was accepted: what can be left undone is.
    pub(super) fn is_killing(&self) -> bool {
        self.queue.is_killing()
    }

    async fn accept(&mut self, request: Request) {
        match request {
            Request::Pause { keep, reply } => self.ask(Verb::Pause(keep), Waiter::Pause(reply)).await,
            Request::Resume { ask, reply } => self.ask(Verb::Resume, Waiter::Resume(ask, reply)).await,
            Request::Copy { keep, reply } => self.ask(Verb::Copy, Waiter::Copy(keep, reply)).await,
            Request::SetNetwork { policy, reply } => self.ask(Verb::Network, Waiter::Network(policy, reply)).await,
            Request::Kill { reason, reply } => self.accept_kill(reason, Some(reply)).await,
            Request::SetEnd { end, reply } => {
                let result = self.set_end(end).await;
                self.event(EventKind::Timeout, &result);
                let _caller_may_be_gone = reply.send(result);
            }
            Request::Volumes { change, reply } => drop(reply.send(self.change_volumes(change).await)),
            Request::Adjust { adjust, reply } => drop(reply.send(self.adjust(adjust).await)),
            Request::ForgetMemory { reply } => drop(reply.send(self.forget_memory().await)),
            Request::Expired => self.expire().await,
            Request::Close => self.closing = true,
        }
    }

    async fn ask(&mut self, verb: Verb, waiter: Waiter) {
        match self.queue.ask(verb) {
            Answer::Wait(ticket) => self.wait_for(ticket, waiter),
            Answer::Already => self.answer_already(waiter).await,
            Answer::Denied(denied) => waiter.deny(self.id, denied, self.record.state),
        }
    }

    fn wait_for(&mut self, ticket: Ticket, waiter: Waiter) {
        self.waiters.entry(ticket).or_default().push(waiter);
    }

    /// It is gone for its users from here on, whatever verb is still under way.
    pub(super) async fn accept_kill(&mut self, reason: EndReason, reply: Option<Reply<()>>) {
        self.kill_reason.get_or_insert(reason);
        self.publish();
        if let Some(run) = &self.run {
            run.cut.send_replace(true);
        }
        match (self.queue.ask(Verb::Kill), reply) {
            (Answer::Wait(ticket), Some(reply)) => self.wait_for(ticket, Waiter::Kill(reply)),
            (Answer::Already | Answer::Denied(_), Some(reply)) => drop(reply.send(())),
            (Answer::Wait(_) | Answer::Already | Answer::Denied(_), None) => {}
        }
    }

    fn take_exit(&mut self, exit: Exit) {
        tracing::warn!(sandbox.id = %self.id, detail = exit.detail, "The agent of sandbox {} ended by itself", self.id);
        self.kill_reason.get_or_insert(EndReason::AgentDied { detail: exit.detail });
        self.publish();
        if let Some(run) = &self.run {
            run.cut.send_replace(true);
        }
        let _nobody_waits = self.queue.ask(Verb::Kill);
    }

    async fn restore_again(&mut self, torn: RuntimeError) {
        self.queue.fell_back();
        let ask = self.tear_down_torn(torn).await;
        let (reply, _nobody_waits) = oneshot::channel();
        self.ask(Verb::Resume, Waiter::Resume(ask, reply)).await;
    }

    /// What a verb that is so already answers: a resume of a running one extends its time.
    async fn answer_already(&mut self, waiter: Waiter) {
        match waiter {
            Waiter::Resume(ask, reply) => {
                let extended = self.set_end(NewEnd::AtLeast(ask.timeout)).await;
                self.event(EventKind::Connect, &extended);
                let answer = match extended {
                    Ok(record) => Ok(Connected::WasRunning(Box::new(record))),
                    Err(TimeoutError::Store(error)) => Err(ConnectError::Store(error)),
                    // It stopped running between the queue's answer and this: the caller asks again.
                    Err(TimeoutError::Unknown(_) | TimeoutError::NotRunning { .. } | TimeoutError::TooLong { .. }) => {
                        Err(UnknownSandbox(self.id).into())
                    }
                };
                let _caller_may_be_gone = reply.send(answer);
            }
            Waiter::Kill(reply) => drop(reply.send(())),
            Waiter::Create(_) | Waiter::Pause(_) | Waiter::Copy(..) | Waiter::Network(..) => {
                waiter.deny(self.id, Denied::Busy, self.record.state);
            }
        }
    }

    async fn settle_moot(&mut self, ticket: Ticket, answer: Answer) {
        for waiter in self.waiters.remove(&ticket).unwrap_or_default() {
            match answer {
                Answer::Already | Answer::Wait(_) => self.answer_already(waiter).await,
                Answer::Denied(denied) => waiter.deny(self.id, denied, self.record.state),
            }
        }
    }

    fn settle(&mut self, ticket: Ticket, answer: impl FnMut(Waiter)) {
        self.waiters.remove(&ticket).unwrap_or_default().into_iter().for_each(answer);
    }

    fn deny_all(&mut self, ticket: Ticket, denied: Denied) {
        let (id, state) = (self.id, self.record.state);
        self.settle(ticket, |waiter| waiter.deny(id, denied, state));
    }

    fn settle_create(&mut self, ticket: Ticket, result: Result<(), CreateError>) {
        let (record, mut result) = (self.record.clone(), Some(result));
        self.settle(ticket, |waiter| match (waiter, result.take()) {
            (Waiter::Create(reply), Some(result)) => drop(reply.send(result.map(|()| record.clone()))),
            (other, _) => other.deny(record.id, Denied::Gone, record.state),
        });
    }

    fn settle_pause(&mut self, ticket: Ticket, result: &Result<(), PauseFailure>) {
        if let Err(failure) = result {
            self.pause_failed(failure);
        }
        let told = result.as_ref().map_err(|failure| failure.error(self.id));
        self.event(EventKind::Pause, &told);
        let record = self.record.clone();
        self.settle(ticket, |waiter| match waiter {
            Waiter::Pause(reply) => {
                let answer = result.as_ref().map(|()| record.clone()).map_err(|failure| failure.error(record.id));
                let _caller_may_be_gone = reply.send(answer);
            }
            other => other.deny(record.id, Denied::Busy, record.state),
        });
    }

    async fn settle_resume(&mut self, ticket: Ticket, result: &Result<(), ResumeFailure>) {
        let told = result.as_ref().map_err(|failure| failure.error(self.id));
        self.event(EventKind::Resume, &told);
        let waiters = self.waiters.remove(&ticket).unwrap_or_default();
        let longest = waiters.iter().filter_map(|waiter| if let Waiter::Resume(ask, _) = waiter { Some(ask.timeout) } else { None }).max();
        if let (Ok(()), Some(longest)) = (result, longest) {
            // Who joined later may have asked for more.
            let _the_resume_itself_succeeded = self.set_end(NewEnd::AtLeast(longest)).await;
        }
        for waiter in waiters {
            match (waiter, result) {
                (Waiter::Resume(_, reply), Ok(())) => drop(reply.send(Ok(Connected::Resumed(Box::new(self.record.clone()))))),
                (Waiter::Resume(_, reply), Err(failure)) => drop(reply.send(Err(failure.error(self.id)))),
                (other, _) => other.deny(self.id, Denied::Busy, self.record.state),
            }
        }
    }

    /// What those who wait for a resume want, as far as they are known when it begins.
    fn ask_of(&self, ticket: Ticket) -> ResumeAsk {
        let asks = self.waiters.get(&ticket).into_iter().flatten().filter_map(|waiter| match waiter {
            Waiter::Resume(ask, _) => Some(*ask),
            Waiter::Create(_) | Waiter::Pause(_) | Waiter::Copy(..) | Waiter::Network(..) | Waiter::Kill(_) => None,
        });
        let default = ResumeAsk { timeout: self.record.spec.lifecycle.timeout, on_timeout: None, keep: Keep::Memory };
        asks.reduce(|one, two| ResumeAsk { timeout: one.timeout.max(two.timeout), on_timeout: one.on_timeout.or(two.on_timeout), ..one })
            .unwrap_or(default)
    }

    /// Writes the row; when this returns, the state survives us.
    pub(super) async fn write_row(&self) -> Result<(), crate::store::StoreError> {
        let record = self.record.clone();
        self.core.store.write(move |db| sandboxes::update(db, &record)).await
    }

    /// Tells the world where the sandbox stands. Whoever is being killed is gone.
    pub(super) fn publish(&self) {
        let mut record = self.record.clone();
        if self.kill_reason.is_some() && !record.state.is_final() {
            record.state = SandboxState::Killing;
        }
        let run = self.run.as_ref().map(|run| RunView {
            cut: run.cut.subscribe(),
            log: Arc::clone(&run.log),
            activity: Arc::clone(&run.activity),
        });
        self.view.send_replace(View::new(&record, run));
    }

    /// Opens it to requests: the record says running, its agent is initialised.
    pub(super) async fn open_run(&mut self, place: Place) {
        let log = LogReader::open(&self.core, &self.record).await;
        let activity = Arc::new(Activity::new(self.core.clock.clone()));
        let run = Run { place, cut: watch::channel(false).0, sampler: Sampler::new(), log: Arc::new(log), activity };
        let cut = run.cut.subscribe();
        self.core.spawn(super::logs::follow(Arc::clone(&self.core), Arc::clone(&run.log), cut));
        self.run = Some(run);
        self.publish();
        self.watch_end();
        self.sample().await;
    }

    /// Closes it to requests, cuts those inside, and takes the last sample and log lines. The place stays taken.
    pub(super) async fn close_run(&mut self) -> Option<Place> {
        self.sample().await;
        let run = self.run.take()?;
        self.core.timers.clear(self.id);
        self.publish();
        run.cut.send_replace(true);
        run.log.read_rest(&self.core).await;
        Some(run.place)
    }
}

fn ended<T, E>(result: &Result<T, E>) -> Ended {
    if result.is_ok() { Ended::Done } else { Ended::Failed }
}

impl Waiter {
    /// The answer of each verb to a denial.
    fn deny(self, id: SandboxId, denied: Denied, state: SandboxState) {
        let (gone, state) = (UnknownSandbox(id), denied.state(state));
        match (self, denied) {
            (Self::Kill(reply), _) => drop(reply.send(())),
            (Self::Create(reply), _) => drop(reply.send(Err(CreateError::Killed(id)))),
            (Self::Pause(reply), Denied::Gone) => drop(reply.send(Err(gone.into()))),
            (Self::Pause(reply), Denied::AlreadyPaused) => drop(reply.send(Err(PauseError::AlreadyPaused(id)))),
            (Self::Pause(reply), Denied::NotRunning | Denied::InTransition | Denied::Busy) => {
                drop(reply.send(Err(PauseError::InTransition { id, state })));
            }
            (Self::Copy(_, reply), Denied::Gone) => drop(reply.send(Err(gone.into()))),
            (Self::Copy(_, reply), Denied::AlreadyPaused | Denied::NotRunning | Denied::InTransition | Denied::Busy) => {
                drop(reply.send(Err(PauseError::InTransition { id, state })));
            }
            (Self::Network(_, reply), Denied::Gone) => drop(reply.send(Err(gone.into()))),
            (Self::Network(_, reply), Denied::AlreadyPaused | Denied::NotRunning | Denied::InTransition | Denied::Busy) => {
                drop(reply.send(Err(NetworkError::NotRunning { id, state })));
            }
            (Self::Resume(_, reply), Denied::Busy) => drop(reply.send(Err(ConnectError::InTransition { id, state }))),
            (Self::Resume(_, reply), Denied::Gone | Denied::AlreadyPaused | Denied::NotRunning | Denied::InTransition) => {
                drop(reply.send(Err(gone.into())));
            }
        }
    }
}
