//! One program from its start to its end, or to its timeout, with all that it printed.
//!
//! It runs in a task of its own: a client that goes away changes nothing, and a client that waits is answered shortly
//! after the timeout at the latest.

use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::time::{Instant, sleep_until};

use super::WORKSPACE;
use super::error::{Code, HopxError};
use crate::blocking;
use crate::filesystem::ops::{self, Owner};
use crate::process::exit::Exit;
use crate::process::output::{Chunk, OutputEvent, Source, Subscription};
use crate::process::spawn::{ProcessConfig, Stdin, Terminal};
use crate::process::{self, Process, Start};
use crate::state::Agent;
use crate::users::{self, User};

/// What is kept of either stream; the rest is counted and dropped.
const OUTPUT_BYTES_MAX: usize = 8 << 20;
/// For the last output, and for the news of the end, after a timeout has killed everything.
const END_MAX: Duration = Duration::from_secs(2);
/// What shells say of a command that was ended by its timeout, and by a signal.
const EXIT_TIMED_OUT: i32 = 124;
const EXIT_SIGNAL_BASE: i32 = 128;

/// A program to run.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) config: ProcessConfig,
    /// What it finds on its standard input; without it the input is at its end.
    pub(super) input: Option<Vec<u8>>,
    pub(super) timeout: Duration,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Exited(Exit),
    TimedOut(Duration),
}

#[derive(Debug)]
pub(super) struct Finished {
    pub(super) pid: u32,
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) outcome: Outcome,
    pub(super) took: Duration,
}

impl Outcome {
    pub(super) fn exit_code(self) -> i32 {
        match self {
            Outcome::Exited(Exit::Code(code)) => code,
            Outcome::Exited(Exit::Signal { number, .. }) => EXIT_SIGNAL_BASE + number,
            Outcome::TimedOut(_) => EXIT_TIMED_OUT,
        }
    }

    pub(super) fn is_success(self) -> bool {
        self.exit_code() == 0
    }
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

/// A program that was started.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) process: Arc<Process>,
    /// Sees its output from the first byte on.
    pub(super) output: Subscription,
    begun: Instant,
    timeout: Duration,
}

/// Starts a program. Its deadline holds whether or not anybody collects its output.
pub(super) fn start(agent: &Arc<Agent>, program: Program) -> Result<Running, HopxError> {
    let user = user(agent)?;
    let (begun, timeout) = (Instant::now(), program.timeout);
    let deadline = begun.checked_add(timeout);
    let stdin = if program.input.is_some() { Stdin::Open } else { Stdin::Null };
    let start = Start { config: program.config, terminal: Terminal::Pipes { stdin }, tag: None, deadline };
    let (process, output) = process::start(agent, &agent.identity(), &user, start)?;
    if let Some(input) = program.input {
        tokio::spawn(feed(Arc::clone(&process), input));
    }
    tokio::spawn(end_group_at(Arc::clone(&process), deadline));
    Ok(Running { process, output, begun, timeout })
}

/// Writes the input and closes it. A program that does not read it all loses nothing but the rest.
async fn feed(process: Arc<Process>, input: Vec<u8>) {
    let Some(live) = process.live() else { return };
    drop(live.input.write_stdin(&input).await);
    drop(live.input.close().await);
}

/// At the deadline its children end with it: they would go on for nobody, and a repeated request would find them.
async fn end_group_at(process: Arc<Process>, deadline: Option<Instant>) {
    let Some(deadline) = deadline else { return };
    // Looks twice a second whether it has ended by itself, so that a long timeout keeps no record of a short program.
    while Instant::now() < deadline {
        sleep_until(deadline.min(Instant::now() + Duration::from_millis(500))).await;
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

/// Runs a program to its end, in a task of its own.
pub(super) async fn to_end(agent: &Arc<Agent>, program: Program) -> Result<Finished, HopxError> {
    let running = start(agent, program)?;
    let agent = Arc::clone(agent);
    let task = tokio::spawn(async move {
        let _active = agent.hopx.counters.execution();
        collect(running, &mut |_| {}).await
    });
    task.await.map_err(|error| HopxError::new(Code::Internal, error.to_string()))
}

/// Takes all output until the end; `sink` sees each chunk as it comes.
pub(super) async fn collect(running: Running, sink: &mut (dyn FnMut(&Chunk) + Send)) -> Finished {
    let Running { process, mut output, begun, timeout } = running;
    let end = begun + timeout + END_MAX;
    let (mut stdout, mut stderr) = (Stream::default(), Stream::default());
    let exit = loop {
        // Both arms are cancel-safe: an event that was not returned comes with the next call.
        let event = tokio::select! {
            event = output.next() => event,
            () = sleep_until(end) => None,
        };
        match event {
            Some(OutputEvent::Chunk(chunk)) => {
                sink(&chunk);
                match chunk.source {
                    Source::Stdout | Source::Pty => stdout.take(&chunk.bytes),
                    Source::Stderr => stderr.take(&chunk.bytes),
                }
            }
            Some(OutputEvent::End(exit)) => break Some(exit),
            None => break None,
        }
    };
    let took = begun.elapsed();
    let outcome = match exit {
        Some(exit) if took < timeout || exit.is_normal() => Outcome::Exited(exit),
        Some(_) | None => Outcome::TimedOut(timeout),
    };
    let mut stderr = stderr.text();
    if let Outcome::TimedOut(timeout) = outcome {
        stderr.push_str(&timeout_note(timeout));
    }
    Finished { pid: process.pid, stdout: stdout.text(), stderr, outcome, took }
}

/// Ends what a program that was cut short has printed.
pub(super) fn timeout_note(timeout: Duration) -> String {
    format!("timed out after {} s and was killed\n", timeout.as_secs_f64())
}

/// One stream, as far as it is kept.
#[derive(Debug, Default)]
struct Stream {
    kept: Vec<u8>,
    dropped: usize,
}

impl Stream {
    fn take(&mut self, bytes: &[u8]) {
        let room = OUTPUT_BYTES_MAX - self.kept.len();
        let kept = bytes.len().min(room);
        self.kept.extend_from_slice(&bytes[..kept]);
        self.dropped += bytes.len() - kept;
    }

    fn text(self) -> String {
        let mut text = String::from_utf8_lossy(&self.kept).into_owned();
        if self.dropped > 0 {
            text.push_str(&format!("\n[{} more bytes were printed; the limit is {OUTPUT_BYTES_MAX}]\n", self.dropped));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_keeps_its_beginning_and_says_what_is_missing() {
        let mut stream = Stream::default();
        stream.take(&vec![b'a'; OUTPUT_BYTES_MAX - 1]);
        stream.take(b"bcd");
        let text = stream.text();
        assert!(text.starts_with("aaa") && text[OUTPUT_BYTES_MAX - 1..].starts_with("b\n[2 more bytes"));
    }

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        assert_eq!(Outcome::Exited(Exit::Code(3)).exit_code(), 3);
        assert_eq!(Outcome::Exited(Exit::Signal { number: 9, core_dumped: false }).exit_code(), 137);
        assert_eq!(Outcome::TimedOut(Duration::from_secs(1)).exit_code(), 124);
    }
}
