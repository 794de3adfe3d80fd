//! One program from its start to its end, or to its timeout.
//!
//! It runs in a task of its own: a client that goes away changes nothing, and a client that waits is answered shortly
//! after the timeout at the latest.

use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::WORKSPACE;
use super::error::{Code, HopxError};
use super::pieces::{self, Decoder, Ended, Finished, Outcome, Piece};
use crate::blocking;
use crate::filesystem::ops::{self, Owner};
use crate::memory;
use crate::process::output::{OutputEvent, Source, Subscription};
use crate::process::spawn::{ProcessConfig, Stdin, Terminal};
use crate::process::{self, Process, Start};
use crate::state::Agent;
use crate::users::{self, User};

/// For the last output, and for the news of the end, after a timeout has killed everything.
pub(super) const END_MAX: Duration = Duration::from_secs(2);
/// How often a program that may run for hours is asked whether it has ended.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A program to run.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) config: ProcessConfig,
    /// What it finds on its standard input; without it the input is at its end.
    pub(super) input: Option<Vec<u8>>,
    pub(super) timeout: Duration,
}

/// A program that was started.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) process: Arc<Process>,
    /// Its output from the first byte on. Who drops it lets it run.
    pub(super) pieces: mpsc::Receiver<Piece>,
}

/// The sandbox's user, as whom everything runs.
pub(super) fn user(agent: &Agent) -> Result<User, HopxError> {
    Ok(users::by_name(&agent.identity().default_user)?)
}

/// Makes the folder that HopX's clients expect to be there, if it is not. Templates need not know of it.
pub(super) async fn ensure_workspace(agent: &Agent) -> Result<(), HopxError> {
    let user = user(agent)?;
    let owner = Owner { uid: user.uid, gid: user.gid };
    let made = blocking::run(move || ops::ensure_dirs(WORKSPACE.as_ref(), owner)).await?;
    made.map(drop).map_err(|error| HopxError::new(Code::DirectoryNotFound, crate::files::describe(&error)).at(WORKSPACE))
}

/// The working directory of a request: what it asks for, else the workspace.
pub(super) async fn workdir(agent: &Agent, asked: Option<String>) -> Result<String, HopxError> {
    let workdir = asked.filter(|asked| !asked.is_empty()).unwrap_or_else(|| WORKSPACE.to_owned());
    if workdir.trim_end_matches('/') == WORKSPACE {
        ensure_workspace(agent).await?;
    }
    Ok(workdir)
}

/// Starts a program. Its deadline holds whether or not anybody takes its output.
pub(super) fn start(agent: &Arc<Agent>, program: Program) -> Result<Running, HopxError> {
    let user = user(agent)?;
    let (begun, timeout) = (Instant::now(), program.timeout);
    let deadline = begun + timeout;
    let stdin = if program.input.is_some() { Stdin::Open } else { Stdin::Null };
    let start = Start { config: program.config, terminal: Terminal::Pipes { stdin }, tag: None, deadline: Some(deadline) };
    let (process, output) = process::start(agent, &agent.identity(), &user, start)?;
    if let Some(input) = program.input {
        tokio::spawn(feed(Arc::clone(&process), input));
    }
    tokio::spawn(end_group_at(Arc::clone(&process), deadline));
    let (sender, pieces) = pieces::channel();
    let agent = Arc::clone(agent);
    tokio::spawn(async move {
        let _active = agent.hopx.counters.execution();
        let outcome = forward(output, begun, timeout, &sender).await;
        drop(sender.send(Piece::Ended(Ended { outcome, took: begun.elapsed() })).await);
        memory::release_later();
    });
    Ok(Running { process, pieces })
}

/// Runs a program to its end.
pub(super) async fn to_end(agent: &Arc<Agent>, program: Program) -> Result<(u32, Finished), HopxError> {
    let Running { process, pieces } = start(agent, program)?;
    let finished = pieces::gather(pieces).await.ok_or_else(|| HopxError::new(Code::Internal, "the program's end was lost"))?;
    Ok((process.pid, finished))
}

/// Writes the input and closes it. A program that does not read it all loses nothing but the rest.
async fn feed(process: Arc<Process>, input: Vec<u8>) {
    let Some(live) = process.live() else { return };
    drop(live.input.write_stdin(&input).await);
    drop(live.input.close().await);
}

/// At the deadline its children end with it: they would go on for nobody, and a repeated request would find them.
async fn end_group_at(process: Arc<Process>, deadline: Instant) {
    while Instant::now() < deadline {
        sleep_until(deadline.min(Instant::now() + LOOK_EVERY)).await;
        if !process.is_running() {
            return;
        }
    }
    kill_group(&process);
}

/// Ends a program with everything that it has started and that did not leave its group.
pub(super) fn kill_group(process: &Process) {
    // Every process is started as the leader of a session, so its pid names the group; while it runs, nobody else's.
    if process.is_running()
        && let Some(group) = i32::try_from(process.pid).ok().and_then(Pid::from_raw)
    {
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = process.send_signal(Signal::KILL);
}

/// Passes output on until the end, which it returns.
async fn forward(mut output: Subscription, begun: Instant, timeout: Duration, pieces: &mpsc::Sender<Piece>) -> Outcome {
    let end = begun + timeout + END_MAX;
    let (mut stdout, mut stderr) = (Decoder::default(), Decoder::default());
    let exit = loop {
        // Both arms are cancel-safe: an event that was not returned comes with the next call.
        let event = tokio::select! {
            event = output.next() => event,
            () = sleep_until(end) => None,
        };
        let piece = match event {
            Some(OutputEvent::Chunk(chunk)) => match chunk.source {
                Source::Stdout | Source::Pty => Piece::Stdout(stdout.text_of(&chunk.bytes)),
                Source::Stderr => Piece::Stderr(stderr.text_of(&chunk.bytes)),
            },
            Some(OutputEvent::End(exit)) => break Some(exit),
            None => break None,
        };
        // A client that is gone is no reason to stop.
        drop(pieces.send(piece).await);
    };
    let outcome = match exit {
        Some(exit) if begun.elapsed() < timeout || exit.is_normal() => Outcome::Exited(exit),
        Some(_) | None => Outcome::TimedOut(timeout),
    };
    let note = match outcome {
        Outcome::Exited(_) => String::new(),
        Outcome::TimedOut(timeout) => timeout_note(timeout),
    };
    for rest in [Piece::Stdout(stdout.rest()), Piece::Stderr(stderr.rest() + &note)] {
        drop(pieces.send(rest).await);
    }
    outcome
}

/// What stands at the end of the errors of something that was cut short.
pub(super) fn timeout_note(timeout: Duration) -> String {
    format!("timed out after {} s and was killed\n", timeout.as_secs_f64())
}
