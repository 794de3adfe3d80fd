//! Bodies between the async side and blocking threads, a bounded number of chunks at a time.

use std::io::{self, Read};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::sync::mpsc;

use crate::blocking::{self, Lost};
use crate::memory;

/// Chunks on their way: enough to keep both sides busy, and a quarter of a megabyte at most.
const CHUNKS_MAX: usize = 4;
/// How long an upload may send nothing. The SDKs set no deadline of their own on streamed uploads.
const UPLOAD_IDLE_MAX: Duration = Duration::from_secs(300);
/// How long the body of a refused request is read.
const REFUSED_MAX: Duration = Duration::from_secs(10);

/// What goes to the blocking side.
enum Piece {
    Data(Bytes),
    Failed(io::Error),
    /// Without it the end of the channel means that the request was cut off.
    End,
}

/// A request's body for a blocking reader.
#[derive(Debug)]
pub(crate) struct BodyReader {
    pieces: mpsc::Receiver<Piece>,
    current: Bytes,
    ended: bool,
}

/// Runs `work` on a blocking thread over the request's body.
///
/// A body that `work` does not want is read to its end all the same: the clients look for the answer only when
/// they have sent everything. Dropping the future makes the reader fail; `work` then ends by itself.
pub(crate) async fn consume<T: Send + 'static>(body: Body, work: impl FnOnce(BodyReader) -> T + Send + 'static) -> Result<T, Lost> {
    let (sender, pieces) = mpsc::channel(CHUNKS_MAX);
    let reader = BodyReader { pieces, current: Bytes::new(), ended: false };
    let (result, ()) = tokio::join!(blocking::run(move || work(reader)), feed(body, sender));
    memory::release_later();
    result
}

/// Reads the body of a request that is refused, for a while: who sends to a closed connection never sees the answer.
pub(crate) async fn read_away(body: Body) {
    let mut stream = body.into_data_stream();
    let rest = async { while let Some(Ok(_unwanted)) = stream.next().await {} };
    drop(tokio::time::timeout(REFUSED_MAX, rest).await);
}

async fn feed(body: Body, sender: mpsc::Sender<Piece>) {
    let mut stream = body.into_data_stream();
    loop {
        let piece = match tokio::time::timeout(UPLOAD_IDLE_MAX, stream.next()).await {
            Ok(Some(Ok(data))) => Piece::Data(data),
            Ok(Some(Err(error))) => Piece::Failed(io::Error::other(error)),
            Ok(None) => Piece::End,
            Err(_) => Piece::Failed(io::Error::new(io::ErrorKind::TimedOut, "nothing was sent for 300 s")),
        };
        let is_last = !matches!(piece, Piece::Data(_));
        // A worker that has its answer has dropped the receiver; what still comes is thrown away here.
        drop(sender.send(piece).await);
        if is_last {
            return;
        }
    }
}

impl Read for BodyReader {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Data(data)) => self.current = data,
                Some(Piece::End) => self.ended = true,
                Some(Piece::Failed(error)) => return Err(error),
                None => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the request was cut off")),
            }
        }
        let length = self.current.len().min(target.len());
        target[..length].copy_from_slice(&self.current.split_to(length));
        Ok(length)
    }
}

/// Where a blocking thread puts a response's body, chunk by chunk.
#[derive(Debug)]
pub(crate) struct BodyWriter {
    chunks: mpsc::Sender<io::Result<Bytes>>,
}

/// The client is gone: there is nothing left to do.
#[derive(Debug)]
pub(crate) struct Gone;

impl BodyWriter {
    /// Waits until there is room.
    pub(crate) fn send(&self, chunk: Bytes) -> Result<(), Gone> {
        self.chunks.blocking_send(Ok(chunk)).map_err(|_| Gone)
    }

    /// Cuts the response off, so that the client does not take it for whole.
    pub(crate) fn fail(&self, error: io::Error) {
        drop(self.chunks.blocking_send(Err(error)));
    }
}

/// A response body that `produce` writes on a blocking thread, which ends early when the client goes away.
pub(crate) fn produced(produce: impl FnOnce(BodyWriter) + Send + 'static) -> Body {
    let (chunks, receiver) = mpsc::channel(CHUNKS_MAX);
    blocking::begin(move || {
        produce(BodyWriter { chunks });
        memory::release_later();
    });
    Body::from_stream(futures_util::stream::unfold(
        receiver,
        |mut receiver| async move { receiver.recv().await.map(|chunk| (chunk, receiver)) },
    ))
}
