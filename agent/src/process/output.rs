//! The way of output from a process's pipes to the clients that watch it.
//!
//! While clients are attached, each gets every chunk, and a slow one slows the process down, as a pipe does. While none
//! is, the process must not block: the pipes are drained into a backlog of at most [`BACKLOG_BYTES_MAX`], oldest bytes
//! dropped first, which the next client to attach gets before anything newer. So a client never sees output that
//! another client was handed before, and what was printed while the server was being restarted is not lost.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use super::exit::Exit;
use crate::sys;

/// Kept for a process that nobody watches.
const BACKLOG_BYTES_MAX: usize = 64 << 10;
/// Chunks on their way to one client. More waits in the process's pipe.
const CHUNKS_IN_FLIGHT_MAX: usize = 8;
/// Largest chunk of a pipe, and of a PTY.
const PIPE_CHUNK_BYTES_MAX: usize = 32 << 10;
const PTY_CHUNK_BYTES_MAX: usize = 16 << 10;

thread_local! {
    // One for all processes: an idle process holds no buffer.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; PIPE_CHUNK_BYTES_MAX].into_boxed_slice());
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Stdout,
    Stderr,
    Pty,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) source: Source,
    pub(crate) bytes: Bytes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum OutputEvent {
    Chunk(Chunk),
    End(Exit),
}

/// Where readers publish and clients subscribe; one per process.
#[derive(Debug, Default)]
pub(crate) struct Output {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    clients: Vec<(u64, mpsc::Sender<OutputEvent>)>,
    last_client_id: u64,
    backlog: VecDeque<Chunk>,
    backlog_bytes: usize,
    end: Option<Exit>,
}

/// One client's view: first what waited for it, then what comes. Dropping it detaches; chunks that it did not take go
/// back to the backlog if it was the last.
#[derive(Debug)]
pub(crate) struct Subscription {
    id: u64,
    output: Arc<Output>,
    waiting: VecDeque<OutputEvent>,
    receiver: mpsc::Receiver<OutputEvent>,
}

impl Output {
    pub(crate) fn subscribe(self: &Arc<Self>) -> Subscription {
        let (sender, receiver) = mpsc::channel(CHUNKS_IN_FLIGHT_MAX);
        let mut state = self.state();
        state.backlog_bytes = 0;
        let mut waiting: VecDeque<OutputEvent> = state.backlog.drain(..).map(OutputEvent::Chunk).collect();
        state.last_client_id += 1;
        let id = state.last_client_id;
        match state.end {
            Some(exit) => waiting.push_back(OutputEvent::End(exit)),
            None => state.clients.push((id, sender)),
        }
        Subscription { id, output: Arc::clone(self), waiting, receiver }
    }

    /// Hands the chunk to every client, waiting for the slowest; keeps it when there is none.
    pub(crate) async fn publish(&self, chunk: Chunk) {
        let clients = self.state().clients.clone();
        let mut delivered = false;
        for (_, client) in clients {
            delivered |= client.send(OutputEvent::Chunk(chunk.clone())).await.is_ok();
        }
        let mut state = self.state();
        if !delivered && state.end.is_none() {
            state.keep(chunk);
        }
    }

    /// Tells every client, and every later one, that this was all. Output of surviving grandchildren is dropped from now on.
    pub(crate) async fn end(&self, exit: Exit) {
        let clients = {
            let mut state = self.state();
            state.end = Some(exit);
            std::mem::take(&mut state.clients)
        };
        for (_, client) in clients {
            let _ = client.send(OutputEvent::End(exit)).await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn keep(&mut self, chunk: Chunk) {
        self.backlog_bytes += chunk.bytes.len();
        self.backlog.push_back(chunk);
        while self.backlog_bytes > BACKLOG_BYTES_MAX {
            let excess = self.backlog_bytes - BACKLOG_BYTES_MAX;
            let Some(oldest) = self.backlog.front_mut() else { break };
            let cut = excess.min(oldest.bytes.len());
            drop(oldest.bytes.split_to(cut));
            self.backlog_bytes -= cut;
            if oldest.bytes.is_empty() {
                self.backlog.pop_front();
            }
        }
    }
}

impl Subscription {
    /// None when the process's end has been taken already.
    ///
    /// Cancel-safe: an event that was not returned comes with the next call.
    pub(crate) async fn next(&mut self) -> Option<OutputEvent> {
        match self.waiting.pop_front() {
            Some(event) => Some(event),
            None => self.receiver.recv().await,
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.receiver.close();
        let mut untaken: Vec<OutputEvent> = self.waiting.drain(..).collect();
        while let Ok(event) = self.receiver.try_recv() {
            untaken.push(event);
        }
        let mut state = self.output.state();
        state.clients.retain(|(id, _)| *id != self.id);
        if !state.clients.is_empty() {
            return;
        }
        for event in untaken {
            if let OutputEvent::Chunk(chunk) = event {
                state.keep(chunk);
            }
        }
    }
}

/// Publishes everything that `fd` yields until its other end is closed everywhere.
pub(crate) async fn pump(fd: OwnedFd, source: Source, output: Arc<Output>, mut on_chunk: impl FnMut(&Chunk)) -> io::Result<()> {
    let fd = sys::async_fd(fd, Interest::READABLE)?;
    pump_shared(&fd, source, &output, &mut on_chunk).await
}

/// As [`pump`], for a PTY's master, which is also written to.
pub(crate) async fn pump_shared(
    fd: &AsyncFd<OwnedFd>,
    source: Source,
    output: &Output,
    on_chunk: &mut impl FnMut(&Chunk),
) -> io::Result<()> {
    while let Some(bytes) = read_chunk(fd, source).await? {
        let chunk = Chunk { source, bytes };
        on_chunk(&chunk);
        output.publish(chunk).await;
    }
    Ok(())
}

async fn read_chunk(fd: &AsyncFd<OwnedFd>, source: Source) -> io::Result<Option<Bytes>> {
    let read = fd.async_io(Interest::READABLE, |fd| SCRATCH.with_borrow_mut(|scratch| read_once(fd, source, scratch))).await;
    match read {
        Ok(bytes) if bytes.is_empty() => Ok(None),
        Ok(bytes) => Ok(Some(bytes)),
        // What a PTY's master says instead of an end of file.
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_once(fd: impl AsFd, source: Source, scratch: &mut [u8]) -> io::Result<Bytes> {
    let limit = match source {
        Source::Stdout | Source::Stderr => PIPE_CHUNK_BYTES_MAX,
        Source::Pty => PTY_CHUNK_BYTES_MAX,
    };
    let count = rustix::io::read(fd, &mut scratch[..limit])?;
    Ok(Bytes::copy_from_slice(&scratch[..count]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(text: &str) -> Chunk {
        Chunk { source: Source::Stdout, bytes: Bytes::copy_from_slice(text.as_bytes()) }
    }

    async fn text(subscription: &mut Subscription) -> String {
        match subscription.next().await {
            Some(OutputEvent::Chunk(chunk)) => String::from_utf8(chunk.bytes.to_vec()).unwrap(),
            other => format!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn output_that_nobody_saw_waits_for_the_next_client_only() {
        let output = Arc::new(Output::default());
        output.publish(chunk("unseen")).await;
        let mut first = output.subscribe();
        let mut second = output.subscribe();
        output.publish(chunk("new")).await;
        assert_eq!((text(&mut first).await, text(&mut first).await), ("unseen".into(), "new".into()));
        assert_eq!(text(&mut second).await, "new");
    }

    #[tokio::test]
    async fn what_a_vanished_client_did_not_take_goes_to_the_next_one() {
        let output = Arc::new(Output::default());
        let mut gone = output.subscribe();
        output.publish(chunk("taken")).await;
        output.publish(chunk("untaken")).await;
        assert_eq!(text(&mut gone).await, "taken");
        drop(gone);
        output.publish(chunk("later")).await;
        let mut next = output.subscribe();
        assert_eq!((text(&mut next).await, text(&mut next).await), ("untaken".into(), "later".into()));
    }

    #[tokio::test]
    async fn the_backlog_keeps_the_newest_bytes_within_its_bound() {
        let output = Arc::new(Output::default());
        output.publish(chunk(&"a".repeat(BACKLOG_BYTES_MAX - 1))).await;
        output.publish(chunk("bcd")).await;
        let mut client = output.subscribe();
        assert_eq!(text(&mut client).await.len(), BACKLOG_BYTES_MAX - 3);
        assert_eq!(text(&mut client).await, "bcd");
    }

    #[tokio::test]
    async fn an_end_reaches_clients_of_before_and_after() {
        let output = Arc::new(Output::default());
        let mut before = output.subscribe();
        output.publish(chunk("last")).await;
        output.end(Exit::Code(0)).await;
        output.publish(chunk("of a grandchild")).await;
        let mut after = output.subscribe();
        assert_eq!(text(&mut before).await, "last");
        assert_eq!(before.next().await, Some(OutputEvent::End(Exit::Code(0))));
        assert_eq!(before.next().await, None);
        assert_eq!(after.next().await, Some(OutputEvent::End(Exit::Code(0))));
        assert_eq!(after.next().await, None);
    }
}
