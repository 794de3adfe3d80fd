//! The task that attends one process from its start until it is forgotten.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join;
use rustix::process::Signal;
use tokio::io::Interest;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

use super::exit::Exit;
use super::input::Input;
use super::output::{Chunk, Output, Source, Subscription, pump, pump_shared};
use super::spawn::{Spawned, Streams};
use super::table::Sweep;
use super::{Live, Process, Start};
use crate::memory;
use crate::state::Agent;
use crate::sys;
use crate::wire::LogLevel;

/// After a signal, for the output that is already in the pipes; a grandchild may hold them open for ever.
const DRAIN_AFTER_SIGNAL: Duration = Duration::from_millis(50);

type Pump = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Registers the process and sets its task going.
pub(super) fn attend(
    agent: &Arc<Agent>,
    spawned: Spawned,
    start: Start,
    exit: oneshot::Receiver<Exit>,
) -> io::Result<(Arc<Process>, Subscription)> {
    let pid = spawned.pid.as_raw_pid().cast_unsigned();
    let output = Arc::new(Output::default());
    let (input, pumps) = wire_up(agent, pid, spawned.streams, &output)?;
    let subscription = output.subscribe();
    let process = Arc::new(Process {
        pid,
        tag: start.tag,
        config: start.config,
        output,
        live: Mutex::new(Some(Arc::new(Live { input, pidfd: spawned.pidfd }))),
        signalled: Notify::new(),
    });
    agent.processes.insert(Arc::clone(&process));
    agent.log.write(LogLevel::Info, "process started", [("pid", pid.to_string()), ("cmd", process.config.cmd.clone())]);
    let [first, second] = pumps;
    let pumps = tokio::spawn(join(first, second));
    tokio::spawn(supervise(Arc::clone(agent), Arc::clone(&process), exit, pumps, start.deadline));
    Ok((process, subscription))
}

/// The agent's ends of pipes or PTY, as the process's input and the work of reading its output.
fn wire_up(agent: &Arc<Agent>, pid: u32, streams: Streams, output: &Arc<Output>) -> io::Result<(Input, [Pump; 2])> {
    match streams {
        Streams::Pipes { stdin, stdout, stderr } => {
            let input = match stdin {
                Some(stdin) => Input::pipe(stdin)?,
                None => Input::Null,
            };
            let pumps = [(stdout, Source::Stdout), (stderr, Source::Stderr)].map(|(fd, source)| -> Pump {
                let (output, log_chunk) = (Arc::clone(output), chunk_logger(agent, pid));
                Box::pin(async move { drop(pump(fd, source, output, log_chunk).await) })
            });
            Ok((input, pumps))
        }
        Streams::Pty(master) => {
            let master = Arc::new(sys::async_fd(master, Interest::READABLE | Interest::WRITABLE)?);
            let input = Input::pty(Arc::clone(&master));
            let (output, mut log_chunk) = (Arc::clone(output), chunk_logger(agent, pid));
            let pump: Pump = Box::pin(async move { drop(pump_shared(&master, Source::Pty, &output, &mut log_chunk).await) });
            Ok((input, [pump, Box::pin(std::future::ready(()))]))
        }
    }
}

fn chunk_logger(agent: &Arc<Agent>, pid: u32) -> impl FnMut(&Chunk) + Send + use<> {
    let agent = Arc::clone(agent);
    move |chunk| {
        let source = match chunk.source {
            Source::Stdout => "stdout",
            Source::Stderr => "stderr",
            Source::Pty => "pty",
        };
        agent.log.write_bytes(LogLevel::Info, &chunk.bytes, [("pid", pid.to_string()), ("source", source.to_owned())]);
    }
}

async fn supervise(
    agent: Arc<Agent>,
    process: Arc<Process>,
    exit: oneshot::Receiver<Exit>,
    pumps: JoinHandle<((), ())>,
    deadline: Option<Instant>,
) {
    let exit = exit_or_kill(&process, exit, deadline).await;
    drain(&process, pumps, deadline).await;
    process.retire();
    process.output.end(exit).await;
    memory::release_later();
    agent.log.write(LogLevel::Info, "process ended", [("pid", process.pid.to_string()), ("status", exit.status())]);
    if agent.processes.keep_ended(process) == Sweep::Begin {
        sweep(&agent).await;
    }
    memory::release_later();
}

/// Forgets ended processes as their time comes, until there is none left.
async fn sweep(agent: &Agent) {
    while let Some(next) = agent.processes.forget_expired(Instant::now()) {
        sleep_until(next).await;
    }
}

/// Waits for the exit; kills at the deadline.
async fn exit_or_kill(process: &Process, mut exit: oneshot::Receiver<Exit>, deadline: Option<Instant>) -> Exit {
    // Both arms are cancel-safe: a receiver by reference, and a timer.
    let exited = tokio::select! {
        exited = &mut exit => exited,
        () = expired(deadline) => {
            let _ = process.send_signal(Signal::KILL);
            exit.await
        }
    };
    // The reaper drops no sender; a lost one could only mean that the child was waited for elsewhere.
    exited.unwrap_or(Exit::Code(0))
}

/// Waits until the output is at its end, or shortly after a signal or the deadline. The pumps go on without us, so that
/// grandchildren neither block nor break on their inherited pipes.
async fn drain(process: &Process, mut pumps: JoinHandle<((), ())>, deadline: Option<Instant>) {
    let cut_short = async {
        // A signal that came before the exit has left its permit here.
        tokio::select! {
            () = process.signalled.notified() => {}
            () = expired(deadline) => {}
        }
        sleep(DRAIN_AFTER_SIGNAL).await;
    };
    tokio::select! {
        _ = &mut pumps => {}
        () = cut_short => {}
    }
}

async fn expired(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
